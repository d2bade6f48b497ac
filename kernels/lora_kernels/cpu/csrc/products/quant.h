// Matrix product with quantized weights. Included inside the instruction set's namespace.
//
// With bf16 products, codes become integers in registers, and each group's sum is scaled in fp32: a table look-up
// between packed codes and products takes less time than storing and loading widened codes. Otherwise codes become fp32
// weights, a chunk of inputs at a time in the thread's scratch memory, and all rows use them. Weights are rounded to
// bf16 only for many rows in tile registers (quant_rounded.h).
//
// If inputs are written as integers of 8 or 16 bits, or few rows as sums of int8 codes, products are in quant_int8.h.
#pragma once

// Maximum rows that share a chunk of codes.
#ifdef __AMX_BF16__
constexpr int64_t kQuantRows = 256;
#else
constexpr int64_t kQuantRows = 128;
#endif
constexpr int kIntegerRows = 7;      // per tile: 14 sums and 14 totals, codes, their table, inputs

// sums[i] += x[i] . weights in fp32, for Vecs vectors of a panel's columns.
template <int Rows, int Vecs>
inline void float_tile(const float* x, int64_t x_stride, int64_t inputs, const float* weights, float* sums) {
  Vec acc[Rows][Vecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vecs; ++v) acc[i][v] = load(sums + i * kPanel + v * kLanes);
  for (int64_t k = 0; k < inputs; ++k) {
    Vec w[Vecs];
    for (int v = 0; v < Vecs; ++v) w[v] = load(weights + k * kPanel + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Vec xv = set1(x[i * x_stride + k]);
      for (int v = 0; v < Vecs; ++v) acc[i][v] = fma(xv, w[v], acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vecs; ++v) store(sums + i * kPanel + v * kLanes, acc[i][v]);
}
// Vectors of eight lanes leave registers for half of a panel's columns, of more than two rows.
constexpr int kFloatRows = kLanes == 16 ? 12 : 6;
template <int Rows>
constexpr int kFloatVecs = kLanes == 16 || Rows <= 2 ? kPanelVecs : kPanelVecs / 2;

using WidenChunk = const uint8_t* (*)(const uint8_t*, int64_t, int64_t, float*);
constexpr WidenChunk kWidenChunk[] = {widen_chunk<0>, widen_chunk<1>, widen_chunk<2>, widen_chunk<3>,
                                      widen_chunk<4>, widen_chunk<5>, widen_chunk<6>};
static_assert(sizeof(kWidenChunk) / sizeof(WidenChunk) == kNumQuantForms);

constexpr int64_t kFloatChunk = 128;  // inputs; twice as many fill the first-level cache without the rows

// sums [rows, kPanel] += rows [row, row + rows) times one panel, in fp32.
inline void float_panel(const QuantArgs& args, const QuantPart& part, const uint8_t* panel, int64_t row, int64_t rows,
                        float* sums, float* weights) {
  for (int64_t first = 0; first < args.in_features; first += kFloatChunk) {
    const int64_t inputs = min(kFloatChunk, args.in_features - first), tiles = ceil_div(rows, kFloatRows);
    panel = kWidenChunk[part.form](panel, first, inputs, weights);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin;
      const float* x = args.x32 + (row + begin) * args.x32_stride + first;
      with_size<kFloatRows>(num, [&]<int Rows>() {
        for (int64_t side = 0; side < kPanel; side += kFloatVecs<Rows> * kLanes)
          float_tile<Rows, kFloatVecs<Rows>>(x, args.x32_stride, inputs, weights + side, sums + begin * kPanel + side);
      });
    }
  }
}

template <typename T>
inline void store_panel(const QuantArgs& args, const float* sums, int64_t row, int64_t rows, int64_t col, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    T* to = static_cast<T*>(args.out.data) + (row + i) * args.out.stride + col;
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t n = min(kLanes, width - j);
      const Vec b = args.bias ? load_n(static_cast<const T*>(args.bias) + col + j, n) : zero();
      store_n(to + j, add(load(sums + i * kPanel + j), b), n);
    }
  }
}

#ifdef __AVX512BF16__
// The operands of a tile's integer products, without the number of rows.
struct IntegerTile {
  const uint16_t* x;    // [rows, kXChunk]
  const float* x_sums;  // per row and group of 32 inputs, if there are addends
  int64_t x_sums_stride;
  float* sums;          // [rows, kPanel]
};

// totals += the integer products of parts [part, part + Chains), each scaled. Parts are added in order, and so are the
// products within one, so that a row's total depends neither on Chains nor on the other rows.
template <int F, int Rows, int Chains>
__attribute__((always_inline)) inline void integer_parts(const PackedChunk<F>& chunk, const IntegerTile& t, int64_t part,
                                                         Vec (&totals)[Rows][kPanelVecs]) {
  using Chunk = PackedChunk<F>;
  Vec acc[Chains][Rows][kPanelVecs];
  repeat<Chains>([&]<int S>() __attribute__((always_inline)) {
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < kPanelVecs; ++v) acc[S][i][v] = zero();
  });
  repeat<Chunk::kGroup / 8>([&]<int Q>() __attribute__((always_inline)) {
    repeat<Chains>([&]<int S>() __attribute__((always_inline)) {
      const PackedQuad<F> first = chunk.quad(part + S, Q, 0), second = chunk.quad(part + S, Q, 1);
      chunk.template prefetch<Q>(part + S);
      const uint16_t* x = t.x + (part + S) * Chunk::kGroup + Q * 8;
      repeat<4>([&]<int I>() __attribute__((always_inline)) {
        const Pairs codes[kPanelVecs] = {first.template pair<I, Q % 2 == 1>(), second.template pair<I, Q % 2 == 1>()};
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          int pair;
          __builtin_memcpy(&pair, x + r * kXChunk + I * 2, 4);
          const Pairs xv = set1_pair(pair);
#pragma GCC unroll 2
          for (int v = 0; v < kPanelVecs; ++v) acc[S][r][v] = dot_pairs(acc[S][r][v], codes[v], xv);
        }
      });
    });
  });
  repeat<Chains>([&]<int S>() __attribute__((always_inline)) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const Vec scale = chunk.scale(part + S, v);
      for (int i = 0; i < Rows; ++i) totals[i][v] = fma(scale, acc[S][i][v], totals[i][v]);
      if constexpr (Chunk::kHasAddends) {
        const Vec addend = chunk.addend(part + S, v);
        for (int i = 0; i < Rows; ++i)
          totals[i][v] = fma(addend, set1(t.x_sums[i * t.x_sums_stride + part + S]), totals[i][v]);
      }
    }
  });
}

// sums[i] += the products of `inputs` inputs. With 4-bit codes arithmetic is the limit, and few rows compute two parts
// at once: a sum would otherwise wait for its own previous addition. With larger codes memory is the limit, and two
// parts would only mean reading from two places.
template <int F, int Rows>
inline void integer_tile(const PackedChunk<F>& chunk, const IntegerTile& t, int64_t inputs) {
  constexpr int kChains = kQuantForms[F].bits == 4 && 2 <= Rows && Rows <= 4 ? 2 : 1;
  const int64_t parts = inputs / kQuantForms[F].group;
  Vec totals[Rows][kPanelVecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) totals[i][v] = load(t.sums + i * kPanel + v * kLanes);
  int64_t part = 0;
  for (; part + kChains <= parts; part += kChains) integer_parts<F, Rows, kChains>(chunk, t, part, totals);
  for (; part < parts; ++part) integer_parts<F, Rows, 1>(chunk, t, part, totals);
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) store(t.sums + i * kPanel + v * kLanes, totals[i][v]);
}

#ifdef __AMX_BF16__
#include "quant_tiles.h"

#include "quant_rounded.h"
#endif

// sums [rows, kPanel] += rows [row, row + rows) times one panel, by integer products. memory: kChunk * kPanel floats.
template <int F>
void integer_panel(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums,
                   [[maybe_unused]] float* memory) {
  constexpr QuantForm form = kQuantForms[F];
#ifdef __AMX_BF16__
  if (quant_in_tiles(args, form)) return integer_panel_in_tiles<F>(args, panel, row, rows, sums, memory);
#endif
#ifdef __AMX_BF16__
  constexpr int kMostRows = min(kIntegerRows, fewest_tile_rows(form) - 1);
#else
  constexpr int kMostRows = kIntegerRows;
#endif
  const int64_t tiles = ceil_div(rows, kMostRows), groups = args.in_features / 32;
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    const PackedChunk<F> chunk(panel);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin, at = row + begin;
      const IntegerTile t = {args.x_chunks + (first / kXChunk * args.rows + at) * kXChunk,
                             form.min ? args.x_sums + at * groups + first / 32 : nullptr, groups, sums + begin * kPanel};
      with_size<kMostRows>(num, [&]<int Rows>() { integer_tile<F, Rows>(chunk, t, inputs); });
    }
    panel += super_head_bytes(form) + inputs / 32 * group_bytes(form);
  }
}

using IntegerPanel = void (*)(const QuantArgs&, const uint8_t*, int64_t, int64_t, float*, float*);
constexpr IntegerPanel kIntegerPanel[] = {integer_panel<0>, integer_panel<1>, integer_panel<2>, integer_panel<3>,
                                          integer_panel<4>, integer_panel<5>, integer_panel<6>};
static_assert(sizeof(kIntegerPanel) / sizeof(IntegerPanel) == kNumQuantForms && kChunk == kSuperInputs &&
              kChunk == kXChunk && kPanelVecs == 2);
#endif

// out = rows [row, row + rows) times one panel. width: number of the panel's columns in use.
inline void quant_panel(const QuantArgs& args, const QuantPart& part, const uint8_t* panel, int64_t row, int64_t rows,
                        int64_t col, int64_t width) {
  float* memory = scratch(kQuantRows * kPanel + kChunk * kPanel);
  float* sums = memory + kChunk * kPanel;  // after the widened codes
  for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(sums + i, zero());
  if (args.x_codes)
    int8_panel(args, part.form, panel, row, rows, sums, memory);
  else
#ifdef __AVX512BF16__
      if (args.x_chunks)
    kIntegerPanel[part.form](args, panel, row, rows, sums, memory);
  else
#endif
    float_panel(args, part, panel, row, rows, sums, memory);
  with_dtype(args.dtype, [&]<typename T>() { store_panel<T>(args, sums, row, rows, col, width); });
}

// Panels of a product that one task multiplies, at most. panels: of the product.
inline int64_t most_panels([[maybe_unused]] const QuantArgs& args, [[maybe_unused]] int64_t panels) {
#ifdef __AMX_BF16__
  if (rounds_weights(args))
    return max(1, min(kMostRoundedPanels, panels * ceil_div(args.rows, kQuantRows) / (3 * args.num_threads)));
#endif
  return 1;
}

// out = rows [row, row + rows) times panels [first, last) of a part of the weight, whose first column is `col`.
inline void quant_panels(const QuantArgs& args, const QuantPart& part, int64_t first, int64_t last, int64_t row,
                         int64_t rows, int64_t col) {
#ifdef __AMX_BF16__
  if (rounds_weights(args)) return kRoundedPanels[part.form](args, part, first, last, row, rows, col);
#endif
  const int64_t bytes = panel_bytes(kQuantForms[part.form], args.in_features);
  for (int64_t panel = first; panel < last; ++panel)
    quant_panel(args, part, part.panels + panel * bytes, row, rows, col + panel * kPanel,
                min(kPanel, part.out_features - panel * kPanel));
}

// Computes what tasks read besides x or in place of it: x in fp32, or the sums of its groups.
void quant_prepare(const QuantArgs& args, float* x32, float* x_sums) {
  const auto row = [&]<typename T>(int64_t i) {
    const T* x = static_cast<const T*>(args.x.data) + i * args.x.stride;
    for (int64_t k = 0; k < args.in_features; k += 32) {
      Vec total = zero();
      for (int64_t j = k; j < k + 32; j += kLanes) {
        const Vec part = load(x + j);
        if (x32) store(x32 + i * args.x32_stride + j, part);
        total = add(total, part);
      }
      if (x_sums) x_sums[i * (args.in_features / 32) + k / 32] = sum(total);
    }
  };
  with_dtype(args.dtype, [&]<typename T>() {
    if (args.rows < 8)
      for (int64_t i = 0; i < args.rows; ++i) row.template operator()<T>(i);
    else
      run(args.rows, [&](int64_t i) { row.template operator()<T>(i); });
  });
}

bool quant_uses_integers(Dtype dtype) { return kBf16Products && dtype == Dtype::kBf16; }

void quant_linear(const QuantArgs& args) {
  if (args.rows == 0) return;
  const auto panels_of = [&](const QuantPart& part) { return ceil_div(part.out_features, kPanel); };
  int64_t panels = 0, runs = 0;  // runs of panels of one part
  for (int64_t p = 0; p < args.num_parts; ++p) panels += panels_of(args.parts[p]);
  const int64_t most = most_panels(args, panels);
  const auto runs_of = [&](const QuantPart& part) { return ceil_div(panels_of(part), most); };
  for (int64_t p = 0; p < args.num_parts; ++p) runs += runs_of(args.parts[p]);
  const int64_t blocks = ceil_div(args.rows, kQuantRows);
  run(blocks * runs, [&](int64_t task) {
    const int64_t block = task / runs, row = args.rows * block / blocks;
    int64_t own = task % runs, col = 0;
    const QuantPart* part = args.parts;
    for (; own >= runs_of(*part); ++part) {
      own -= runs_of(*part);
      col += part->out_features;
    }
    const int64_t first = panels_of(*part) * own / runs_of(*part), last = panels_of(*part) * (own + 1) / runs_of(*part);
    quant_panels(args, *part, first, last, row, args.rows * (block + 1) / blocks - row, col);
  });
}

// Tasks are panels of groups in memory order, as in linear_groups.
void quant_groups(const QuantArgs& args, const RowGroup* groups, int64_t num_groups) {
  const int64_t panels = args.parts->out_features / kPanel;
  const int64_t bytes = panel_bytes(kQuantForms[args.parts->form], args.in_features);
  run(num_groups * panels, [&](int64_t task) {
    const RowGroup& group = groups[task / panels];
    const int64_t panel = task % panels;
    QuantArgs own = args;
    QuantPart part = *args.parts;
    own.weight_rows = group.rows;
    part.panels += group.panel * bytes;
    const int64_t blocks = ceil_div(group.rows, kQuantRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = group.rows * block / blocks, end = group.rows * (block + 1) / blocks;
      quant_panels(own, part, panel, panel + 1, group.first + begin, end - begin, 0);
    }
  });
}
