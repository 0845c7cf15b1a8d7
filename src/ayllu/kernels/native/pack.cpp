// Rows of a file's blocks into panels. Bits move, nothing is rounded. Layouts of blocks: ggml's public format
// (ggml-common.h describes it); ours: formats.h.
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace ayllu {
namespace {

struct SourceFacts { int elements, bytes; };
constexpr SourceFacts SOURCES[FORMAT_COUNT] = {{32, 18},  {32, 20},  {32, 22},  {32, 24},  {32, 34},  {256, 84}, {256, 110},
                                               {256, 144}, {256, 176}, {256, 210}, {1, 4},    {1, 2},    {1, 2}};

// The stored whole numbers of a block, one byte each.
void numbers_of(int format, const uint8_t* block, uint8_t* q) {
  switch (format) {
    case 0: case 1: {  // Q4_0, Q4_1
      const uint8_t* packed = block + (format == 0 ? 2 : 4);
      for (int i = 0; i < 16; i++) {
        q[i] = packed[i] & 15;
        q[i + 16] = packed[i] >> 4;
      }
      return;
    }
    case 2: case 3: {  // Q5_0, Q5_1
      uint32_t high;
      std::memcpy(&high, block + (format == 2 ? 2 : 4), 4);
      const uint8_t* packed = block + (format == 2 ? 6 : 8);
      for (int i = 0; i < 16; i++) {
        q[i] = static_cast<uint8_t>((packed[i] & 15) | (((high >> i) & 1) << 4));
        q[i + 16] = static_cast<uint8_t>((packed[i] >> 4) | (((high >> (i + 16)) & 1) << 4));
      }
      return;
    }
    case 4:  // Q8_0, signed; stored as unsigned
      for (int i = 0; i < 32; i++) q[i] = static_cast<uint8_t>(block[2 + i] ^ 0x80);
      return;
    case 5:  // Q2_K: scales 16, qs 64, d, dmin
      for (int half = 0; half < 2; half++)
        for (int shift = 0; shift < 4; shift++)
          for (int i = 0; i < 32; i++) q[128 * half + 32 * shift + i] = (block[16 + 32 * half + i] >> (2 * shift)) & 3;
      return;
    case 6:  // Q3_K: hmask 32, qs 64, scales 12, d
      for (int half = 0; half < 2; half++)
        for (int shift = 0; shift < 4; shift++)
          for (int i = 0; i < 32; i++) {
            const int low = (block[32 + 32 * half + i] >> (2 * shift)) & 3, high = (block[i] >> (4 * half + shift)) & 1;
            q[128 * half + 32 * shift + i] = static_cast<uint8_t>(low + 4 * high);
          }
      return;
    case 7: case 8: {  // Q4_K: d, dmin, scales 12, qs 128; Q5_K: with qh 32 before qs
      const uint8_t* high = block + 16;
      const uint8_t* packed = block + (format == 7 ? 16 : 48);
      for (int pair = 0; pair < 4; pair++)
        for (int i = 0; i < 32; i++) {
          const uint8_t both = packed[32 * pair + i];
          const int first = format == 8 ? (high[i] >> (2 * pair)) & 1 : 0, second = format == 8 ? (high[i] >> (2 * pair + 1)) & 1 : 0;
          q[64 * pair + i] = static_cast<uint8_t>((both & 15) | (first << 4));
          q[64 * pair + 32 + i] = static_cast<uint8_t>((both >> 4) | (second << 4));
        }
      return;
    }
    default:  // Q6_K: ql 128, qh 64, scales 16, d
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < 32; i++) {
          const uint8_t a = block[64 * half + i], b = block[64 * half + 32 + i], h = block[128 + 32 * half + i];
          uint8_t* out = q + 128 * half + i;
          out[0] = static_cast<uint8_t>((a & 15) | ((h & 3) << 4));
          out[32] = static_cast<uint8_t>((b & 15) | (((h >> 2) & 3) << 4));
          out[64] = static_cast<uint8_t>((a >> 4) | (((h >> 4) & 3) << 4));
          out[96] = static_cast<uint8_t>((b >> 4) | ((h >> 6) << 4));
        }
  }
}

// Scale and minimum j (0..7) of a Q4_K or Q5_K block, 6 bits each.
void k_scales(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) {
  if (j < 4) {
    *scale = s[j] & 63;
    *minimum = s[j + 4] & 63;
  } else {
    *scale = static_cast<uint8_t>((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4));
    *minimum = static_cast<uint8_t>((s[j + 4] >> 4) | ((s[j] >> 6) << 4));
  }
}

// Scale j (0..15) of a Q3_K block, 6 bits, less 32.
int8_t q3_scale(const uint8_t* s, int j) {
  const int low = j < 8 ? s[j % 8] & 15 : s[j % 8] >> 4, high = (s[8 + j % 4] >> (2 * (j / 4))) & 3;
  return static_cast<int8_t>((low | (high << 4)) - 32);
}

// The scales of a source block into those of a unit, at lane `lane`. place: of the block in the unit.
void place_scales(int format, const uint8_t* block, int place, int lane, uint8_t* scales) {
  const auto half_at = [&](int row) { return scales + 2 * (LANES * row + lane); };
  switch (FORMATS[format].scales) {
    case Scales::zero:
      std::memcpy(half_at(place), block, 2);
      return;
    case Scales::minimum:
      std::memcpy(half_at(0), block, 2);
      std::memcpy(half_at(1), block + 2, 2);
      return;
    case Scales::k_minimum:
      std::memcpy(half_at(0), block, 2);
      std::memcpy(half_at(1), block + 2, 2);
      for (int j = 0; j < 8; j++) k_scales(block + 4, j, scales + 64 + 32 * j + lane, scales + 64 + 32 * j + 16 + lane);
      return;
    case Scales::k_half:
      std::memcpy(half_at(0), block + (format == 6 ? 108 : 208), 2);
      for (int j = 0; j < 16; j++) scales[64 + 16 * j + lane] = format == 6 ? static_cast<uint8_t>(q3_scale(block + 96, j)) : block[192 + j];
      return;
    default:
      std::memcpy(half_at(0), block + 80, 2);
      std::memcpy(half_at(1), block + 82, 2);
      for (int j = 0; j < 16; j++) {
        scales[64 + 32 * j + lane] = block[j] & 15;
        scales[64 + 32 * j + 16 + lane] = block[j] >> 4;
      }
  }
}

// 32 numbers of one row into a block of a panel.
void place_numbers(int bits, const uint8_t* q, int lane, uint8_t* block) {
  if (bits == 8) {
    for (int g = 0; g < 8; g++) std::memcpy(block + 64 * g + 4 * lane, q + 4 * g, 4);
    return;
  }
  for (int g = 0; g < 4; g++)
    for (int i = 0; i < 4; i++) block[64 * g + 4 * lane + i] = static_cast<uint8_t>((q[4 * g + i] & 15) | ((q[16 + 4 * g + i] & 15) << 4));
  if (bits == 5) {
    for (int g = 0; g < 8; g++)
      for (int i = 0; i < 4; i++)
        block[256 + 8 * g + (4 * lane + i) / 8] |= static_cast<uint8_t>(((q[4 * g + i] >> 4) & 1) << ((4 * lane + i) % 8));
  }
  if (bits == 6) {
    for (int g = 0; g < 8; g++)
      for (int i = 0; i < 4; i++) block[256 + 64 * (g / 4) + 4 * lane + i] |= static_cast<uint8_t>((q[4 * g + i] >> 4) << (2 * (g % 4)));
  }
}

// Stored numbers of `width` bytes (pairs of bfloat16 count as one of four) into their lanes.
template <size_t width> void spread(const uint8_t* row, size_t count, int lane, uint8_t* out) {
  for (size_t k = 0; k < count; k++) std::memcpy(out + (k * LANES + static_cast<size_t>(lane)) * width, row + k * width, width);
}

void pack_floats(const Matrix& m, const uint8_t* rows, size_t stride, int panel, uint8_t* out) {
  const size_t cols = static_cast<size_t>(m.cols);
  for (int lane = 0; lane < LANES && panel * LANES + lane < m.rows; lane++) {
    const uint8_t* row = rows + stride * static_cast<size_t>(panel * LANES + lane);
    switch (m.facts().scales) {
      case Scales::float32: spread<4>(row, cols, lane, out); break;
      case Scales::float16: spread<2>(row, cols, lane, out); break;
      default:
        spread<4>(row, cols / 2, lane, out);
        if (cols % 2) std::memcpy(out + (cols / 2 * LANES + static_cast<size_t>(lane)) * 4, row + (cols - 1) * 2, 2);
    }
  }
}

}  // namespace

size_t source_row_bytes(int format, int cols) {
  const SourceFacts& source = SOURCES[format];
  return static_cast<size_t>(cols / source.elements) * static_cast<size_t>(source.bytes);
}

bool fits_source(int format, int cols) { return cols % SOURCES[format].elements == 0; }

void pack_panel(const Matrix& m, const uint8_t* rows, size_t stride, int panel, uint8_t* out) {
  std::memset(out, 0, m.panel_bytes);
  if (is_float(m.facts().scales)) {
    pack_floats(m, rows, stride, panel, out);
    return;
  }
  const SourceFacts& source = SOURCES[m.format];
  const Format& facts = m.facts();
  const int parts = source.elements / BLOCK, unit = unit_blocks(facts.scales);
  uint8_t q[256];
  // Block by block over all rows: what is written stays in the nearest cache.
  for (int index = 0; index * source.elements < m.cols; index++) {
    uint8_t* scales = out + static_cast<size_t>(index * parts / unit) * unit_bytes(facts.bits, facts.scales);
    uint8_t* weights = scales + unit_scale_bytes(facts.scales) + (index * parts % unit) * block_weight_bytes(facts.bits);
    for (int lane = 0; lane < LANES && panel * LANES + lane < m.rows; lane++) {
      const uint8_t* block = rows + stride * static_cast<size_t>(panel * LANES + lane) + static_cast<size_t>(index) * static_cast<size_t>(source.bytes);
      numbers_of(m.format, block, q);
      place_scales(m.format, block, index % unit, lane, scales);
      for (int part = 0; part < parts; part++) place_numbers(facts.bits, q + BLOCK * part, lane, weights + part * block_weight_bytes(facts.bits));
    }
  }
}

}  // namespace ayllu
