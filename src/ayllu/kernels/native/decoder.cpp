#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace ayllu {
namespace {

constexpr int FEW = FEW_ROWS;     // rows up to which every thread reads its own part of the weights once
constexpr int SPLIT_ROWS = 16;    // rows up to which attention is split over the keys
constexpr int QUERY_ROWS = 32;    // rows of a long piece that pass over the keys together
constexpr size_t HUGE_PAGE = 2u << 20;
constexpr int64_t ASK_AGAIN = 64;  // steps after which an expert's pages are asked for again: asking has its price

template <class T> void grow(std::vector<T>& v, size_t n) {
  if (v.size() < n) v.resize(n);
}

}  // namespace

void* map_memory(size_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
  // Aligned to huge pages: one more is mapped, and what sticks out is given back.
  const size_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const bool large = bytes >= HUGE_PAGE;
  const size_t asked = large ? rounded + HUGE_PAGE : bytes;
  void* at = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  if (!large) return at;
  const uintptr_t start = reinterpret_cast<uintptr_t>(at), aligned = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (aligned > start) munmap(at, aligned - start);
  const uintptr_t end = start + asked, kept = aligned + (bytes + 4095) / 4096 * 4096;
  if (end > kept) munmap(reinterpret_cast<void*>(kept), end - kept);
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(aligned), kept - aligned, MADV_HUGEPAGE);
#endif
  return reinterpret_cast<void*>(aligned);
#else
  return std::calloc(bytes, 1);
#endif
}

void unmap_memory(void* at, size_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
  munmap(at, bytes >= HUGE_PAGE ? (bytes + 4095) / 4096 * 4096 : bytes);
#else
  std::free(at);
#endif
}

Decoder::Decoder(const DecoderShape& given, const float* frequencies, const Kernels* chosen, int threads)
    : layers(static_cast<size_t>(given.layers)), shape(given), kernels(chosen), pool(threads),
      frequencies_(frequencies, frequencies + given.head_dim / 2), scratch_(static_cast<size_t>(pool.threads())) {}

Decoder::~Decoder() {
  for (auto& [at, bytes] : mapped_) unmap_memory(at, bytes);
}

void Decoder::make_cache(int groups, const int64_t* blocks, int block_tokens, bool int8) {
  block_tokens_ = block_tokens;
  layout_.head_dim = shape.head_dim;
  layout_.padded_dim = (shape.head_dim + 15) / 16 * 16;
  layout_.kv_heads = shape.kv_heads;
  layout_.int8 = int8;
  // The largest tile that fills blocks exactly: positions of a tile are then neighbours in every table.
  int tile = std::min(16, block_tokens);
  while (block_tokens % tile) tile--;
  layout_.tile_keys = tile;
  layout_.tiles_per_block = block_tokens / tile;
  blocks_.assign(blocks, blocks + groups);
  plans_.resize(static_cast<size_t>(groups));
  block_bytes_.assign(static_cast<size_t>(groups), 0);
  for (const LayerWeights& layer : layers) {
    const size_t group = static_cast<size_t>(layer.group);
    place_in_group_.push_back(static_cast<int>(block_bytes_[group] / layer_bytes()));
    block_bytes_[group] += layer_bytes();
    plans_[group].chunk = layer.chunk;
  }
  for (size_t group = 0; group < static_cast<size_t>(groups); group++) {
    const size_t bytes = std::max<size_t>(block_bytes_[group] * static_cast<size_t>(blocks[group]), 64);
    void* at = map_memory(bytes);
    if (!at) throw std::bad_alloc();
    mapped_.emplace_back(at, bytes);
    pools_.push_back(static_cast<uint8_t*>(at));
    cache_bytes_ += bytes;
  }
}

void Decoder::reserve(int rows) {
  if (rows <= reserved_) return;
  int width = std::max(shape.hidden_size, shape.heads * shape.head_dim), hidden = 16;
  for (const LayerWeights& layer : layers) {
    hidden = std::max({hidden, layer.gate.rows, layer.mixture ? layer.expert_gate.rows * shape.top_k : 0});
    width_most_ = std::max({width_most_, width, layer.gate.rows, layer.expert_gate.rows});
  }
  const size_t n = static_cast<size_t>(rows);
  grow(x_, n * static_cast<size_t>(shape.hidden_size));
  grow(normed_, n * static_cast<size_t>(shape.hidden_size));
  grow(qkv_, n * static_cast<size_t>((shape.heads + 2 * shape.kv_heads) * shape.head_dim));
  grow(attended_, n * static_cast<size_t>(shape.heads * shape.head_dim));
  grow(queries_, n * static_cast<size_t>(shape.heads * shape.head_dim) + 32);
  grow(hidden_, n * static_cast<size_t>(hidden));
  grow(angles_, n * static_cast<size_t>(shape.head_dim));
  const size_t copies = static_cast<size_t>(std::max(1, shape.top_k));
  if (shape.experts) {
    grow(router_, n * static_cast<size_t>(shape.experts));
    grow(routed_, n * copies * static_cast<size_t>(shape.hidden_size));
    grow(routed_out_, n * copies * static_cast<size_t>(shape.hidden_size));
    grow(chosen_, n * copies);
    grow(order_, n * copies);
    grow(token_of_, n * copies);
    grow(expert_start_, static_cast<size_t>(shape.experts) + 1);
    grow(asked_, static_cast<size_t>(shape.layers * shape.experts));
  }
  // One buffer for each kind of inputs that any matrix takes.
  bool used[3] = {};
  used[static_cast<int>(input_kind(head.format))] = true;
  for (const LayerWeights& layer : layers)
    for (const Matrix* w : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down, &layer.router, &layer.expert_gate, &layer.expert_up, &layer.expert_down})
      if (w->data) used[static_cast<int>(input_kind(w->format))] = true;
  for (int kind = 0; kind < 3; kind++)
    if (used[kind]) grow(inputs_[kind], std::max(n * copies * input_stride(static_cast<InputKind>(kind), width_most_), (n / STRIP + 1) * strip_stride(width_most_)) + 64);
  const size_t queries = static_cast<size_t>(QUERY_ROWS * (shape.heads / shape.kv_heads) + MOST_QUERIES);
  for (std::vector<uint8_t>& scratch : scratch_) {
    const size_t attention = static_cast<size_t>(layout_.padded_dim + 16) * queries * sizeof(float);
    grow(scratch, scratch_bytes(width_most_, shape.head_dim) + attention);
  }
  reserved_ = rows;
}

// Which tiles, chunks and merges the pieces mean: the same for all layers of a group.
void Decoder::plan(const Piece* pieces, int count) {
  const int chunk_keys = CHUNK_TILES * layout_.tile_keys, share = shape.heads / shape.kv_heads;
  size_t partials = 0;
  piece_row_.clear();
  int row = 0;
  for (int p = 0; p < count; p++) {
    piece_row_.push_back(row);
    row += pieces[p].rows;
  }
  for (GroupPlan& group : plans_) {
    group.runs.clear();
    group.tasks.clear();
    group.merges.clear();
    size_t own = 0;
    for (int p = 0; p < count; p++) {
      const int64_t begin = group.chunk ? pieces[p].start / group.chunk * group.chunk : 0;
      for (int done = 0; done < pieces[p].rows;) {
        const int64_t at = pieces[p].start - begin + done;
        const int some = std::min<int64_t>(pieces[p].rows - done, layout_.tile_keys - at % layout_.tile_keys);
        group.runs.push_back({p, done, some});
        done += some;
      }
      if (pieces[p].rows <= SPLIT_ROWS) {
        const int64_t keys = pieces[p].start - begin + pieces[p].rows;
        const int chunks = static_cast<int>((keys + chunk_keys - 1) / chunk_keys);
        group.merges.push_back({p, 0, own, chunks});
        for (int head = 0; head < shape.kv_heads; head++)
          for (int c = 0; c < chunks; c++) {
            group.tasks.push_back({p, 0, pieces[p].rows, head, c, 1, own});
            own += static_cast<size_t>(pieces[p].rows * share);
          }
      } else {
        for (int first = 0; first < pieces[p].rows; first += QUERY_ROWS) {
          const int rows = std::min(QUERY_ROWS, pieces[p].rows - first);
          const int64_t keys = pieces[p].start - begin + first + rows;
          for (int head = 0; head < shape.kv_heads; head++)
            group.tasks.push_back({p, first, rows, head, 0, static_cast<int>((keys + chunk_keys - 1) / chunk_keys), 0});
        }
      }
    }
    // Long tasks first: whoever takes the last one should not keep the others waiting.
    std::stable_sort(group.tasks.begin(), group.tasks.end(), [](const Task& a, const Task& b) { return a.chunks * a.rows > b.chunks * b.rows; });
    partials = std::max(partials, own);
  }
  grow(partials_, partials * static_cast<size_t>(layout_.padded_dim + 16));
}

Inputs Decoder::inputs_of(const Matrix& w, bool many) const {
  const int kind = static_cast<int>(input_kind(w.format));
  if (many && input_kind(w.format) == InputKind::quantised) return {inputs_[kind].data(), strip_stride(w.cols), true};
  return {inputs_[kind].data(), input_stride(static_cast<InputKind>(kind), w.cols), false};
}

// x -> the kinds of inputs that the users want. Ends with a meeting.
void Decoder::inputs(int thread, const float* x, size_t stride, int rows, int cols, std::initializer_list<const Matrix*> users, bool row_by_row) {
  bool wanted[3] = {};
  for (const Matrix* user : users)
    if (user->data) wanted[static_cast<int>(input_kind(user->format))] = true;
  const int blocks = (cols + BLOCK - 1) / BLOCK;
  for (int kind = 0; kind < 3; kind++) {
    if (!wanted[kind]) continue;
    const InputKind as = static_cast<InputKind>(kind);
    if (as == InputKind::quantised && rows > FEW && !row_by_row) {
      const int strips = (rows + STRIP - 1) / STRIP;
      for (int strip = pool.first_of(thread, strips); strip < pool.first_of(thread + 1, strips); strip++)
        kernels->make_strip(x + stride * static_cast<size_t>(strip * STRIP), stride, std::min(STRIP, rows - strip * STRIP), cols,
                            inputs_[kind].data() + strip_stride(cols) * static_cast<size_t>(strip));
      continue;
    }
    const size_t to = input_stride(as, cols);
    if (rows < pool.threads()) {
      const int first = pool.first_of(thread, blocks), last = pool.first_of(thread + 1, blocks);
      kernels->make_inputs(as, x, stride, rows, cols, inputs_[kind].data(), to, first, last);
    } else {
      const int first = pool.first_of(thread, rows), last = pool.first_of(thread + 1, rows);
      kernels->make_inputs(as, x + stride * static_cast<size_t>(first), stride, last - first, cols,
                           inputs_[kind].data() + to * static_cast<size_t>(first), to, 0, blocks);
    }
  }
  pool.meet();
}

// Several matrices over the same inputs. Ends with a meeting.
void Decoder::linears(int thread, std::initializer_list<Job> jobs, int rows) {
  uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
  if (rows <= FEW) {
    size_t total = 0;
    for (const Job& job : jobs) total += static_cast<size_t>(job.w->panels) * job.w->panel_bytes;
    const size_t from = total / static_cast<size_t>(pool.threads()) * static_cast<size_t>(thread);
    const size_t to = thread + 1 == pool.threads() ? total : total / static_cast<size_t>(pool.threads()) * static_cast<size_t>(thread + 1);
    size_t at = 0;
    for (const Job& job : jobs) {
      const size_t bytes = job.w->panel_bytes;
      const auto panel_at = [&](size_t offset) {
        return offset <= at ? 0 : std::min<int64_t>(job.w->panels, static_cast<int64_t>((offset - at + bytes - 1) / bytes));
      };
      const int first = static_cast<int>(panel_at(from)), last = static_cast<int>(panel_at(to));
      if (first < last) kernels->linear(*job.w, first, last, inputs_of(*job.w, rows > FEW), rows, {job.out, job.stride, job.write}, scratch);
      at += static_cast<size_t>(job.w->panels) * bytes;
    }
    pool.meet();
    return;
  }
  int pairs = 0;
  for (const Job& job : jobs) pairs += (job.w->panels + 1) / 2;
  pool.share(thread, pairs, [&](int index) {
    for (const Job& job : jobs) {
      const int own = (job.w->panels + 1) / 2;
      if (index < own) {
        kernels->linear(*job.w, 2 * index, std::min(2 * index + 2, job.w->panels), inputs_of(*job.w, rows > FEW), rows, {job.out, job.stride, job.write}, scratch);
        return;
      }
      index -= own;
    }
  });
}

// silu(gate x) * (up x) -> out [rows][gate.rows]. Ends with a meeting.
void Decoder::swiglu(int thread, const Matrix& gate, const Matrix& up, int rows, float* out) {
  uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
  const size_t stride = static_cast<size_t>(gate.rows);
  if (gate.format != up.format || adapted_) {
    // Each apart: one into `out`, one beside it.
    if (thread == 0) grow(side_, stride * static_cast<size_t>(rows));
    pool.meet();
    linears(thread, {{&gate, out, stride, Write::set}, {&up, side_.data(), stride, Write::set}}, rows);
    return;
  }
  const Outputs outputs{out, stride, Write::set};
  if (rows <= FEW) {
    const int first = pool.first_of(thread, gate.panels), last = pool.first_of(thread + 1, gate.panels);
    if (first < last) kernels->linear_swiglu(gate, up, first, last, inputs_of(gate, rows > FEW), rows, outputs, scratch);
    pool.meet();
    return;
  }
  pool.share(thread, gate.panels, [&](int panel) { kernels->linear_swiglu(gate, up, panel, panel + 1, inputs_of(gate, rows > FEW), rows, outputs, scratch); });
}

// Adds adapters' low-rank products to y, for the rows of pieces that have one. Ends with a meeting.
void Decoder::adapt(int thread, int layer, Projection projection, const float* x, int cols, float* y, size_t stride, int outputs) {
  if (!adapted_) return;
  const int rows = static_cast<int>(row_piece_.size());
  for (int first = 0, last = 0; first < rows; first = last) {
    const int which = row_piece_[static_cast<size_t>(first)];
    for (last = first + 1; last < rows && row_piece_[static_cast<size_t>(last)] == which;) last++;
    if (which < 0) continue;
    const LowRank& part = (*adapters[static_cast<size_t>(which)])[static_cast<size_t>(layer * PROJECTIONS + projection)];
    if (part.rank) add_low_rank(thread, part, x + static_cast<size_t>(cols) * static_cast<size_t>(first), cols, y + stride * static_cast<size_t>(first), stride, outputs, last - first);
  }
  pool.meet();
}

// One adapter's part for rows that follow each other. Few rows: every thread takes them all through A, and its
// own panels of B. Many: its own rows through both.
void Decoder::add_low_rank(int thread, const LowRank& part, const float* x, int cols, float* y, size_t stride, int outputs, int rows) {
  constexpr int float32 = 10, together = 48;
  Matrix a = shape_matrix(float32, static_cast<int>(part.rank), cols), b = shape_matrix(float32, outputs, static_cast<int>(part.rank));
  a.data = part.a;
  b.data = part.b;
  const bool split_rows = rows > FEW;
  const int from = split_rows ? pool.first_of(thread, rows) : 0, to = split_rows ? pool.first_of(thread + 1, rows) : rows;
  const int first = split_rows ? 0 : pool.first_of(thread, b.panels), last = split_rows ? b.panels : pool.first_of(thread + 1, b.panels);
  if (first >= last) return;
  // A float32 matrix reads no further than its columns: rows of numbers are its inputs as they are.
  const size_t low_stride = static_cast<size_t>(part.rank);
  std::vector<float>& low = low_[static_cast<size_t>(thread)];
  grow(low, low_stride * together);
  uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
  for (int row = from; row < to; row += together) {
    const int count = std::min(together, to - row);
    const Inputs inputs{reinterpret_cast<const uint8_t*>(x + static_cast<size_t>(cols) * static_cast<size_t>(row)), sizeof(float) * static_cast<size_t>(cols), false};
    kernels->linear(a, 0, a.panels, inputs, count, {low.data(), low_stride, Write::set}, scratch);
    const Inputs through{reinterpret_cast<const uint8_t*>(low.data()), sizeof(float) * low_stride, false};
    kernels->linear(b, first, last, through, count, {y + stride * static_cast<size_t>(row), stride, Write::accumulate}, scratch);
  }
}

void Decoder::norm_rows(int thread, const float* weight, int rows) {
  const size_t width = static_cast<size_t>(shape.hidden_size);
  const int first = pool.first_of(thread, rows), last = pool.first_of(thread + 1, rows);
  for (int row = first; row < last; row++)
    kernels->rms_norm(x_.data() + width * static_cast<size_t>(row), weight, shape.norm_eps, shape.hidden_size, normed_.data() + width * static_cast<size_t>(row));
  pool.meet();
}

// Bias, rotation, norm, temperature; queries and cache slots of rows that share a tile.
void Decoder::finish_run(int index, const LayerWeights& layer, const Piece* pieces, const Run& run) {
  const Piece& piece = pieces[run.piece];
  const int dim = shape.head_dim, heads = shape.heads, groups = shape.kv_heads;
  const size_t width = static_cast<size_t>((heads + 2 * groups) * dim);
  const int64_t begin = layer.chunk ? piece.start / layer.chunk * layer.chunk : 0;
  // Scores in units of ln 2: softmax weights are then powers of two.
  const float scale = 1.44269504088896341f / std::sqrt(static_cast<float>(dim));
  for (int i = 0; i < run.rows; i++) {
    const size_t row = static_cast<size_t>(piece_row_[static_cast<size_t>(run.piece)] + run.row + i);
    const int64_t position = piece.start + run.row + i, held = position - begin;
    float* q = qkv_.data() + width * row;
    for (int part = 0; part < 3; part++) {
      if (!layer.bias[part]) continue;
      float* to = q + (part == 0 ? 0 : (heads + (part - 1) * groups) * dim);
      const int count = (part == 0 ? heads : groups) * dim;
      for (int k = 0; k < count; k++) to[k] += layer.bias[part][k];
    }
    const float* cos = angles_.data() + static_cast<size_t>(dim) * row;
    float query_scale = scale;
    if (!layer.rotates && shape.temperature_floor > 0.0f) {
      const float steps = std::floor((static_cast<float>(position) + 1.0f) / shape.temperature_floor);
      query_scale *= 1.0f + shape.temperature_scale * std::log(std::max(steps, 0.0f) + 1.0f);
    }
    for (int head = 0; head < heads + groups; head++) {
      if (layer.rotates) {
        kernels->rotate(q + head * dim, cos, cos + dim / 2, dim, shape.interleaved);
        if (shape.qk_norm) kernels->rms_norm(q + head * dim, nullptr, shape.norm_eps, dim, q + head * dim);
      }
    }
    for (int head = 0; head < heads; head++)
      kernels->store_queries(q + head * dim, query_scale, dim, queries_.data() + (row * static_cast<size_t>(heads) + static_cast<size_t>(head)) * static_cast<size_t>(dim));
    const int32_t block = piece.tables[layer.group][held / block_tokens_];
    uint8_t* keys = block_at(index, block);
    uint8_t* values = keys + key_bytes();
    const size_t tile = static_cast<size_t>(held % block_tokens_ / layout_.tile_keys) * static_cast<size_t>(groups);
    const int slot = static_cast<int>(held % layout_.tile_keys);
    for (int head = 0; head < groups; head++) {
      kernels->store_key(layout_, q + (heads + head) * dim, keys + (tile + static_cast<size_t>(head)) * layout_.key_tile_bytes(), slot);
      kernels->store_value(layout_, q + (heads + groups + head) * dim, values + (tile + static_cast<size_t>(head)) * layout_.value_tile_bytes(), slot);
    }
  }
}

// Some rows of a piece and one key-value head, over one chunk (to be merged) or over all of them.
void Decoder::attend_task(int thread, const LayerWeights& layer, int index, const Piece* pieces, const Task& task) {
  const Piece& piece = pieces[task.piece];
  const int dim = shape.head_dim, heads = shape.heads, groups = shape.kv_heads, share = heads / groups;
  const int chunk_keys = CHUNK_TILES * layout_.tile_keys, padded = layout_.padded_dim, count = task.rows * share;
  const int64_t begin = layer.chunk ? piece.start / layer.chunk * layer.chunk : 0;
  const size_t first_row = static_cast<size_t>(piece_row_[static_cast<size_t>(task.piece)] + task.row);
  uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
  float* own = reinterpret_cast<float*>(scratch + scratch_bytes(width_most_, dim));
  const size_t partial_floats = static_cast<size_t>(padded) + 16;
  const bool whole = task.chunks > 1 || piece.rows > SPLIT_ROWS;
  std::vector<Partial>& running = running_[static_cast<size_t>(thread)];
  grow(running, static_cast<size_t>(count));
  for (int i = 0; i < count; i++) {
    float* at = whole ? own + partial_floats * static_cast<size_t>(i) : partials_.data() + (task.partial + static_cast<size_t>(i)) * partial_floats;
    running[static_cast<size_t>(i)] = {at, -INFINITY, 0.0f};
  }
  float* fresh_sums = own + partial_floats * static_cast<size_t>(whole ? count : 0);
  // Queries of a row's heads lie together; those of a task are gathered so that a strip is contiguous.
  uint16_t gathered[MOST_QUERIES * 256];
  std::vector<uint16_t> long_gathered;
  uint16_t* strip = gathered;
  if (dim > 256) {
    long_gathered.resize(static_cast<size_t>(MOST_QUERIES * dim));
    strip = long_gathered.data();
  }
  const int32_t* table = piece.tables[layer.group];
  for (int c = task.chunk; c < task.chunk + task.chunks; c++) {
    ChunkView view;
    view.tiles = 0;
    const int64_t last_seen = piece.start - begin + task.row + task.rows;  // keys that the last row sees
    for (int t = 0; t < CHUNK_TILES; t++) {
      const int64_t key = static_cast<int64_t>(c) * chunk_keys + static_cast<int64_t>(t) * layout_.tile_keys;
      if (key >= last_seen) break;
      const uint8_t* block = block_at(index, table[key / block_tokens_]);
      const size_t tile = static_cast<size_t>(key % block_tokens_ / layout_.tile_keys) * static_cast<size_t>(groups) + static_cast<size_t>(task.head);
      view.keys[t] = block + tile * layout_.key_tile_bytes();
      view.values[t] = block + key_bytes() + tile * layout_.value_tile_bytes();
      view.tiles++;
    }
    for (int first = 0; first < count; first += MOST_QUERIES) {
      const int some = std::min(MOST_QUERIES, count - first);
      int32_t seen[MOST_QUERIES];
      Partial fresh[MOST_QUERIES];
      int most = 0;
      for (int i = 0; i < some; i++) {
        const int row = (first + i) / share, head = task.head * share + (first + i) % share;
        const int64_t position = piece.start - begin + task.row + row;
        seen[i] = static_cast<int32_t>(std::clamp<int64_t>(position + 1 - static_cast<int64_t>(c) * chunk_keys, 0, chunk_keys));
        most = std::max(most, seen[i]);
        std::memcpy(strip + i * dim, queries_.data() + ((first_row + static_cast<size_t>(row)) * static_cast<size_t>(heads) + static_cast<size_t>(head)) * static_cast<size_t>(dim), sizeof(uint16_t) * static_cast<size_t>(dim));
        fresh[i] = {whole ? fresh_sums + partial_floats * static_cast<size_t>(i) : running[static_cast<size_t>(first + i)].sum, 0.0f, 0.0f};
      }
      if (most == 0) continue;
      view.cold = first == 0;
      kernels->attend_chunk(layout_, view, strip, some, seen, fresh, scratch);
      for (int i = 0; i < some; i++) {
        if (whole) {
          if (seen[i] > 0) kernels->merge(&running[static_cast<size_t>(first + i)], fresh[i], padded);
        } else {
          running[static_cast<size_t>(first + i)] = fresh[i];
          if (seen[i] <= 0) running[static_cast<size_t>(first + i)].best = -INFINITY;
        }
      }
    }
  }
  for (int i = 0; i < count; i++) {
    const int row = i / share, head = task.head * share + i % share;
    if (whole) {
      kernels->divide(running[static_cast<size_t>(i)], dim, attended_.data() + ((first_row + static_cast<size_t>(row)) * static_cast<size_t>(heads) + static_cast<size_t>(head)) * static_cast<size_t>(dim));
    } else {
      // Behind the sum: what the merge needs.
      float* at = partials_.data() + (task.partial + static_cast<size_t>(i)) * partial_floats + padded;
      at[0] = running[static_cast<size_t>(i)].best;
      at[1] = running[static_cast<size_t>(i)].total;
      at[2] = 0.0f;
    }
  }
}

void Decoder::attention(int thread, int index, const Piece* pieces) {
  const LayerWeights& layer = layers[static_cast<size_t>(index)];
  const GroupPlan& group = plans_[static_cast<size_t>(layer.group)];
  pool.share(thread, static_cast<int>(group.runs.size()), [&](int i) { finish_run(index, layer, pieces, group.runs[static_cast<size_t>(i)]); });
  pool.share(thread, static_cast<int>(group.tasks.size()), [&](int i) { attend_task(thread, layer, index, pieces, group.tasks[static_cast<size_t>(i)]); });
  if (group.merges.empty()) return;
  const int share = shape.heads / shape.kv_heads, dim = shape.head_dim;
  const size_t partial_floats = static_cast<size_t>(layout_.padded_dim) + 16;
  pool.share(thread, static_cast<int>(group.merges.size()) * shape.kv_heads, [&](int i) {
    const Merge& merge = group.merges[static_cast<size_t>(i / shape.kv_heads)];
    const int head = i % shape.kv_heads, rows = pieces[merge.piece].rows;
    const size_t first_row = static_cast<size_t>(piece_row_[static_cast<size_t>(merge.piece)]);
    for (int query = 0; query < rows * share; query++) {
      Partial into{nullptr, -INFINITY, 0.0f};
      for (int c = 0; c < merge.chunks; c++) {
        float* at = partials_.data() + (merge.first + static_cast<size_t>(head * merge.chunks + c) * static_cast<size_t>(rows * share) + static_cast<size_t>(query)) * partial_floats;
        const Partial part{at, at[layout_.padded_dim], at[layout_.padded_dim + 1]};
        if (c == 0) into = part;
        else kernels->merge(&into, part, layout_.padded_dim);
      }
      kernels->divide(into, dim, attended_.data() + ((first_row + static_cast<size_t>(query / share)) * static_cast<size_t>(shape.heads) + static_cast<size_t>(head * share + query % share)) * static_cast<size_t>(dim));
    }
  });
}

void Decoder::feed_forward(int thread, int index, int rows) {
  const LayerWeights& layer = layers[static_cast<size_t>(index)];
  const size_t width = static_cast<size_t>(shape.hidden_size), hidden = static_cast<size_t>(layer.gate.rows);
  norm_rows(thread, layer.feed_forward_norm, rows);
  if (layer.mixture) mixture(thread, index, rows);
  inputs(thread, normed_.data(), width, rows, shape.hidden_size, {&layer.gate, &layer.up});
  swiglu(thread, layer.gate, layer.up, rows, hidden_.data());
  if (layer.gate.format != layer.up.format || adapted_) {
    adapt(thread, index, PROJ_GATE, normed_.data(), shape.hidden_size, hidden_.data(), hidden, layer.gate.rows);
    adapt(thread, index, PROJ_UP, normed_.data(), shape.hidden_size, side_.data(), hidden, layer.gate.rows);
    const int first = pool.first_of(thread, rows), last = pool.first_of(thread + 1, rows);
    for (int row = first; row < last; row++) {
      float* at = hidden_.data() + hidden * static_cast<size_t>(row);
      kernels->silu_multiply(at, side_.data() + hidden * static_cast<size_t>(row), layer.gate.rows, at);
    }
    pool.meet();
  }
  inputs(thread, hidden_.data(), hidden, rows, layer.gate.rows, {&layer.down});
  linears(thread, {{&layer.down, x_.data(), width, Write::accumulate}}, rows);
  adapt(thread, index, PROJ_DOWN, hidden_.data(), layer.gate.rows, x_.data(), width, shape.hidden_size);
}

// The routed part of a mixture, added to x_. normed_ holds its input, and still does afterwards.
void Decoder::mixture(int thread, int index, int rows) {
  const LayerWeights& layer = layers[static_cast<size_t>(index)];
  const int top_k = shape.top_k, experts = shape.experts, total = rows * top_k;
  const size_t width = static_cast<size_t>(shape.hidden_size), hidden = static_cast<size_t>(layer.expert_gate.rows);
  inputs(thread, normed_.data(), width, rows, shape.hidden_size, {&layer.router});
  linears(thread, {{&layer.router, router_.data(), static_cast<size_t>(experts), Write::set}}, rows);
  if (thread == 0) {
    // Sorted by expert, tokens in order within one: each expert's weights are read once.
    std::fill(expert_start_.begin(), expert_start_.end(), 0);
    for (int row = 0; row < rows; row++) {
      const float* scores = router_.data() + static_cast<size_t>(row * experts);
      for (int k = 0; k < top_k; k++) {
        int best = -1;
        for (int e = 0; e < experts; e++) {
          bool taken = false;
          for (int j = 0; j < k; j++) taken |= chosen_[static_cast<size_t>(row * top_k + j)] == e;
          // NaN counts as the largest, as torch's topk has it: the result then shows it.
          if (!taken && (best < 0 || scores[e] > scores[best] || (std::isnan(scores[e]) && !std::isnan(scores[best])))) best = e;
        }
        chosen_[static_cast<size_t>(row * top_k + k)] = best;
        expert_start_[static_cast<size_t>(best) + 1]++;
      }
    }
    for (int e = 0; e < experts; e++) {
      experts_read += expert_start_[static_cast<size_t>(e) + 1] > 0;
      expert_start_[static_cast<size_t>(e) + 1] += expert_start_[static_cast<size_t>(e)];
    }
    std::vector<int32_t> next(expert_start_.begin(), expert_start_.end() - 1);
    for (int i = 0; i < total; i++) {
      const int slot = next[static_cast<size_t>(chosen_[static_cast<size_t>(i)])]++;
      order_[static_cast<size_t>(i)] = slot;
      token_of_[static_cast<size_t>(slot)] = i;
    }
#if defined(MADV_WILLNEED)
    // Experts may be mapped from a file: the chosen ones are asked for before they are needed.
    if (advises_) {
      for (int e = 0; e < experts; e++) {
        if (expert_start_[static_cast<size_t>(e) + 1] == expert_start_[static_cast<size_t>(e)]) continue;
        int64_t& asked = asked_[static_cast<size_t>(index * experts + e)];
        if (asked && steps_ - asked < ASK_AGAIN) continue;
        asked = steps_;
        for (const Matrix* w : {&layer.expert_gate, &layer.expert_up, &layer.expert_down}) {
          const size_t bytes = static_cast<size_t>(w->panels) * w->panel_bytes;
          const uintptr_t at = reinterpret_cast<uintptr_t>(w->data) + static_cast<size_t>(e) * bytes;
          madvise(reinterpret_cast<void*>(at / 4096 * 4096), bytes + at % 4096, MADV_WILLNEED);
        }
      }
    }
#endif
  }
  pool.meet();
  {
    const int first = pool.first_of(thread, total), last = pool.first_of(thread + 1, total);
    for (int slot = first; slot < last; slot++) {
      const int i = token_of_[static_cast<size_t>(slot)], row = i / top_k;
      const float logit = router_[static_cast<size_t>(row * experts + chosen_[static_cast<size_t>(i)])];
      const float score = 1.0f / (1.0f + std::exp(-logit));
      const float* from = normed_.data() + width * static_cast<size_t>(row);
      float* to = routed_.data() + width * static_cast<size_t>(slot);
      for (size_t k = 0; k < width; k++) to[k] = from[k] * score;
    }
    pool.meet();
  }
  uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
  const auto of_expert = [](const Matrix& first, int expert) {
    Matrix own = first;
    own.data += static_cast<size_t>(expert) * static_cast<size_t>(first.panels) * first.panel_bytes;
    return own;
  };
  const auto each_part = [&](int panels, int step, auto&& work) {
    const int parts = (panels + step - 1) / step;
    pool.share(thread, experts * parts, [&](int task) {
      const int expert = task / parts, first = task % parts * step;
      const int start = expert_start_[static_cast<size_t>(expert)], count = expert_start_[static_cast<size_t>(expert) + 1] - start;
      if (count > 0) work(expert, first, std::min(first + step, panels), start, count);
    });
  };
  const int step = rows <= FEW ? std::max(1, layer.expert_gate.panels / (4 * pool.threads())) : 2;
  inputs(thread, routed_.data(), width, total, shape.hidden_size, {&layer.expert_gate, &layer.expert_up}, true);
  each_part(layer.expert_gate.panels, step, [&](int expert, int first, int last, int start, int count) {
    Inputs from = inputs_of(layer.expert_gate, false);
    from.data += from.stride * static_cast<size_t>(start);
    kernels->linear_swiglu(of_expert(layer.expert_gate, expert), of_expert(layer.expert_up, expert), first, last, from, count,
                           {hidden_.data() + hidden * static_cast<size_t>(start), hidden, Write::set}, scratch);
  });
  inputs(thread, hidden_.data(), hidden, total, layer.expert_gate.rows, {&layer.expert_down}, true);
  const int down_step = rows <= FEW ? std::max(1, layer.expert_down.panels / (4 * pool.threads())) : 2;
  each_part(layer.expert_down.panels, down_step, [&](int expert, int first, int last, int start, int count) {
    Inputs from = inputs_of(layer.expert_down, false);
    from.data += from.stride * static_cast<size_t>(start);
    kernels->linear(of_expert(layer.expert_down, expert), first, last, from, count,
                    {routed_out_.data() + width * static_cast<size_t>(start), width, Write::set}, scratch);
  });
  const int first = pool.first_of(thread, rows), last = pool.first_of(thread + 1, rows);
  for (int row = first; row < last; row++) {
    float* to = x_.data() + width * static_cast<size_t>(row);
    for (int k = 0; k < top_k; k++) {
      const float* from = routed_out_.data() + width * static_cast<size_t>(order_[static_cast<size_t>(row * top_k + k)]);
      for (size_t i = 0; i < width; i++) to[i] += from[i];
    }
  }
  pool.meet();
}

void Decoder::forward(const Piece* pieces, int count, const int32_t* tokens, const float* const* given, float* hidden) {
  int rows = 0;
  row_piece_.clear();
  adapted_ = false;
  for (int p = 0; p < count; p++) {
    rows += pieces[p].rows;
    adapted_ |= pieces[p].adapter >= 0;
    row_piece_.insert(row_piece_.end(), static_cast<size_t>(pieces[p].rows), pieces[p].adapter);
  }
  if (rows == 0) return;
  steps_++;
  running_.resize(static_cast<size_t>(pool.threads()));
  low_.resize(static_cast<size_t>(pool.threads()));
  reserve(rows);
  plan(pieces, count);
  const size_t width = static_cast<size_t>(shape.hidden_size), dim = static_cast<size_t>(shape.head_dim);
  const size_t qkv_width = static_cast<size_t>(shape.heads + 2 * shape.kv_heads) * dim, attended_width = static_cast<size_t>(shape.heads) * dim;
  pool.run([&](int thread) {
    pool.share(thread, rows, [&](int row) {
      float* to = x_.data() + width * static_cast<size_t>(row);
      if (given && given[row]) {
        std::memcpy(to, given[row], sizeof(float) * width);
      } else if (embedding_rows) {
        // One row as the file has it, by way of a panel of its own.
        const Matrix one = shape_matrix(embedding_format, 1, shape.hidden_size);
        uint8_t* panel = scratch_[static_cast<size_t>(thread)].data();
        pack_panel(one, embedding_rows + embedding_stride * static_cast<size_t>(tokens[row]), embedding_stride, 0, panel);
        Matrix own = one;
        own.data = panel;
        kernels->unpack_row(own, 0, to);
      } else {
        kernels->unpack_row(embedding, tokens[row], to);
      }
      int piece = count - 1;
      while (piece_row_[static_cast<size_t>(piece)] > row) piece--;
      const float position = static_cast<float>(pieces[piece].start + row - piece_row_[static_cast<size_t>(piece)]);
      float* angles = angles_.data() + dim * static_cast<size_t>(row);
      for (size_t pair = 0; pair < dim / 2; pair++) {
        angles[pair] = std::cos(position * frequencies_[pair]);
        angles[dim / 2 + pair] = std::sin(position * frequencies_[pair]);
      }
    });
    for (int index = 0; index < shape.layers; index++) {
      const LayerWeights& layer = layers[static_cast<size_t>(index)];
      norm_rows(thread, layer.attention_norm, rows);
      inputs(thread, normed_.data(), width, rows, shape.hidden_size, {&layer.q, &layer.k, &layer.v});
      float* q = qkv_.data();
      float* k = q + attended_width;
      float* v = k + static_cast<size_t>(shape.kv_heads) * dim;
      linears(thread, {{&layer.q, q, qkv_width, Write::set}, {&layer.k, k, qkv_width, Write::set}, {&layer.v, v, qkv_width, Write::set}}, rows);
      adapt(thread, index, PROJ_Q, normed_.data(), shape.hidden_size, q, qkv_width, layer.q.rows);
      adapt(thread, index, PROJ_K, normed_.data(), shape.hidden_size, k, qkv_width, layer.k.rows);
      adapt(thread, index, PROJ_V, normed_.data(), shape.hidden_size, v, qkv_width, layer.v.rows);
      attention(thread, index, pieces);
      inputs(thread, attended_.data(), attended_width, rows, shape.heads * shape.head_dim, {&layer.o});
      linears(thread, {{&layer.o, x_.data(), width, Write::accumulate}}, rows);
      adapt(thread, index, PROJ_O, attended_.data(), shape.heads * shape.head_dim, x_.data(), width, shape.hidden_size);
      feed_forward(thread, index, rows);
    }
    const int first = pool.first_of(thread, rows), last = pool.first_of(thread + 1, rows);
    for (int row = first; row < last; row++)
      kernels->rms_norm(x_.data() + width * static_cast<size_t>(row), final_norm, shape.norm_eps, shape.hidden_size, hidden + width * static_cast<size_t>(row));
  });
}

void Decoder::logits(const float* const* hidden, int rows, float* out) {
  reserve(rows);
  const size_t width = static_cast<size_t>(shape.hidden_size);
  for (int row = 0; row < rows; row++) std::memcpy(normed_.data() + width * static_cast<size_t>(row), hidden[row], sizeof(float) * width);
  pool.run([&](int thread) {
    inputs(thread, normed_.data(), width, rows, shape.hidden_size, {&head});
    linears(thread, {{&head, out, static_cast<size_t>(shape.vocab_size), Write::set}}, rows);
  });
}

}  // namespace ayllu
