// How inputs of quantized weights are written for integer products: rounded to int8, or exactly, as digits or as
// integers of 16 bits. Included by quant_int8.h.
#pragma once

// 32 inputs that share a scale.
struct InputGroup {
  static constexpr int kVecs = 32 / kLanes;
  Vec x[kVecs];

  // Loads a group and returns its largest magnitude, ignoring NaN.
  template <typename T>
  float load_from(const T* from) {
    Vec largest = zero();
    for (int v = 0; v < kVecs; ++v) {
      x[v] = load(from + v * kLanes);
      largest = max(max(x[v], sub(zero(), x[v])), largest);
    }
    return max_lane(largest);
  }

  // Writes a group of integers from -128 to 127 as codes, and the sums of its halves, `stride` apart. Returns 0, or NaN
  // if one is NaN.
  float store_to(int8_t* codes, int32_t* halves, int64_t stride) const {
    Vec own[kVecs], sums[2] = {zero(), zero()};
    for (int v = 0; v < kVecs; ++v) {
      sums[v * 2 / kVecs] = add(sums[v * 2 / kVecs], x[v]);
      own[v] = max(x[v], set1(-128.0f));  // a NaN becomes a code, too
    }
    store_eights(codes, own);
    float found[4];
    store_sums(found, sums[0], sums[1], zero(), zero());
    for (int half = 0; half < 2; ++half)
      halves[half * stride] = -4096 < found[half] && found[half] < 4096 ? static_cast<int32_t>(found[half]) : 0;
    return 0.0f * (found[0] + found[1]);
  }
};

// Reads a group of 32 inputs and rounds them to codes, as `code_row` does. Returns their scale.
template <typename T>
inline float load_codes(const T* from, InputGroup& group) {
  float scale = group.load_from(from) / 127.0f;
  if (scale < 1.1754944e-38f) scale = 0;
  const Vec divisor = set1(scale > 0 ? scale : 1.0f);
  for (Vec& x : group.x) x = round(div(x, divisor));
  return scale;
}

// Writes the codes of a group, and the sums of those of its halves, `stride` apart. Returns the scale, which is NaN if
// an input is NaN or infinite.
template <typename T>
inline float encode_group(const T* from, int8_t* codes, int32_t* halves, int64_t stride) {
  InputGroup group;
  const float scale = load_codes(from, group);
  return scale + group.store_to(codes, halves, stride);
}

// Maximum rows for writing inputs as digits. Up to here, integer products of three digits take less time than the
// alternative, or are the more exact one: integers of 16 bits, products in fp32, slow products of bf16 pairs, or codes
// widened for tile registers.
inline int64_t most_digit_rows([[maybe_unused]] const QuantForm& form) {
#if defined(__AMX_BF16__)
  return 2;
#elif defined(__AVX512BF16__)
  return is_amd ? 0 : 4;
#elif defined(__AVX512VNNI__)
  return 6;
#elif defined(__AVX512F__)
  return form.bits == 8 ? 2 : 3;
#elif defined(__AVXVNNI__)
  return form.bits == 8 ? 2 : 6;
#elif defined(__AVX2__)
  return form.bits == 8 ? 1 : 4;
#else
  return 0;
#endif
}

// Whether rounded inputs of many rows take longer as bytes than as integers of 16 bits: without VNNI, with codes of 8
// bits, whose signs must become those of the inputs. Sums are the same integers.
inline bool are_bytes_slow([[maybe_unused]] const QuantArgs& args) {
#if defined(__x86_64__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
  bool are_bytes = true;
  for (int64_t i = 0; i < args.num_parts; ++i) are_bytes = are_bytes && kQuantForms[args.parts[i].form].bits == 8;
  return are_bytes && args.weight_rows >= kFewestManyBytes;
#else
  return false;
#endif
}

int64_t quant_digits(const QuantArgs& args) {
  if (args.rounds_inputs) return are_bytes_slow(args) ? kWords : 1;
  if (args.fixed_sums) return 0;
  bool are_few = true;
  for (int64_t i = 0; i < args.num_parts; ++i)
    are_few = are_few && args.weight_rows <= most_digit_rows(kQuantForms[args.parts[i].form]);
  if (are_few) return kDigits;
  return kUsesWords && args.dtype != Dtype::kF32 && args.weight_rows >= kFewestManyRows ? kWords : 0;
}

// The largest power of two up to a magnitude, but at least 2^-100, so that its inverse is finite.
inline float power_of_two(float size) {
  uint32_t bits;
  __builtin_memcpy(&bits, &size, 4);
  bits &= 0x7f800000;
  float top;
  __builtin_memcpy(&top, &bits, 4);
  return top > 0x1p-100f ? top : 0x1p-100f;
}

// Writes each of 32 inputs as the sum of kDigits codes, the most significant first: x is the sum of scales[d] *
// codes[d]. Relative to the group's largest magnitude, or to 2^-100 if that is larger, numbers of eight bits down to
// 2^-14 are exact, and the error of others is at most 2^-22.
//
// Digit d is at codes + d * kXChunk; the sums of the halves at halves + d and halves + stride + d (see Int8Rows); its
// scale at scales + d, NaN if an input is NaN or infinite.
template <typename T>
inline void split_group(const T* from, int8_t* codes, int32_t* halves, int64_t stride, float* scales) {
  constexpr float kTie = kDigitBase % 2 ? 0.0f : 0x1p-10f;  // 128 is -128 and one of the next digit
  InputGroup rest, digit;
  const float top = power_of_two(rest.load_from(from));
  const Vec inverse = set1(0x1p21f / top), base = set1(kDigitBase), part = set1(1.0f / kDigitBase), tie = set1(kTie);
  float scale = top * 0x1p-21f;
  for (Vec& x : rest.x) x = round(mul(x, inverse));
  for (int64_t d = kDigits; d-- > 0; scale *= kDigitBase) {
    for (int v = 0; v < InputGroup::kVecs; ++v) {
      const Vec upper = d ? round(fma(rest.x[v], part, tie)) : zero();
      digit.x[v] = sub(rest.x[v], mul(upper, base));
      rest.x[v] = upper;
    }
    scales[d] = scale + digit.store_to(codes + d * kXChunk, halves + d, stride);
  }
  for (int64_t d = 1; d < kDigits; ++d)
    for (int64_t half = 0; half < 2; ++half)
      halves[half * stride + d] += halves[half * stride + d - 1] * kDigitBase;
}

// Writes 32 inputs as integers of 16 bits and the sums of their halves, `stride` apart. Returns the scale, which is NaN
// if an input is NaN or infinite. rounds: the integers are those of int8 codes. Otherwise numbers of eight bits down to
// 2^-7 of the largest, or of 2^-100, are exact; the error of others is at most 2^-15 of it.
template <typename T>
inline float encode_words(const T* from, int16_t* words, int32_t* halves, int64_t stride, bool rounds) {
  InputGroup group;
  float scale;
  if (rounds) {
    scale = load_codes(from, group);
  } else {
    const float top = power_of_two(group.load_from(from));
    scale = top * 0x1p-14f;
    const Vec inverse = set1(0x1p14f / top);
    for (Vec& x : group.x) x = round(mul(x, inverse));
  }
  Vec sums[2] = {zero(), zero()};
  for (int v = 0; v < InputGroup::kVecs; ++v) {
    Vec& half = sums[v * 2 / InputGroup::kVecs];
    half = add(half, group.x[v]);
    store_words(words + v * kLanes, group.x[v]);
  }
  float found[4];
  store_sums(found, sums[0], sums[1], zero(), zero());
  for (int half = 0; half < 2; ++half)
    halves[half * stride] = -0x1p20f < found[half] && found[half] < 0x1p20f ? static_cast<int32_t>(found[half]) : 0;
  return scale + 0.0f * (found[0] + found[1]);
}

// Writes x as codes, in the layout of QuantArgs. A task has a chunk of 16 rows, whose scales of a group fill about one
// cache line: threads that write to the same line would wait for each other.
void quant_encode(const QuantArgs& args, int8_t* x_codes, float* x_scales, int32_t* x_halves) {
  constexpr int64_t kRows = 16;
  const int64_t chunks = ceil_div(args.in_features, kXChunk), own = scale_rows(args), stride = args.rows * own;
  const auto encode = [&]<typename T>(int64_t i, int64_t first) {
    const T* x = static_cast<const T*>(args.x.data) + i * args.x.stride;
    int8_t* const codes = x_codes + (first * args.rows + i * kXChunk) * args.digits;
    for (int64_t k = first; k < min(first + kXChunk, args.in_features); k += 32) {
      float* const scales = x_scales + k / 32 * stride + i * own;
      int32_t* const halves = x_halves + k / 16 * stride + i * own;
      if (args.digits == kDigits)
        split_group(x + k, codes + (k - first), halves, stride, scales);
      else if (args.digits == kWords)
        *scales = encode_words(x + k, reinterpret_cast<int16_t*>(codes) + (k - first), halves, stride,
                               args.rounds_inputs);
      else
        *scales = encode_group(x + k, codes + (k - first), halves, stride);
    }
  };
  with_dtype(args.dtype, [&]<typename T>() {
    const auto task = [&](int64_t t) {
      const int64_t begin = t / chunks * kRows;
      for (int64_t i = begin; i < min(begin + kRows, args.rows); ++i)
        encode.template operator()<T>(i, t % chunks * kXChunk);
    };
    const int64_t tasks = ceil_div(args.rows, kRows) * chunks;
    if (args.rows < 8)
      for (int64_t t = 0; t < tasks; ++t) task(t);
    else
      run(tasks, task);
  });
}
