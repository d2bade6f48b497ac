// Products of quantised weights with inputs in int8. Included inside the instruction set's namespace.
//
// A chunk of a panel is spread out once for all rows: its codes as bytes, four inputs of a column side by side as
// integer products want them, and what they are scaled with in fp32. A group's integer sum is exact, and groups are
// added one after the other, so that a row's product does not depend on the rows beside it.
#pragma once

constexpr int kInt8Rows = kLanes == 16 ? 8 : 4;  // of a tile
constexpr int kInt8Vecs = kLanes == 16 ? 2 : 1;  // of columns of a tile

// Where the packed nibbles have the inputs 0, 4, 1, 5 and 2, 6, 3, 7 of eight, all forms have them.
constexpr int kInt8Order[] = {0, 4, 1, 5, 2, 6, 3, 7};

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef int8_t Codes32 __attribute__((vector_size(32)));
typedef uint8_t Bytes64 __attribute__((vector_size(64)));
typedef uint16_t Words32 __attribute__((vector_size(64)));

struct SpreadChunk {
  uint8_t* codes;  // [inputs / 4, kPanel, 4]
  float* scales;   // [inputs / form.group, kPanel]
  float* addends;  // [inputs / 32, kPanel]

  explicit SpreadChunk(float* memory)
      : codes(reinterpret_cast<uint8_t*>(memory)),
        scales(memory + kChunk * kPanel / 4),
        addends(scales + kChunk * kPanel / 16) {}
};

// What is to be subtracted from the codes of a form as they are spread.
constexpr int spread_offset(const QuantForm& form) {
  return !kUnsignedCodes ? 0 : form.bits == 8 ? 128 : form.offset;
}

inline Bytes16 zip_low(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes16 zip_high(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Bytes16 zip_low_pairs(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
}
inline Bytes16 zip_high_pairs(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
}

// Writes bytes [32, kPanel] as [8, kPanel, 4].
inline void spread_bytes(const uint8_t* from, uint8_t* to) {
  constexpr uint8_t kFlipped = kUnsignedCodes ? 128 : 0;
  repeat<8>([&]<int Four>() __attribute__((always_inline)) {
    const uint8_t* first = from + Four / 2 * 8 * kPanel;
    constexpr const int* kOrder = kInt8Order + Four % 2 * 4;
    repeat<kPanel / 16>([&]<int C>() __attribute__((always_inline)) {
      Bytes16 x, y, z, w;
      __builtin_memcpy(&x, first + kOrder[0] * kPanel + C * 16, 16);
      __builtin_memcpy(&y, first + kOrder[1] * kPanel + C * 16, 16);
      __builtin_memcpy(&z, first + kOrder[2] * kPanel + C * 16, 16);
      __builtin_memcpy(&w, first + kOrder[3] * kPanel + C * 16, 16);
      x ^= kFlipped, y ^= kFlipped, z ^= kFlipped, w ^= kFlipped;
      const Bytes16 low_xy = zip_low(x, y), low_zw = zip_low(z, w), high_xy = zip_high(x, y), high_zw = zip_high(z, w);
      const Bytes16 a = zip_low_pairs(low_xy, low_zw), b = zip_high_pairs(low_xy, low_zw);
      const Bytes16 c = zip_low_pairs(high_xy, high_zw), d = zip_high_pairs(high_xy, high_zw);
      uint8_t* own = to + (Four * kPanel + C * 16) * 4;
      __builtin_memcpy(own, &a, 16), __builtin_memcpy(own + 16, &b, 16);
      __builtin_memcpy(own + 32, &c, 16), __builtin_memcpy(own + 48, &d, 16);
    });
  });
}

// Writes packed nibbles, and for codes of six bits their upper bits, as bytes [8, kPanel, 4].
template <int F>
inline void spread_nibbles(const uint8_t* from, uint8_t* to) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr uint8_t kMinus = kUnsignedCodes ? 0 : form.offset;
  for (int quad = 0; quad < 4; ++quad) {
    for (int columns = 0; columns < 2; ++columns) {
      Words32 words;
      __builtin_memcpy(&words, from + (quad * 2 + columns) * 64, 64);
      Words32 low = words & 0x0f0f, high = words >> 4 & 0x0f0f;
      if constexpr (form.bits == 6) {
        Words32 upper;
        __builtin_memcpy(&upper, from + 512 + (quad / 2 * 2 + columns) * 64, 64);
        // The second quad of a run finds its bits where the first does, in the other byte.
        if (quad % 2) upper = upper << 8 | upper >> 8;
        low |= ((upper >> 4 & 0x0003) | (upper & 0x0300)) << 4;
        high |= ((upper >> 6 & 0x0003) | (upper >> 2 & 0x0300)) << 4;
      }
      const Bytes64 spread[2] = {reinterpret_cast<Bytes64>(low) - kMinus, reinterpret_cast<Bytes64>(high) - kMinus};
      for (int odd = 0; odd < 2; ++odd) __builtin_memcpy(to + ((quad * 2 + odd) * 2 + columns) * 64, &spread[odd], 64);
    }
  }
}

// Spreads `inputs` of a panel, and returns where the next ones lie. first: the input that the first of them is.
template <int F>
inline const uint8_t* spread_chunk(const uint8_t* at, int64_t first, int64_t inputs, const SpreadChunk& to) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int kParts = 32 / form.group;
  SuperScales super = {};
  for (int64_t k = 0; k < inputs; k += 32, at += group_bytes(form)) {
    if constexpr (form.super) {
      const int64_t in_super = (first + k) % kSuperInputs;
      if (in_super == 0 || k == 0) load_super<F>(in_super ? at - super_offset(form, in_super) : at, &super);
      if (in_super == 0) at += super_head_bytes(form);
    }
    prefetch_once<group_bytes(form)>(at + kQuantAhead);
    for (int v = 0; v < kPanelVecs; ++v) {
      for (int part = 0; part < kParts; ++part)
        store(to.scales + (k / 32 * kParts + part) * kPanel + v * kLanes, load_scale<F>(at, super, part, v));
      if constexpr (form.min) store(to.addends + k / 32 * kPanel + v * kLanes, load_addend<F>(at, super, v));
    }
    const uint8_t* codes = at + group_head_bytes(form);
    if constexpr (form.bits == 8)
      spread_bytes(codes, to.codes + k * kPanel);
    else
      spread_nibbles<F>(codes, to.codes + k * kPanel);
  }
  return at;
}

// What a tile of rows reads of x, and adds to.
struct Int8Rows {
  const int8_t* x;        // [rows, kXChunk]
  const float* scales;    // [rows, groups of all inputs]
  const int32_t* halves;  // [rows, 2 * groups of all inputs]
  int64_t groups;
  int offset;   // of the spread codes
  float* sums;  // [rows, kPanel]
};

// sums[i] += the products of a chunk's groups, for kInt8Vecs vectors of columns from `col` on.
template <int Group, bool Min, int Rows>
void int8_tile(const SpreadChunk& chunk, const Int8Rows& t, int64_t col, int64_t groups) {
  constexpr int kParts = 32 / Group;
  Vec totals[Rows][kInt8Vecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kInt8Vecs; ++v) totals[i][v] = load(t.sums + i * kPanel + col + v * kLanes);
  for (int64_t g = 0; g < groups; ++g) {
    repeat<kParts>([&]<int P>() __attribute__((always_inline)) {
      Ints acc[Rows][kInt8Vecs];
      for (int i = 0; i < Rows; ++i) {
        const int32_t* halves = t.halves + (i * t.groups + g) * 2;
        const int sum = kParts == 2 ? halves[P] : halves[0] + halves[1];
        for (int v = 0; v < kInt8Vecs; ++v) acc[i][v] = set1_int(-t.offset * sum);
      }
      repeat<Group / 4>([&]<int Q>() __attribute__((always_inline)) {
        constexpr int kFour = P * Group / 4 + Q;
        const uint8_t* from = chunk.codes + ((g * 8 + kFour) * kPanel + col) * 4;
        Codes codes[kInt8Vecs];
        for (int v = 0; v < kInt8Vecs; ++v) codes[v] = load_codes(from + v * kLanes * 4);
        repeat<Rows>([&]<int R>() __attribute__((always_inline)) {
          int x;
          __builtin_memcpy(&x, t.x + R * kXChunk + g * 32 + kFour * 4, 4);
          for (int v = 0; v < kInt8Vecs; ++v) acc[R][v] = dot_codes(acc[R][v], codes[v], x);
        });
      });
      for (int v = 0; v < kInt8Vecs; ++v) {
        const Vec scale = load(chunk.scales + (g * kParts + P) * kPanel + col + v * kLanes);
        for (int i = 0; i < Rows; ++i)
          totals[i][v] = fma(to_floats(acc[i][v]), mul(scale, set1(t.scales[i * t.groups + g])), totals[i][v]);
      }
    });
    if constexpr (Min) {
      for (int i = 0; i < Rows; ++i) {
        const int32_t* halves = t.halves + (i * t.groups + g) * 2;
        const Vec sum = set1(static_cast<float>(halves[0] + halves[1]) * t.scales[i * t.groups + g]);
        for (int v = 0; v < kInt8Vecs; ++v)
          totals[i][v] = fma(load(chunk.addends + g * kPanel + col + v * kLanes), sum, totals[i][v]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kInt8Vecs; ++v) store(t.sums + i * kPanel + col + v * kLanes, totals[i][v]);
}

// sums [rows, kPanel] += rows [row, row + rows) of codes times one panel. memory: kChunk * kPanel floats.
template <int F>
void int8_panel(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums, float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  const SpreadChunk chunk(memory);
  const int64_t tiles = ceil_div(rows, kInt8Rows), groups = args.in_features / 32;
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    panel = spread_chunk<F>(panel, first, inputs, chunk);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin, at = row + begin;
      const Int8Rows t = {args.x_codes + (first / kXChunk * args.rows + at) * kXChunk + first % kXChunk,
                          args.x_scales + at * groups + first / 32, args.x_halves + (at * groups + first / 32) * 2,
                          groups, spread_offset(form), sums + begin * kPanel};
      for (int64_t col = 0; col < kPanel; col += kInt8Vecs * kLanes)
        with_size<kInt8Rows>(num, [&]<int Rows>() {
          int8_tile<form.group, form.min, Rows>(chunk, t, col, inputs / 32);
        });
    }
  }
}

using Int8Panel = void (*)(const QuantArgs&, const uint8_t*, int64_t, int64_t, float*, float*);
constexpr Int8Panel kInt8Panel[] = {int8_panel<0>, int8_panel<1>, int8_panel<2>, int8_panel<3>,
                                    int8_panel<4>, int8_panel<5>, int8_panel<6>};
static_assert(sizeof(kInt8Panel) / sizeof(Int8Panel) == kNumQuantForms && kXChunk % kChunk == 0);

// Does for a group of 32 inputs what `encode` does, and writes the sums of the codes of its halves.
template <typename T>
inline float encode_group(const T* from, int8_t* codes, int32_t* halves) {
  constexpr int kVecs = 32 / kLanes;
  Vec x[kVecs], largest = zero(), poison = zero(), sums[2] = {zero(), zero()};
  for (int v = 0; v < kVecs; ++v) {
    x[v] = load(from + v * kLanes);
    largest = max(max(x[v], sub(zero(), x[v])), largest);
    poison = fma(x[v], zero(), poison);
  }
  float scale = max_lane(largest) / 127.0f;
  if (scale < 1.1754944e-38f) scale = 0;
  const Vec divisor = set1(scale > 0 ? scale : 1.0f);
  for (int v = 0; v < kVecs; ++v) {
    // No number is larger than 127; what is none becomes one.
    const Vec code = max(round(div(x[v], divisor)), set1(-127.0f));
    store_codes(codes + v * kLanes, code, kLanes);
    sums[v * 2 / kVecs] = add(sums[v * 2 / kVecs], code);
  }
  for (int half = 0; half < 2; ++half) halves[half] = static_cast<int32_t>(sum(sums[half]));
  return scale + sum(poison);
}

// Writes x as QuantArgs has its codes.
void quant_encode(const QuantArgs& args, int8_t* x_codes, float* x_scales, int32_t* x_halves) {
  const int64_t groups = args.in_features / 32;
  const auto row = [&]<typename T>(int64_t i) {
    const T* x = static_cast<const T*>(args.x.data) + i * args.x.stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * 32;
      Codes32 codes;
      x_scales[i * groups + g] =
          encode_group(x + k, reinterpret_cast<int8_t*>(&codes), x_halves + (i * groups + g) * 2);
      codes = __builtin_shufflevector(codes, codes, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 16, 20, 17,
                                      21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31);
      __builtin_memcpy(x_codes + (k / kXChunk * args.rows + i) * kXChunk + k % kXChunk, &codes, 32);
    }
  };
  with_dtype(args.dtype, [&]<typename T>() {
    if (args.rows < 8)
      for (int64_t i = 0; i < args.rows; ++i) row.template operator()<T>(i);
    else
      run(args.rows, [&](int64_t i) { row.template operator()<T>(i); });
  });
}
