// Shrink and expand for every site of one input, fused. Included inside the instruction set's namespace.
//
// A task is a tile: rows of one adapter. Its rank products stay in the thread's scratch memory, so there is no barrier
// between shrink and expand and no buffer shared by threads. Together with a product (linear_lora), tiles are computed
// before the product's outputs exist, into args.apart, and added afterwards.
#pragma once

constexpr int64_t kMaxTileRows = 64;
constexpr int64_t kDirectRows = 3;  // maximum rows for reading B in place
constexpr int64_t kFewestPacked = 8, kPackedInputs = 32;  // minimum rows for packing inputs; inputs per step

template <typename Y>
constexpr bool is_int8 = sizeof(Y) == 1;

// out[i] = in[i], which every T represents exactly.
template <typename T>
inline void to_numbers(const i8* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_n(out + i, load_n(in + i, n - i), n - i);
}

// Pieces of memory to prefetch evenly, line by line, during other computations.
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

  // The pool's row that holds an adapter's rank row.
  int64_t pool_row(const LoraSiteArgs& site, int64_t j) const {
    const int64_t page = args.pages[(slot * args.groups + site.group) * args.max_pages + j / kPageRows];
    return page * kPageRows + j % kPageRows;
  }

  // An adapter's rank rows from j to the end of its page, in a pool with rows of `width` entries.
  template <typename Y>
  const Y* rows(const LoraSiteArgs& site, const void* pool, int64_t j, int64_t width) const {
    return static_cast<const Y*>(pool) + pool_row(site, j) * width;
  }

  // For few rows of x, int8 rows are read in place; for more they are first converted to T. Both are exact.
  bool is_direct() const { return count <= kDirectRows && !args.fixed_sums; }

  // hidden[i][j] = x[i] . a[j]; hidden: [count, stride], columns from rank on stay unchanged. AsksForB: prefetch the
  // rows of B, which expand reads next.
  template <typename Y, bool AsksForB>
  void multiply_rows(const LoraSiteArgs& site, float* hidden, int64_t stride, T* memory) const {
    constexpr int64_t kStep = 4;  // rank rows of A between two prefetches of B
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

  // With enough rows, inputs are packed in pairs for tile registers; not if sums are fixed, since few rows' sums have
  // other bits.
  bool packs_inputs() const {
    return kHasTiles && P::kDepth == 2 && kFewestPacked <= count && !args.fixed_sums &&
           args.in_features % kPackedInputs == 0;
  }
  int64_t packed_stride() const { return ceil_div(count, kPackedInputs) * kPackedInputs; }
  int64_t packed_floats() const { return packs_inputs() ? args.in_features / 2 * packed_stride() : 0; }

#ifdef __AMX_BF16__
  static_assert(kPackedInputs == kTileInputs && kPackedInputs == kTwoTiles);

  // packed[k][i] = inputs 2 k and 2 k + 1 of row i, for the products of all sites; rows past the last repeat it.
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

  // multiply_rows for 16 rank rows of A, which are in one page, and 32 rows of x at a time.
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

  // hidden[i][j] = scale * x[i] . a[j], see multiply_rows. packed: from pack_inputs, or null.
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

  // Adds hidden[i] times b to out_row(i), or writes it if IsFirst, in runs of columns that stay in the first-level
  // cache.
  template <typename Y, bool IsFirst, typename OutRow>
  void expand(const LoraSiteArgs& site, const float* hidden, int64_t stride, float* memory,
              const OutRow& out_row) const {
    const int64_t num_rows = rank(site);
    if (is_direct() && num_rows <= kPageRows) {
      const Y* b = rows<Y>(site, site.b_rows, 0, site.width);
      update<DirectProduct<Y>, IsFirst>(hidden, stride, b, site.width, out_row, count, num_rows, site.width);
      return;
    }
    const Tiles registers(count);
    const int64_t depth = packed_depth<P>(num_rows), width = max(stride, depth * P::kDepth);
    auto* left = reinterpret_cast<typename P::Left*>(memory);  // [count, width]: no more bytes than hidden
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < stride; j += kLanes) store(left + i * width + j, load(hidden + i * stride + j));
      for (int64_t j = stride; j < width; j += kLanes) store(left + i * width + j, zero());
    }
    auto* right = reinterpret_cast<typename P::Right*>(memory + count * stride);
    for (int64_t j = ceil_div(num_rows, P::kDepth); j < depth; ++j)
      __builtin_memset(static_cast<void*>(right + j * kTileCols), 0, kTileCols * sizeof(*right));
    auto* numbers = reinterpret_cast<T*>(memory + stride * (count + kTileCols));
    for (int64_t col = 0; col < site.width; col += kTileCols) {
      const int64_t cols = min(kTileCols, site.width - col);
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
      const auto at = [&](int64_t i) { return out_row(i) + col; };
      update<P, IsFirst>(left, width, right, kTileCols, at, count, depth, cols);
    }
  }

  // AsksForB and IsFirst: see multiply_rows and expand. hidden: memory of add_floats entries.
  template <typename Y, bool AsksForB, bool IsFirst, typename OutRow>
  void add_as(const LoraSiteArgs& site, const float* packed, float* hidden, const OutRow& out_row) const {
    const int64_t stride = hidden_stride(site);
    // An odd rank is multiplied in pairs: the missing partner is zero.
    for (int64_t i = 0; i < count * stride; i += kLanes) store(hidden + i, zero());
    shrink<Y, AsksForB>(site, hidden, stride, packed, reinterpret_cast<T*>(hidden + count * stride));
    expand<Y, IsFirst>(site, hidden, stride, hidden + count * stride, out_row);
  }
  template <bool AsksForB, bool IsFirst, typename OutRow>
  void add_site(const LoraSiteArgs& site, const float* packed, float* hidden, const OutRow& out_row) const {
    if (rank(site) == 0) return;
    site.factors ? add_as<i8, AsksForB, IsFirst>(site, packed, hidden, out_row)
                 : add_as<T, AsksForB, IsFirst>(site, packed, hidden, out_row);
  }
  T* out_of(const LoraSiteArgs& site, int64_t i) const {
    return static_cast<T*>(site.out.data) + args.rows[first + i] * site.out.stride;
  }
  int64_t add_floats(const LoraSiteArgs& site) const {
    const int64_t num_numbers = site.factors ? kPageRows * max(kTileCols, args.in_features) : 0;
    return hidden_stride(site) * (2 * count + kTileCols) + num_numbers;
  }

  int64_t hidden_stride(const LoraSiteArgs& site) const { return ceil_div(rank(site), kPageRows) * kPageRows; }

  // Calls f with packed inputs, or null, and with memory for `floats` more entries.
  template <typename F>
  void with_inputs(int64_t floats, const F& f) const {
    float* packed = scratch(packed_floats() + floats);
#ifdef __AMX_BF16__
    if constexpr (P::kDepth == 2) if (packs_inputs()) pack_inputs(packed);
#endif
    f(packs_inputs() ? packed : nullptr, packed + packed_floats());
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

  // Calls f(site, packed, memory) for each site, with memory of add_floats entries.
  template <typename F>
  void each_site(const F& f) const {
    int64_t floats = 0;
    for (int64_t s = 0; s < args.num_sites; ++s) floats = max(floats, add_floats(args.sites[s]));
    with_inputs(floats, [&](const float* packed, float* memory) {
      for (int64_t s = 0; s < args.num_sites; ++s) f(args.sites[s], packed, memory);
    });
  }

  // next: the following tile, or null.
  void run(const LoraTile* next) const {
    each_site([&](const LoraSiteArgs& site, const float* packed, float* memory) {
      if (&site + 1 < args.sites + args.num_sites)
        touch(*(&site + 1));
      else if (next)
        next->touch(args.sites[0]);
      add_site<true, false>(site, packed, memory, [&](int64_t i) { return out_of(site, i); });
    });
  }

  // The place in args.apart for the tile's row i of a site; apart is [rows, width] for every site.
  float* apart_of(const LoraSiteArgs& site, int64_t i) const {
    int64_t before = 0;
    for (const LoraSiteArgs* s = args.sites; s < &site; ++s) before += s->width;
    return args.apart + before * args.num_rows + (first + i) * site.width;
  }

  // The rank rows of all sites, in memory order.
  template <typename Y>
  void list_rows(const LoraSiteArgs& site, const void* pool, int64_t width, Pieces& pieces) const {
    for (int64_t j = 0, num_rows = rank(site); j < num_rows; j += kPageRows)
      pieces.add(rows<Y>(site, pool, j, width), min(kPageRows, num_rows - j) * width * sizeof(Y));
  }
  void list(Pieces& pieces) const {
    const auto add_rows = [&]<typename Y>(const LoraSiteArgs& site) {
      list_rows<Y>(site, site.a_rows, args.in_features, pieces);
      list_rows<Y>(site, site.b_rows, site.width, pieces);
    };
    for (int64_t s = 0; s < args.num_sites; ++s)
      args.sites[s].factors ? add_rows.template operator()<i8>(args.sites[s])
                            : add_rows.template operator()<T>(args.sites[s]);
  }
  static int64_t most_pieces(const LoraArgs& args) { return 2 * args.num_sites * args.max_pages; }

  // Computes what is added to the outputs later, into args.apart.
  void keep_apart() const {
    each_site([&](const LoraSiteArgs& site, const float* packed, float* memory) {
      add_site<false, true>(site, packed, memory, [&](int64_t i) { return apart_of(site, i); });
    });
  }

  void add_apart() const {
    for (int64_t s = 0; s < args.num_sites; ++s) {
      const LoraSiteArgs& site = args.sites[s];
      if (rank(site) == 0) continue;
      for (int64_t i = 0; i < count; ++i) {
        T* out = out_of(site, i);
        const float* from = apart_of(site, i);
        each_vector(site.width, [&](int64_t col, auto n) {
          store_n(out + col, add(load_n(out + col, n), load_n(from + col, n)), n);
        });
      }
    }
  }
};

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
