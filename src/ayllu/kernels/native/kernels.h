// The kernels of one instruction set, as a table: the runner and the tests call them through it.
#pragma once

#include "formats.h"

namespace ayllu {

// What happens to results: `set` writes them, `accumulate` adds them to what is there.
enum class Write : int32_t { set = 0, accumulate = 1 };

constexpr int FEW_ROWS = 12;  // up to here weights are unpacked in registers, for all rows at once
constexpr int STRIP = 6;      // rows of quantised inputs that pass together over weights unpacked in memory

// A block of a strip: 32 inputs of 6 rows, group by group of 4, then what belongs to each row's block.
struct StripBlock {
  int8_t q[8][STRIP][4];
  float scale[STRIP];
  float sum[STRIP];
  int32_t whole_sum[STRIP];
  int32_t half_sum[2][STRIP];
  uint8_t unused[8];
};
static_assert(sizeof(StripBlock) == 320);

// Rows of inputs, one after the other, or (quantised ones, when there are many) as strips of 6.
struct Inputs {
  const uint8_t* data;
  size_t stride;  // bytes from row to row, or from strip to strip
  bool strips;
  const uint8_t* row(int i) const { return data + stride * static_cast<size_t>(i); }
};

inline size_t strip_stride(int cols) { return (static_cast<size_t>(cols) + BLOCK - 1) / BLOCK * sizeof(StripBlock); }

struct Outputs {
  float* data;
  size_t stride;  // floats from row to row
  Write write;
  float* row(int i) const { return data + stride * static_cast<size_t>(i); }
};

// Keys and values of one layer. A tile holds up to 16 positions of one head: keys as bfloat16
// [head_dim / 2][16][2], values as [8][padded_dim][2]; int8 with a float32 scale per position behind them.
struct KvLayout {
  int32_t head_dim, padded_dim, kv_heads;
  int32_t tile_keys;        // positions in a tile, at most 16
  int32_t tiles_per_block;
  bool int8;
  size_t key_tile_bytes() const { return int8 ? static_cast<size_t>(head_dim) * 16 + 64 : static_cast<size_t>(head_dim) * 32; }
  size_t value_tile_bytes() const { return int8 ? static_cast<size_t>(padded_dim) * 16 + 64 : static_cast<size_t>(padded_dim) * 32; }
};

constexpr int CHUNK_TILES = 16;  // tiles whose scores are normalised together; fixes the order of all sums
constexpr int MOST_QUERIES = 6; // queries that pass over a tile together

// What one task of attention reads: some queries of one key-value head against one chunk of tiles.
struct ChunkView {
  const uint8_t* keys[CHUNK_TILES];
  const uint8_t* values[CHUNK_TILES];
  int32_t tiles;
  bool cold;  // the tiles are read for the first time: ask for them ahead
};

// A softmax under way for one query: weighted sum [padded_dim], largest score, sum of weights. Scores are in units of
// ln 2: whoever stores queries multiplies them by 1 / ln 2, and weights are powers of two.
struct Partial {
  float* sum;
  float best;
  float total;
};

struct Kernels {
  const char* name;
  // x [rows][cols] float32 (row stride given in floats) -> inputs of a kind.
  void (*make_inputs)(InputKind kind, const float* x, size_t x_stride, int rows, int cols, uint8_t* out, size_t stride,
                      int first_block, int last_block);
  // One strip of quantised inputs from up to 6 rows; missing rows are zero.
  void (*make_strip)(const float* x, size_t x_stride, int rows, int cols, uint8_t* out);
  // Panels [first, last) of w times rows inputs.
  void (*linear)(const Matrix& w, int first, int last, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch);
  // silu(gate x) * (up x), panels [first, last) of both.
  void (*linear_swiglu)(const Matrix& gate, const Matrix& up, int first, int last, const Inputs& x, int rows,
                        const Outputs& out, uint8_t* scratch);
  void (*rms_norm)(const float* x, const float* weight, float eps, int cols, float* out);
  void (*silu_multiply)(const float* gate, const float* up, int count, float* out);
  // head [head_dim] turned by cos, sin [head_dim / 2]; interleaved or half layout.
  void (*rotate)(float* head, const float* cos, const float* sin, int head_dim, bool interleaved);
  void (*store_queries)(const float* head, float scale, int head_dim, uint16_t* out);
  void (*store_key)(const KvLayout& layout, const float* head, uint8_t* tile, int slot);
  void (*store_value)(const KvLayout& layout, const float* head, uint8_t* tile, int slot);
  // Queries bfloat16 [count][head_dim]; seen[i]: keys of the chunk that query i sees. Fresh partials.
  void (*attend_chunk)(const KvLayout& layout, const ChunkView& chunk, const uint16_t* queries, int count,
                       const int32_t* seen, Partial* out, uint8_t* scratch);
  void (*merge)(Partial* into, const Partial& from, int padded_dim);
  void (*divide)(const Partial& from, int head_dim, float* out);
  // Rows of numbers for the embedding table: row `row` of a packed matrix as float32 [cols].
  void (*unpack_row)(const Matrix& w, int row, float* out);
};

// Bytes of scratch memory that linear and attend_chunk need of each thread.
size_t scratch_bytes(int most_cols, int head_dim);

const Kernels* kernels_plain();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif
// The best set this processor runs; `wanted` null, or a name. Null if that one does not run here.
const Kernels* choose_kernels(const char* wanted);

}  // namespace ayllu
