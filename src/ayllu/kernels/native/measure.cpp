// What this machine can do at most: how fast memory is read, and how fast each kind of product runs in registers.
#include <chrono>
#include <cstring>
#include <algorithm>

#include "decoder.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace ayllu;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#define AVX2 __attribute__((target("avx2,fma")))

AVX512 uint64_t read_512(const uint8_t* p, size_t bytes) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    _mm_prefetch(reinterpret_cast<const char*>(p + i + 4096), _MM_HINT_T0);
    a = _mm512_xor_si512(a, _mm512_loadu_si512(p + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(p + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(p + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(p + i + 192));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d))));
}

// 12 independent sums, as the matrix kernels have them; `turns` products each. Named one by one, and shown to the
// compiler as changed: it would keep an array in memory, and compute a known sum beforehand.
#define AYLLU_ONE(s, product) s = product(s); asm volatile("" : "+v"(s));
#define AYLLU_PRODUCTS(attribute, name, type, zero, product)                                          \
  attribute double name(int64_t turns) {                                                              \
    type a = zero, b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;       \
    for (int64_t t = 0; t < turns; t++) {                                                             \
      AYLLU_ONE(a, product) AYLLU_ONE(b, product) AYLLU_ONE(c, product) AYLLU_ONE(d, product)         \
      AYLLU_ONE(e, product) AYLLU_ONE(f, product) AYLLU_ONE(g, product) AYLLU_ONE(h, product)         \
      AYLLU_ONE(i, product) AYLLU_ONE(j, product) AYLLU_ONE(k, product) AYLLU_ONE(l, product)         \
    }                                                                                                 \
    return static_cast<double>(turns);                                                                \
  }
#define AYLLU_F512(s) _mm512_fmadd_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.5f), s)
#define AYLLU_B512(s) _mm512_dpbf16_ps(s, (__m512bh)_mm512_set1_epi32(0x3F803F80), (__m512bh)_mm512_set1_epi32(0x3FC03FC0))
#define AYLLU_I512(s) _mm512_dpbusd_epi32(s, _mm512_set1_epi8(3), _mm512_set1_epi8(5))
#define AYLLU_F256(s) _mm256_fmadd_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(1.5f), s)
#define AYLLU_I256(s) _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(3), _mm256_set1_epi8(5)), _mm256_set1_epi16(1)))
AYLLU_PRODUCTS(AVX512, float_512, __m512, _mm512_setzero_ps(), AYLLU_F512)
AYLLU_PRODUCTS(AVX512, bf16_512, __m512, _mm512_setzero_ps(), AYLLU_B512)
AYLLU_PRODUCTS(AVX512, int8_512, __m512i, _mm512_setzero_si512(), AYLLU_I512)
AYLLU_PRODUCTS(AVX2, float_256, __m256, _mm256_setzero_ps(), AYLLU_F256)
AYLLU_PRODUCTS(AVX2, int8_256, __m256i, _mm256_setzero_si256(), AYLLU_I256)
#endif

uint64_t read_plain(const uint8_t* p, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t words[8];
    std::memcpy(words, p + i, 64);
    for (int k = 0; k < 8; k++) sums[k] ^= words[k];
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

double float_plain(int64_t turns) {
  float s[64] = {};
  for (int64_t t = 0; t < turns; t++)
    for (int i = 0; i < 64; i++) s[i] = s[i] * 0.5f + 1.5f;
  double total = 0;
  for (float x : s) total += x;
  return total;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) double ayllu_measure(const char* what, int32_t threads, int64_t bytes, double seconds) {
  const Kernels* kernels = choose_kernels(nullptr);
  const bool wide = std::strcmp(kernels->name, "avx512") == 0, middle = std::strcmp(kernels->name, "avx2") == 0;
  Pool pool(threads);
  volatile uint64_t seen = 0;
  volatile double sum = 0;
  double best = 0;
  if (std::strcmp(what, "read") == 0) {
    const size_t size = static_cast<size_t>(bytes);
    uint8_t* data = static_cast<uint8_t*>(map_memory(size));
    if (!data) return 0;
    pool.run([&](int thread) {
      const size_t first = size / 4096 * static_cast<size_t>(thread) / static_cast<size_t>(pool.threads()) * 4096, last = size / 4096 * static_cast<size_t>(thread + 1) / static_cast<size_t>(pool.threads()) * 4096;
      std::memset(data + first, 1, last - first);
    });
    const double end = now() + seconds;
    do {
      const double start = now();
      pool.run([&](int thread) {
        const size_t first = size / 4096 * static_cast<size_t>(thread) / static_cast<size_t>(pool.threads()) * 4096, last = size / 4096 * static_cast<size_t>(thread + 1) / static_cast<size_t>(pool.threads()) * 4096;
#if defined(__x86_64__)
        if (wide) {
          seen = seen ^ read_512(data + first, last - first);
          return;
        }
#endif
        seen = seen ^ read_plain(data + first, last - first);
      });
      best = std::max(best, static_cast<double>(size) / (now() - start));
    } while (now() < end);
    unmap_memory(data, size);
    return best;
  }
  const int64_t turns = 200000;
  double (*work)(int64_t) = float_plain;
  double per_turn = 64 * 2;
#if defined(__x86_64__)
  const bool int8 = std::strcmp(what, "int8") == 0, bf16 = std::strcmp(what, "bfloat16") == 0;
  if (wide) {
    work = int8 ? int8_512 : bf16 ? bf16_512 : float_512;
    per_turn = 12.0 * 2 * (int8 ? 64 : bf16 ? 32 : 16);
  } else if (middle) {
    work = int8 ? int8_256 : float_256;
    per_turn = 12.0 * 2 * (int8 ? 32 : 8);
  }
#endif
  const double end = now() + seconds;
  do {
    const double start = now();
    pool.run([&](int) { sum = sum + work(turns); });
    best = std::max(best, per_turn * static_cast<double>(turns) * pool.threads() / (now() - start));
  } while (now() < end);
  return best;
}
