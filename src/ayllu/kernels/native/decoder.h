// The decoder on a CPU: the fast twin of ayllu.model.decoder.Decoder, over packed weights and a paged cache.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "pool.h"

namespace ayllu {

// Mirrors the C interface (ayllu.kernels.native.decoder fills it).
struct DecoderShape {
  int32_t vocab_size, hidden_size, layers, heads, kv_heads, head_dim;
  int32_t experts, top_k;           // 0 without experts
  int32_t interleaved;              // rotary layout
  int32_t qk_norm;
  float norm_eps;
  float temperature_floor, temperature_scale;  // floor 0: none
};

struct LayerWeights {
  const float* attention_norm = nullptr;
  const float* feed_forward_norm = nullptr;
  const float* bias[3] = {};  // of q, k, v
  Matrix q, k, v, o;
  Matrix gate, up, down;      // dense, or the shared expert's
  Matrix router;
  Matrix expert_gate, expert_up, expert_down;  // the first expert's; the others follow without a gap
  int32_t rotates = 1, mixture = 0, group = 0, chunk = 0;  // chunk 0: sees everything
};

// Tokens of one sequence. tables: its blocks, per layer group.
struct Piece {
  int32_t rows;
  int32_t adapter;  // -1: none
  int64_t start;
  const int32_t* const* tables;
};

// A low-rank addition to one projection: y += B (A x), with A [rank][inputs] and B [outputs][rank] as panels of float32.
struct LowRank {
  const uint8_t* a = nullptr;
  const uint8_t* b = nullptr;
  int64_t rank = 0;
};
enum Projection : int32_t { PROJ_Q, PROJ_K, PROJ_V, PROJ_O, PROJ_GATE, PROJ_UP, PROJ_DOWN, PROJECTIONS };
using AdapterWeights = std::vector<LowRank>;  // [layer * PROJECTIONS + projection]

class Decoder {
 public:
  Decoder(const DecoderShape& shape, const float* frequencies, const Kernels* kernels, int threads);
  ~Decoder();

  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;
  Matrix head;
  // The embedding: a packed matrix, or rows as the file has them.
  Matrix embedding;
  const uint8_t* embedding_rows = nullptr;
  size_t embedding_stride = 0;
  int embedding_format = -1;
  std::vector<std::unique_ptr<AdapterWeights>> adapters;

  void make_cache(int groups, const int64_t* blocks, int block_tokens, bool int8);
  size_t cache_bytes() const { return cache_bytes_; }

  // tokens [rows of all pieces]; given: rows that replace embeddings (null, or one pointer per row, null where the
  // token counts); hidden [rows][hidden_size].
  void forward(const Piece* pieces, int count, const int32_t* tokens, const float* const* given, float* hidden);
  // hidden [rows][hidden_size] -> logits [rows][vocab_size].
  void logits(const float* const* hidden, int rows, float* out);

  const DecoderShape shape;
  const Kernels* const kernels;
  Pool pool;
  void advise_experts(bool advise) { advises_ = advise; }
  int64_t experts_read = 0;  // matrices of experts that were read, for tests

 private:
  struct Task {
    int piece, row, rows, head, chunk, chunks;
    size_t partial;  // where its partials begin; only of tasks that are merged later
  };
  struct Merge { int piece, row; size_t first; int chunks; };
  struct Run { int piece, row, rows; };  // rows of a piece in one tile
  struct GroupPlan {
    std::vector<Run> runs;
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int chunk = 0;
  };
  struct Job { const Matrix* w; float* out; size_t stride; Write write; };

  void plan(const Piece* pieces, int count);
  void reserve(int rows);
  void attention(int thread, int layer, const Piece* pieces);
  void feed_forward(int thread, int layer, int rows);
  void mixture(int thread, int layer, int rows);
  void linears(int thread, std::initializer_list<Job> jobs, int rows);
  void swiglu(int thread, const Matrix& gate, const Matrix& up, int rows, float* out);
  void inputs(int thread, const float* x, size_t stride, int rows, int cols, std::initializer_list<const Matrix*> users, bool row_by_row = false);
  void adapt(int thread, int layer, Projection projection, const float* x, int cols, float* y, size_t stride, int outputs);
  void add_low_rank(int thread, const LowRank& part, const float* x, int cols, float* y, size_t stride, int outputs, int rows);
  void norm_rows(int thread, const float* weight, int rows);
  void attend_task(int thread, const LayerWeights& layer, int index, const Piece* pieces, const Task& task);
  void finish_run(int index, const LayerWeights& layer, const Piece* pieces, const Run& run);
  Inputs inputs_of(const Matrix& w, bool many) const;
  bool adapted() const { return adapted_; }

  std::vector<float> frequencies_;
  KvLayout layout_{};
  int block_tokens_ = 0;
  // A block of a group holds its tokens for all layers of the group: a short sequence touches few pages.
  std::vector<uint8_t*> pools_;       // per group
  std::vector<size_t> block_bytes_;   // per group
  std::vector<int> place_in_group_;   // per layer
  uint8_t* block_at(int layer, int block) const {
    const size_t group = static_cast<size_t>(layers[static_cast<size_t>(layer)].group);
    return pools_[group] + block_bytes_[group] * static_cast<size_t>(block) + layer_bytes() * static_cast<size_t>(place_in_group_[static_cast<size_t>(layer)]);
  }
  size_t key_bytes() const { return static_cast<size_t>(layout_.tiles_per_block * layout_.kv_heads) * layout_.key_tile_bytes(); }
  size_t layer_bytes() const { return static_cast<size_t>(layout_.tiles_per_block * layout_.kv_heads) * (layout_.key_tile_bytes() + layout_.value_tile_bytes()); }
  std::vector<int64_t> blocks_;
  size_t cache_bytes_ = 0;
  std::vector<std::pair<void*, size_t>> mapped_;

  int reserved_ = 0;
  bool adapted_ = false, advises_ = false;
  std::vector<float> x_, normed_, qkv_, attended_, hidden_, side_, angles_, router_, routed_, routed_out_, partials_;
  std::vector<std::vector<float>> low_;  // per thread: inputs of an adapter's second matrix
  std::vector<uint16_t> queries_;
  std::vector<uint8_t> inputs_[3];
  std::vector<int32_t> chosen_, order_, token_of_, expert_start_;
  int64_t steps_ = 0;
  std::vector<int64_t> asked_;  // the step in which an expert's pages were last asked for
  std::vector<int> piece_row_, row_piece_;
  std::vector<GroupPlan> plans_;
  std::vector<std::vector<uint8_t>> scratch_;
  std::vector<std::vector<Partial>> running_;
  int width_most_ = 0;
};

// Zeroed memory from the system, in huge pages where there are any. Null when there is none.
void* map_memory(size_t bytes);
void unmap_memory(void* at, size_t bytes);

}  // namespace ayllu
