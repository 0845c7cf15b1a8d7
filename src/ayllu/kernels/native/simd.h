// Sixteen lanes at a time, in three instruction sets under one set of names.
//
// Every kernel is written once over these types and compiled once per instruction set (AYLLU_ISA). A lane is
// one output row of a matrix; 64 bytes of weights are 4 consecutive inputs of 16 rows. Integer dot products
// are exact, so the sets differ only where floating point is rounded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace AYLLU_ISA {

#if defined(__AVX512F__)

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats rounded(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n whole
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }

inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }

// a where the first `count` lanes are, else `otherwise`.
inline Floats first_lanes(Floats a, int count, Floats otherwise) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << (count < 0 ? 0 : count)) - 1), otherwise.v, a.v)};
}

inline Floats load_halves(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Floats load_unsigned(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}; }
inline Floats load_signed(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}; }
inline void store_signed(int8_t* p, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Two bits of every byte of `a`, the pair number `which` (0..3), as 16 x their value.
template <int which> inline Bytes crumbs_times_16(Bytes a) {
  const __m512i moved = which < 2 ? _mm512_slli_epi16(a.v, which == 0 ? 4 : 2) : (which == 2 ? a.v : _mm512_srli_epi16(a.v, 2));
  return {_mm512_and_si512(moved, _mm512_set1_epi8(0x30))};
}
// Bit i of the 64 at p decides whether byte i is 16 or 0.
inline Bytes bits_times_16(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  return {_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(16))};
}
inline Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }

// sum + the dot product of each row's 4 unsigned weights with the 4 signed inputs at x. nibbles: weights < 64.
template <bool small> inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
}

// Pairs of bfloat16: sum + w[2i] x[0] + w[2i+1] x[1] in every lane.
inline Floats dot2(Floats sum, const uint16_t* w, const uint16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(two))};
}
inline void store_bf16(uint16_t* p, Floats a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#elif defined(__AVX2__)

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats maximum(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats minimum(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats rounded(Floats x) { return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline __m256 power_of_two(__m256 x, __m256 n) {
  // In two halves, so that results below the normal range come out as numbers and not as wrapped exponents.
  const __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(n, _mm256_set1_ps(252.0f)), _mm256_set1_ps(-252.0f)));
  const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}
inline Floats power_of_two(Floats x, Floats n) { return {power_of_two(x.a, n.a), power_of_two(x.b, n.b)}; }
inline float largest(Floats x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float sum(Floats x) {
  const __m256 m = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}

inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline int32_t sum(Ints x) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(x.a, x.b));
  int32_t total = 0;
  for (int i = 0; i < 8; i++) total += lanes[i];
  return total;
}
inline Floats first_lanes(Floats x, int count, Floats otherwise) {
  const __m256i n = _mm256_set1_epi32(count);
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  return {_mm256_blendv_ps(otherwise.a, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, low))),
          _mm256_blendv_ps(otherwise.b, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, high)))};
}
inline Floats load_halves(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Floats load_unsigned(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline Floats load_signed(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline void store_signed(int8_t* p, Ints x) {
  alignas(32) int32_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), x.b);
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(lanes[i]);
}
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store_bytes(uint8_t* p, Bytes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Bytes high_nibbles(Bytes x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
template <int which> inline __m256i crumbs_times_16(__m256i x) {
  const __m256i moved = which < 2 ? _mm256_slli_epi16(x, which == 0 ? 4 : 2) : (which == 2 ? x : _mm256_srli_epi16(x, 2));
  return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
}
template <int which> inline Bytes crumbs_times_16(Bytes x) { return {crumbs_times_16<which>(x.a), crumbs_times_16<which>(x.b)}; }
inline __m256i bits_times_16_half(uint32_t bits) {
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}
inline Bytes bits_times_16(const uint8_t* p) {
  uint32_t low, high;
  std::memcpy(&low, p, 4);
  std::memcpy(&high, p + 4, 4);
  return {bits_times_16_half(low), bits_times_16_half(high)};
}
inline Bytes either(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

template <bool small> inline __m256i dot4_half(__m256i sum, __m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (small) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  // maddubs saturates at 16 bits when weights reach 255: low and high nibbles are multiplied apart.
  const __m256i m = _mm256_set1_epi8(15);
  const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(w, m), x), ones);
  const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), m), x), ones);
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, _mm256_slli_epi32(high, 4)));
}
template <bool small> inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i inputs = _mm256_set1_epi32(four);
  return {dot4_half<small>(sum.a, w.a, inputs), dot4_half<small>(sum.b, w.b, inputs)};
}
inline __m256 dot2_half(__m256 sum, __m256i w, __m256 even, __m256 odd) {
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  return _mm256_fmadd_ps(high, odd, _mm256_fmadd_ps(low, even, sum));
}
inline Floats dot2(Floats sum, const uint16_t* w, const uint16_t* x) {
  uint32_t bits[2] = {static_cast<uint32_t>(x[0]) << 16, static_cast<uint32_t>(x[1]) << 16};
  float pair[2];
  std::memcpy(pair, bits, 8);
  const __m256 even = _mm256_set1_ps(pair[0]), odd = _mm256_set1_ps(pair[1]);
  return {dot2_half(sum.a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), even, odd),
          dot2_half(sum.b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16)), even, odd)};
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#else  // plain C++

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };

#define AYLLU_LANES for (int i = 0; i < 16; i++)
#define AYLLU_BYTES for (int i = 0; i < 64; i++)

inline Floats load(const float* p) { Floats r; std::memcpy(r.v, p, 64); return r; }
inline void store(float* p, Floats a) { std::memcpy(p, a.v, 64); }
inline Floats splat(float x) { Floats r; AYLLU_LANES r.v[i] = x; return r; }
inline Floats add(Floats a, Floats b) { AYLLU_LANES a.v[i] += b.v[i]; return a; }
inline Floats sub(Floats a, Floats b) { AYLLU_LANES a.v[i] -= b.v[i]; return a; }
inline Floats mul(Floats a, Floats b) { AYLLU_LANES a.v[i] *= b.v[i]; return a; }
inline Floats div(Floats a, Floats b) { AYLLU_LANES a.v[i] /= b.v[i]; return a; }
inline Floats fma(Floats a, Floats b, Floats c) { AYLLU_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
inline Floats maximum(Floats a, Floats b) { AYLLU_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Floats minimum(Floats a, Floats b) { AYLLU_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Floats absolute(Floats a) { AYLLU_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline Floats rounded(Floats a) { AYLLU_LANES a.v[i] = std::nearbyint(a.v[i]); return a; }
inline Floats power_of_two(Floats a, Floats n) {
  AYLLU_LANES a.v[i] = std::ldexp(a.v[i], static_cast<int>(n.v[i] > 300 ? 300 : n.v[i] < -300 ? -300 : n.v[i]));
  return a;
}
inline float largest(Floats a) { float m = a.v[0]; AYLLU_LANES m = a.v[i] > m ? a.v[i] : m; return m; }
inline float sum(Floats a) {
  for (int n = 8; n > 0; n /= 2) for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}
inline Ints splat_int(int32_t x) { Ints r; AYLLU_LANES r.v[i] = x; return r; }
inline Ints add(Ints a, Ints b) { AYLLU_LANES a.v[i] += b.v[i]; return a; }
inline Floats to_floats(Ints a) { Floats r; AYLLU_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
inline Ints to_ints(Floats a) { Ints r; AYLLU_LANES r.v[i] = static_cast<int32_t>(std::lrint(a.v[i])); return r; }
inline int32_t sum(Ints a) { int32_t s = 0; AYLLU_LANES s += a.v[i]; return s; }
inline Floats first_lanes(Floats a, int count, Floats otherwise) { AYLLU_LANES if (i >= count) a.v[i] = otherwise.v[i]; return a; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, mantissa = h & 0x3FF, exponent = (h >> 10) & 31;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  } else {
    const uint32_t bits = exponent == 31 ? 0x7F800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&magnitude, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}
inline Floats load_halves(const uint16_t* p) { Floats r; AYLLU_LANES r.v[i] = half_to_float(p[i]); return r; }
inline Floats load_unsigned(const uint8_t* p) { Floats r; AYLLU_LANES r.v[i] = p[i]; return r; }
inline Floats load_signed(const int8_t* p) { Floats r; AYLLU_LANES r.v[i] = p[i]; return r; }
inline void store_signed(int8_t* p, Ints a) { AYLLU_LANES p[i] = static_cast<int8_t>(a.v[i]); }
inline Bytes load_bytes(const uint8_t* p) { Bytes r; std::memcpy(r.v, p, 64); return r; }
inline void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, a.v, 64); }
inline Bytes low_nibbles(Bytes a) { AYLLU_BYTES a.v[i] &= 15; return a; }
inline Bytes high_nibbles(Bytes a) { AYLLU_BYTES a.v[i] >>= 4; return a; }
template <int which> inline Bytes crumbs_times_16(Bytes a) {
  AYLLU_BYTES a.v[i] = static_cast<uint8_t>(((a.v[i] >> (2 * which)) & 3) << 4);
  return a;
}
inline Bytes bits_times_16(const uint8_t* p) {
  Bytes r;
  AYLLU_BYTES r.v[i] = static_cast<uint8_t>(((p[i / 8] >> (i % 8)) & 1) << 4);
  return r;
}
inline Bytes either(Bytes a, Bytes b) { AYLLU_BYTES a.v[i] |= b.v[i]; return a; }
template <bool small> inline Ints dot4(Ints s, Bytes w, const int8_t* x) {
  AYLLU_LANES for (int k = 0; k < 4; k++) s.v[i] += static_cast<int32_t>(w.v[4 * i + k]) * x[k];
  return s;
}
inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline Floats dot2(Floats s, const uint16_t* w, const uint16_t* x) {
  const float even = bf16_to_float(x[0]), odd = bf16_to_float(x[1]);
  AYLLU_LANES {
    s.v[i] += bf16_to_float(w[2 * i]) * even;
    s.v[i] += bf16_to_float(w[2 * i + 1]) * odd;
  }
  return s;
}
inline void prefetch(const void*) {}

#undef AYLLU_LANES
#undef AYLLU_BYTES
#endif

#if !defined(__AVX512F__)
inline void store_bf16(uint16_t* p, Floats a) {
  float values[16];
  store(values, a);
  for (int i = 0; i < 16; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    p[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}
#endif

// e^x, within 2 ulp where the result is a normal number; NaN stays NaN. Cephes' polynomial (Moshier, 1989).
inline Floats exponential(Floats x) {
  const Floats clamped = minimum(splat(89.0f), maximum(splat(-104.0f), x));
  const Floats n = rounded(mul(clamped, splat(1.44269504088896341f)));
  Floats r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, splat(1.0f)));
  return power_of_two(p, n);
}

// 2^x for x <= 0 to 4e-6 of the value, half of bfloat16's last place a hundred times over; NaN stays NaN. A
// polynomial of degree 4 through 2^r, |r| <= 1/2 (least squares at Chebyshev points).
inline Floats power_of_two(Floats x) {
  const Floats n = rounded(x), r = sub(x, n);
  Floats p = splat(9.600395518e-3f);
  p = fma(p, r, splat(5.591689383e-2f));
  p = fma(p, r, splat(2.402371846e-1f));
  p = fma(p, r, splat(6.931219948e-1f));
  p = fma(p, r, splat(1.0f));
  return power_of_two(p, n);
}

}  // namespace AYLLU_ISA
