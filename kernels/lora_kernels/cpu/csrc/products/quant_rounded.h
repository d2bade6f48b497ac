// Products of many rows with quantized weights in tile registers. Included by quant.h.
//
// To scale each group's sum in fp32 (quant_tiles.h) takes longer than the products themselves. For many rows, weights
// are therefore scaled first, and rounded to bf16: the numbers that a model has whose file is dequantized to bf16. They
// are computed once for all rows of a block, those of the next part while the tile registers multiply by this one.
#pragma once

constexpr int64_t kFewestRoundedRows = 64;
constexpr int64_t kRoundedInputs = 512;    // approximate, per part of a panel: the first-level cache holds it
constexpr int64_t kMostRoundedChunks = 3;  // of a part
constexpr int64_t kMostRoundedPanels = 3;  // of a task; only the first part of a task is rounded before its products

// Whether weights are rounded for bf16 products: never if sums are fixed, since those of few rows have other bits.
inline bool rounds_weights(const QuantArgs& args) {
  return args.x_chunks && !args.fixed_sums && args.weight_rows >= kFewestRoundedRows;
}

// The weights of a part of a panel in tile layout.
struct RoundedPart {
  alignas(64) Pair pairs[kMostRoundedChunks * kChunk / 2][kPanel];
};

// Rounds the weights of a part, 16 inputs and 16 columns at a time.
template <int F>
class Rounding {
 public:
  static constexpr int64_t kRun = 16;  // inputs

  // at: start of the part, which is that of a chunk.
  Rounding(const uint8_t* at, int64_t inputs, RoundedPart* to)
      : at_(at), chunk_(at), to_(to), left_(inputs / kRun * kPanelVecs) {}

  int64_t left() const { return left_; }

  // Rounds `num` blocks of 16 inputs and 16 columns, or those that are left.
  void advance(int64_t num) {
    for (const int64_t end = next_ + min(num, left_); next_ < end; ++next_, --left_) {
      if (next_ % kBlocks == 0 && next_ > 0) chunk_ = Chunk(at_ += panel_bytes(form, kChunk));
      round(next_ % kBlocks / kPanelVecs, static_cast<int>(next_ % kPanelVecs), to_->pairs + next_ / kPanelVecs * kRun / 2);
    }
  }

 private:
  using Chunk = PackedChunk<F>;
  static constexpr QuantForm form = kQuantForms[F];
  static constexpr int64_t kBlocks = kChunk / kRun * kPanelVecs;  // of a chunk

  // run: of the chunk.
  void round(int64_t run, int v, Pair (*to)[kPanel]) const {
    constexpr int kRuns = Chunk::kGroup / kRun;  // that share a scale
    constexpr int64_t kBytes = (group_bytes(form) * kRun / 32 + 63) / 64 * 64;
    const int64_t part = run / kRuns;
    const int quad = static_cast<int>(run % kRuns) * 2;
    if (v == 0) prefetch_once<kBytes>(chunk_.groups + run * kRun / 32 * group_bytes(form) + run % 2 * kBytes + kLinesAhead);
    const Vec scale = chunk_.scale(part, v);
    Vec addend = zero();
    if constexpr (Chunk::kHasAddends) addend = chunk_.addend(part, v);
    const auto weight = [&](Vec code) { return Chunk::kHasAddends ? fma(scale, code, addend) : mul(scale, code); };
    repeat<2>([&]<int Q>() __attribute__((always_inline)) {
      const PackedQuad<F> own = chunk_.quad(part, quad + Q, v);
      repeat<4>([&]<int I>() __attribute__((always_inline)) {
        Vec even, odd;
        own.template codes<I, Q == 1>(even, odd);
        store_pairs(to[Q * 4 + I] + v * kLanes, weight(even), weight(odd));
      });
    });
  }

  // Writes kLanes pairs, each element rounded to the nearest bf16.
  static void store_pairs(Pair* to, Vec even, Vec odd) {
    alignas(64) static constexpr uint16_t kPlaces[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), both));
  }

  const uint8_t* at_;  // start of the chunk
  Chunk chunk_;
  RoundedPart* const to_;
  int64_t next_ = 0, left_;
};

// out = rows [row, row + rows) times panels [first, last) of a part of the weight, whose first column is `col`.
template <int F>
void rounded_panels(const QuantArgs& args, const QuantPart& part, int64_t first, int64_t last, int64_t row, int64_t rows,
                    int64_t col) {
  constexpr QuantForm form = kQuantForms[F];
  const Tiles registers(rows);
  const int64_t tiles = ceil_div(rows, kTwoTiles), chunks = ceil_div(args.in_features, kChunk);
  const int64_t parts = max(1, (args.in_features + kRoundedInputs / 2) / kRoundedInputs);
  float* const memory = scratch((2 * sizeof(RoundedPart) + (parts > 1 ? tiles : 0) * sizeof(TileSums)) / sizeof(float));
  auto* const rounded = reinterpret_cast<RoundedPart*>(memory);
  auto* const kept = reinterpret_cast<TileSums*>(rounded + 2);  // sums of each tile, between parts
  // A part is a run of whole chunks: with this number of parts, at most kMostRoundedChunks.
  const auto begin_of = [&](int64_t p) { return min(chunks * p / parts * kChunk, args.in_features); };
  // Parts of all panels are numbered in the order of their products.
  const auto rounding = [&](int64_t number, int64_t inputs) {
    const int64_t panel = first + number / parts, begin = begin_of(number % parts);
    const uint8_t* at = part.panels + panel * panel_bytes(form, args.in_features) + panel_bytes(form, begin);
    return Rounding<F>(at, inputs, rounded + number % 2);
  };
  for (Rounding<F> own = rounding(0, begin_of(1)); own.left();) own.advance(own.left());
  const int64_t end = (last - first) * parts;
  for (int64_t number = 0; number < end; ++number) {
    const int64_t p = number % parts, begin = begin_of(p), inputs = begin_of(p + 1) - begin, panel = first + number / parts;
    const bool is_last = number + 1 == end, is_last_part = p + 1 == parts;
    const int64_t next_inputs = is_last_part ? begin_of(1) : begin_of(p + 2) - begin_of(p + 1);
    Rounding<F> next = is_last ? rounding(number, 0) : rounding(number + 1, next_inputs);
    const int64_t share = ceil_div(next.left(), tiles * (inputs / kTileInputs));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const RowsOfTile in(tile, rows);
      const TileRows x(args.x_chunks + (row + in.row) * kXChunk, in.num, kXChunk * sizeof(bf16));
      with_size<2>(ceil_div(in.num, kTileSide), [&]<int Heights>() {
        p ? load_tiles<Heights>(kept[tile]) : zero_tiles<Heights>();
        for (int64_t k = 0; k < inputs; k += kTileInputs) {
          const int64_t at = (begin + k) / kXChunk * args.rows * kXChunk + (begin + k) % kXChunk;
          add_products<Heights>(x, at * sizeof(bf16), rounded[number % 2].pairs[k / 2], sizeof(rounded->pairs[0]));
          next.advance(share);
        }
        if (!is_last_part) return store_tiles<Heights>(kept[tile]);
        TileSums sums;
        store_tiles<Heights>(sums);
        const int64_t to = col + panel * kPanel, width = min(kPanel, part.out_features - panel * kPanel);
        store_panel<bf16>(args, sums.rows[0], row + in.row, min(in.num, kTileSide), to, width);
        if (Heights == 2)
          store_panel<bf16>(args, sums.rows[kTileSide], row + in.row + in.num - kTileSide, kTileSide, to, width);
      });
    }
  }
}

using RoundedPanels = void (*)(const QuantArgs&, const QuantPart&, int64_t, int64_t, int64_t, int64_t, int64_t);
constexpr RoundedPanels kRoundedPanels[] = {rounded_panels<0>, rounded_panels<1>, rounded_panels<2>, rounded_panels<3>,
                                            rounded_panels<4>, rounded_panels<5>, rounded_panels<6>};
static_assert(sizeof(kRoundedPanels) / sizeof(RoundedPanels) == kNumQuantForms);
