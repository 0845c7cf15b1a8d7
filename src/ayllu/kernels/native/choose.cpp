// Which instruction set this processor runs.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace ayllu {

size_t scratch_bytes(int most_cols, int head_dim) {
  const size_t blocks = (static_cast<size_t>(most_cols) + BLOCK - 1) / BLOCK, dim = (static_cast<size_t>(head_dim) + 15) / 16 * 16;
  const size_t panels = 2 * blocks * (512 + 256), tiles = CHUNK_TILES * 2 * dim * 32;
  return (std::max({panels, tiles, static_cast<size_t>(most_cols) * 4 * LANES + 4096}) + 127) / 64 * 64;
}

const Kernels* choose_kernels(const char* wanted) {
  const auto is = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx512 && is("avx512")) return kernels_avx512();
  if (avx2 && is("avx2")) return kernels_avx2();
#endif
  return is("plain") ? kernels_plain() : nullptr;
}

}  // namespace ayllu
