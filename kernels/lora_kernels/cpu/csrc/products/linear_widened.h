// bf16 matrix product of many rows in fp32, with 16 vector registers of eight numbers. Included by linear.h.
//
// A part of a panel is widened to fp32 once, and stays in the first-level cache while all rows are multiplied by it. Six
// rows by half of a panel's columns then leave two registers for weights and one for inputs. Sums wait in memory for the
// next part. Their order is that of panel_tile, so they have the same bits.
#pragma once

constexpr int64_t kFewestWidened = 12;   // rows
constexpr int64_t kWidenedRows = 6;      // of a tile
constexpr int64_t kSide = kPanel / 2;    // columns of a tile
constexpr int64_t kSideVecs = kSide / kLanes;
constexpr int64_t kRowBytes = 256 * 1024;  // of widened inputs that a task keeps in the second-level cache
constexpr int64_t kPanelsOfTask = 3;       // about, for which a task widens its inputs once

// Adds products of rows and of a side of a panel, both in fp32. x: [Rows], kXChunk apart. weights: [inputs, kSide].
// sums: [Rows], kPanel apart.
template <int Rows>
inline void widened_tile(const float* x, const float* weights, int64_t inputs, float* sums, PanelAhead& shared) {
  PanelAhead ahead = shared;  // stays in registers
  Vec acc[Rows][kSideVecs];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSideVecs; ++v) acc[i][v] = load(sums + i * kPanel + v * kLanes);
  }
  for (int64_t k = 0; k < inputs; k += 2) {
    prefetch_line(ahead.at);
    ahead.at += ahead.step;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, weights += kSide) {
      Vec own[kSideVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kSideVecs; ++v) own[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const Vec xv = set1(x[i * kXChunk + k + half]);
#pragma GCC unroll 2
        for (int v = 0; v < kSideVecs; ++v) acc[i][v] = fma(own[v], xv, acc[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSideVecs; ++v) store(sums + i * kPanel + v * kLanes, acc[i][v]);
  }
  shared = ahead;
}

// Rows [first, first + rows) times panels [panel, last).
inline void multiply_widened(const LinearArgs& args, int64_t first, int64_t rows, int64_t panel, int64_t last) {
  const int64_t chunks = ceil_div(args.in_features, kXChunk), tiles = ceil_div(rows, kWidenedRows);
  float* x32 = scratch((chunks * rows + kSide) * kXChunk + rows * kPanel);
  float* wide = x32 + chunks * rows * kXChunk;  // [kXChunk, kSide]
  float* sums = wide + kSide * kXChunk;         // [rows, kPanel]
  const auto inputs_of = [&](int64_t chunk) { return min(kXChunk, args.in_features - chunk * kXChunk); };
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < rows; ++i) {
      const auto* from = reinterpret_cast<const bf16*>(args.x) + (c * args.rows + first + i) * kXChunk;
      float* to = x32 + (c * rows + i) * kXChunk;
      each_vector(inputs_of(c), [&](int64_t k, auto n) { store(to + k, load_n(from + k, n)); });
    }
  }
  const auto* weights = args.panels + panel * kPanel * args.in_features;
  for (int64_t p = panel; p < last; ++p) {
    for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(sums + i, zero());
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t inputs = inputs_of(c), pairs = inputs / 2;
      // The next part begins where this one ends, in whichever panel: it is prefetched evenly.
      PanelAhead ahead = {reinterpret_cast<const char*>(weights) + pairs * kPairBytes, ceil_div(kSide * 4, tiles)};
      for (int64_t side = 0; side < kPanel; side += kSide) {
        for (int64_t pair = 0; pair < pairs; ++pair) {
#pragma GCC unroll 2
          for (int v = 0; v < kSideVecs; ++v) {
            const Pairs both = load_pairs(weights + (pair * kPanel + side + v * kLanes) * 2);
            store(wide + 2 * pair * kSide + v * kLanes, even_half(both));
            store(wide + (2 * pair + 1) * kSide + v * kLanes, odd_half(both));
          }
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t begin = rows * tile / tiles;
          with_size<kWidenedRows>(rows * (tile + 1) / tiles - begin, [&]<int Rows>() {
            widened_tile<Rows>(x32 + (c * rows + begin) * kXChunk, wide, inputs, sums + begin * kPanel + side, ahead);
          });
        }
      }
      weights += pairs * kPanel * 2;
    }
    write_sums(args, first, rows, p * kPanel, sums);
  }
}

inline void linear_widened(const LinearArgs& args) {
  const int64_t panels = ceil_div(args.out_features, kPanel), groups = ceil_div(panels, kPanelsOfTask);
  const int64_t most_rows = max(kFewestWidened, kRowBytes / static_cast<int64_t>(sizeof(float)) / args.in_features);
  const int64_t row_blocks = ceil_div(args.rows, most_rows);
  run(row_blocks * groups, [&](int64_t task) {
    const int64_t block = task / groups, group = task % groups, first = args.rows * block / row_blocks;
    multiply_widened(args, first, args.rows * (block + 1) / row_blocks - first, panels * group / groups,
                     panels * (group + 1) / groups);
  });
}
