// How weights lie in memory once packed, for every format a file may hold. Exact: packing moves bits, it never
// rounds. A matrix is cut into panels of 16 rows, a panel into units of one, two or eight blocks of 32 inputs: the
// scales of the unit, then its weights. So a panel is read from front to back, which is what memory does fastest.
// Padding rows and inputs are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ayllu {

constexpr int LANES = 16;  // rows of a panel
constexpr int BLOCK = 32;  // inputs of a block

// Numbers are part of the C interface. w is the weight, q the stored whole number.
enum class Scales : int32_t {
  zero = 0,       // w = d (q - zero): d per block
  minimum = 1,    // w = d q + m: d and m per block
  k_minimum = 2,  // w = d s q - e t: d, e per 256 inputs, s, t per block (8 bits)
  k_half = 3,     // w = d s (q - zero): d per 256 inputs, s per half block (8 bits, signed)
  k_half_minimum = 4,  // w = d s q - e t: d, e per 256 inputs, s, t per half block (8 bits)
  float32 = 5,
  float16 = 6,
  bfloat16 = 7,
};

struct Format {
  int32_t code;      // in the C interface
  int32_t bits;      // of a stored number
  Scales scales;
  int32_t zero;      // what is subtracted from a stored number
};

// The order is the C interface's numbering; ayllu.kernels.native.library has the same list.
constexpr Format FORMATS[] = {
    {0, 4, Scales::zero, 8},           // Q4_0
    {1, 4, Scales::minimum, 0},        // Q4_1
    {2, 5, Scales::zero, 16},          // Q5_0
    {3, 5, Scales::minimum, 0},        // Q5_1
    {4, 8, Scales::zero, 128},         // Q8_0
    {5, 4, Scales::k_half_minimum, 0}, // Q2_K
    {6, 4, Scales::k_half, 4},         // Q3_K
    {7, 4, Scales::k_minimum, 0},      // Q4_K
    {8, 5, Scales::k_minimum, 0},      // Q5_K
    {9, 6, Scales::k_half, 32},        // Q6_K
    {10, 32, Scales::float32, 0},
    {11, 16, Scales::float16, 0},
    {12, 16, Scales::bfloat16, 0},
};
constexpr int FORMAT_COUNT = sizeof(FORMATS) / sizeof(FORMATS[0]);

constexpr bool is_float(Scales s) { return s >= Scales::float32; }
constexpr int block_weight_bytes(int bits) { return bits * LANES * BLOCK / 8; }

// Blocks that share a unit: as many as share scales, or fill whole cache lines with theirs.
constexpr int unit_blocks(Scales scales) { return scales == Scales::zero ? 2 : scales == Scales::minimum ? 1 : 8; }

// Bytes of a unit's scales.
constexpr int unit_scale_bytes(Scales scales) {
  switch (scales) {
    case Scales::zero: return 2 * 32;
    case Scales::minimum: return 64;
    case Scales::k_minimum: return 64 + 8 * 32;
    case Scales::k_half: return 64 + 16 * 16;  // 32 of them unused, so that lines stay whole
    case Scales::k_half_minimum: return 64 + 16 * 32;
    default: return 0;
  }
}

constexpr size_t unit_bytes(int bits, Scales scales) {
  return static_cast<size_t>(unit_scale_bytes(scales) + unit_blocks(scales) * block_weight_bytes(bits));
}

// A packed matrix: rows outputs by cols inputs.
struct Matrix {
  const uint8_t* data = nullptr;
  int32_t format = 0;
  int32_t rows = 0, cols = 0;
  int32_t blocks = 0;      // of 32 inputs, the last one padded
  int32_t panels = 0;
  size_t panel_bytes = 0;

  const Format& facts() const { return FORMATS[format]; }
  const uint8_t* panel(int index) const { return data + static_cast<size_t>(index) * panel_bytes; }
};

inline Matrix shape_matrix(int format, int rows, int cols) {
  Matrix m;
  const Format& facts = FORMATS[format];
  m.format = format;
  m.rows = rows;
  m.cols = cols;
  m.panels = (rows + LANES - 1) / LANES;
  m.blocks = (cols + BLOCK - 1) / BLOCK;
  if (is_float(facts.scales)) {
    // Pairs of inputs for bfloat16, single inputs otherwise; padded to whole pairs.
    m.panel_bytes = static_cast<size_t>((cols + 1) / 2 * 2) * LANES * static_cast<size_t>(facts.bits / 8);
  } else {
    const int unit = unit_blocks(facts.scales);
    m.panel_bytes = static_cast<size_t>((m.blocks + unit - 1) / unit) * unit_bytes(facts.bits, facts.scales);
  }
  return m;
}

// Inputs of a matrix, one blob per row. Quantised: int8 [blocks * 32], then per block its scale (float32), its
// sum (float32), and the sums of its two halves (int32 each). bfloat16 or float32: the numbers, padded.
enum class InputKind : int32_t { quantised = 0, bfloat16 = 1, float32 = 2 };

inline InputKind input_kind(int format) {
  switch (FORMATS[format].scales) {
    case Scales::float32:
    case Scales::float16: return InputKind::float32;
    case Scales::bfloat16: return InputKind::bfloat16;
    default: return InputKind::quantised;
  }
}

inline size_t input_stride(InputKind kind, int cols) {
  const size_t blocks = (cols + BLOCK - 1) / BLOCK;
  switch (kind) {
    case InputKind::quantised: return blocks * 48;
    case InputKind::bfloat16: return blocks * 64;
    default: return blocks * 128;
  }
}

}  // namespace ayllu
