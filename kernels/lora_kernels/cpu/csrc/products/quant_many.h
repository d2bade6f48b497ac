// Integer products of many rows with quantized weights. Included by quant_int8.h.
//
// A chunk's codes are written to the first-level cache once for all rows, which then read them in the order of the
// products: as bytes for inputs in int8, or as 16-bit integers for inputs of 16 bits. These stand for bf16 and fp16
// numbers where the processor multiplies pairs of such integers, but not of bf16. With VNNI an instruction has two
// products and their sum, where one in fp32 has one of each. Without it the sum is an instruction of its own, for
// which processors have more units with AVX2 than for products.
#pragma once

#if defined(__x86_64__) && !defined(__AVX512BF16__)
constexpr bool kUsesWords = true;
#else
constexpr bool kUsesWords = false;
#endif
constexpr int kManyVecs = 2;                     // of columns per tile
constexpr int kManyRows = kLanes == 16 ? 8 : 6;  // per tile, at most
constexpr int64_t kFewestManyRows = 7;
constexpr int64_t kFewestManyBytes = kLanes == 16 ? 9 : 7;  // of int8 inputs: fewer take no longer with packed codes
// Whether codes are written for int8 inputs: 4-bit codes were not measured on Arm.
#ifdef __x86_64__
constexpr bool spreads_codes(const QuantForm&) { return true; }
#else
constexpr bool spreads_codes(const QuantForm& form) { return form.bits > 4; }
#endif
constexpr int64_t kSpreadAt = kChunk / 8 * kPanel;  // floats: after a chunk's scales and addends

// The codes of inputs 2 I and 2 I + 1 of a quad of eight as 16-bit integers, for a vector of columns. codes: those of a
// group of 32 inputs.
template <int F, int Quad, int I>
__attribute__((always_inline)) inline Words pair_of(const uint8_t* codes, int64_t col) {
  constexpr QuantForm form = kQuantForms[F];
  if constexpr (form.bits == 8) {
    return pair_bytes(codes + (Quad * 8 + I * 2) * kPanel + col);
  } else {
    Words words;
    __builtin_memcpy(&words, codes + Quad * 128 + col * 4, sizeof(words));
    words = words >> 4 * I & 15;
    if constexpr (form.bits == 6) {
      Words upper;
      __builtin_memcpy(&upper, codes + 512 + Quad / 2 * 128 + col * 4, sizeof(upper));
      words |= (upper >> upper_place(Quad % 2 * 4 + I) & 3) << 4;
    }
    return words - static_cast<uint16_t>(form.offset);
  }
}

// Writes the codes of `groups` groups of 32 inputs: [inputs of four bytes, kPanel] integers of 8 or 16 bits.
template <int F, typename Code>
void spread_codes(const Int8Chunk& chunk, int64_t groups, uint8_t* to) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int kSteps = 2 * sizeof(Code);  // of four bytes, per quad
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* codes = chunk.codes + g * chunk.group_bytes;
    prefetch_once<128>(codes + chunk.head_ahead);
    repeat<4>([&]<int Q>() __attribute__((always_inline)) {
      prefetch_once<form.bits * 32>(codes + Q * form.bits * 32 + kLinesAhead);
      uint8_t* at = to + (g * 4 + Q) * kSteps * kPanel * 4;
      const auto put = [&](int step, int64_t col, Words words) __attribute__((always_inline)) {
        __builtin_memcpy(at + (step * kPanel + col) * 4, &words, sizeof(words));
      };
      if constexpr (sizeof(Code) == 1 && form.bits == 8) {
        for (int half = 0; half < 2; ++half) spread_fours(codes + (Q * 8 + half * 2) * kPanel, at + half * kPanel * 4);
        return;
      }
      for (int64_t col = 0; col < kPanel; col += kInt8Vecs * kLanes) {
        if constexpr (sizeof(Code) == 1) {
          Words quad[2][kInt8Vecs];
          load_quad<form.bits, Q>(codes, col, quad);
          for (int half = 0; half < 2; ++half)
            for (int v = 0; v < kInt8Vecs; ++v) put(half, col + v * kLanes, quad[half][v]);
        } else {
          for (int v = 0; v < kInt8Vecs; ++v)
            repeat<4>([&]<int I>() __attribute__((always_inline)) {
              put(I, col + v * kLanes, pair_of<F, Q, I>(codes, col + v * kLanes));
            });
        }
      }
    });
  }
}

// Like int8_tile, with codes that `spread_codes` has written.
template <typename Code, int Bits, int Group, int Rows, bool HasAddends>
void many_tile(const Int8Chunk& chunk, const uint8_t* spread, const Int8Rows& t, const Starts<Group, Rows>& starts,
               int64_t col, int64_t groups) {
  constexpr bool kAreBytes = sizeof(Code) == 1, kAreSmall = kAreBytes && kSumsAreSmall<Bits>;
  constexpr int kParts = 32 / Group, kSteps = Group * sizeof(Code) / 4;
  constexpr int64_t kRowBytes = kXChunk * sizeof(Code);
  static_assert(!HasAddends || kParts == 1);
  const int8_t* x = t.x;
  const float* x_scales = t.scales;
  const int32_t* halves = t.halves;
  const uint8_t* weights = spread + col * 4;
  const float *scales = chunk.scales + col, *addends = HasAddends ? chunk.addends + col : nullptr;
  Vec totals[Rows][kManyVecs];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kManyVecs; ++v) totals[i][v] = load(t.sums + i * kPanel + col + v * kLanes);
  for (int64_t part = 0; part < groups * kParts; ++part) {
    Ints acc[Rows][kManyVecs];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Ints start = set1_int(kAreBytes && !kAreSmall ? starts.of[part][i] : 0);
#pragma GCC unroll 2
      for (int v = 0; v < kManyVecs; ++v) acc[i][v] = start;
    }
    repeat<kSteps>([&]<int S>() __attribute__((always_inline)) {
      Words w[kManyVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kManyVecs; ++v)
        __builtin_memcpy(&w[v], weights + (S * kPanel + v * kLanes) * 4, sizeof(Words));
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        int four;
        __builtin_memcpy(&four, x + i * kRowBytes + S * 4, 4);
#pragma GCC unroll 2
        for (int v = 0; v < kManyVecs; ++v) {
          if constexpr (kAreBytes) acc[i][v] = dot_codes<Bits>(acc[i][v], w[v], four);
          else acc[i][v] = dot_words(acc[i][v], w[v], four);
        }
      }
    });
#pragma GCC unroll 2
    for (int v = 0; v < kManyVecs; ++v) {
      const Vec scale = load(scales + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        if constexpr (kAreSmall) acc[i][v] = add_ints(set1_int(starts.of[part][i]), sum_pairs(acc[i][v]));
        totals[i][v] = fma(to_floats(acc[i][v]), mul(scale, set1(x_scales[i])), totals[i][v]);
        if constexpr (HasAddends) {
          const float sum = static_cast<float>(halves[i] + halves[t.stride + i]) * x_scales[i];
          totals[i][v] = fma(load(addends + v * kLanes), set1(sum), totals[i][v]);
        }
      }
    }
    weights += kSteps * kPanel * 4, x += kSteps * 4, scales += kPanel;
    if (part % kParts < kParts - 1) continue;
    x_scales += t.stride;
    if constexpr (HasAddends) addends += kPanel, halves += 2 * t.stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kManyVecs; ++v) store(t.sums + i * kPanel + col + v * kLanes, totals[i][v]);
}

// sums [rows, kPanel] += rows [row, row + rows) times one panel. memory: kChunk * kPanel floats.
template <int F, typename Code>
void many_panel(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums, float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int64_t kBytes = sizeof(Code);
  static_assert(kSpreadAt * sizeof(float) + kChunk * kPanel * kBytes <= kChunk * kPanel * sizeof(float));
  auto* const spread = reinterpret_cast<uint8_t*>(memory + kSpreadAt);
  const int64_t tiles = ceil_div(rows, kManyRows);
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    const Int8Chunk chunk = scales_of<F>(panel, first, inputs, memory);
    spread_codes<F, Code>(chunk, inputs / 32, spread);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin;
      const Int8Rows t = tile_rows(args, row + begin, first, int8_offset(form), sums + begin * kPanel);
      // Rows of int8 inputs are many; those of 16 bits may be few, if they have a weight of their own.
      with_size<kManyRows, kBytes == 1 ? kManyRows / 2 : 1>(num, [&]<int Rows>() {
        const Starts<form.group, Rows> starts(t, kBytes == 1 ? inputs : 0);
        for (int64_t col = 0; col < kPanel; col += kManyVecs * kLanes)
          many_tile<Code, form.bits, form.group, Rows, form.min>(chunk, spread, t, starts, col, inputs / 32);
      });
    }
  }
}

using ManyPanel = void (*)(const QuantArgs&, const uint8_t*, int64_t, int64_t, float*, float*);
template <int F, typename Code>
constexpr ManyPanel many_panel_if_used() {
  if constexpr (sizeof(Code) == 1 ? spreads_codes(kQuantForms[F]) : kUsesWords)
    return many_panel<F, Code>;
  else
    return nullptr;
}
template <typename Code>
constexpr ManyPanel kManyPanel[] = {many_panel_if_used<0, Code>(), many_panel_if_used<1, Code>(),
                                    many_panel_if_used<2, Code>(), many_panel_if_used<3, Code>(),
                                    many_panel_if_used<4, Code>(), many_panel_if_used<5, Code>(),
                                    many_panel_if_used<6, Code>()};
static_assert(sizeof(kManyPanel<int8_t>) / sizeof(ManyPanel) == kNumQuantForms);
