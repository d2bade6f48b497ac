// Products in tile registers (AMX): 16 rows times 16 columns, 32 bf16 inputs at a time. Included inside the instruction
// set's namespace.
//
// An instruction first sums its own products, even inputs separately from odd ones, and then adds them to those of its
// tile, so sums have other bits than a chain of dot_pairs. A row's sum does not depend on the other rows.
#pragma once

#ifdef __AMX_BF16__

constexpr int64_t kTileSide = 16;    // rows and columns of a tile of sums
constexpr int64_t kTileInputs = 32;  // per instruction
constexpr int64_t kTwoTiles = 2 * kTileSide;

// Earlier writes must be in memory: the compiler does not know that tiles are loaded from it.
inline void finish_writes() { asm volatile("" ::: "memory"); }

// The calling thread's tile registers: 0 to 3 for sums, 4 and 5 for rows of the left operand, 6 and 7 for columns of
// the right one. The destructor releases them: the system saves registers in use whenever it switches threads.
class Tiles {
 public:
  // rows: number of rows of left operands, if a tile has more.
  explicit Tiles(int64_t rows) {
    const auto num = static_cast<uint8_t>(min(rows, kTileSide));
    alignas(64) const Config config = {.rows = {num, num, num, num, num, num, kTileSide, kTileSide}};
    finish_writes();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Config {  // what LDTILECFG reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16];
  };
};

// Sums of 2 x 2 tiles.
struct TileSums {
  alignas(64) float rows[kTwoTiles][kTwoTiles];

  // Row i of `num`; two tiles hold the last 16 rows in the second.
  template <int Heights>
  float* row(int64_t i, int64_t num) {
    return rows[i < kTileSide || Heights == 1 ? i : i + kTwoTiles - num];
  }
};

// Rows of a left operand in one or two tiles. If they do not fill two, the tiles overlap: shared rows are computed
// twice.
struct TileRows {
  const void* first;
  int64_t second, stride;  // bytes to the second tile's rows, and between rows

  TileRows(const void* first, int64_t rows, int64_t stride)
      : first(first), second(second_of(rows) * stride), stride(stride) {}
  static int64_t second_of(int64_t rows) { return rows - kTileSide; }
};

template <int Heights>
inline void zero_tiles() {
  finish_writes();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Heights == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Adds the products of 32 inputs, `at` bytes after the start of each row, for the rows of one or two tiles and 32
// columns. KeepsRows: the first-level cache keeps the rows, and columns bypass it; else vice versa.
template <int Heights, bool KeepsRows = false>
inline void add_products(const TileRows& left, int64_t at, const void* right, int64_t right_stride) {
  const char *rows = static_cast<const char*>(left.first) + at, *columns = static_cast<const char*>(right);
  // Tile numbers are part of an instruction's name here.
  if constexpr (KeepsRows) {
    _tile_loadd(4, rows, left.stride);
    _tile_stream_loadd(6, columns, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, columns + 64, right_stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Heights == 2) _tile_loadd(5, rows + left.second, left.stride);
  } else {
    _tile_stream_loadd(4, rows, left.stride);
    _tile_loadd(6, columns, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + 64, right_stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Heights == 2) _tile_stream_loadd(5, rows + left.second, left.stride);
  }
  if constexpr (Heights == 2) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Loads or stores the sums of tiles: rows `stride` entries apart.
template <int Heights>
inline void load_tiles(const float* rows, int64_t stride) {
  const int64_t bytes = stride * sizeof(float);
  finish_writes();
  _tile_loadd(0, rows, bytes);
  _tile_loadd(1, rows + kTileSide, bytes);
  if constexpr (Heights == 2) {
    _tile_loadd(2, rows + kTileSide * stride, bytes);
    _tile_loadd(3, rows + kTileSide * stride + kTileSide, bytes);
  }
}
template <int Heights>
inline void store_tiles(float* rows, int64_t stride) {
  const int64_t bytes = stride * sizeof(float);
  _tile_stored(0, rows, bytes);
  _tile_stored(1, rows + kTileSide, bytes);
  if constexpr (Heights == 2) {
    _tile_stored(2, rows + kTileSide * stride, bytes);
    _tile_stored(3, rows + kTileSide * stride + kTileSide, bytes);
  }
}
template <int Heights>
inline void load_tiles(const TileSums& sums) {
  load_tiles<Heights>(sums.rows[0], kTwoTiles);
}
template <int Heights>
inline void store_tiles(TileSums& sums) {
  store_tiles<Heights>(sums.rows[0], kTwoTiles);
}

// Tile number `tile` of rows: up to 32 in two tiles, or up to 16 in one. If there are enough rows, the last tiles start
// early enough to be full.
struct RowsOfTile {
  int64_t row, num;

  RowsOfTile(int64_t tile, int64_t rows) {
    const int64_t end = min(rows, (tile + 1) * kTwoTiles), left = end - tile * kTwoTiles;
    num = left <= kTileSide ? min(rows, kTileSide) : left;
    row = end - num;
  }
};

// Like `update`, but without the last depth % 16 pairs; returns the number of pairs done. The right operand's rows must
// be followed by enough memory to read 32 columns.
template <bool IsFirst, typename OutRow, typename Between>
inline int64_t update_in_tiles(const bf16* left, int64_t left_stride, const Pair* right, int64_t right_stride,
                               const OutRow& out_row, int64_t rows, int64_t depth, int64_t cols, Between& between) {
  constexpr int64_t kTilePairs = kTileInputs / 2;
  const int64_t steps = depth / kTilePairs;
  if (steps == 0) return 0;
  TileSums sums;
  for (int64_t tile = 0; tile * kTwoTiles < rows; ++tile) {
    const RowsOfTile in(tile, rows);
    const TileRows own(left + in.row * left_stride, in.num, left_stride * sizeof(bf16));
    const bool are_whole = in.row == tile * kTwoTiles && in.num % kTileSide == 0;
    with_size<2>(ceil_div(in.num, kTileSide), [&]<int Heights>() {
      // Calls f(out, sum, n) for each vector of rows [begin, end) of the tiles.
      const auto each_sum = [&](int64_t begin, int64_t end, int64_t col, const auto& f) {
        for (int64_t i = begin; i < end; ++i) {
          float* own_sums = sums.template row<Heights>(i, in.num);
          auto* out = out_row(in.row + i) + col;
          for (int64_t j = 0; j < min(kTwoTiles, cols - col); j += kLanes)
            f(out + j, own_sums + j, min(kLanes, cols - col - j));
        }
      };
      for (int64_t col = 0; col < cols; col += kTwoTiles) {
        bool in_place = false;
        if constexpr (is_float_rows<OutRow>) in_place = are_whole && col + kTwoTiles <= cols;
        if constexpr (IsFirst) {
          zero_tiles<Heights>();
        } else {
          if constexpr (is_float_rows<OutRow>)
            if (in_place) load_tiles<Heights>(out_row(in.row) + col, out_row.stride);
          if (!in_place) {
            each_sum(0, in.num, col, [](auto* out, float* sum, int64_t n) { store(sum, load_n(out, n)); });
            load_tiles<Heights>(sums);
          }
        }
        for (int64_t i = 0; i < steps; ++i) {
          add_products<Heights>(own, i * kTileInputs * sizeof(bf16), right + i * kTilePairs * right_stride + col,
                                right_stride * sizeof(Pair));
          between();
        }
        if constexpr (is_float_rows<OutRow>)
          if (in_place) store_tiles<Heights>(out_row(in.row) + col, out_row.stride);
        if (in_place) continue;
        store_tiles<Heights>(sums);
        // The previous tile already stored the other rows.
        each_sum(tile * kTwoTiles - in.row, in.num, col,
                 [](auto* out, float* sum, int64_t n) { store_n(out, load_n(sum, n), n); });
      }
    });
  }
  return steps * kTilePairs;
}

#endif
