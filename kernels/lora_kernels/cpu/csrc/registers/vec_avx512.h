// Sixteen fp32 lanes. Included inside the instruction set's namespace; vec_avx2.h offers the same functions.
#pragma once

constexpr int kLanes = 16;
using Vec = __m512;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float first_lane(Vec a) { return _mm512_cvtss_f32(a); }
inline float max_lane(Vec a) { return _mm512_reduce_max_ps(a); }
// Writes the sums of four vectors.
inline void store_sums(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec quads = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
// Writes the largest lanes of four vectors.
inline void store_maxima(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = max(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec quads = max(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_max_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  _mm_storeu_ps(p, _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_pow2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n integral from -125 to 128
// a where x is at least `least`, else zero.
inline Vec zero_below(Vec a, Vec x, float least) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(least), _CMP_NLT_UQ), a);
}
// Lanes outside [begin, end) replaced; both may lie outside the vector.
inline Vec keep_range(Vec a, int64_t begin, int64_t end, float other) {
  const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1; };
  return _mm512_mask_blend_ps(static_cast<__mmask16>(below(end) & ~below(begin)), set1(other), a);
}
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  // 0xca: mask ? sign : magnitude, bit by bit.
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xca));
}

inline Vec widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// kLanes integers as fp32: bytes, or the bits of `mask` in 32-bit words shifted right by `shift`.
inline Vec widen_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec widen_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec widen_bits(const uint8_t* p, int shift, int mask) {
  const __m512i words = _mm512_srli_epi32(_mm512_loadu_si512(p), shift);
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask)));
}

inline Vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vec load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline Vec load(const i8* p) { return widen_i8(reinterpret_cast<const uint8_t*>(p)); }
inline Vec load_n(const i8* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
inline Vec load_n(const f16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

inline __m256i narrow(Vec v) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  // Round to nearest even; NaN would round to infinity and is restored.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline __m256i narrow_f16(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store(f16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }

inline void store_n(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store_n(bf16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v)); }
inline void store_n(f16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(v)); }

inline void store_codes(int8_t* p, Vec integers, int64_t n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(n), _mm512_cvtps_epi32(integers));
}

// The two halves of 16 bf16 pairs: elements 0, 2, 4... and 1, 3, 5...
inline Vec even_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Vec odd_half(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

using Pairs = __m512i;
inline Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline Pairs set1_pair(int pair) { return _mm512_set1_epi32(pair); }

// acc[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  return fma(odd_half(a), odd_half(b), fma(even_half(a), even_half(b), acc));
#endif
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec rows[kLanes]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// Codes of weights in the layout of integer products: bytes, four inputs for each of kLanes columns.
typedef uint16_t Words __attribute__((vector_size(64)));
using Ints = __m512i;
inline Ints set1_int(int x) { return _mm512_set1_epi32(x); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints times(Ints a, int b) { return reinterpret_cast<Ints>(reinterpret_cast<__v16si>(a) * b); }
inline Vec to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
// mask ? a : b, bit by bit.
inline Words select(uint16_t mask, Words a, Words b) {
  return reinterpret_cast<Words>(_mm512_ternarylogic_epi32(_mm512_set1_epi16(static_cast<short>(mask)),
                                                           reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                           0xca));
}
// From rows of bytes [columns], reads the first, second, fifth and sixth: 0, 4, 1, 5 of each column.
inline void load_fours(const uint8_t* rows, Words (&out)[2]) {
  __m512i first = _mm512_loadu_si512(rows), second = _mm512_loadu_si512(rows + 4 * kPanel);
  if constexpr (kUnsignedBytes) {
    const __m512i flipped = _mm512_set1_epi8(static_cast<char>(128));
    first = _mm512_xor_si512(first, flipped), second = _mm512_xor_si512(second, flipped);
  }
  // Pairs of 0 and 4 in the lower half, of 1 and 5 in the upper half; columns 0 to 7, 16 to 23, then the others.
  const __m512i low = _mm512_unpacklo_epi8(first, second), high = _mm512_unpackhi_epi8(first, second);
  alignas(64) static constexpr uint16_t kPlaces[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       32, 48, 33, 49, 34, 50, 35, 51, 36, 52, 37, 53, 38, 54, 39, 55};
  const __m512i places = _mm512_load_si512(kPlaces);
  out[0] = reinterpret_cast<Words>(_mm512_permutex2var_epi16(low, places, high));
  out[1] = reinterpret_cast<Words>(
      _mm512_permutex2var_epi16(low, _mm512_add_epi16(places, _mm512_set1_epi16(8)), high));
}
// Writes what load_fours reads, for all columns of a panel: [kPanel, 4].
inline void spread_fours(const uint8_t* rows, uint8_t* to) {
  Words fours[2];
  load_fours(rows, fours);
  for (int v = 0; v < 2; ++v) __builtin_memcpy(to + v * sizeof(Words), &fours[v], sizeof(Words));
}
// A sum that is complete here. GCC would otherwise collect the products of a whole group before it adds them, and write
// them to the stack meanwhile.
inline Ints summed(Ints a) {
  asm("" : "+v"(a));
  return a;
}
// acc[i] += the sum of words[2 i + j] * (word j of x)
inline Ints dot_words(Ints acc, Words words, int x) {
  const __m512i own = reinterpret_cast<__m512i>(words), all = _mm512_set1_epi32(x);
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(acc, own, all);
#else
  return summed(add_ints(acc, _mm512_madd_epi16(own, all)));
#endif
}
// Signed bytes of two rows of kPanel columns, side by side.
inline Words pair_bytes(const uint8_t* rows) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + kPanel));
  const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  return reinterpret_cast<Words>(_mm512_cvtepi8_epi16(both));
}
// Writes integers of at most 16 bits.
inline void store_words(int16_t* p, Vec integers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(integers)));
}
// Adds the pairs of small sums.
inline Ints sum_pairs(Ints sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }
// acc[i] += the sum of codes[4 i + j] * (byte j of x); of small sums, one pair to each. Codes of fewer than eight bits
// are not negative.
template <int Bits>
inline Ints dot_codes(Ints acc, Words codes, int x) {
  const __m512i own = reinterpret_cast<__m512i>(codes), all = _mm512_set1_epi32(x);
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(acc, own, all);
#else
  // The sum of two products of 128 and 127 fits into 16 bits.
  const __m512i products =
      Bits < 8 ? _mm512_maddubs_epi16(own, all)
               : _mm512_maddubs_epi16(_mm512_abs_epi8(own), _mm512_mask_sub_epi8(all, _mm512_movepi8_mask(own),
                                                                                 _mm512_setzero_si512(), all));
  return summed(kSumsAreSmall<Bits> ? _mm512_add_epi16(acc, products) : add_ints(acc, sum_pairs(products)));
#endif
}
// Writes 32 integers as int8 codes, every eight in the order 0, 4, 1, 5, 2, 6, 3, 7.
inline void store_eights(int8_t* p, const Vec (&integers)[2]) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int v = 0; v < 2; ++v) {
    const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(integers[v]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + v, _mm_shuffle_epi8(codes, order));
  }
}
