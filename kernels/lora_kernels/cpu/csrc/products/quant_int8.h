// Products of quantized weights with integer codes: for inputs that are rounded to int8, for few rows whose inputs are
// exact sums of three int8 codes, or for more rows with inputs of 16 bits. Included inside the instruction set's namespace.
//
// Codes are read in place and become bytes in registers, with four inputs of a column adjacent, as integer products
// need them: nothing is stored in between, even for few rows. A group's integer sum is exact, and groups are added in
// order, so that a row's product does not depend on the other rows.
#pragma once

constexpr int64_t kWords = 2;                    // args.digits of inputs of 16 bits
constexpr int kInt8Rows = 8;                     // per tile, also of rows written as digits
constexpr int kInt8Vecs = kLanes == 16 ? 2 : 1;  // of columns per tile

// The number subtracted from codes during multiplication.
//
// All codes and inputs (`store_eights`) have the order of packed nibbles: of every eight inputs, 0, 4, 1, 5 in the
// lower halves of their bytes and 2, 6, 3, 7 in the upper halves.
constexpr int int8_offset(const QuantForm& form) { return form.bits < 8 ? form.offset : kUnsignedBytes ? 128 : 0; }

// The codes of inputs 0, 4, 1, 5 of a quad of eight, and those of 2, 6, 3, 7, for kInt8Vecs vectors of columns. codes:
// those of a group of 32 inputs.
template <int Bits, int Quad>
__attribute__((always_inline)) inline void load_quad(const uint8_t* codes, int64_t col, Words (&out)[2][kInt8Vecs]) {
  if constexpr (Bits == 8) {
    for (int half = 0; half < 2; ++half) load_fours(codes + (Quad * 8 + half * 2) * kPanel + col, out[half]);
  } else {
    for (int v = 0; v < kInt8Vecs; ++v) {
      Words words;
      __builtin_memcpy(&words, codes + Quad * 128 + (col + v * kLanes) * 4, sizeof(words));
      if constexpr (Bits == 4) {
        out[0][v] = words & 0x0f0f, out[1][v] = words >> 4 & 0x0f0f;
      } else {
        Words upper;
        __builtin_memcpy(&upper, codes + 512 + Quad / 2 * 128 + (col + v * kLanes) * 4, sizeof(upper));
        // Bits 4 and 5 of each byte; for the second quad of a run they are in the other byte.
        const Words low = Quad % 2 ? select(0x00ff, upper >> 8, upper << 12) : select(0x00ff, upper, upper << 4);
        const Words high = Quad % 2 ? select(0x00ff, upper >> 10, upper << 10) : select(0x00ff, upper >> 2, upper << 2);
        out[0][v] = select(0x0f0f, words, low) & 0x3f3f, out[1][v] = select(0x0f0f, words >> 4, high) & 0x3f3f;
      }
    }
  }
}

// A chunk of a panel, and the scales of its codes.
struct Int8Chunk {
  const uint8_t* codes;  // the first group of 32 inputs
  int64_t group_bytes;   // between groups
  const float* scales;   // [groups of inputs that share a scale, kPanel]
  const float* addends;  // [groups, kPanel] or null
  int64_t head_ahead;    // from a group's codes to the scales to prefetch
};

// A tile's rows of x, and the sums it adds to. If inputs are written as digits, each row has kDigits rows of codes,
// scales and halves; the halves are then sums over the digits so far, in units of the last one.
struct Int8Rows {
  const int8_t* x;        // [rows, kXChunk]
  const float* scales;    // [groups, rows], `stride` apart
  const int32_t* halves;  // [2 * groups, rows], likewise
  int64_t stride;
  int offset;   // see int8_offset
  float* sums;  // [rows, kPanel]
};

// Rows of scales for a row of x: inputs of 16 bits have one, though their codes take the space of two.
inline int64_t scale_rows(const QuantArgs& args) { return args.digits == kWords ? 1 : args.digits; }

// Rows of a tile that starts at a row and an input.
inline Int8Rows tile_rows(const QuantArgs& args, int64_t row, int64_t input, int offset, float* sums) {
  const int64_t own = scale_rows(args), stride = args.rows * own, code_bytes = args.digits / own;
  const int64_t chunk_row = (input / kXChunk * args.rows + row) * args.digits;
  return {args.x_codes + chunk_row * kXChunk + input % kXChunk * code_bytes,
          args.x_scales + input / 32 * stride + row * own,
          args.x_halves + input / 16 * stride + row * own,
          stride,
          offset,
          sums};
}

// What the offset of codes adds to a tile's sums, negative: the sums start from it. Computed once for all columns, and
// for all rows at once: more of them may be read than there are. Group: number of inputs that share a scale.
template <int Group, int Rows>
struct Starts {
  typedef int32_t Row __attribute__((vector_size(4 * (Rows > 4 ? 8 : Rows > 2 ? 4 : Rows))));
  Row of[kChunk / Group];

  Starts(const Int8Rows& rows, int64_t inputs) {
    const int32_t* halves = rows.halves;
    for (int64_t part = 0; part < inputs / Group; ++part, halves += Group / 16 * rows.stride) {
      Row first, second = {};
      __builtin_memcpy(&first, halves, sizeof(Row));
      if constexpr (Group == 32) __builtin_memcpy(&second, halves + rows.stride, sizeof(Row));
      of[part] = (first + second) * -rows.offset;
    }
  }
};

// Adds the pairs of small sums, if sums of such codes are small at first.
template <int Bits, int Rows>
__attribute__((always_inline)) inline void add_small(Ints (&acc)[Rows][kInt8Vecs],
                                                     const Ints (&small)[Rows][kInt8Vecs]) {
  if constexpr (kSumsAreSmall<Bits>)
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < kInt8Vecs; ++v) acc[i][v] = add_ints(acc[i][v], sum_pairs(small[i][v]));
}

// sums[i] += the products of a chunk's groups, for kInt8Vecs vectors of columns starting at `col`.
template <int Bits, int Group, int Rows>
void int8_tile(const Int8Chunk& chunk, const Int8Rows& t, const Starts<Group, Rows>& starts, int64_t col,
               int64_t groups) {
  constexpr int kParts = 32 / Group;
  constexpr int kChains = Rows <= 2 ? 2 : 1;  // with few rows a sum would wait for its own previous addition
  Vec totals[Rows][kInt8Vecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kInt8Vecs; ++v) totals[i][v] = load(t.sums + i * kPanel + col + v * kLanes);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* codes = chunk.codes + g * chunk.group_bytes;
    const float* x_scales = t.scales + g * t.stride;
    prefetch_once<128>(codes + chunk.head_ahead);
    repeat<kParts>([&]<int P>() __attribute__((always_inline)) {
      Ints acc[kChains][Rows][kInt8Vecs], small[Rows][kInt8Vecs];
      for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < kInt8Vecs; ++v) {
          acc[0][i][v] = set1_int(starts.of[g * kParts + P][i]);
          if constexpr (kChains == 2) acc[1][i][v] = set1_int(0);
          small[i][v] = set1_int(0);
        }
      }
      repeat<Group / 8>([&]<int Q>() __attribute__((always_inline)) {
        constexpr int kQuad = P * Group / 8 + Q;
        Words quad[2][kInt8Vecs];
        load_quad<Bits, kQuad>(codes, col, quad);
        prefetch_once<Bits * 32>(codes + kQuad * Bits * 32 + kLinesAhead);
        repeat<2>([&]<int Half>() __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            int x;
            __builtin_memcpy(&x, t.x + r * kXChunk + g * 32 + kQuad * 8 + Half * 4, 4);
            Ints* to = kSumsAreSmall<Bits> ? small[r] : acc[Half % kChains][r];
            for (int v = 0; v < kInt8Vecs; ++v) to[v] = dot_codes<Bits>(to[v], quad[Half][v], x);
          }
        });
      });
      add_small<Bits>(acc[0], small);
      for (int v = 0; v < kInt8Vecs; ++v) {
        const Vec scale = load(chunk.scales + (g * kParts + P) * kPanel + col + v * kLanes);
        for (int i = 0; i < Rows; ++i) {
          Ints sum = acc[0][i][v];
          if constexpr (kChains == 2) sum = add_ints(sum, acc[1][i][v]);
          totals[i][v] = fma(to_floats(sum), mul(scale, set1(x_scales[i])), totals[i][v]);
        }
      }
    });
    if (chunk.addends) {
      const int32_t* halves = t.halves + g * 2 * t.stride;
      for (int i = 0; i < Rows; ++i) {
        const Vec sum = set1(static_cast<float>(halves[i] + halves[t.stride + i]) * x_scales[i]);
        for (int v = 0; v < kInt8Vecs; ++v)
          totals[i][v] = fma(load(chunk.addends + g * kPanel + col + v * kLanes), sum, totals[i][v]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kInt8Vecs; ++v) store(t.sums + i * kPanel + col + v * kLanes, totals[i][v]);
}

constexpr int kDigits = 3;  // per input
// Digits are -128 to 127, which needs one shift. Where products take the sign off signed bytes, these must not be -128.
constexpr int kDigitBase = kUnsignedBytes ? 256 : 255;

// Like int8_tile, for rows whose inputs are written as digits. The products of a row's digits form one integer: the sum
// so far is multiplied by the base before the next digit's products are added. With codes of more than four bits it
// could exceed 32 bits, so the first digit is scaled separately.
template <int Bits, int Group, int Rows>
void digit_tile(const Int8Chunk& chunk, const Int8Rows& t, int64_t col, int64_t groups) {
  constexpr int kParts = 32 / Group, kFirst = Bits == 4 ? 0 : 1;  // kFirst: the first digit of that integer
  constexpr bool kIsApart = Rows <= 2;                            // few rows: each sum would wait for its previous addition
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* codes = chunk.codes + g * chunk.group_bytes;
    const auto sum_of = [&](int i, int d, int part) {  // over the group, or over the inputs that share a scale
      const int32_t* halves = t.halves + g * 2 * t.stride + i * kDigits + d;
      return kParts == 2 ? halves[part * t.stride] : halves[0] + halves[t.stride];
    };
    const auto x_scale = [&](int i, int d) { return t.scales[g * t.stride + i * kDigits + d]; };
    prefetch_once<128>(codes + chunk.head_ahead);
    repeat<kParts>([&]<int P>() __attribute__((always_inline)) {
      Words own[Group / 8][2][kInt8Vecs];
      repeat<Group / 8>([&]<int Q>() __attribute__((always_inline)) {
        constexpr int kQuad = P * Group / 8 + Q;
        load_quad<Bits, kQuad>(codes, col, own[Q]);
        prefetch_once<Bits * 32>(codes + kQuad * Bits * 32 + kLinesAhead);
      });
      // Adds the scaled integers of digits `first` to `last` to t.sums.
      const auto add_scaled = [&](const Ints (&of_rows)[Rows][kInt8Vecs], int first, int last)
                                  __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          int sum = sum_of(i, last, P);
          if (first) sum -= sum_of(i, first - 1, P) * kDigitBase * kDigitBase;
          const Ints less = set1_int(-t.offset * sum);
          const Vec factor = set1(x_scale(i, last));
#pragma GCC unroll 2
          for (int v = 0; v < kInt8Vecs; ++v) {
            const Vec scale = load(chunk.scales + (g * kParts + P) * kPanel + col + v * kLanes);
            float* to = t.sums + i * kPanel + col + v * kLanes;
            store(to, fma(to_floats(add_ints(of_rows[i][v], less)), mul(scale, factor), load(to)));
          }
        }
      };
      Ints acc[kIsApart ? kDigits : 1][Rows][kInt8Vecs];
      repeat<kDigits>([&]<int D>() __attribute__((always_inline)) {
        auto& to = acc[kIsApart ? D : 0];
        Ints small[Rows][kInt8Vecs];
        auto& sums = kSumsAreSmall<Bits> ? small : to;
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < kInt8Vecs; ++v) {
            to[i][v] = kIsApart || D <= kFirst ? set1_int(0) : times(to[i][v], kDigitBase);
            small[i][v] = set1_int(0);
          }
        const int8_t* x = t.x + D * kXChunk + g * 32 + P * Group;
        for (int four = 0; four < Group / 4; ++four, x += 4) {
#pragma GCC unroll 8
          for (int i = 0; i < Rows; ++i) {
            int all;
            __builtin_memcpy(&all, x + i * kDigits * kXChunk, 4);
#pragma GCC unroll 2
            for (int v = 0; v < kInt8Vecs; ++v)
              sums[i][v] = dot_codes<Bits>(sums[i][v], own[four / 2][four % 2][v], all);
          }
        }
        add_small<Bits>(to, small);
        if constexpr (D < kFirst) add_scaled(to, D, D);
      });
      if constexpr (kIsApart)
        for (int d = kFirst + 1; d < kDigits; ++d)
          for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < kInt8Vecs; ++v)
              acc[kFirst][i][v] = add_ints(times(acc[kFirst][i][v], kDigitBase), acc[d][i][v]);
      add_scaled(acc[kIsApart ? kFirst : 0], kFirst, kDigits - 1);
    });
    if (chunk.addends) {
      for (int i = 0; i < Rows; ++i) {
        const float sum = static_cast<float>(sum_of(i, kDigits - 1, 0)) * x_scale(i, kDigits - 1);
        for (int v = 0; v < kInt8Vecs; ++v) {
          float* to = t.sums + i * kPanel + col + v * kLanes;
          store(to, fma(load(chunk.addends + g * kPanel + col + v * kLanes), set1(sum), load(to)));
        }
      }
    }
  }
}

// Writes the scales of `inputs` inputs of a panel, and moves `at` past them. first: index of the first input. memory:
// kChunk * kPanel floats.
template <int F>
Int8Chunk scales_of(const uint8_t*& at, int64_t first, int64_t inputs, float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int kParts = 32 / form.group;
  float *scales = memory, *addends = memory + kChunk / 16 * kPanel;
  // All scales of a chunk are read at its start, so they are prefetched earlier than its codes.
  constexpr int64_t kAhead = panel_bytes(form, 2 * kChunk);
  SuperScales super = {};
  touch_ahead<F>(at);
  if constexpr (form.super) {
    const int64_t in_super = first % kSuperInputs;
    load_super<F>(in_super ? at - super_offset(form, in_super) : at, &super);
    if (in_super == 0) prefetch_once<super_head_bytes(form)>(at + kAhead), at += super_head_bytes(form);
  }
  const uint8_t* codes = at + group_head_bytes(form);
  for (int64_t g = 0; g < inputs / 32; ++g, at += group_bytes(form)) {
    for (int v = 0; v < kPanelVecs; ++v) {
      for (int part = 0; part < kParts; ++part)
        store(scales + (g * kParts + part) * kPanel + v * kLanes, load_scale<F>(at, super, part, v));
      if constexpr (form.min) store(addends + g * kPanel + v * kLanes, load_addend<F>(at, super, v));
    }
  }
  return {codes, group_bytes(form), scales, form.min ? addends : nullptr, kAhead - group_head_bytes(form)};
}

using ScalesOf = Int8Chunk (*)(const uint8_t*&, int64_t, int64_t, float*);
constexpr ScalesOf kScalesOf[] = {scales_of<0>, scales_of<1>, scales_of<2>, scales_of<3>,
                                  scales_of<4>, scales_of<5>, scales_of<6>};
static_assert(sizeof(kScalesOf) / sizeof(ScalesOf) == kNumQuantForms && kXChunk % kChunk == 0 &&
              kSuperInputs % kChunk == 0);

// sums [rows, kPanel] += rows [row, row + rows) times one panel. memory: kChunk * kPanel floats.
template <int Bits, int Group>
void int8_tiles(const QuantArgs& args, int64_t form, const uint8_t* panel, int64_t row, int64_t rows, float* sums,
                float* memory) {
  const bool are_digits = args.digits > 1;
  const int64_t tiles = ceil_div(rows, kInt8Rows);
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    const Int8Chunk chunk = kScalesOf[form](panel, first, inputs, memory);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin;
      const Int8Rows t = tile_rows(args, row + begin, first, int8_offset(kQuantForms[form]), sums + begin * kPanel);
      if (are_digits)
        with_size<kInt8Rows>(num, [&]<int Rows>() {
          for (int64_t col = 0; col < kPanel; col += kInt8Vecs * kLanes)
            digit_tile<Bits, Group, Rows>(chunk, t, col, inputs / 32);
        });
      else
        with_size<kInt8Rows>(num, [&]<int Rows>() {
          const Starts<Group, Rows> starts(t, inputs);
          for (int64_t col = 0; col < kPanel; col += kInt8Vecs * kLanes)
            int8_tile<Bits, Group, Rows>(chunk, t, starts, col, inputs / 32);
        });
    }
  }
}

#include "quant_many.h"

inline void int8_panel(const QuantArgs& args, int64_t form, const uint8_t* panel, int64_t row, int64_t rows,
                       float* sums, float* memory) {
  if (args.digits == kWords) return kManyPanel<int16_t>[form](args, panel, row, rows, sums, memory);
  if (args.digits == 1 && args.weight_rows >= kFewestManyBytes && spreads_codes(kQuantForms[form]))
    return kManyPanel<int8_t>[form](args, panel, row, rows, sums, memory);
  switch (kQuantForms[form].bits) {
    case 4:
      return int8_tiles<4, 32>(args, form, panel, row, rows, sums, memory);
    case 6:
      return int8_tiles<6, 16>(args, form, panel, row, rows, sums, memory);
    default:
      return int8_tiles<8, 32>(args, form, panel, row, rows, sums, memory);
  }
}

#include "quant_inputs.h"
