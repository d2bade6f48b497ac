// Shrink and expand of every site of one input, fused. Included inside the instruction set's namespace.
//
// A task is a tile: rows of one adapter. Its rank products stay in the thread's scratch memory, so there is no barrier
// between shrink and expand and no buffer shared by threads. Where a product does the second half (linear_lora), shrink
// is a job of its own, its rank products lie in args.hidden, and each of the product's tasks expands its own columns.
#pragma once

constexpr int64_t kMaxTileRows = 64;
constexpr int64_t kDirectRows = 3;  // up to here B is read in place
constexpr int64_t kFewestPacked = 8, kPackedInputs = 32;  // rows whose inputs are packed; so many inputs at a time

template <typename Y>
constexpr bool is_int8 = sizeof(Y) == 1;

// out[i] = in[i], which every T represents.
template <typename T>
inline void to_numbers(const i8* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_n(out + i, load_n(in + i, n - i), n - i);
}

// Pieces of memory that are asked for evenly, line by line, while something else is computed.
struct Piece {
  const char *at, *end;
};

struct Pieces {
  Piece* list;
  int64_t num = 0, bytes = 0;

  void add(const void* from, int64_t num_bytes) {
    const char* at = static_cast<const char*>(from);
    list[num++] = {at, at + num_bytes};
    bytes += num_bytes;
  }
};

template <typename T>
struct LoraTile {
  using P = Product<T>;
  const LoraArgs& args;
  int64_t slot, first, count;
  const T* x[kMaxTileRows];

  LoraTile(const LoraArgs& lora_args, const int32_t* tile)
      : args(lora_args), slot(tile[0]), first(tile[1]), count(tile[2]) {
    for (int64_t i = 0; i < count; ++i)
      x[i] = static_cast<const T*>(args.x.data) + args.rows[first + i] * args.x.stride;
  }

  int64_t rank(const LoraSiteArgs& site) const { return args.ranks[slot * args.table_sites + site.index]; }

  float scale(const LoraSiteArgs& site, int64_t i) const {
    return args.scales[slot * args.table_sites + site.index] * (args.row_scales ? args.row_scales[first + i] : 1.0f);
  }

  // The pool's row of an adapter's rank row.
  int64_t pool_row(const LoraSiteArgs& site, int64_t j) const {
    const int64_t page = args.pages[(slot * args.groups + site.group) * args.max_pages + j / kPageRows];
    return page * kPageRows + j % kPageRows;
  }

  // An adapter's rank rows from j to the end of its page, in a pool of rows `width` wide.
  template <typename Y>
  const Y* rows(const LoraSiteArgs& site, const void* pool, int64_t j, int64_t width) const {
    return static_cast<const Y*>(pool) + pool_row(site, j) * width;
  }

  // Int8 rows are read in place for few rows of x, and are numbers of type T first for more: both are exact.
  bool is_direct() const { return count <= kDirectRows && !args.fixed_sums; }

  // hidden[i][j] = x[i] . a[j]; hidden: [count, stride], columns from rank on stay as they are. AsksForB: for the rows of
  // B, which expand reads next.
  template <typename Y, bool AsksForB>
  void multiply_rows(const LoraSiteArgs& site, float* hidden, int64_t stride, T* memory) const {
    constexpr int64_t kStep = 4;  // rank rows of A between two requests for B
    const int64_t num_rows = rank(site), width = args.in_features;
    for (int64_t j = 0; j < num_rows; j += kStep) {
      const int64_t n = min(kStep, num_rows - j);
      if (AsksForB) prefetch(rows<Y>(site, site.b_rows, j, site.width), n * site.width * sizeof(Y));
      const Y* a = rows<Y>(site, site.a_rows, j, width);
      if constexpr (is_int8<Y>) {
        if (!is_direct()) {
          to_numbers(a, n * width, memory);
          dots(x, count, memory, width, n, width, hidden + j, stride);
        } else {
          dots(x, count, a, width, n, width, hidden + j, stride);
        }
        const float* factors = site.factors + pool_row(site, j);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t r = 0; r < n; ++r) hidden[i * stride + j + r] *= factors[r];
      } else {
        dots(x, count, a, width, n, width, hidden + j, stride);
      }
    }
  }

  // Inputs of so many rows are packed, in pairs of them, for tile registers; not where sums are fixed, as those of few rows
  // have other bits.
  bool packs_inputs() const {
    return kHasTiles && P::kDepth == 2 && kFewestPacked <= count && !args.fixed_sums &&
           args.in_features % kPackedInputs == 0;
  }
  int64_t packed_stride() const { return ceil_div(count, kPackedInputs) * kPackedInputs; }
  int64_t packed_floats() const { return packs_inputs() ? args.in_features / 2 * packed_stride() : 0; }

#ifdef __AMX_BF16__
  static_assert(kPackedInputs == kTileInputs && kPackedInputs == kTwoTiles);

  // packed[k][i] = inputs 2 k and 2 k + 1 of row i, what the products of all sites read; rows past the last repeat it.
  void pack_inputs(float* packed) const {
    for (int64_t i = 0; i < packed_stride(); i += kLanes) {
      for (int64_t k = 0; k < args.in_features / 2; k += kLanes) {
        Vec pairs[kLanes];
        for (int64_t r = 0; r < kLanes; ++r)
          pairs[r] = load(reinterpret_cast<const float*>(x[min(i + r, count - 1)] + 2 * k));
        transpose(pairs);
        for (int64_t r = 0; r < kLanes; ++r) store(packed + (k + r) * packed_stride() + i, pairs[r]);
      }
    }
  }

  // multiply_rows by 16 rank rows of A, which lie in a page, and 32 rows of x.
  template <typename Y, bool AsksForB>
  void multiply_packed(const LoraSiteArgs& site, float* hidden, int64_t stride, const float* packed, T* memory) const {
    const Tiles registers(kTileSide);
    const int64_t num_rows = rank(site), width = args.in_features, packed_bytes = packed_stride() * sizeof(float);
    TileSums sums;
    for (int64_t j = 0; j < num_rows; j += kPageRows) {
      const int64_t n = min(kPageRows, num_rows - j);
      if (AsksForB) prefetch(rows<Y>(site, site.b_rows, j, site.width), n * site.width * sizeof(Y));
      const Y* page = rows<Y>(site, site.a_rows, j, width);
      const void* a = page;
      if constexpr (is_int8<Y>) to_numbers(page, kPageRows * width, memory), a = memory;
      const TileRows own(a, kPageRows, width * sizeof(T));
      for (int64_t col = 0; col < count; col += kTwoTiles) {
        zero_tiles<1>();
        for (int64_t k = 0; k < width; k += kTileInputs)
          add_products<1>(own, k * sizeof(T), packed + k / 2 * packed_stride() + col, packed_bytes);
        store_tiles<1>(sums);
        for (int64_t first_row = col; first_row < min(count, col + kTwoTiles); first_row += kTileSide) {
          Vec ranks[kLanes];
          for (int64_t r = 0; r < kPageRows; ++r) {
            ranks[r] = load(sums.rows[r] + first_row - col);
            if constexpr (is_int8<Y>) ranks[r] = mul(ranks[r], set1(r < n ? site.factors[pool_row(site, j + r)] : 0.0f));
          }
          transpose(ranks);
          for (int64_t i = 0; i < min(kTileSide, count - first_row); ++i)
            store_n(hidden + (first_row + i) * stride + j, ranks[i], n);
        }
      }
    }
  }
#endif

  // hidden[i][j] = scale * x[i] . a[j], as multiply_rows. packed: of pack_inputs, or null.
  template <typename Y, bool AsksForB>
  void shrink(const LoraSiteArgs& site, float* hidden, int64_t stride, const float* packed, T* memory) const {
#ifdef __AMX_BF16__
    if constexpr (P::kDepth == 2) if (packed) multiply_packed<Y, AsksForB>(site, hidden, stride, packed, memory);
#endif
    if (!packed) multiply_rows<Y, AsksForB>(site, hidden, stride, memory);
    for (int64_t i = 0; i < count; ++i) {
      const Vec factor = set1(scale(site, i));
      for (int64_t j = i * stride; j < (i + 1) * stride; j += kLanes) store(hidden + j, mul(load(hidden + j), factor));
    }
  }

  // Adds hidden[i] times b to out[rows[i]], columns [col, end) in runs that stay in the first-level cache.
  template <typename Y>
  void expand(const LoraSiteArgs& site, const float* hidden, int64_t stride, float* memory, int64_t col,
              int64_t end) const {
    const int64_t num_rows = rank(site);
    const auto out_row = [&](int64_t i) {
      return static_cast<T*>(site.out.data) + args.rows[first + i] * site.out.stride + col;
    };
    if (is_direct() && num_rows <= kPageRows) {
      const Y* b = rows<Y>(site, site.b_rows, 0, site.width) + col;
      update<DirectProduct<Y>>(hidden, stride, b, site.width, out_row, count, num_rows, end - col);
      return;
    }
    const Tiles registers(count);
    const int64_t depth = packed_depth<P>(num_rows), width = max(stride, depth * P::kDepth);
    auto* left = reinterpret_cast<typename P::Left*>(memory);  // [count, width]: no more bytes than hidden has
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < stride; j += kLanes) store(left + i * width + j, load(hidden + i * stride + j));
      for (int64_t j = stride; j < width; j += kLanes) store(left + i * width + j, zero());
    }
    auto* right = reinterpret_cast<typename P::Right*>(memory + count * stride);
    for (int64_t j = ceil_div(num_rows, P::kDepth); j < depth; ++j)
      __builtin_memset(static_cast<void*>(right + j * kTileCols), 0, kTileCols * sizeof(*right));
    auto* numbers = reinterpret_cast<T*>(memory + stride * (count + kTileCols));
    for (; col < end; col += kTileCols) {
      const int64_t cols = min(kTileCols, end - col);
      for (int64_t j = 0; j < num_rows; j += kPageRows) {
        const int64_t n = min(kPageRows, num_rows - j);
        const Y* b = rows<Y>(site, site.b_rows, j, site.width) + col;
        auto* to = right + j / P::kDepth * kTileCols;
        if constexpr (is_int8<Y>) {
          for (int64_t r = 0; r < n; ++r) to_numbers(b + r * site.width, cols, numbers + r * kTileCols);
          P::pack_rows(numbers, kTileCols, n, cols, to, kTileCols);
        } else {
          P::pack_rows(b, site.width, n, cols, to, kTileCols);
        }
      }
      update<P>(left, width, right, kTileCols, out_row, count, depth, cols);
    }
  }

  // hidden: memory for add_floats.
  template <typename Y>
  void add(const LoraSiteArgs& site, const float* packed, float* hidden) const {
    const int64_t stride = hidden_stride(site);
    // An odd rank is multiplied in pairs: the missing partner is zero.
    for (int64_t i = 0; i < count * stride; i += kLanes) store(hidden + i, zero());
    shrink<Y, true>(site, hidden, stride, packed, reinterpret_cast<T*>(hidden + count * stride));
    expand<Y>(site, hidden, stride, hidden + count * stride, 0, site.width);
  }
  int64_t add_floats(const LoraSiteArgs& site) const {
    const int64_t num_numbers = site.factors ? kPageRows * max(kTileCols, args.in_features) : 0;
    return hidden_stride(site) * (2 * count + kTileCols) + num_numbers;
  }

  // The tile's rank products of a site in args.hidden, [count, hidden_stride].
  float* hidden_of(int64_t s) const { return args.hidden + (s * args.num_rows + first) * args.max_pages * kPageRows; }
  int64_t hidden_stride(const LoraSiteArgs& site) const { return ceil_div(rank(site), kPageRows) * kPageRows; }

  // The first half of add, for a site by its number. memory: for kPageRows rows of A, of int8 ones.
  template <typename Y>
  void multiply(int64_t s, const float* packed, T* memory) const {
    const LoraSiteArgs& site = args.sites[s];
    if (rank(site) == 0) return;
    float* hidden = hidden_of(s);
    const int64_t stride = hidden_stride(site);
    for (int64_t i = 0; i < count * stride; i += kLanes) store(hidden + i, zero());
    shrink<Y, false>(site, hidden, stride, packed, memory);
  }

  // Calls f with packed inputs, or null, and the memory for `floats` more.
  template <typename F>
  void with_inputs(int64_t floats, const F& f) const {
    float* packed = scratch(packed_floats() + floats);
#ifdef __AMX_BF16__
    if constexpr (P::kDepth == 2) if (packs_inputs()) pack_inputs(packed);
#endif
    f(packs_inputs() ? packed : nullptr, packed + packed_floats());
  }

  // The second half, for columns [begin, end) of the site.
  template <typename Y>
  void add_part(int64_t s, int64_t begin, int64_t end) const {
    const LoraSiteArgs& site = args.sites[s];
    if (rank(site) == 0) return;
    const int64_t stride = hidden_stride(site), num_numbers = is_int8<Y> ? kPageRows * kTileCols : 0;
    expand<Y>(site, hidden_of(s), stride, scratch(stride * (count + kTileCols) + num_numbers), begin, end);
  }

  template <typename Y>
  void list_b(const LoraSiteArgs& site, int64_t begin, int64_t end, Pieces& pieces) const {
    for (int64_t j = 0, num_rows = rank(site); j < num_rows; ++j)
      pieces.add(rows<Y>(site, site.b_rows, j, site.width) + begin, (end - begin) * sizeof(Y));
  }
  // Part [begin, end) of `parts` of its rows of A.
  template <typename Y>
  void list_a(const LoraSiteArgs& site, int64_t begin, int64_t end, int64_t parts, Pieces& pieces) const {
    for (int64_t j = 0, num_rows = rank(site); j < num_rows; j += kPageRows) {
      const int64_t bytes = min(kPageRows, num_rows - j) * args.in_features * sizeof(Y);
      const auto* a = reinterpret_cast<const char*>(rows<Y>(site, site.a_rows, j, args.in_features));
      pieces.add(a + bytes * begin / parts, bytes * end / parts - bytes * begin / parts);
    }
  }

  template <typename Y>
  void touch_rows(const LoraSiteArgs& site) const {
    for (int64_t j = 0, num_rows = rank(site); j < num_rows; j += kPageRows) {
      const int64_t n = min(kPageRows, num_rows - j);
      touch_pages(rows<Y>(site, site.a_rows, j, args.in_features), n * args.in_features * sizeof(Y));
      touch_pages(rows<Y>(site, site.b_rows, j, site.width), n * site.width * sizeof(Y));
    }
  }
  void touch(const LoraSiteArgs& site) const { site.factors ? touch_rows<i8>(site) : touch_rows<T>(site); }

  // next: the tile that comes after this one, or null.
  void run(const LoraTile* next) const {
    int64_t floats = 0;
    for (int64_t s = 0; s < args.num_sites; ++s) floats = max(floats, add_floats(args.sites[s]));
    with_inputs(floats, [&](const float* packed, float* memory) {
      for (int64_t s = 0; s < args.num_sites; ++s) {
        const LoraSiteArgs& site = args.sites[s];
        if (s + 1 < args.num_sites)
          touch(args.sites[s + 1]);
        else if (next)
          next->touch(args.sites[0]);
        if (rank(site) > 0) site.factors ? add<i8>(site, packed, memory) : add<T>(site, packed, memory);
      }
    });
  }
};

// Columns [begin, end) of a site, of those [begin, end) of all sites side by side: f(site's number, begin, end).
template <typename F>
inline void sites_in(const LoraArgs& args, int64_t begin, int64_t end, const F& f) {
  for (int64_t s = 0, first = 0; s < args.num_sites; first += args.sites[s++].width) {
    const int64_t from = max(begin, first), to = min(end, first + args.sites[s].width);
    if (from < to) f(s, from - first, to - first);
  }
}

// Products with A alone, into args.hidden.
inline void lora_shrink(const LoraArgs& args) {
  run(args.num_tiles, [&](int64_t task) {
    with_dtype(args.dtype, [&]<typename T>() {
      const LoraTile<T> tile(args, args.tiles + 3 * task);
      tile.with_inputs(kPageRows * args.in_features, [&](const float* packed, float* memory) {
        T* numbers = reinterpret_cast<T*>(memory);
        for (int64_t s = 0; s < args.num_sites; ++s)
          args.sites[s].factors ? tile.template multiply<i8>(s, packed, numbers)
                                : tile.template multiply<T>(s, packed, numbers);
      });
    });
  });
}

// The rest, for columns [begin, end) of all sites side by side.
template <typename T>
void lora_expand(const LoraArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < args.num_tiles; ++t) {
    const LoraTile<T> tile(args, args.tiles + 3 * t);
    sites_in(args, begin, end, [&](int64_t s, int64_t from, int64_t to) {
      args.sites[s].factors ? tile.template add_part<i8>(s, from, to) : tile.template add_part<T>(s, from, to);
    });
  }
}

// At most so many are listed by list_pieces.
inline int64_t most_pieces(const LoraArgs& args, const LoraArgs* next) {
  return args.num_tiles * args.num_sites * args.max_pages * kPageRows +
         (next ? next->num_tiles * next->num_sites * next->max_pages : 0);
}

// What columns [begin, end) need of the rows of B, and part `task` of the rows of A that come next: the tiles that the
// same thread multiplies then.
template <typename T>
void list_pieces(const LoraArgs& args, const LoraArgs* next, int64_t begin, int64_t end, int64_t task,
                 int64_t num_tasks, Pieces& pieces) {
  for (int64_t t = 0; t < args.num_tiles; ++t) {
    const LoraTile<T> tile(args, args.tiles + 3 * t);
    sites_in(args, begin, end, [&](int64_t s, int64_t from, int64_t to) {
      const LoraSiteArgs& site = args.sites[s];
      site.factors ? tile.template list_b<i8>(site, from, to, pieces) : tile.template list_b<T>(site, from, to, pieces);
    });
  }
  if (!next) return;
  // Tiles and tasks as lengths on one line: a tile is num_tasks long, a task num_tiles.
  const int64_t first = task * next->num_tiles, last = first + next->num_tiles;
  for (int64_t t = first / num_tasks; t * num_tasks < last; ++t) {
    const LoraTile<T> tile(*next, next->tiles + 3 * t);
    const int64_t from = max(0, first - t * num_tasks), to = min(num_tasks, last - t * num_tasks);
    for (int64_t s = 0; s < next->num_sites; ++s) {
      const LoraSiteArgs& site = next->sites[s];
      site.factors ? tile.template list_a<i8>(site, from, to, num_tasks, pieces)
                   : tile.template list_a<T>(site, from, to, num_tasks, pieces);
    }
  }
}

#include "lora_few.h"

void lora_add(const LoraArgs& args) {
  run(args.num_tiles, [&](int64_t number) {
    with_dtype(args.dtype, [&]<typename T>() {
      const bool is_last = number + 1 == args.num_tiles;
      const LoraTile<T> tile(args, args.tiles + 3 * number), next(args, args.tiles + 3 * (is_last ? number : number + 1));
      if constexpr (kHasTiles)
        if (tile.is_direct()) return add_to_few(tile, is_last ? nullptr : &next);
      tile.run(is_last ? nullptr : &next);
    });
  });
}
