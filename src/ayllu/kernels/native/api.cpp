// The plain C interface that ayllu.kernels.native.library binds. No exception passes it: functions that can
// fail return 0 for success, and a code otherwise.
#include <algorithm>
#include <cstring>
#include <new>

#include "decoder.h"
#include "pack.h"

using namespace ayllu;

#if defined(_WIN32)
#define AYLLU_EXPORT extern "C" __declspec(dllexport)
#else
#define AYLLU_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Failure : int32_t { DONE = 0, NO_MEMORY = 1, NOT_HERE = 2, FAILED = 3 };

template <class Work> int32_t guarded(Work&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (...) {
    return FAILED;
  }
}

Matrix matrix_at(int32_t format, int32_t rows, int32_t cols, const void* data) {
  Matrix w = shape_matrix(format, rows, cols);
  w.data = static_cast<const uint8_t*>(data);
  return w;
}

}  // namespace

struct PackJob {
  int32_t format, rows, cols, reserved;
  const uint8_t* source;
  int64_t stride;  // bytes from row to row
  uint8_t* packed;
};

AYLLU_EXPORT int32_t ayllu_interface_version() { return 1; }

// The name of the kernels that `wanted` (null: the best) means on this processor; null if they do not run here.
AYLLU_EXPORT const char* ayllu_kernels_name(const char* wanted) {
  const Kernels* kernels = choose_kernels(wanted);
  return kernels ? kernels->name : nullptr;
}

AYLLU_EXPORT void* ayllu_allocate(int64_t bytes) { return map_memory(static_cast<size_t>(bytes)); }
AYLLU_EXPORT void ayllu_free(void* at, int64_t bytes) { unmap_memory(at, static_cast<size_t>(bytes)); }

AYLLU_EXPORT int64_t ayllu_packed_bytes(int32_t format, int32_t rows, int32_t cols) {
  const Matrix m = shape_matrix(format, rows, cols);
  return static_cast<int64_t>(m.panel_bytes) * m.panels;
}

AYLLU_EXPORT int64_t ayllu_source_row_bytes(int32_t format, int32_t cols) {
  return fits_source(format, cols) ? static_cast<int64_t>(source_row_bytes(format, cols)) : -1;
}

AYLLU_EXPORT int32_t ayllu_pack(const PackJob* jobs, int32_t count, int32_t threads) {
  for (int i = 0; i < count; i++) {
    const PackJob& job = jobs[i];
    if (job.format < 0 || job.format >= FORMAT_COUNT || job.rows < 0 || job.cols < 0 || !fits_source(job.format, job.cols)) return FAILED;
    if (job.rows > 0 && job.stride < static_cast<int64_t>(source_row_bytes(job.format, job.cols))) return FAILED;
  }
  return guarded([&] {
    Pool pool(threads);
    pool.run([&](int thread) {
      constexpr int together = 4;  // panels of a task
      int tasks = 0;
      for (int i = 0; i < count; i++) tasks += (shape_matrix(jobs[i].format, jobs[i].rows, jobs[i].cols).panels + together - 1) / together;
      pool.share(thread, tasks, [&](int task) {
        for (int i = 0; i < count; i++) {
          const PackJob& job = jobs[i];
          const Matrix m = shape_matrix(job.format, job.rows, job.cols);
          const int own = (m.panels + together - 1) / together;
          if (task < own) {
            for (int panel = together * task; panel < std::min(m.panels, together * (task + 1)); panel++)
              pack_panel(m, job.source, static_cast<size_t>(job.stride), panel, job.packed + static_cast<size_t>(panel) * m.panel_bytes);
            return;
          }
          task -= own;
        }
      });
    });
    return DONE;
  });
}

// Single kernels, for tests: x [count][cols] -> out [count][rows].
namespace {

// Inputs as the decoder makes them: strips when there are many quantised rows.
Inputs test_inputs(const Kernels& kernels, int format, const float* x, int count, int cols, std::vector<uint8_t>& memory) {
  const InputKind kind = input_kind(format);
  if (kind == InputKind::quantised && count > FEW_ROWS) {
    const int strips = (count + STRIP - 1) / STRIP;
    memory.resize(strip_stride(cols) * static_cast<size_t>(strips));
    for (int strip = 0; strip < strips; strip++)
      kernels.make_strip(x + static_cast<size_t>(strip * STRIP) * static_cast<size_t>(cols), static_cast<size_t>(cols), std::min(STRIP, count - strip * STRIP),
                         cols, memory.data() + strip_stride(cols) * static_cast<size_t>(strip));
    return {memory.data(), strip_stride(cols), true};
  }
  const size_t stride = input_stride(kind, cols);
  memory.resize(stride * static_cast<size_t>(count) + 64);
  kernels.make_inputs(kind, x, static_cast<size_t>(cols), count, cols, memory.data(), stride, 0, (cols + BLOCK - 1) / BLOCK);
  return {memory.data(), stride, false};
}

}  // namespace

AYLLU_EXPORT int32_t ayllu_linear(const char* isa, int32_t format, int32_t rows, int32_t cols, const void* packed, const float* x, int32_t count, float* out) {
  return guarded([&]() -> int32_t {
    const Kernels* kernels = choose_kernels(isa);
    if (!kernels) return NOT_HERE;
    if (count == 0) return DONE;
    const Matrix w = matrix_at(format, rows, cols, packed);
    std::vector<uint8_t> memory, scratch(scratch_bytes(cols, 64));
    const Inputs inputs = test_inputs(*kernels, format, x, count, cols, memory);
    kernels->linear(w, 0, w.panels, inputs, count, {out, static_cast<size_t>(rows), Write::set}, scratch.data());
    return DONE;
  });
}

AYLLU_EXPORT int32_t ayllu_linear_swiglu(const char* isa, int32_t format, int32_t rows, int32_t cols, const void* gate, const void* up, const float* x, int32_t count, float* out) {
  return guarded([&]() -> int32_t {
    const Kernels* kernels = choose_kernels(isa);
    if (!kernels) return NOT_HERE;
    if (count == 0) return DONE;
    const Matrix g = matrix_at(format, rows, cols, gate), u = matrix_at(format, rows, cols, up);
    std::vector<uint8_t> memory, scratch(scratch_bytes(cols, 64));
    const Inputs inputs = test_inputs(*kernels, format, x, count, cols, memory);
    kernels->linear_swiglu(g, u, 0, g.panels, inputs, count, {out, static_cast<size_t>(rows), Write::set}, scratch.data());
    return DONE;
  });
}

AYLLU_EXPORT int32_t ayllu_unpack_rows(const char* isa, int32_t format, int32_t rows, int32_t cols, const void* packed, float* out) {
  return guarded([&]() -> int32_t {
    const Kernels* kernels = choose_kernels(isa);
    if (!kernels) return NOT_HERE;
    const Matrix w = matrix_at(format, rows, cols, packed);
    for (int row = 0; row < rows; row++) kernels->unpack_row(w, row, out + static_cast<size_t>(row) * static_cast<size_t>(cols));
    return DONE;
  });
}

AYLLU_EXPORT Decoder* ayllu_decoder_new(const DecoderShape* shape, const float* frequencies, const char* isa, int32_t threads) {
  try {
    const Kernels* kernels = choose_kernels(isa);
    return kernels ? new Decoder(*shape, frequencies, kernels, threads) : nullptr;
  } catch (...) {
    return nullptr;
  }
}

AYLLU_EXPORT void ayllu_decoder_free(Decoder* decoder) { delete decoder; }

AYLLU_EXPORT void ayllu_decoder_set_layer(Decoder* decoder, int32_t index, int32_t rotates, int32_t mixture, int32_t group, int32_t chunk) {
  LayerWeights& layer = decoder->layers[static_cast<size_t>(index)];
  layer.rotates = rotates;
  layer.mixture = mixture;
  layer.group = group;
  layer.chunk = chunk;
}

// slot: 0-3 q k v o, 4-6 gate up down, 7 router, 8-10 the experts' gate up down; layer -1: 0 embedding, 1 head.
AYLLU_EXPORT void ayllu_decoder_set_matrix(Decoder* decoder, int32_t index, int32_t slot, int32_t format, int32_t rows, int32_t cols, const void* data) {
  const Matrix w = matrix_at(format, rows, cols, data);
  if (index < 0) {
    (slot == 0 ? decoder->embedding : decoder->head) = w;
    return;
  }
  LayerWeights& layer = decoder->layers[static_cast<size_t>(index)];
  Matrix* slots[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down, &layer.router, &layer.expert_gate, &layer.expert_up, &layer.expert_down};
  *slots[slot] = w;
}

// slot: 0 attention norm, 1 feed-forward norm, 2-4 biases of q k v; layer -1: the final norm.
AYLLU_EXPORT void ayllu_decoder_set_vector(Decoder* decoder, int32_t index, int32_t slot, const float* data) {
  if (index < 0) {
    decoder->final_norm = data;
    return;
  }
  LayerWeights& layer = decoder->layers[static_cast<size_t>(index)];
  if (slot == 0) layer.attention_norm = data;
  else if (slot == 1) layer.feed_forward_norm = data;
  else layer.bias[slot - 2] = data;
}

AYLLU_EXPORT void ayllu_decoder_set_embedding_rows(Decoder* decoder, int32_t format, const void* rows, int64_t stride) {
  decoder->embedding_rows = static_cast<const uint8_t*>(rows);
  decoder->embedding_stride = static_cast<size_t>(stride);
  decoder->embedding_format = format;
}

AYLLU_EXPORT void ayllu_decoder_advise_experts(Decoder* decoder, int32_t advise) { decoder->advise_experts(advise != 0); }

AYLLU_EXPORT int64_t ayllu_decoder_experts_read(const Decoder* decoder) { return decoder->experts_read; }

AYLLU_EXPORT int32_t ayllu_decoder_make_cache(Decoder* decoder, int32_t groups, const int64_t* blocks, int32_t block_tokens, int32_t int8) {
  return guarded([&]() -> int32_t {
    decoder->make_cache(groups, blocks, block_tokens, int8 != 0);
    return DONE;
  });
}

AYLLU_EXPORT int64_t ayllu_decoder_cache_bytes(const Decoder* decoder) { return static_cast<int64_t>(decoder->cache_bytes()); }

// The number of a new adapter; parts [layers * 7] in the order of Projection.
AYLLU_EXPORT int32_t ayllu_decoder_add_adapter(Decoder* decoder, const LowRank* parts, int32_t count) {
  try {
    auto weights = std::make_unique<AdapterWeights>(parts, parts + count);
    for (size_t i = 0; i < decoder->adapters.size(); i++)
      if (!decoder->adapters[i]) {
        decoder->adapters[i] = std::move(weights);
        return static_cast<int32_t>(i);
      }
    decoder->adapters.push_back(std::move(weights));
    return static_cast<int32_t>(decoder->adapters.size()) - 1;
  } catch (...) {
    return -1;
  }
}

AYLLU_EXPORT void ayllu_decoder_remove_adapter(Decoder* decoder, int32_t number) { decoder->adapters[static_cast<size_t>(number)].reset(); }

// tables: for each piece, one pointer per layer group.
AYLLU_EXPORT int32_t ayllu_decoder_forward(Decoder* decoder, int32_t count, const int32_t* rows, const int64_t* starts, const int32_t* adapters,
                                           const int32_t* const* tables, int32_t groups, const int32_t* tokens, const float* const* given, float* hidden) {
  return guarded([&]() -> int32_t {
    std::vector<Piece> pieces(static_cast<size_t>(count));
    for (int p = 0; p < count; p++) pieces[static_cast<size_t>(p)] = {rows[p], adapters ? adapters[p] : -1, starts[p], tables + static_cast<size_t>(p) * static_cast<size_t>(groups)};
    decoder->forward(pieces.data(), count, tokens, given, hidden);
    return DONE;
  });
}

AYLLU_EXPORT int32_t ayllu_decoder_logits(Decoder* decoder, const float* const* hidden, int32_t rows, float* out) {
  return guarded([&]() -> int32_t {
    if (rows > 0) decoder->logits(hidden, rows, out);
    return DONE;
  });
}

// The small kernels one by one, for tests.

// x [rows][cols] -> out; weight [cols], or null.
AYLLU_EXPORT int32_t ayllu_rms_norm(const char* isa, const float* x, const float* weight, float eps, int32_t rows, int32_t cols, float* out) {
  const Kernels* kernels = choose_kernels(isa);
  if (!kernels) return NOT_HERE;
  for (int64_t row = 0; row < rows; row++) kernels->rms_norm(x + row * cols, weight, eps, cols, out + row * cols);
  return DONE;
}

// heads [rows][head_dim], changed in place; cos, sin [rows][head_dim / 2].
AYLLU_EXPORT int32_t ayllu_rotate(const char* isa, float* heads, const float* cos, const float* sin, int32_t rows, int32_t head_dim, int32_t interleaved) {
  const Kernels* kernels = choose_kernels(isa);
  if (!kernels) return NOT_HERE;
  for (int64_t row = 0; row < rows; row++)
    kernels->rotate(heads + row * head_dim, cos + row * (head_dim / 2), sin + row * (head_dim / 2), head_dim, interleaved != 0);
  return DONE;
}

AYLLU_EXPORT int32_t ayllu_silu_multiply(const char* isa, const float* gate, const float* up, int32_t count, float* out) {
  const Kernels* kernels = choose_kernels(isa);
  if (!kernels) return NOT_HERE;
  kernels->silu_multiply(gate, up, count, out);
  return DONE;
}

// One part of a softmax into another: sums [padded_dim], a multiple of 16; of[0] the largest score, of[1] the sum of weights.
AYLLU_EXPORT int32_t ayllu_merge(const char* isa, float* into_sum, float* into_of, float* from_sum, const float* from_of, int32_t padded_dim) {
  const Kernels* kernels = choose_kernels(isa);
  if (!kernels) return NOT_HERE;
  Partial into{into_sum, into_of[0], into_of[1]};
  const Partial from{from_sum, from_of[0], from_of[1]};
  kernels->merge(&into, from, padded_dim);
  into_of[0] = into.best;
  into_of[1] = into.total;
  return DONE;
}
