// Integer products of many rows with quantized weights. Included by quant_int8.h.
//
// A chunk's codes are written to the first-level cache once for all rows: as bytes for inputs in int8, or as 16-bit
// integers for inputs of 16 bits. So a tile has more rows than one that reads packed codes. Inputs of 16 bits stand for
// bf16 and fp16 numbers where the processor multiplies pairs of such integers, but not of bf16: two products take an
// instruction, as one does in fp32.
#pragma once

#if (defined(__AVX512VNNI__) && !defined(__AVX512BF16__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool kUsesWords = true;
#else
constexpr bool kUsesWords = false;
#endif
constexpr int64_t kWords = 2;          // args.digits of inputs of 16 bits
constexpr int kManyRows = 12;          // per tile, at most
constexpr int64_t kFewestManyRows = 7;
// Minimum rows of int8 inputs: with fewer, or with such codes at all, reading packed codes takes no longer.
constexpr int64_t fewest_many_bytes(const QuantForm& form) {
  if (form.bits == 4 || (form.bits == 6 && kLanes == 16)) return INT64_MAX;
  return kLanes == 16 ? 9 : kFewestManyRows;
}
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
template <typename Code, int Bits, int Group, int Rows>
void many_tile(const Int8Chunk& chunk, const uint8_t* spread, const Int8Rows& t, const Starts<Group, Rows>& starts,
               int64_t col, int64_t groups) {
  constexpr bool kAreBytes = sizeof(Code) == 1;
  constexpr int kParts = 32 / Group, kSteps = Group * sizeof(Code) / 4;
  constexpr int64_t kRowBytes = kXChunk * sizeof(Code);
  const int64_t row_groups = t.groups * sizeof(Code);  // as many rows of scales and halves as bytes
  for (int64_t part = 0; part < groups * kParts; ++part) {
    const int64_t g = part / kParts;
    Ints acc[Rows][kInt8Vecs], small[Rows][kInt8Vecs];
    auto& sums = kAreBytes && kSumsAreSmall<Bits> ? small : acc;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Ints start = set1_int(kAreBytes ? starts.of[part][i] : 0);
#pragma GCC unroll 2
      for (int v = 0; v < kInt8Vecs; ++v) acc[i][v] = start, small[i][v] = set1_int(0);
    }
    const uint8_t* weights = spread + (part * kSteps * kPanel + col) * 4;
    const int8_t* x = t.x + part * kSteps * 4;
    repeat<kSteps>([&]<int S>() __attribute__((always_inline)) {
      Words w[kInt8Vecs];
#pragma GCC unroll 2
      for (int v = 0; v < kInt8Vecs; ++v)
        __builtin_memcpy(&w[v], weights + (S * kPanel + v * kLanes) * 4, sizeof(Words));
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        int four;
        __builtin_memcpy(&four, x + i * kRowBytes + S * 4, 4);
#pragma GCC unroll 2
        for (int v = 0; v < kInt8Vecs; ++v) {
          if constexpr (kAreBytes) sums[i][v] = dot_codes<Bits>(sums[i][v], w[v], four);
          else sums[i][v] = dot_words(sums[i][v], w[v], four);
        }
      }
    });
    if constexpr (kAreBytes) add_small<Bits>(acc, small);
    const auto add_scaled = [&](auto has_addends) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const float x_scale = t.scales[i * row_groups + g];
        const int32_t* halves = t.halves + (i * row_groups + g) * 2;
        const Vec sum = set1(has_addends ? static_cast<float>(halves[0] + halves[1]) * x_scale : 0.0f);
#pragma GCC unroll 2
        for (int v = 0; v < kInt8Vecs; ++v) {
          const int64_t at = col + v * kLanes;
          const Vec scale = mul(load(chunk.scales + part * kPanel + at), set1(x_scale));
          Vec total = fma(to_floats(acc[i][v]), scale, load(t.sums + i * kPanel + at));
          if constexpr (has_addends) total = fma(load(chunk.addends + g * kPanel + at), sum, total);
          store(t.sums + i * kPanel + at, total);
        }
      }
    };
    if (chunk.addends) add_scaled(std::true_type());
    else add_scaled(std::false_type());
  }
}

// sums [rows, kPanel] += rows [row, row + rows) times one panel. memory: kChunk * kPanel floats.
template <int F, typename Code>
void many_panel(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums, float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int64_t kBytes = sizeof(Code);
  static_assert(kSpreadAt * sizeof(float) + kChunk * kPanel * kBytes <= kChunk * kPanel * sizeof(float));
  auto* const spread = reinterpret_cast<uint8_t*>(memory + kSpreadAt);
  const int64_t tiles = ceil_div(rows, kManyRows), groups = args.in_features / 32;
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    const Int8Chunk chunk = scales_of<F>(panel, first, inputs, memory);
    spread_codes<F, Code>(chunk, inputs / 32, spread);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin;
      const int64_t at = row + begin, scales_at = at * kBytes * groups + first / 32;
      const int8_t* x = args.x_codes + ((first / kXChunk * args.rows + at) * kXChunk + first % kXChunk) * kBytes;
      const Int8Rows t = {x, args.x_scales + scales_at, args.x_halves + scales_at * 2, groups, int8_offset(form),
                          sums + begin * kPanel};
      // Rows of int8 inputs are many; those of 16 bits may be few, if they have a weight of their own.
      with_size<kManyRows, kBytes == 1 ? kManyRows / 2 : 1>(num, [&]<int Rows>() {
        const Starts<form.group, Rows> starts(t, kBytes == 1 ? inputs : 0);
        for (int64_t col = 0; col < kPanel; col += kInt8Vecs * kLanes)
          many_tile<Code, form.bits, form.group, Rows>(chunk, spread, t, starts, col, inputs / 32);
      });
    }
  }
}

using ManyPanel = void (*)(const QuantArgs&, const uint8_t*, int64_t, int64_t, float*, float*);
template <int F, typename Code>
constexpr ManyPanel many_panel_if_used() {
  if constexpr (sizeof(Code) == 1 ? fewest_many_bytes(kQuantForms[F]) < INT64_MAX : kUsesWords)
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
