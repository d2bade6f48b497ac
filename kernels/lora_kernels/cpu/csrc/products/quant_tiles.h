// Integer products of quantized weights in tile registers. Included by quant.h.
//
// Codes of a chunk become bf16 integers in memory once for all rows. Each group of inputs that shares a scale takes one
// instruction, and its sum then leaves the registers to be scaled.
#pragma once

// For fewer rows, codes are multiplied in place. Groups of 16 inputs leave half of a tile empty.
constexpr int64_t fewest_tile_rows(const QuantForm& form) { return form.group == 32 ? 3 : 8; }

// The integers of 32 inputs and 32 columns in tile layout: [16 pairs, kPanel].
struct CodeTile {
  alignas(64) Pair pairs[kTileInputs / 2][kPanel];
};

// Whether rows are multiplied here: always if sums are fixed, since sums in quant.h have other bits.
inline bool quant_in_tiles(const QuantArgs& args, const QuantForm& form) {
  return args.fixed_sums || args.weight_rows >= fewest_tile_rows(form);
}

// The codes of part `part` of a chunk. Parts of 16 inputs fill half a tile; the other half is zero.
template <int F>
inline void widen_part(const PackedChunk<F>& chunk, int64_t part, CodeTile* tile) {
  constexpr int kGroup = PackedChunk<F>::kGroup;
  constexpr int64_t kPairs = kGroup / 2;
  const int64_t first = part * kPairs % (kTileInputs / 2);
  if (kGroup < kTileInputs) __builtin_memset(tile->pairs[first ? 0 : kPairs], 0, kPairs * sizeof(tile->pairs[0]));
  repeat<kGroup / 8>([&]<int Q>() __attribute__((always_inline)) {
    chunk.template prefetch<Q>(part);
    for (int v = 0; v < kPanelVecs; ++v) {
      const PackedQuad<F> quad = chunk.quad(part, Q, v);
      repeat<4>([&]<int I>() __attribute__((always_inline)) {
        _mm512_store_si512(tile->pairs[first + Q * 4 + I] + v * kLanes, quad.template pair<I, Q % 2 == 1>());
      });
    }
  });
}

// A chunk of a panel whose codes are widened part by part, and the scales and addends of its parts.
template <int F>
struct WideChunk {
  using Chunk = PackedChunk<F>;
  static constexpr int64_t kParts = kChunk / Chunk::kGroup;
  static_assert(kParts * sizeof(CodeTile) <= kChunk * kPanel * sizeof(float));

  const Chunk packed;
  CodeTile* const codes;  // [kParts]
  const int64_t parts;    // existing ones
  Vec scales[kParts][kPanelVecs], addends[Chunk::kHasAddends ? kParts : 1][kPanelVecs];

  WideChunk(const uint8_t* at, int64_t inputs, float* memory)
      : packed(at), codes(reinterpret_cast<CodeTile*>(memory)), parts(inputs / Chunk::kGroup) {}

  // Widens the existing ones of parts [first, first + num).
  void widen(int64_t first, int64_t num) {
    for (int64_t part = first; part < min(first + num, parts); ++part) {
      widen_part<F>(packed, part, codes + part);
      for (int v = 0; v < kPanelVecs; ++v) {
        scales[part][v] = packed.scale(part, v);
        if constexpr (Chunk::kHasAddends) addends[part][v] = packed.addend(part, v);
      }
    }
  }
};

// Rows of a chunk's inputs, their sums, and the range of rows that a tile adds: an earlier tile added the others.
struct QuantRows {
  const uint16_t* x;    // [num, kXChunk]
  const float* x_sums;  // per row and group, if there are addends
  int64_t x_sums_stride;
  float* sums;  // [num, kPanel]
  int64_t first, num;
};

// Adds the products of a tile of rows and a part of a chunk to tiles 2 and 3, after `add_products` for the previous
// part.
inline void add_next_part(const TileRows& x, int64_t at, const CodeTile& codes) {
  constexpr int64_t stride = sizeof(codes.pairs[0]);
  _tile_stream_loadd(5, static_cast<const char*>(x.first) + at, x.stride);
  _tile_loadd(6, codes.pairs[0], stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, codes.pairs[0] + kTileSide, stride);
  _tile_dpbf16ps(3, 5, 7);
}

// Adds the products of up to 16 rows (one Height) with two parts at a time, or of up to 32 rows with one part. Products
// have a long latency. Meanwhile the next codes are widened (widens: the first rows do that for all), and sums of up to
// 16 rows are scaled one turn later.
template <int F, int Heights>
void add_chunk(WideChunk<F>& chunk, const QuantRows& rows, bool widens) {
  constexpr bool kHasAddends = PackedChunk<F>::kHasAddends, kScalesLater = Heights == 1;
  constexpr int64_t kAtOnce = 3 - Heights;
  const TileRows x(rows.x, rows.num, kXChunk * sizeof(bf16));
  const auto multiply = [&](int64_t part) __attribute__((always_inline)) {
    const auto at = [](int64_t p) { return p * PackedChunk<F>::kGroup / kTileInputs * kTileInputs * sizeof(bf16); };
    zero_tiles<2>();
    add_products<Heights>(x, at(part), chunk.codes + part, sizeof(chunk.codes->pairs[0]));
    if (kAtOnce == 2 && part + 1 < chunk.parts) add_next_part(x, at(part + 1), chunk.codes[part + 1]);
  };
  const auto scale = [&](int64_t first, TileSums& products) __attribute__((always_inline)) {
    for (int64_t part = first; part < min(first + kAtOnce, chunk.parts); ++part) {
      for (int64_t i = rows.first; i < rows.num; ++i) {
        const float* from = products.template row<Heights>(i + (part - first) * kTileSide, rows.num);
        float* to = rows.sums + i * kPanel;
        for (int v = 0; v < kPanelVecs; ++v, from += kLanes, to += kLanes) {
          Vec total = fma(chunk.scales[part][v], load(from), load(to));
          if constexpr (kHasAddends)
            total = fma(chunk.addends[part][v], set1(rows.x_sums[i * rows.x_sums_stride + part]), total);
          store(to, total);
        }
      }
    }
  };
  TileSums products[kScalesLater ? 2 : 1];
  int64_t part = 0, turn = 0;
  if (widens) chunk.widen(0, kAtOnce);
  for (; part < chunk.parts; part += kAtOnce) {
    multiply(part);
    if (widens) chunk.widen(part + kAtOnce, kAtOnce);
    if (kScalesLater && part) scale(part - kAtOnce, products[!turn]);
    store_tiles<2>(products[turn]);
    if (kScalesLater) turn = !turn;
    else scale(part, products[0]);
  }
  if (kScalesLater) scale(part - kAtOnce, products[!turn]);
}

// sums [rows, kPanel] += rows [row, row + rows) times one panel. memory: kChunk * kPanel floats.
template <int F>
void integer_panel_in_tiles(const QuantArgs& args, const uint8_t* panel, int64_t row, int64_t rows, float* sums,
                            float* memory) {
  constexpr QuantForm form = kQuantForms[F];
  const int64_t groups = args.in_features / 32;
  const Tiles registers(rows);
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    WideChunk<F> chunk(panel, inputs, memory);
    for (int64_t tile = 0; tile * kTwoTiles < rows; ++tile) {
      const RowsOfTile in(tile, rows);
      const int64_t at = row + in.row;
      const QuantRows own = {args.x_chunks + (first / kXChunk * args.rows + at) * kXChunk,
                             form.min ? args.x_sums + at * groups + first / 32 : nullptr, groups,
                             sums + in.row * kPanel, tile * kTwoTiles - in.row, in.num};
      in.num > kTileSide ? add_chunk<F, 2>(chunk, own, tile == 0) : add_chunk<F, 1>(chunk, own, tile == 0);
    }
    panel += super_head_bytes(form) + inputs / 32 * group_bytes(form);
  }
}
