// Products of many rows with quantized weights in tile registers. Included by quant.h.
//
// To scale each group's sum in fp32 (quant_tiles.h) takes longer than the products themselves. For many rows, weights
// are therefore scaled first, and rounded to bf16: the numbers that a model has whose file is dequantized to bf16. They
// are computed once for all rows, those of the next chunk while the tile registers multiply by this one.
#pragma once

constexpr int64_t kFewestRoundedRows = 64;

// Whether weights are rounded: never if sums are fixed, since those of few rows have other bits.
inline bool rounds_weights(const QuantArgs& args) { return !args.fixed_sums && args.weight_rows >= kFewestRoundedRows; }

// The weights of a chunk in tile layout.
struct RoundedChunk {
  alignas(64) Pair pairs[kChunk / 2][kPanel];
};

// Rounds the weights of a chunk, 16 inputs and 16 columns at a time.
template <int F>
class Rounding {
 public:
  static constexpr int64_t kRun = 16;  // inputs

  // at: start of the chunk.
  Rounding(const uint8_t* at, int64_t inputs, RoundedChunk* to)
      : chunk_(at), to_(to), left_(inputs / kRun * kPanelVecs) {}

  int64_t left() const { return left_; }

  // Rounds `num` blocks of 16 inputs and 16 columns, or those that are left.
  void advance(int64_t num) {
    for (const int64_t end = next_ + min(num, left_); next_ < end; ++next_, --left_)
      round(next_ / kPanelVecs, static_cast<int>(next_ % kPanelVecs));
  }

 private:
  using Chunk = PackedChunk<F>;
  static constexpr QuantForm form = kQuantForms[F];

  void round(int64_t run, int v) const {
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
        store_pairs(to_->pairs[run * (kRun / 2) + Q * 4 + I] + v * kLanes, weight(even), weight(odd));
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

  const Chunk chunk_;
  RoundedChunk* const to_;
  int64_t next_ = 0, left_;
};

// sums [rows, kPanel] = rows [row, row + rows) times one panel. sums has space for whole tiles of 32 rows. memory: two
// chunks.
template <int F>
void rounded_panel(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums, float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  static_assert(2 * sizeof(RoundedChunk) <= kChunk * kPanel * sizeof(float));
  const Tiles registers(rows);
  auto* const chunks = reinterpret_cast<RoundedChunk*>(memory);
  auto* const kept = reinterpret_cast<TileSums*>(sums);  // of each tile
  const int64_t tiles = ceil_div(rows, kTwoTiles);
  int64_t left = args.in_features;
  const uint8_t* at = panel;
  for (Rounding<F> first(at, min(kChunk, left), chunks); first.left();) first.advance(first.left());
  for (int64_t number = 0; left > 0; ++number) {
    const int64_t inputs = min(kChunk, left), steps = inputs / kTileInputs;
    const RoundedChunk& own = chunks[number % 2];
    left -= inputs;
    if (left) at += super_head_bytes(form) + inputs / 32 * group_bytes(form);
    Rounding<F> next(at, min(kChunk, left), chunks + (number + 1) % 2);
    const int64_t share = ceil_div(next.left(), tiles * steps);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const RowsOfTile in(tile, rows);
      const TileRows x(args.x_chunks + (number * args.rows + row + in.row) * kXChunk, in.num, kXChunk * sizeof(bf16));
      with_size<2>(ceil_div(in.num, kTileSide), [&]<int Heights>() {
        number ? load_tiles<Heights>(kept[tile]) : zero_tiles<Heights>();
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t k = step * kTileInputs;
          add_products<Heights>(x, k * sizeof(bf16), own.pairs[k / 2], sizeof(own.pairs[0]));
          next.advance(share);
        }
        store_tiles<Heights>(kept[tile]);
      });
    }
  }
  // The last tile's rows go behind the others'. Earlier tiles have some of them already if it starts before their end.
  const RowsOfTile last(tiles - 1, rows);
  with_size<2>(ceil_div(last.num, kTileSide), [&]<int Heights>() {
    for (int64_t i = (tiles - 1) * kTwoTiles - last.row; i < last.num; ++i)
      __builtin_memmove(sums + (last.row + i) * kPanel, kept[tiles - 1].template row<Heights>(i, last.num),
                        kPanel * sizeof(float));
  });
}
