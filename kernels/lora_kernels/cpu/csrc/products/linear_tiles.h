// bf16 matrix product with a packed weight in tile registers, which take a panel's pairs of inputs as they are stored.
// Included by linear.h.
//
// With many rows, all are multiplied by a part of a panel while the first-level cache holds it, and by that part of
// several panels while the second-level cache holds the rows' inputs. Partial sums wait in memory for the next part.
#pragma once

static_assert(kPanel == kTwoTiles);
constexpr int64_t kPartInputs = 512;       // approximate, per part of a panel
constexpr int64_t kRowsAtOnce = 256;       // at most
constexpr int64_t kPanelsAtOnce = 8;       // whose sums wait in memory, if inputs exceed the second-level cache
constexpr int64_t kKeptInputs = 512 * 1024;  // that fit into it
constexpr int64_t kStepBytes = kTileInputs / 2 * kPairBytes;  // of a panel, per instruction

inline bool fits_tiles(const LinearArgs& args) { return args.in_features % kTileInputs == 0; }

// Inputs [begin, end) of rows times the same inputs of a panel.
struct PanelPart {
  const LinearArgs& args;
  const uint16_t* panel;
  int64_t begin, end;

  // Adds the products of up to 16 rows, or up to 32 if Heights is 2. between: called every 32 inputs.
  template <int Heights, bool KeepsRows, typename Between>
  void add(int64_t row, int64_t rows, Between& between) const {
    const TileRows x(args.x + row * kXChunk, rows, kXChunk * sizeof(bf16));
    for (int64_t k = begin; k < end; k += kTileInputs) {
      const int64_t at = k / kXChunk * args.rows * kXChunk + k % kXChunk;
      add_products<Heights, KeepsRows>(x, at * sizeof(bf16), panel + k * kPanel, kPairBytes);
      between();
    }
  }
};

// Prefetches a panel's lines and pages shortly before they are multiplied. Passes: lines go to the second-level cache.
template <bool Passes>
struct SamePanelAhead {
  const char* at;
  int64_t steps = 0;

  void operator()() {
    if (steps++ % (kXChunk / kTileInputs) == 0)
      touch_pages(at + kPagesAhead - kLinesAhead, kXChunk / kTileInputs * kStepBytes);
    for (int64_t i = 0; i < kStepBytes; i += 64) __builtin_prefetch(at + i, 0, Passes ? 2 : 3);
    at += kStepBytes;
  }
};

// Prefetches a tile's share of the data for the next products to the second-level cache.
struct NextPartAhead {
  const char* at;
  int64_t bytes;  // per step

  void operator()() {
    prefetch_to_second_level(at, bytes);
    at += bytes;
  }
};

// Rows [first, first + rows) times panels [panel, last). memory: TileSums for each tile of each panel; null for few
// rows.
inline void multiply_in_tiles(const LinearArgs& args, int64_t first, int64_t rows, int64_t panel, int64_t last,
                              TileSums* memory) {
  const int64_t tiles = ceil_div(rows, kTwoTiles), steps = args.in_features / kTileInputs;
  const int64_t parts = memory ? max(1, (args.in_features + kPartInputs / 2) / kPartInputs) : 1;
  const auto panel_at = [&](int64_t p) { return args.panels + p * kPanel * args.in_features; };
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = steps * part / parts * kTileInputs, end = steps * (part + 1) / parts * kTileInputs;
    const bool is_last_part = part + 1 == parts;
    for (int64_t p = panel; p < last; ++p) {
      const PanelPart own = {args, panel_at(p), begin, end};
      const bool is_last = (p + 1) * kPanel >= args.out_features;
      const uint16_t* next = p + 1 < last    ? panel_at(p + 1) + begin * kPanel
                             : !is_last_part ? panel_at(panel) + end * kPanel
                                             : panel_at(is_last ? p : p + 1);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const RowsOfTile in(tile, rows);
        with_size<2>(ceil_div(in.num, kTileSide), [&]<int Heights>() {
          TileSums here, *kept = is_last_part ? &here : memory + (p - panel) * tiles + tile;
          part == 0 ? zero_tiles<Heights>() : load_tiles<Heights>(memory[(p - panel) * tiles + tile]);
          if (tiles == 1) {
            // The rows of two tiles fill the first-level cache and are read again for every panel.
            constexpr bool kKeepsRows = Heights == 2;
            SamePanelAhead<kKeepsRows> ahead = {reinterpret_cast<const char*>(own.panel) + kLinesAhead};
            own.add<Heights, kKeepsRows>(first + in.row, in.num, ahead);
          } else {
            const int64_t bytes = (end - begin) / 2 * kPairBytes;
            NextPartAhead ahead = {reinterpret_cast<const char*>(next) + bytes * tile / tiles,
                                   ceil_div(kStepBytes, tiles)};
            own.add<Heights, false>(first + in.row, in.num, ahead);
          }
          store_tiles<Heights>(*kept);
          if (!is_last_part) return;
          write_sums(args, first + in.row, min(in.num, kTileSide), p * kPanel, here.rows[0]);
          if (Heights == 2)
            write_sums(args, first + in.row + in.num - kTileSide, kTileSide, p * kPanel, here.rows[kTileSide]);
        });
      }
    }
  }
}

// Rows [first, first + rows) times one panel.
inline void panel_in_tiles(const LinearArgs& args, int64_t first, int64_t rows, int64_t panel) {
  const Tiles registers(rows);
  const int64_t tiles = ceil_div(rows, kTwoTiles);
  auto* memory = tiles > 2 ? reinterpret_cast<TileSums*>(scratch(tiles * sizeof(TileSums) / sizeof(float))) : nullptr;
  multiply_in_tiles(args, first, rows, panel, panel + 1, memory);
}

inline void linear_in_tiles(const LinearArgs& args) {
  const int64_t panels = ceil_div(args.out_features, kPanel);
  const int64_t row_blocks = ceil_div(args.rows, kRowsAtOnce), block_rows = ceil_div(args.rows, row_blocks);
  const bool is_kept = block_rows <= 2 * kTwoTiles || block_rows * args.in_features <= kKeptInputs;
  const int64_t panels_at_once = is_kept ? 1 : kPanelsAtOnce, groups = ceil_div(panels, panels_at_once);
  const int64_t tiles = ceil_div(block_rows, kTwoTiles);
  run(row_blocks * groups, [&](int64_t task) {
    const Tiles registers(args.rows);
    const int64_t block = task / groups, first = args.rows * block / row_blocks;
    const int64_t panel = panels * (task % groups) / groups, last = panels * (task % groups + 1) / groups;
    const int64_t floats = panels_at_once * tiles * sizeof(TileSums) / sizeof(float);
    auto* memory = tiles > 2 ? reinterpret_cast<TileSums*>(scratch(floats)) : nullptr;
    multiply_in_tiles(args, first, args.rows * (block + 1) / row_blocks - first, panel, last, memory);
  });
}
