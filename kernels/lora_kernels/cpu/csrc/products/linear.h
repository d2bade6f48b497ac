// bf16 matrix product with a packed weight. Included inside the instruction set's namespace.
//
// A panel holds kPanel output columns for every pair of inputs, so a pass over a panel needs one load per vector of
// weights and one broadcast per row. Rows are split evenly into tiles that fill the register file. Weights come from
// memory and are prefetched. A single tile prefetches lines and pages shortly before it multiplies them. Of several
// tiles, each prefetches its part of the next panel, evenly: a tile that prefetched all of it would wait for memory
// while memory idles during the others.
#pragma once

#if defined(__AVX512BF16__)
constexpr int kMaxRows = 14;  // 28 accumulators, 2 vectors of weights, 1 of inputs
#elif defined(__AVX512F__)
constexpr int kMaxRows = 12;  // fp32 products split weights into even and odd halves
#else
constexpr int kMaxRows = 5;
#endif
// Maximum rows of a tile that computes all columns of a panel at once; with more rows, vectors of eight lanes leave
// registers for half of the columns.
constexpr int kWideRows = kLanes == 16 ? kMaxRows : 2;

constexpr int64_t kPairBytes = kPanel * 4;  // per pair of inputs in a panel

// The part of the next panel that one of several tiles prefetches, `step` bytes per pair of inputs.
struct PanelAhead {
  const char* at;
  int64_t step;
};

constexpr int64_t kLine = 64;

// Prefetches pieces of memory, `step` bytes per call; after the last piece, unneeded memory.
struct PiecesAhead {
  const Piece *piece, *last;
  const char* at;
  int64_t step, second;  // second: offset of the second line of a step with two, else 0

  void operator()() {
    prefetch_line(at);
    prefetch_line(at + second);
    at += step;
    if (at >= piece->end && piece < last) at = (++piece)->at;
  }
};

// Writes a tile's totals to rows of out that start at `to`, which is output column `col`.
template <int Rows>
inline void store_tile(const LinearArgs& args, bf16* to, int64_t col, const Vec (&acc)[Rows][kPanelVecs]) {
  const auto* bias = reinterpret_cast<const bf16*>(args.bias);
  const int64_t cols = args.out_features - col;
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVecs; ++v) {
    const int64_t n = min(kLanes, cols - v * kLanes);
    if (n <= 0) return;
    const Vec b = bias ? load_n(bias + col + v * kLanes, n) : zero();
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      bf16* at = to + i * args.out.stride + v * kLanes;
      n == kLanes ? store(at, add(acc[i][v], b)) : store_n(at, add(acc[i][v], b), n);
    }
  }
}

// A chunk of a tile's rows, and how a panel's pairs are multiplied by it.
#ifdef __AVX512BF16__
template <int Rows>
struct RowsOfChunk {
  const uint16_t* x;

  void load_from(const uint16_t* from, int64_t) { x = from; }

  template <int Vecs>
  void add_products(int64_t pair, const Pairs (&w)[Vecs], Vec (&acc)[Rows][Vecs]) const {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      int both;
      __builtin_memcpy(&both, x + i * kXChunk + pair * 2, 4);
      const Pairs xv = set1_pair(both);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) acc[i][v] = dot_pairs(acc[i][v], w[v], xv);
    }
  }
};
#else
// Converted to fp32 once for all columns: broadcasting a number from memory takes no arithmetic instruction, while
// extracting the halves of a broadcast pair takes two.
template <int Rows>
struct RowsOfChunk {
  alignas(64) float x[Rows][kXChunk];

  void load_from(const uint16_t* from, int64_t inputs) {
    for (int i = 0; i < Rows; ++i) {
      const auto* row = reinterpret_cast<const bf16*>(from) + i * kXChunk;
      each_vector(inputs, [&](int64_t k, auto n) { store(x[i] + k, load_n(row + k, n)); });
    }
  }

  template <int Vecs>
  void add_products(int64_t pair, const Pairs (&w)[Vecs], Vec (&acc)[Rows][Vecs]) const {
    const auto add_half = [&](int half, const auto& of_pairs) __attribute__((always_inline)) {
      Vec own[Vecs];
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) own[v] = of_pairs(w[v]);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec xv = set1(x[i][pair * 2 + half]);
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) acc[i][v] = fma(own[v], xv, acc[i][v]);
      }
    };
    add_half(0, [](Pairs p) { return even_half(p); });
    add_half(1, [](Pairs p) { return odd_half(p); });
  }
};
#endif

// Rows of a panel's columns. also: called for every pair of inputs if there are several tiles. All loops over totals
// are unrolled: the compiler keeps an array that is indexed by a variable in memory.
template <int Rows, bool IsOnly, typename Also>
inline void panel_tile(const LinearArgs& args, int64_t row, int64_t col, const uint16_t* panel, PanelAhead ahead,
                       Also& shared) {
  constexpr int kVecs = Rows > kWideRows ? kPanelVecs / 2 : kPanelVecs;
  Also also = shared;  // stays in registers
  Vec totals[Rows][kPanelVecs];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) totals[i][v] = zero();
  }
  // Prefetched before they are written: for an output that no cache holds, such as logits, all rows' lines come from
  // memory.
  auto* to = static_cast<bf16*>(args.out.data) + row * args.out.stride + col;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) __builtin_prefetch(to + i * args.out.stride, 1, 3);
  const uint16_t* x = args.x + row * kXChunk;
  const int64_t pairs = args.in_features / 2;
  for (int64_t first = 0; first < pairs; first += kXChunk / 2, x += args.rows * kXChunk) {
    const int64_t end = min(kXChunk / 2, pairs - first);
    RowsOfChunk<Rows> chunk;
    chunk.load_from(x, 2 * end);
    if (IsOnly) touch_pages(reinterpret_cast<const char*>(panel) + kPagesAhead, end * kPairBytes);
#pragma GCC unroll 2
    for (int side = 0; side < kPanelVecs; side += kVecs) {
      Vec acc[Rows][kVecs];
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[i][v] = totals[i][side + v];
      }
      const uint16_t* weights = panel + side * 2 * kLanes;
      for (int64_t p = 0; p < end; ++p, weights += kPanel * 2) {
        Pairs w[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          w[v] = load_pairs(weights + v * 2 * kLanes);
          if (IsOnly) prefetch_line(reinterpret_cast<const char*>(weights + v * 2 * kLanes) + kLinesAhead);
        }
        if (!IsOnly && side == 0) {
          prefetch_line(ahead.at);
          ahead.at += ahead.step;
          also();
        }
        chunk.add_products(p, w, acc);
      }
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) totals[i][side + v] = acc[i][v];
      }
    }
    panel += end * kPanel * 2;
  }
  shared = also;
  store_tile<Rows>(args, to, col, totals);
}

// The part of the next panel that one of several tiles prefetches.
inline PanelAhead part_of_next(const LinearArgs& args, int64_t panel, int64_t tile, int64_t tiles) {
  const int64_t bytes = args.in_features / 2 * kPairBytes;
  const bool is_last = (panel + 1) * kPanel >= args.out_features;
  const char* next = reinterpret_cast<const char*>(args.panels) + (is_last ? panel : panel + 1) * bytes;
  return {next + bytes * tile / tiles, ceil_div(kPairBytes, tiles)};
}

// Rows [first, first + rows) times one panel.
template <typename Also>
inline void panel_rows(const LinearArgs& args, int64_t first, int64_t rows, int64_t panel, Also& also) {
  // Weights for few rows come from memory, where a pass over half of each line would run at half the speed.
  const int64_t most_rows = rows <= 3 * kWideRows ? kWideRows : kMaxRows;
  const int64_t col = panel * kPanel, tiles = ceil_div(rows, most_rows);
  const uint16_t* weights = args.panels + col * args.in_features;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = rows * tile / tiles, row = first + begin;
    with_size<kMaxRows>(rows * (tile + 1) / tiles - begin, [&]<int Rows>() {
      if constexpr (Rows <= kWideRows)
        if (tiles == 1) return panel_tile<Rows, true>(args, row, col, weights, {}, also);
      panel_tile<Rows, false>(args, row, col, weights, part_of_next(args, panel, tile, tiles), also);
    });
  }
}

// Writes sums [rows, kPanel] to rows of out, starting at column col.
inline void write_sums(const LinearArgs& args, int64_t row, int64_t rows, int64_t col, const float* sums) {
  auto* to = static_cast<bf16*>(args.out.data) + row * args.out.stride + col;
  const auto* bias = reinterpret_cast<const bf16*>(args.bias);
  const int64_t cols = min(kPanel, args.out_features - col);
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t n = min(kLanes, cols - j);
    const Vec b = bias ? load_n(bias + col + j, n) : zero();
    for (int64_t i = 0; i < rows; ++i) store_n(to + i * args.out.stride + j, add(load(sums + i * kPanel + j), b), n);
  }
}

#ifdef __AMX_BF16__
#include "linear_tiles.h"
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "linear_widened.h"
#endif

void linear(const LinearArgs& args) {
  if (args.rows == 0) return;
#ifdef __AMX_BF16__
  if (fits_tiles(args)) return linear_in_tiles(args);
#endif
  const int64_t panels = ceil_div(args.out_features, kPanel);
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (args.rows >= kFewestWidened) return linear_widened(args);
#endif
  // Rows of x that stay in the second-level cache while all panels are read; more rows bring no gain.
  const int64_t most_rows = max(8 * kMaxRows, min(192, 320 * 1024 / args.in_features));
  const int64_t row_blocks = ceil_div(args.rows, most_rows);
  run(row_blocks * panels, [&](int64_t task) {
    Nothing nothing;
    const int64_t block = task / panels, first = args.rows * block / row_blocks;
    panel_rows(args, first, args.rows * (block + 1) / row_blocks - first, task % panels, nothing);
  });
}

// Tasks are panels of groups in memory order, so that a thread reads long stretches of weights.
void linear_groups(const LinearArgs& args, const RowGroup* groups, int64_t num_groups) {
  const int64_t panels = args.out_features / kPanel;
  run(num_groups * panels, [&](int64_t task) {
    const RowGroup& group = groups[task / panels];
    LinearArgs own = args;
    own.panels += group.panel * kPanel * args.in_features;
#ifdef __AMX_BF16__
    if (fits_tiles(args)) return panel_in_tiles(own, group.first, group.rows, task % panels);
#endif
    Nothing nothing;
    panel_rows(own, group.first, group.rows, task % panels, nothing);
  });
}

// Multiplies panels [first, last) and prefetches pieces of memory meanwhile, evenly.
inline void multiply_and_ask(const LinearArgs& args, int64_t first, int64_t last, Pieces& pieces) {
  pieces.add(args.x, 0);  // so that the list is not empty
  const int64_t panel_steps = ceil_div(args.rows, kMaxRows) * (args.in_features / 2);
  const int64_t step = min(2 * kLine, ceil_div(pieces.bytes, (last - first) * panel_steps));
  PiecesAhead ahead = {pieces.list, pieces.list + pieces.num - 1, pieces.list->at, step, step > kLine ? kLine : 0};
  for (int64_t panel = first; panel < last; ++panel) panel_rows(args, 0, args.rows, panel, ahead);
}

inline void linear_lora(const LinearArgs& args, const LinearLora& with) {
  const LoraArgs& lora = with.lora;
  const int64_t panels = ceil_div(args.out_features, kPanel);
  const auto tile_at = [&](int64_t tile) { return LoraTile<bf16>(lora, lora.tiles + 3 * tile); };
  run(with.num_tasks, [&](int64_t task) {
    const auto part_of = [&](int64_t num, int64_t i) { return num * i / with.num_tasks; };
    const int64_t begin = part_of(lora.num_tiles, task), end = part_of(lora.num_tiles, task + 1);
    const int64_t most = (end - begin) * LoraTile<bf16>::most_pieces(lora) + 1;
    Pieces pieces = {reinterpret_cast<Piece*>(scratch(most * sizeof(Piece) / sizeof(float)))};
    for (int64_t tile = begin; tile < end; ++tile) tile_at(tile).list(pieces);
    multiply_and_ask(args, part_of(panels, task), part_of(panels, task + 1), pieces);
    for (int64_t tile = begin; tile < end; ++tile) tile_at(tile).keep_apart();
  });
  run(lora.num_tiles, [&](int64_t tile) { tile_at(tile).add_apart(); });
}
