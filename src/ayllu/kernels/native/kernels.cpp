// The kernels, written once and compiled for each instruction set (AYLLU_ISA names the namespace).
//
// One rule holds everywhere: what a result is summed from, and in which order, depends on nothing but the row
// itself. Few rows or many, alone or beside others, a row gives the same bits. So batching, prefix reuse and
// speculation change no answer.
#include "kernels.h"

#include <algorithm>

#include "simd.h"

namespace AYLLU_ISA {

using namespace ayllu;

// Inputs of one row, as input_stride describes them.
struct QuantisedRow {
  const int8_t* q;
  const float* scale;
  const float* sum;
  const int32_t* half_sum;
};

inline QuantisedRow quantised_row(const uint8_t* row, int blocks) {
  const uint8_t* after = row + static_cast<size_t>(blocks) * BLOCK;
  return {reinterpret_cast<const int8_t*>(row), reinterpret_cast<const float*>(after),
          reinterpret_cast<const float*>(after + 4 * static_cast<size_t>(blocks)),
          reinterpret_cast<const int32_t*>(after + 8 * static_cast<size_t>(blocks))};
}

// A block of weights: 8 groups of 4 inputs x 16 rows, as unsigned bytes.
template <int bits> inline void load_block(const uint8_t* p, Bytes w[8]) {
  if constexpr (bits == 8) {
    for (int g = 0; g < 8; g++) w[g] = load_bytes(p + 64 * g);
    return;
  }
  for (int g = 0; g < 4; g++) {
    const Bytes both = load_bytes(p + 64 * g);
    w[g] = low_nibbles(both);
    w[g + 4] = high_nibbles(both);
  }
  if constexpr (bits == 5) {
    for (int g = 0; g < 8; g++) w[g] = either(w[g], bits_times_16(p + 256 + 8 * g));
  }
  if constexpr (bits == 6) {
    for (int c = 0; c < 2; c++) {
      const Bytes crumbs = load_bytes(p + 256 + 64 * c);
      w[4 * c] = either(w[4 * c], crumbs_times_16<0>(crumbs));
      w[4 * c + 1] = either(w[4 * c + 1], crumbs_times_16<1>(crumbs));
      w[4 * c + 2] = either(w[4 * c + 2], crumbs_times_16<2>(crumbs));
      w[4 * c + 3] = either(w[4 * c + 3], crumbs_times_16<3>(crumbs));
    }
  }
}

constexpr bool has_minimum(Scales s) { return s == Scales::minimum || s == Scales::k_minimum || s == Scales::k_half_minimum; }
constexpr bool has_halves(Scales s) { return s == Scales::k_half || s == Scales::k_half_minimum; }

// Where block b of a panel lies: the scales of its unit, its place there, and its weights.
struct BlockPlace {
  const uint8_t* scales;
  int place;
  const uint8_t* weights;
};
template <int bits, Scales kind> inline BlockPlace block_place(const uint8_t* panel, int b) {
  constexpr int blocks = unit_blocks(kind);
  const uint8_t* unit = panel + static_cast<size_t>(b / blocks) * unit_bytes(bits, kind);
  return {unit, b % blocks, unit + unit_scale_bytes(kind) + (b % blocks) * block_weight_bytes(bits)};
}

// Factor and offset of a block (of its half `half`, where halves differ).
template <Scales kind> inline void block_scales(const BlockPlace& at, int half, Floats& factor, Floats& offset) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(at.scales);
  if constexpr (kind == Scales::zero) {
    factor = load_halves(halves + LANES * at.place);
  } else if constexpr (kind == Scales::minimum) {
    factor = load_halves(halves);
    offset = load_halves(halves + LANES);
  } else if constexpr (kind == Scales::k_half) {
    factor = mul(load_halves(halves), load_signed(reinterpret_cast<const int8_t*>(at.scales + 64 + 16 * (2 * at.place + half))));
  } else {
    const uint8_t* own = at.scales + 64 + 32 * (kind == Scales::k_minimum ? at.place : 2 * at.place + half);
    factor = mul(load_halves(halves), load_unsigned(own));
    offset = sub(splat(0.0f), mul(load_halves(halves + LANES), load_unsigned(own + 16)));
  }
}

// The one way in which a block's whole-number product becomes part of a result.
template <Scales kind> inline Floats add_block(Floats result, Ints dot, Floats factor, Floats offset, float scale, float sum) {
  Floats value;
  if constexpr (has_minimum(kind)) {
    value = fma(to_floats(dot), factor, mul(offset, splat(sum)));
  } else {
    value = mul(to_floats(dot), factor);
  }
  return fma(value, splat(scale), result);
}

template <Scales kind> inline Ints start(int zero, int32_t sum) {
  return splat_int(has_minimum(kind) ? 0 : -zero * sum);
}

// How many bytes ahead weights are asked for: they come from memory, once. More rows take longer over a block, and
// the processor's own prefetcher then falls behind. Measured with Qwen 1.5B on two threads: 1 row 28.1, 28.9 and 30.8
// ms with 2, 4 and 8 KiB; 8 rows 67, 57.5 and 56.4.
template <int count> constexpr int AHEAD = count <= 2 ? 2048 : 6144;

// One panel times `count` rows, weights unpacked in registers.
template <int bits, Scales kind, int count>
void panel_times_rows(const Matrix& w, const uint8_t* panel, const QuantisedRow* rows, float (*out)[LANES]) {
  constexpr bool small = bits < 8;
  const int zero = w.facts().zero;
  Floats result[count];
  for (int m = 0; m < count; m++) result[m] = splat(0.0f);
  for (int b = 0; b < w.blocks; b++) {
    const BlockPlace at = block_place<bits, kind>(panel, b);
    constexpr int span = static_cast<int>(unit_bytes(bits, kind)) / unit_blocks(kind);
    for (int line = 0; line < span; line += 64) prefetch(at.weights + AHEAD<count> + line);
    Bytes q[8];
    load_block<bits>(at.weights, q);
    Floats factor, offset;
    if constexpr (!has_halves(kind)) {
      block_scales<kind>(at, 0, factor, offset);
      for (int m = 0; m < count; m++) {
        const int8_t* x = rows[m].q + BLOCK * b;
        Ints first = start<kind>(zero, rows[m].half_sum[2 * b] + rows[m].half_sum[2 * b + 1]);
        Ints second = splat_int(0);
        for (int g = 0; g < 4; g++) {
          first = dot4<small>(first, q[g], x + 4 * g);
          second = dot4<small>(second, q[g + 4], x + 16 + 4 * g);
        }
        result[m] = add_block<kind>(result[m], add(first, second), factor, offset, rows[m].scale[b], rows[m].sum[b]);
      }
    } else {
      for (int half = 0; half < 2; half++) {
        block_scales<kind>(at, half, factor, offset);
        for (int m = 0; m < count; m++) {
          const int8_t* x = rows[m].q + BLOCK * b + 16 * half;
          const int32_t sum = rows[m].half_sum[2 * b + half];
          Ints dot = start<kind>(zero, sum);
          for (int g = 0; g < 4; g++) dot = dot4<small>(dot, q[4 * half + g], x + 4 * g);
          result[m] = add_block<kind>(result[m], dot, factor, offset, rows[m].scale[b], static_cast<float>(sum));
        }
      }
    }
  }
  for (int m = 0; m < count; m++) store(out[m], result[m]);
}

// The same for many rows: panels are unpacked once into `scratch`, and then pass over strips of rows.
struct Unpacked {
  uint8_t* bytes;   // [blocks][8][64]
  float* factors;   // [blocks or half blocks][16]
  float* offsets;
};

inline Unpacked unpacked_at(uint8_t* scratch, int blocks) {
  uint8_t* factors = scratch + static_cast<size_t>(blocks) * 512;
  return {scratch, reinterpret_cast<float*>(factors), reinterpret_cast<float*>(factors + static_cast<size_t>(blocks) * 128)};
}
inline size_t unpacked_bytes(int blocks) { return static_cast<size_t>(blocks) * (512 + 256); }

template <int bits, Scales kind> void unpack_panel(const Matrix& w, const uint8_t* panel, const Unpacked& out) {
  constexpr int halves = has_halves(kind) ? 2 : 1;
  for (int b = 0; b < w.blocks; b++) {
    Bytes q[8];
    const BlockPlace at = block_place<bits, kind>(panel, b);
    load_block<bits>(at.weights, q);
    for (int g = 0; g < 8; g++) store_bytes(out.bytes + 512 * static_cast<size_t>(b) + 64 * g, q[g]);
    for (int half = 0; half < halves; half++) {
      Floats factor, offset;
      block_scales<kind>(at, half, factor, offset);
      store(out.factors + LANES * (static_cast<size_t>(b) * halves + half), factor);
      if constexpr (has_minimum(kind)) store(out.offsets + LANES * (static_cast<size_t>(b) * halves + half), offset);
    }
  }
}

template <Scales kind, bool small, int panels>
void unpacked_times_strip(int blocks, int zero, const Unpacked* w, const StripBlock* x, float (*out)[STRIP][LANES]) {
  constexpr int halves = has_halves(kind) ? 2 : 1, groups = 8 / halves;
  Floats result[panels][STRIP];
  for (int p = 0; p < panels; p++)
    for (int m = 0; m < STRIP; m++) result[p][m] = splat(0.0f);
  for (int b = 0; b < blocks * halves; b++) {
    const StripBlock& block = x[b / halves];
    const int half = halves == 2 ? b % 2 : 0;
    const int32_t* sums = halves == 2 ? block.half_sum[half] : block.whole_sum;
    Ints dot[panels][STRIP];
    for (int m = 0; m < STRIP; m++)
      for (int p = 0; p < panels; p++) dot[p][m] = start<kind>(zero, sums[m]);
    for (int g = 0; g < groups; g++) {
      Bytes q[panels];
      for (int p = 0; p < panels; p++) q[p] = load_bytes(w[p].bytes + 64 * (static_cast<size_t>(b) * groups + g));
      for (int m = 0; m < STRIP; m++)
        for (int p = 0; p < panels; p++) dot[p][m] = dot4<small>(dot[p][m], q[p], block.q[groups * half + g][m]);
    }
    for (int p = 0; p < panels; p++) {
      const Floats factor = load(w[p].factors + LANES * static_cast<size_t>(b));
      Floats offset = factor;
      if constexpr (has_minimum(kind)) offset = load(w[p].offsets + LANES * static_cast<size_t>(b));
      for (int m = 0; m < STRIP; m++) {
        const float sum = halves == 2 ? static_cast<float>(sums[m]) : block.sum[m];
        result[p][m] = add_block<kind>(result[p][m], dot[p][m], factor, offset, block.scale[m], sum);
      }
    }
  }
  for (int p = 0; p < panels; p++)
    for (int m = 0; m < STRIP; m++) store(out[p][m], result[p][m]);
}

constexpr int FLOAT_STRIP = 12;  // rows that pass together over plain numbers

// Matrices of plain numbers: `panels` panels times `count` rows.
template <Scales kind, int panels, int count>
void float_panels_times_rows(const Matrix& w, const uint8_t* const* panel, const uint8_t* const* rows, float (*out)[FLOAT_STRIP][LANES]) {
  Floats result[panels][count];
  for (int p = 0; p < panels; p++)
    for (int m = 0; m < count; m++) result[p][m] = splat(0.0f);
  if constexpr (kind == Scales::bfloat16) {
    for (int k = 0; k < (w.cols + 1) / 2; k++)
      for (int p = 0; p < panels; p++) {
        const uint16_t* pairs = reinterpret_cast<const uint16_t*>(panel[p]) + 32 * static_cast<size_t>(k);
        if constexpr (count <= 2) prefetch(reinterpret_cast<const uint8_t*>(pairs) + 2048);
        for (int m = 0; m < count; m++) result[p][m] = dot2(result[p][m], pairs, reinterpret_cast<const uint16_t*>(rows[m]) + 2 * k);
      }
  } else {
    for (int k = 0; k < w.cols; k++)
      for (int p = 0; p < panels; p++) {
        const Floats weights = kind == Scales::float32 ? load(reinterpret_cast<const float*>(panel[p]) + LANES * static_cast<size_t>(k))
                                                       : load_halves(reinterpret_cast<const uint16_t*>(panel[p]) + LANES * static_cast<size_t>(k));
        for (int m = 0; m < count; m++) result[p][m] = fma(weights, splat(reinterpret_cast<const float*>(rows[m])[k]), result[p][m]);
      }
  }
  for (int p = 0; p < panels; p++)
    for (int m = 0; m < count; m++) store(out[p][m], result[p][m]);
}

// What a finished tile of results does: go to `out`, or wait beside its gate.
inline void write_tile(const float (*tile)[LANES], int count, int panel, int matrix_rows, const Outputs& out, int first_row) {
  const int column = panel * LANES, lanes = std::min(LANES, matrix_rows - column);
  for (int m = 0; m < count; m++) {
    float* to = out.row(first_row + m) + column;
    if (lanes == LANES) {
      Floats value = load(tile[m]);
      if (out.write == Write::accumulate) value = add(load(to), value);
      store(to, value);
    } else {
      for (int i = 0; i < lanes; i++) to[i] = out.write == Write::accumulate ? to[i] + tile[m][i] : tile[m][i];
    }
  }
}

inline Floats silu(Floats x) { return div(x, add(splat(1.0f), exponential(sub(splat(0.0f), x)))); }

inline void write_swiglu(const float (*gate)[LANES], const float (*up)[LANES], int count, int panel, int matrix_rows,
                         const Outputs& out, int first_row) {
  float tile[LANES][LANES];
  for (int m = 0; m < count; m++) store(tile[m], mul(silu(load(gate[m])), load(up[m])));
  write_tile(tile, count, panel, matrix_rows, out, first_row);
}

template <int bits, Scales kind>
void few_rows(const Matrix& w, const uint8_t* panel, const QuantisedRow* rows, int count, float (*out)[LANES]) {
  switch (count) {
    case 1: return panel_times_rows<bits, kind, 1>(w, panel, rows, out);
    case 2: return panel_times_rows<bits, kind, 2>(w, panel, rows, out);
    case 3: return panel_times_rows<bits, kind, 3>(w, panel, rows, out);
    case 4: return panel_times_rows<bits, kind, 4>(w, panel, rows, out);
    case 5: return panel_times_rows<bits, kind, 5>(w, panel, rows, out);
    case 6: return panel_times_rows<bits, kind, 6>(w, panel, rows, out);
    case 7: return panel_times_rows<bits, kind, 7>(w, panel, rows, out);
    case 8: return panel_times_rows<bits, kind, 8>(w, panel, rows, out);
    case 9: return panel_times_rows<bits, kind, 9>(w, panel, rows, out);
    case 10: return panel_times_rows<bits, kind, 10>(w, panel, rows, out);
    case 11: return panel_times_rows<bits, kind, 11>(w, panel, rows, out);
    default: return panel_times_rows<bits, kind, 12>(w, panel, rows, out);
  }
}

template <Scales kind, int panels>
void float_strip(const Matrix& w, const uint8_t* const* panel, const uint8_t* const* rows, int count, float (*out)[FLOAT_STRIP][LANES]) {
  switch (count) {
    case 1: return float_panels_times_rows<kind, panels, 1>(w, panel, rows, out);
    case 2: return float_panels_times_rows<kind, panels, 2>(w, panel, rows, out);
    case 3: return float_panels_times_rows<kind, panels, 3>(w, panel, rows, out);
    case 4: return float_panels_times_rows<kind, panels, 4>(w, panel, rows, out);
    case 5: return float_panels_times_rows<kind, panels, 5>(w, panel, rows, out);
    case 6: return float_panels_times_rows<kind, panels, 6>(w, panel, rows, out);
    case 7: return float_panels_times_rows<kind, panels, 7>(w, panel, rows, out);
    case 8: return float_panels_times_rows<kind, panels, 8>(w, panel, rows, out);
    case 9: return float_panels_times_rows<kind, panels, 9>(w, panel, rows, out);
    case 10: return float_panels_times_rows<kind, panels, 10>(w, panel, rows, out);
    case 11: return float_panels_times_rows<kind, panels, 11>(w, panel, rows, out);
    default: return float_panels_times_rows<kind, panels, 12>(w, panel, rows, out);
  }
}

// Panels over rows of inputs, weights unpacked in registers: of one matrix, or of gate and up.
template <int bits, Scales kind, int matrices>
void quantised_panel(const Matrix* const* w, int panel, const Inputs& x, int rows, const Outputs& out) {
  QuantisedRow some[FEW_ROWS];
  float tile[2][FEW_ROWS][LANES];
  for (int first = 0; first < rows; first += FEW_ROWS) {
    const int count = std::min(FEW_ROWS, rows - first);
    for (int m = 0; m < count; m++) some[m] = quantised_row(x.row(first + m), w[0]->blocks);
    for (int p = 0; p < matrices; p++) few_rows<bits, kind>(*w[p], w[p]->panel(panel), some, count, tile[p]);
    if (matrices == 2) write_swiglu(tile[0], tile[1], count, panel, w[0]->rows, out, first);
    else write_tile(tile[0], count, panel, w[0]->rows, out, first);
  }
}

// Panels over strips of inputs, weights unpacked in memory: gate and up, or one or two neighbours of one matrix.
template <int bits, Scales kind, int panels, bool swiglu>
void quantised_strips(const Matrix* const* w, int panel, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch) {
  const int blocks = w[0]->blocks;
  Unpacked unpacked[panels];
  for (int p = 0; p < panels; p++) {
    unpacked[p] = unpacked_at(scratch + static_cast<size_t>(p) * unpacked_bytes(blocks), blocks);
    const Matrix& from = *w[swiglu ? p : 0];
    unpack_panel<bits, kind>(from, from.panel(swiglu ? panel : panel + p), unpacked[p]);
  }
  float tile[panels][STRIP][LANES];
  for (int first = 0; first < rows; first += STRIP) {
    const int count = std::min(STRIP, rows - first);
    unpacked_times_strip<kind, bits < 8, panels>(blocks, w[0]->facts().zero, unpacked, reinterpret_cast<const StripBlock*>(x.row(first / STRIP)), tile);
    if constexpr (swiglu) write_swiglu(tile[0], tile[1], count, panel, w[0]->rows, out, first);
    else
      for (int p = 0; p < panels; p++) write_tile(tile[p], count, panel + p, w[0]->rows, out, first);
  }
}

template <Scales kind, int matrices>
void float_panel(const Matrix* const* w, int panel, const Inputs& x, int rows, const Outputs& out) {
  const uint8_t* data[2] = {w[0]->panel(panel), matrices == 2 ? w[1]->panel(panel) : nullptr};
  const uint8_t* strip_rows[FLOAT_STRIP];
  float tile[2][FLOAT_STRIP][LANES];
  for (int first = 0; first < rows; first += FLOAT_STRIP) {
    const int count = std::min(FLOAT_STRIP, rows - first);
    for (int m = 0; m < count; m++) strip_rows[m] = x.row(first + m);
    float_strip<kind, matrices>(*w[0], data, strip_rows, count, tile);
    if (matrices == 2) write_swiglu(tile[0], tile[1], count, panel, w[0]->rows, out, first);
    else write_tile(tile[0], count, panel, w[0]->rows, out, first);
  }
}

template <Scales kind> void float_panel_pair(const Matrix& w, int panel, const Inputs& x, int rows, const Outputs& out) {
  const uint8_t* data[2] = {w.panel(panel), w.panel(panel + 1)};
  const uint8_t* strip_rows[FLOAT_STRIP];
  float tile[2][FLOAT_STRIP][LANES];
  for (int first = 0; first < rows; first += FLOAT_STRIP) {
    const int count = std::min(FLOAT_STRIP, rows - first);
    for (int m = 0; m < count; m++) strip_rows[m] = x.row(first + m);
    float_strip<kind, 2>(w, data, strip_rows, count, tile);
    for (int p = 0; p < 2; p++) write_tile(tile[p], count, panel + p, w.rows, out, first);
  }
}

template <int bits, Scales kind>
void linear_of(const Matrix& w, int first, int last, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch) {
  const Matrix* one[1] = {&w};
  int panel = first;
  if constexpr (is_float(kind)) {
    for (; panel + 1 < last; panel += 2) float_panel_pair<kind>(w, panel, x, rows, out);
    for (; panel < last; panel++) float_panel<kind, 1>(one, panel, x, rows, out);
  } else if (x.strips) {
    for (; panel + 1 < last; panel += 2) quantised_strips<bits, kind, 2, false>(one, panel, x, rows, out, scratch);
    for (; panel < last; panel++) quantised_strips<bits, kind, 1, false>(one, panel, x, rows, out, scratch);
  } else {
    for (; panel < last; panel++) quantised_panel<bits, kind, 1>(one, panel, x, rows, out);
  }
}

template <int bits, Scales kind>
void swiglu_of(const Matrix& gate, const Matrix& up, int first, int last, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch) {
  const Matrix* both[2] = {&gate, &up};
  for (int panel = first; panel < last; panel++) {
    if constexpr (is_float(kind)) float_panel<kind, 2>(both, panel, x, rows, out);
    else if (x.strips) quantised_strips<bits, kind, 2, true>(both, panel, x, rows, out, scratch);
    else quantised_panel<bits, kind, 2>(both, panel, x, rows, out);
  }
}

#define AYLLU_BY_FORMAT(call)                                            \
  switch (format) {                                                      \
    case 0: call(4, Scales::zero)                                        \
    case 1: call(4, Scales::minimum)                                     \
    case 2: call(5, Scales::zero)                                        \
    case 3: call(5, Scales::minimum)                                     \
    case 4: call(8, Scales::zero)                                        \
    case 5: call(4, Scales::k_half_minimum)                              \
    case 6: call(4, Scales::k_half)                                      \
    case 7: call(4, Scales::k_minimum)                                   \
    case 8: call(5, Scales::k_minimum)                                   \
    case 9: call(6, Scales::k_half)                                      \
    case 10: call(32, Scales::float32)                                   \
    case 11: call(16, Scales::float16)                                   \
    default: call(16, Scales::bfloat16)                                  \
  }

void linear(const Matrix& w, int first, int last, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch) {
  const int format = w.format;
#define AYLLU_CALL(bits, kind) return linear_of<bits, kind>(w, first, last, x, rows, out, scratch);
  AYLLU_BY_FORMAT(AYLLU_CALL)
#undef AYLLU_CALL
}

void linear_swiglu(const Matrix& gate, const Matrix& up, int first, int last, const Inputs& x, int rows, const Outputs& out, uint8_t* scratch) {
  const int format = gate.format;
#define AYLLU_CALL(bits, kind) return swiglu_of<bits, kind>(gate, up, first, last, x, rows, out, scratch);
  AYLLU_BY_FORMAT(AYLLU_CALL)
#undef AYLLU_CALL
}

template <int bits, Scales kind> void unpack_row_of(const Matrix& w, int row, float* out) {
  const uint8_t* panel = w.panel(row / LANES);
  const int lane = row % LANES;
  if constexpr (is_float(kind)) {
    float lanes[LANES];
    for (int k = 0; k < w.cols; k++) {
      if constexpr (kind == Scales::bfloat16) {
        const uint32_t bits32 = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(panel)[32 * static_cast<size_t>(k / 2) + 2 * lane + k % 2]) << 16;
        std::memcpy(out + k, &bits32, 4);
      } else if constexpr (kind == Scales::float32) {
        out[k] = reinterpret_cast<const float*>(panel)[LANES * static_cast<size_t>(k) + lane];
      } else {
        store(lanes, load_halves(reinterpret_cast<const uint16_t*>(panel) + LANES * static_cast<size_t>(k)));
        out[k] = lanes[lane];
      }
    }
  } else {
    constexpr int halves = has_halves(kind) ? 2 : 1;
    for (int b = 0; b < w.blocks; b++) {
      Bytes q[8];
      uint8_t bytes[8][64];
      float factors[2][LANES], offsets[2][LANES];
      const BlockPlace at = block_place<bits, kind>(panel, b);
      load_block<bits>(at.weights, q);
      for (int g = 0; g < 8; g++) store_bytes(bytes[g], q[g]);
      for (int half = 0; half < halves; half++) {
        Floats factor = splat(0.0f), offset = factor;
        block_scales<kind>(at, half, factor, offset);
        store(factors[half], factor);
        store(offsets[half], offset);
      }
      for (int i = 0; i < BLOCK && BLOCK * b + i < w.cols; i++) {
        const int half = halves == 2 ? i / 16 : 0, q_i = bytes[i / 4][4 * lane + i % 4];
        out[BLOCK * b + i] = has_minimum(kind) ? factors[half][lane] * static_cast<float>(q_i) + offsets[half][lane]
                                               : factors[half][lane] * static_cast<float>(q_i - w.facts().zero);
      }
    }
  }
}

void unpack_row(const Matrix& w, int row, float* out) {
  const int format = w.format;
#define AYLLU_CALL(bits, kind) return unpack_row_of<bits, kind>(w, row, out);
  AYLLU_BY_FORMAT(AYLLU_CALL)
#undef AYLLU_CALL
}

// x [32] -> int8 with the scale that makes the number farthest from zero -128: a step 1/128 of it, not 1/127.
// Infinity and NaN make the scale NaN, so that they show in the result instead of vanishing in a conversion.
void quantise_block(const float* x, int8_t* q, float* scale, float* sum_of, int32_t* half_sums) {
  const Floats low = load(x), high = load(x + 16), zero = splat(0.0f);
  const float most = largest(maximum(low, high)), least = -largest(maximum(sub(zero, low), sub(zero, high)));
  const float farthest = -least > most ? least : most;
  const float finite = AYLLU_ISA::sum(add(mul(low, zero), mul(high, zero)));  // 0, or NaN
  const float inverse = std::fabs(farthest) > 1e-36f && finite == 0.0f ? -128.0f / farthest : 0.0f;
  // A number as far on the other side would be +128.
  const Floats top = splat(127.0f);
  const Ints a = to_ints(minimum(top, mul(low, splat(inverse)))), b = to_ints(minimum(top, mul(high, splat(inverse))));
  store_signed(q, a);
  store_signed(q + 16, b);
  half_sums[0] = AYLLU_ISA::sum(a);
  half_sums[1] = AYLLU_ISA::sum(b);
  *sum_of = static_cast<float>(half_sums[0] + half_sums[1]);
  *scale = farthest / -128.0f + finite;
}

void make_inputs(InputKind kind, const float* x, size_t x_stride, int rows, int cols, uint8_t* out, size_t stride,
                 int first_block, int last_block) {
  const int blocks = (cols + BLOCK - 1) / BLOCK;
  for (int r = 0; r < rows; r++) {
    const float* from = x + x_stride * static_cast<size_t>(r);
    uint8_t* row = out + stride * static_cast<size_t>(r);
    for (int b = first_block; b < last_block; b++) {
      float padded[BLOCK];
      const float* block = from + BLOCK * b;
      if (BLOCK * (b + 1) > cols) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, block, sizeof(float) * static_cast<size_t>(cols - BLOCK * b));
        block = padded;
      }
      if (kind == InputKind::quantised) {
        uint8_t* after = row + static_cast<size_t>(blocks) * BLOCK;
        quantise_block(block, reinterpret_cast<int8_t*>(row) + BLOCK * b, reinterpret_cast<float*>(after) + b,
                       reinterpret_cast<float*>(after + 4 * static_cast<size_t>(blocks)) + b,
                       reinterpret_cast<int32_t*>(after + 8 * static_cast<size_t>(blocks)) + 2 * b);
      } else if (kind == InputKind::bfloat16) {
        store_bf16(reinterpret_cast<uint16_t*>(row) + BLOCK * b, load(block));
        store_bf16(reinterpret_cast<uint16_t*>(row) + BLOCK * b + 16, load(block + 16));
      } else {
        std::memcpy(reinterpret_cast<float*>(row) + BLOCK * b, block, sizeof padded);
      }
    }
  }
}

void make_strip(const float* x, size_t x_stride, int rows, int cols, uint8_t* out) {
  StripBlock* blocks = reinterpret_cast<StripBlock*>(out);
  for (int b = 0; b < (cols + BLOCK - 1) / BLOCK; b++) {
    StripBlock& block = blocks[b];
    if (rows < STRIP) std::memset(&block, 0, sizeof block);
    for (int m = 0; m < rows; m++) {
      float padded[BLOCK] = {};
      const float* from = x + x_stride * static_cast<size_t>(m) + BLOCK * b;
      if (BLOCK * (b + 1) > cols) {
        std::memcpy(padded, from, sizeof(float) * static_cast<size_t>(cols - BLOCK * b));
        from = padded;
      }
      int8_t q[BLOCK];
      int32_t halves[2];
      quantise_block(from, q, &block.scale[m], &block.sum[m], halves);
      for (int g = 0; g < 8; g++) std::memcpy(block.q[g][m], q + 4 * g, 4);
      block.whole_sum[m] = halves[0] + halves[1];
      block.half_sum[0][m] = halves[0];
      block.half_sum[1][m] = halves[1];
    }
  }
}

void rms_norm(const float* x, const float* weight, float eps, int cols, float* out) {
  Floats squares = splat(0.0f);
  int k = 0;
  for (; k + 16 <= cols; k += 16) squares = fma(load(x + k), load(x + k), squares);
  float total = sum(squares);
  for (int i = k; i < cols; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(cols) + eps);
  for (k = 0; k + 16 <= cols; k += 16) {
    Floats value = mul(load(x + k), splat(scale));
    if (weight) value = mul(value, load(weight + k));
    store(out + k, value);
  }
  for (; k < cols; k++) out[k] = x[k] * scale * (weight ? weight[k] : 1.0f);
}

void silu_multiply(const float* gate, const float* up, int count, float* out) {
  int k = 0;
  for (; k + 16 <= count; k += 16) store(out + k, mul(silu(load(gate + k)), load(up + k)));
  if (k == count) return;
  float g[LANES] = {}, u[LANES] = {};
  std::memcpy(g, gate + k, sizeof(float) * static_cast<size_t>(count - k));
  std::memcpy(u, up + k, sizeof(float) * static_cast<size_t>(count - k));
  store(g, mul(silu(load(g)), load(u)));
  std::memcpy(out + k, g, sizeof(float) * static_cast<size_t>(count - k));
}

void rotate(float* head, const float* cos, const float* sin, int head_dim, bool interleaved) {
  const int pairs = head_dim / 2;
  for (int p = 0; p < pairs; p++) {
    float* a = interleaved ? head + 2 * p : head + p;
    float* b = interleaved ? a + 1 : head + p + pairs;
    const float x = *a, y = *b;
    *a = x * cos[p] - y * sin[p];
    *b = x * sin[p] + y * cos[p];
  }
}

inline uint16_t to_bf16(float x) {
  float lanes[LANES] = {x};
  uint16_t out[LANES];
  store_bf16(out, load(lanes));
  return out[0];
}

void store_queries(const float* head, float scale, int head_dim, uint16_t* out) {
  int k = 0;
  for (; k + 16 <= head_dim; k += 16) store_bf16(out + k, mul(load(head + k), splat(scale)));
  for (; k < head_dim; k++) out[k] = to_bf16(head[k] * scale);
}

// int8 numbers of one head with their scale: the largest becomes 127.
float quantise_head(const float* head, int head_dim, int8_t* q) {
  float most = 0.0f, finite = 0.0f;
  for (int k = 0; k < head_dim; k++) {
    most = std::max(most, std::fabs(head[k]));
    finite += head[k] * 0.0f;
  }
  const float inverse = most > 1e-36f && finite == 0.0f ? 127.0f / most : 0.0f;
  for (int k = 0; k < head_dim; k++) q[k] = static_cast<int8_t>(std::lrint(head[k] * inverse));
  return most / 127.0f + finite;
}

constexpr int MOST_HEAD = 1 << 14;

void store_key(const KvLayout& layout, const float* head, uint8_t* tile, int slot) {
  if (layout.int8) {
    int8_t q[MOST_HEAD];
    const float scale = quantise_head(head, layout.head_dim, q);
    for (int k = 0; k < layout.head_dim; k++) reinterpret_cast<int8_t*>(tile)[(k / 2) * 32 + 2 * slot + k % 2] = q[k];
    reinterpret_cast<float*>(tile + static_cast<size_t>(layout.head_dim) * 16)[slot] = scale;
    return;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(tile);
  uint16_t lanes[LANES];
  int k = 0;
  for (; k + 16 <= layout.head_dim; k += 16) {
    store_bf16(lanes, load(head + k));
    for (int i = 0; i < 16; i += 2) std::memcpy(out + (k + i) / 2 * 32 + 2 * slot, lanes + i, 4);
  }
  for (; k < layout.head_dim; k++) out[(k / 2) * 32 + 2 * slot + k % 2] = to_bf16(head[k]);
}

// The first position of a tile clears it: what a block held before, NaN perhaps, must not reach a sum even with
// weight zero.
void store_value(const KvLayout& layout, const float* head, uint8_t* tile, int slot) {
  if (slot == 0) std::memset(tile, 0, layout.value_tile_bytes());
  const size_t row = static_cast<size_t>(slot / 2) * layout.padded_dim * 2 + slot % 2;
  if (layout.int8) {
    int8_t q[MOST_HEAD];
    const float scale = quantise_head(head, layout.head_dim, q);
    for (int k = 0; k < layout.head_dim; k++) reinterpret_cast<int8_t*>(tile)[row + 2 * static_cast<size_t>(k)] = q[k];
    reinterpret_cast<float*>(tile + static_cast<size_t>(layout.padded_dim) * 16)[slot] = scale;
    return;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(tile) + row;
  uint16_t lanes[LANES];
  for (int k = 0; k < layout.head_dim; k += 16) {
    const int some = std::min(16, layout.head_dim - k);
    float part[LANES] = {};
    std::memcpy(part, head + k, sizeof(float) * static_cast<size_t>(some));
    store_bf16(lanes, load(part));
    for (int i = 0; i < some; i++) out[2 * static_cast<size_t>(k + i)] = lanes[i];
  }
}

// int8 numbers as bfloat16, exactly.
inline void widen(const uint8_t* from, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; i += 16) store_bf16(to + i, load_signed(reinterpret_cast<const int8_t*>(from) + i));
}

// Scores of all queries against `tiles` neighbouring tiles. What comes next is asked for meanwhile: these tiles'
// values and the next tiles' keys, which lie all over the cache.
template <int count, int tiles>
void scores_of(const KvLayout& layout, const uint8_t* const* keys, const uint16_t* queries, float (*scores)[CHUNK_TILES * 16], int column) {
  Floats score[count][tiles];
  for (int m = 0; m < count; m++)
    for (int t = 0; t < tiles; t++) score[m][t] = splat(0.0f);
  for (int k = 0; k < layout.head_dim / 2; k++)
    for (int m = 0; m < count; m++)
      for (int t = 0; t < tiles; t++)
        score[m][t] = dot2(score[m][t], reinterpret_cast<const uint16_t*>(keys[t]) + 32 * k, queries + static_cast<size_t>(m) * layout.head_dim + 2 * k);
  for (int m = 0; m < count; m++)
    for (int t = 0; t < tiles; t++) store(scores[m] + column + 16 * t, score[m][t]);
}

// `wide` vectors of the values' dimensions from `dim` on, for all queries.
template <int count, int wide>
void values_of(const KvLayout& layout, const uint8_t* const* tiles, int pairs, const uint16_t (*weights)[CHUNK_TILES * 16], int dim, Partial* out) {
  Floats sum[count][wide];
  for (int m = 0; m < count; m++)
    for (int i = 0; i < wide; i++) sum[m][i] = splat(0.0f);
  for (int pair = 0; pair < pairs; pair++) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(tiles[pair / 8]) + (static_cast<size_t>(pair % 8) * layout.padded_dim + dim) * 2;
    for (int i = 0; i < wide; i++)
      for (int m = 0; m < count; m++) sum[m][i] = dot2(sum[m][i], values + 32 * i, weights[m] + 2 * pair);
  }
  for (int m = 0; m < count; m++)
    for (int i = 0; i < wide; i++) store(out[m].sum + dim + 16 * i, sum[m][i]);
}

// Softmax weights of one query from its scores, as bfloat16: 2^(score - best). whole: no key is hidden from it.
template <bool whole>
void weights_of(const KvLayout& layout, const ChunkView& chunk, float* scores, int tiles, int seen, uint16_t* weights, Partial* out) {
  const Floats never = splat(-INFINITY);
  const auto lanes = [&](int t) { return std::min(layout.tile_keys, seen - t * layout.tile_keys); };
  Floats best = never;
  for (int t = 0; t < tiles; t++) {
    Floats score = load(scores + 16 * t);
    if constexpr (!whole) score = first_lanes(score, lanes(t), never);
    best = maximum(best, score);
  }
  out->best = largest(best);
  Floats total = splat(0.0f);
  for (int t = 0; t < tiles; t++) {
    Floats weight = power_of_two(sub(load(scores + 16 * t), splat(out->best)));
    if constexpr (!whole) weight = first_lanes(weight, lanes(t), splat(0.0f));
    total = add(total, weight);
    if (layout.int8) {
      // Slots that nobody has written have no scale: zero times whatever lies there must stay zero.
      Floats scale = load(reinterpret_cast<const float*>(chunk.values[t] + static_cast<size_t>(layout.padded_dim) * 16));
      weight = mul(weight, first_lanes(scale, lanes(t), splat(0.0f)));
    }
    store_bf16(weights + 16 * t, weight);
  }
  out->total = sum(total);
}

template <int count>
void attend_count(const KvLayout& layout, const ChunkView& chunk, const uint16_t* queries, const int32_t* seen, Partial* out, uint8_t* scratch) {
  constexpr int together = count <= 3 ? 4 : 2;  // tiles: sums enough to hide a product's latency
  float scores[count][CHUNK_TILES * 16];
  uint16_t weights[count][CHUNK_TILES * 16];
  const uint8_t* keys[CHUNK_TILES];
  const uint8_t* values[CHUNK_TILES];
  int most = 0;
  for (int m = 0; m < count; m++) most = std::max(most, seen[m]);
  const int tiles = std::min(chunk.tiles, (most + layout.tile_keys - 1) / layout.tile_keys);
  const size_t key_numbers = static_cast<size_t>(layout.head_dim) * 16, value_numbers = static_cast<size_t>(layout.padded_dim) * 16;
  for (int t = 0; t < tiles; t++) {
    keys[t] = chunk.keys[t];
    values[t] = chunk.values[t];
    if (!layout.int8) continue;
    uint16_t* wide = reinterpret_cast<uint16_t*>(scratch) + static_cast<size_t>(t) * (key_numbers + value_numbers);
    widen(keys[t], key_numbers, wide);
    widen(values[t], value_numbers, wide + key_numbers);
    keys[t] = reinterpret_cast<const uint8_t*>(wide);
    values[t] = reinterpret_cast<const uint8_t*>(wide + key_numbers);
  }
  const auto fetch = [&](const uint8_t* tile, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) prefetch(tile + line);
  };
  const bool ahead = chunk.cold && !layout.int8;
  if (ahead)
    for (int t = 0; t < std::min(together, tiles); t++) fetch(keys[t], key_numbers * 2);
  for (int t = 0; t < tiles;) {
    const int some = t + together <= tiles ? together : 1;
    if (ahead) {
      for (int i = t + some; i < std::min(t + some + together, tiles); i++) fetch(keys[i], key_numbers * 2);
      for (int i = t; i < t + some; i++) fetch(values[i], value_numbers * 2);
    }
    if (some == together) scores_of<count, together>(layout, keys + t, queries, scores, 16 * t);
    else scores_of<count, 1>(layout, keys + t, queries, scores, 16 * t);
    t += some;
  }
  for (int m = 0; m < count; m++) {
    if (layout.int8)
      for (int t = 0; t < tiles; t++) {
        const Floats scale = load(reinterpret_cast<const float*>(chunk.keys[t] + key_numbers));
        store(scores[m] + 16 * t, mul(load(scores[m] + 16 * t), scale));
      }
    if (layout.tile_keys == 16 && seen[m] >= 16 * tiles) weights_of<true>(layout, chunk, scores[m], tiles, seen[m], weights[m], &out[m]);
    else weights_of<false>(layout, chunk, scores[m], tiles, seen[m], weights[m], &out[m]);
  }
  // Keys beyond the last one seen are not touched; a tile with an odd number of keys ends in a cleared slot.
  int pairs = 0;
  if (most > 0) {
    const int last = std::min(most, layout.tile_keys * chunk.tiles) - 1;
    pairs = last / layout.tile_keys * 8 + (last % layout.tile_keys) / 2 + 1;
  }
  int dim = 0;
  for (; dim + 64 <= layout.padded_dim; dim += 64) values_of<count, 4>(layout, values, pairs, weights, dim, out);
  for (; dim < layout.padded_dim; dim += 16) values_of<count, 1>(layout, values, pairs, weights, dim, out);
}

void attend_chunk(const KvLayout& layout, const ChunkView& chunk, const uint16_t* queries, int count, const int32_t* seen, Partial* out, uint8_t* scratch) {
  switch (count) {
    case 1: return attend_count<1>(layout, chunk, queries, seen, out, scratch);
    case 2: return attend_count<2>(layout, chunk, queries, seen, out, scratch);
    case 3: return attend_count<3>(layout, chunk, queries, seen, out, scratch);
    case 4: return attend_count<4>(layout, chunk, queries, seen, out, scratch);
    case 5: return attend_count<5>(layout, chunk, queries, seen, out, scratch);
    default: return attend_count<6>(layout, chunk, queries, seen, out, scratch);
  }
}

// Two parts of one softmax (Milakov and Gimelshein, 2018). An empty part (best -infinity) changes nothing.
void merge(Partial* into, const Partial& from, int padded_dim) {
  if (from.best == -INFINITY) return;
  if (into->best == -INFINITY) {
    std::memcpy(into->sum, from.sum, sizeof(float) * static_cast<size_t>(padded_dim));
    into->best = from.best;
    into->total = from.total;
    return;
  }
  const float best = std::max(into->best, from.best);
  float factors[LANES] = {into->best - best, from.best - best};
  store(factors, power_of_two(load(factors)));
  const float old = factors[0], more = factors[1];
  for (int k = 0; k < padded_dim; k += 16)
    store(into->sum + k, fma(load(into->sum + k), splat(old), mul(load(from.sum + k), splat(more))));
  into->total = into->total * old + from.total * more;
  into->best = best;
}

void divide(const Partial& from, int head_dim, float* out) {
  const float inverse = 1.0f / from.total;
  int k = 0;
  for (; k + 16 <= head_dim; k += 16) store(out + k, mul(load(from.sum + k), splat(inverse)));
  for (; k < head_dim; k++) out[k] = from.sum[k] * inverse;
}

extern const Kernels table;
const Kernels table = {AYLLU_ISA_NAME, make_inputs, make_strip, linear,      linear_swiglu, rms_norm, silu_multiply, rotate,
                       store_queries,  store_key,     store_value, attend_chunk,  merge,    divide,        unpack_row};

}  // namespace AYLLU_ISA

namespace ayllu {
const Kernels* AYLLU_ISA_TABLE() { return &AYLLU_ISA::table; }
}  // namespace ayllu
