// Eight fp32 lanes. Included inside the instruction set's namespace; vec_avx512.h offers the same functions.
#pragma once

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float first_lane(Vec a) { return _mm256_cvtss_f32(a); }
inline float max_lane(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
// Writes the sums of four vectors.
inline void store_sums(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec quads = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_pow2(Vec a, Vec n) {  // a * 2^n, n integral from -125 to 128
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126));
  return mul(mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))), set1(2.0f));
}
// a where x is at least `least`, else zero.
inline Vec zero_below(Vec a, Vec x, float least) { return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(least), _CMP_LT_OQ), a); }
// Lanes outside [begin, end) replaced; both may lie outside the vector.
inline Vec keep_range(Vec a, int64_t begin, int64_t end, float other) {
  const Vec lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const Vec from = _mm256_cmp_ps(lane, set1(static_cast<float>(begin)), _CMP_GE_OQ);
  const Vec until = _mm256_cmp_ps(lane, set1(static_cast<float>(end)), _CMP_LT_OQ);
  return _mm256_blendv_ps(set1(other), a, _mm256_and_ps(from, until));
}
inline Vec copysign(Vec magnitude, Vec sign) {
  const Vec mask = set1(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(mask, sign), _mm256_andnot_ps(mask, magnitude));
}

inline Vec widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// kLanes integers as fp32: bytes, or the bits of `mask` in 32-bit words shifted right by `shift`.
inline Vec widen_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec widen_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec widen_bits(const uint8_t* p, int shift, int mask) {
  const __m256i words = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), shift);
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(mask)));
}

inline Vec load(const i8* p) { return widen_i8(reinterpret_cast<const uint8_t*>(p)); }

inline __m128i narrow(Vec v) {
  // Round to nearest even; NaN would round to infinity and is restored.
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
inline __m128i narrow_f16(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
inline void store(f16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }

inline void store_codes(int8_t* p, Vec integers, int64_t n) {
  alignas(32) int32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cvtps_epi32(integers));
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

// The two halves of 8 bf16 pairs: elements 0, 2, 4... and 1, 3, 5...
inline Vec even_half(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Vec odd_half(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

using Pairs = __m256i;
inline Pairs load_pairs(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Pairs set1_pair(int pair) { return _mm256_set1_epi32(pair); }

// acc[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(odd_half(a), odd_half(b), fma(even_half(a), even_half(b), acc));
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec rows[kLanes]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

#include "vec_eight.h"

using Ints = __m256i;
inline Ints set1_int(int x) { return _mm256_set1_epi32(x); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints times(Ints a, int b) { return reinterpret_cast<Ints>(reinterpret_cast<__v8si>(a) * b); }
inline Vec to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
// A sum that is complete here. GCC would otherwise collect the products of a whole group before it adds them, and write
// them to the stack meanwhile.
inline Ints summed(Ints a) {
  asm("" : "+x"(a));
  return a;
}
// acc[i] += the sum of words[2 i + j] * (word j of x)
inline Ints dot_words(Ints acc, Words words, int x) {
  const __m256i own = reinterpret_cast<__m256i>(words), all = _mm256_set1_epi32(x);
#ifdef __AVXVNNI__
  return _mm256_dpwssd_avx_epi32(acc, own, all);
#else
  return summed(add_ints(acc, _mm256_madd_epi16(own, all)));
#endif
}
// Signed bytes of two rows of kPanel columns, side by side.
inline Words pair_bytes(const uint8_t* rows) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows));
  const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + kPanel));
  return reinterpret_cast<Words>(_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second)));
}
// Writes integers of at most 16 bits.
inline void store_words(int16_t* p, Vec integers) {
  const __m256i words = _mm256_cvtps_epi32(integers);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
// Adds the pairs of small sums.
inline Ints sum_pairs(Ints sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
// acc[i] += the sum of codes[4 i + j] * (byte j of x); of small sums, one pair to each. Codes of fewer than eight bits
// are not negative.
template <int Bits>
inline Ints dot_codes(Ints acc, Words codes, int x) {
  const __m256i own = reinterpret_cast<__m256i>(codes), all = _mm256_set1_epi32(x);
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, own, all);
#else
  // The sum of two products of 128 and 127 fits into 16 bits.
  const __m256i products = Bits < 8 ? _mm256_maddubs_epi16(own, all)
                                    : _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(all, own));
  return summed(kSumsAreSmall<Bits> ? _mm256_add_epi16(acc, products) : add_ints(acc, sum_pairs(products)));
#endif
}
