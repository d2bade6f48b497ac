// Eight fp32 lanes in two registers. Included inside the instruction set's namespace; vec_avx512.h offers the same
// functions. Uses only what every 64-bit Arm processor has: products of bf16 are computed in fp32.
#pragma once

constexpr int kLanes = 8;
struct Vec {
  float32x4_t lo, hi;
};

inline Vec zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline Vec set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
// If one of the operands is NaN, the second operand, as on x86.
inline Vec max(Vec a, Vec b) {
  return {vbslq_f32(vcgtq_f32(a.lo, b.lo), a.lo, b.lo), vbslq_f32(vcgtq_f32(a.hi, b.hi), a.hi, b.hi)};
}
inline Vec min(Vec a, Vec b) {
  return {vbslq_f32(vcltq_f32(a.lo, b.lo), a.lo, b.lo), vbslq_f32(vcltq_f32(a.hi, b.hi), a.hi, b.hi)};
}
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }
inline float sum(Vec a) { return vaddvq_f32(vaddq_f32(a.lo, a.hi)); }
inline float first_lane(Vec a) { return vgetq_lane_f32(a.lo, 0); }
inline float max_lane(Vec a) { return vmaxvq_f32(vmaxq_f32(a.lo, a.hi)); }
// Writes the sums of four vectors.
inline void store_sums(float* p, Vec a, Vec b, Vec c, Vec d) {
  const float32x4_t ab = vpaddq_f32(vaddq_f32(a.lo, a.hi), vaddq_f32(b.lo, b.hi));
  const float32x4_t cd = vpaddq_f32(vaddq_f32(c.lo, c.hi), vaddq_f32(d.lo, d.hi));
  vst1q_f32(p, vpaddq_f32(ab, cd));
}
inline Vec round(Vec a) { return {vrndnq_f32(a.lo), vrndnq_f32(a.hi)}; }
inline float32x4_t times_pow2(float32x4_t a, float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(126));
  return vmulq_n_f32(vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23))), 2.0f);
}
inline Vec times_pow2(Vec a, Vec n) {  // a * 2^n, n integral from -125 to 128
  return {times_pow2(a.lo, n.lo), times_pow2(a.hi, n.hi)};
}
// a where x is at least `least`, else zero.
inline Vec zero_below(Vec a, Vec x, float least) {
  const auto keep = [&](float32x4_t half, float32x4_t by) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(half), vcltq_f32(by, vdupq_n_f32(least))));
  };
  return {keep(a.lo, x.lo), keep(a.hi, x.hi)};
}
// Lanes outside [begin, end) replaced; both may lie outside the vector.
inline Vec keep_range(Vec a, int64_t begin, int64_t end, float other) {
  const float numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto keep = [&](float32x4_t half, float32x4_t lane) {
    const uint32x4_t from = vcgeq_f32(lane, vdupq_n_f32(static_cast<float>(begin)));
    const uint32x4_t until = vcltq_f32(lane, vdupq_n_f32(static_cast<float>(end)));
    return vbslq_f32(vandq_u32(from, until), half, vdupq_n_f32(other));
  };
  return {keep(a.lo, vld1q_f32(numbers)), keep(a.hi, vld1q_f32(numbers + 4))};
}
inline Vec copysign(Vec magnitude, Vec sign) {
  const uint32x4_t mask = vdupq_n_u32(0x80000000u);
  return {vbslq_f32(mask, sign.lo, magnitude.lo), vbslq_f32(mask, sign.hi, magnitude.hi)};
}

inline Vec widen(uint16x8_t bits) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
}

inline Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline Vec load(const bf16* p) { return widen(vld1q_u16(&p->bits)); }
inline Vec load(const f16* p) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
}

// kLanes integers as fp32: bytes, or the bits of `mask` in 32-bit words shifted right by `shift`.
inline Vec widen_i8(const uint8_t* p) {
  const int16x8_t codes = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(codes)))};
}
inline Vec widen_u8(const uint8_t* p) {
  const uint16x8_t codes = vmovl_u8(vld1_u8(p));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(codes))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(codes)))};
}
inline Vec widen_bits(const uint8_t* p, int shift, int mask) {
  const auto half = [&](const uint8_t* from) {
    const uint32x4_t words = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(from)), vdupq_n_s32(-shift));
    return vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(static_cast<uint32_t>(mask))));
  };
  return {half(p), half(p + 16)};
}

inline Vec load(const i8* p) { return widen_i8(reinterpret_cast<const uint8_t*>(p)); }

inline uint16x4_t narrow(float32x4_t v) {
  // Round to nearest even; NaN would round to infinity and is restored.
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

inline void store(float* p, Vec v) { vst1q_f32(p, v.lo), vst1q_f32(p + 4, v.hi); }
inline void store(bf16* p, Vec v) { vst1q_u16(&p->bits, vcombine_u16(narrow(v.lo), narrow(v.hi))); }
inline void store(f16* p, Vec v) {
  vst1q_u16(&p->bits, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(v.lo), vcvt_f16_f32(v.hi))));
}

inline void store_codes(int8_t* p, Vec integers, int64_t n) {
  int32_t lanes[kLanes];
  vst1q_s32(lanes, vcvtnq_s32_f32(integers.lo)), vst1q_s32(lanes + 4, vcvtnq_s32_f32(integers.hi));
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

struct Pairs {
  uint32x4_t lo, hi;
};
// The two halves of 8 bf16 pairs: elements 0, 2, 4... and 1, 3, 5...
inline Vec even_half(Pairs pairs) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(pairs.lo, 16)), vreinterpretq_f32_u32(vshlq_n_u32(pairs.hi, 16))};
}
inline Vec odd_half(Pairs pairs) {
  const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
  return {vreinterpretq_f32_u32(vandq_u32(pairs.lo, upper)), vreinterpretq_f32_u32(vandq_u32(pairs.hi, upper))};
}
inline Pairs load_pairs(const uint16_t* p) {
  return {vreinterpretq_u32_u16(vld1q_u16(p)), vreinterpretq_u32_u16(vld1q_u16(p + 8))};
}
inline Pairs set1_pair(int pair) {
  const uint32x4_t all = vdupq_n_u32(static_cast<uint32_t>(pair));
  return {all, all};
}

// acc[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(odd_half(a), odd_half(b), fma(even_half(a), even_half(b), acc));
}

// Transposes four rows of four lanes.
inline void transpose(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float32x4x2_t ab = vtrnq_f32(a, b), cd = vtrnq_f32(c, d);
  a = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  b = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  c = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  d = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}
// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec rows[kLanes]) {
  for (int i = 0; i < 8; i += 4) {
    transpose(rows[i].lo, rows[i + 1].lo, rows[i + 2].lo, rows[i + 3].lo);
    transpose(rows[i].hi, rows[i + 1].hi, rows[i + 2].hi, rows[i + 3].hi);
  }
  for (int i = 0; i < 4; ++i) {
    const float32x4_t upper = rows[i].hi;
    rows[i].hi = rows[i + 4].lo;
    rows[i + 4].lo = upper;
  }
}

#include "vec_eight.h"

struct Ints {
  int32x4_t lo, hi;
};
inline Ints set1_int(int x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline Ints add_ints(Ints a, Ints b) { return {vaddq_s32(a.lo, b.lo), vaddq_s32(a.hi, b.hi)}; }
inline Ints times(Ints a, int b) { return {a.lo * b, a.hi * b}; }
inline Vec to_floats(Ints a) { return {vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi)}; }
inline int32x4_t dot_signed(int32x4_t acc, int8x16_t codes, int8x16_t x) {
  const int16x8_t first = vmull_s8(vget_low_s8(codes), vget_low_s8(x)), second = vmull_high_s8(codes, x);
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second)));
}
// acc[i] += the sum of words[2 i + j] * (word j of x)
inline Ints dot_words(Ints acc, Words words, int x) {
  const int16x8_t all = vreinterpretq_s16_s32(vdupq_n_s32(x));
  const auto lo = reinterpret_cast<int16x8_t>(__builtin_shufflevector(words, words, 0, 1, 2, 3, 4, 5, 6, 7));
  const auto hi = reinterpret_cast<int16x8_t>(__builtin_shufflevector(words, words, 8, 9, 10, 11, 12, 13, 14, 15));
  const auto add = [&](int32x4_t to, int16x8_t own) {
    return vaddq_s32(to, vpaddq_s32(vmull_s16(vget_low_s16(own), vget_low_s16(all)), vmull_high_s16(own, all)));
  };
  return {add(acc.lo, lo), add(acc.hi, hi)};
}
// Signed bytes of two rows of kPanel columns, side by side.
inline Words pair_bytes(const uint8_t* rows) {
  const int8x8_t first = vreinterpret_s8_u8(vld1_u8(rows)), second = vreinterpret_s8_u8(vld1_u8(rows + kPanel));
  const int16x8_t low = vmovl_s8(vzip1_s8(first, second)), high = vmovl_s8(vzip2_s8(first, second));
  Words words;
  __builtin_memcpy(&words, &low, 16);
  __builtin_memcpy(reinterpret_cast<char*>(&words) + 16, &high, 16);
  return words;
}
// Writes integers of at most 16 bits.
inline void store_words(int16_t* p, Vec integers) {
  vst1q_s16(p, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(integers.lo)), vqmovn_s32(vcvtnq_s32_f32(integers.hi))));
}
// acc[i] += the sum of codes[4 i + j] * (byte j of x)
template <int Bits>
inline Ints dot_codes(Ints acc, Words codes, int x) {
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(x));
  const auto lo = __builtin_shufflevector(codes, codes, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto hi = __builtin_shufflevector(codes, codes, 8, 9, 10, 11, 12, 13, 14, 15);
  return {dot_signed(acc.lo, reinterpret_cast<int8x16_t>(lo), all),
          dot_signed(acc.hi, reinterpret_cast<int8x16_t>(hi), all)};
}
