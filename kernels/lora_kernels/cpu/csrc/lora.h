// Shrink and expand of every site of one input, fused. Included inside the instruction set's namespace.
//
// A task is a tile: rows of one adapter. Its rank products stay in the thread's scratch memory, so there is no barrier
// between shrink and expand and no buffer shared by threads.
#pragma once

constexpr int64_t kMaxTileRows = 64;
constexpr int64_t kDirectRows = 3;  // up to here B is read in place

template <typename Y>
constexpr bool is_int8 = sizeof(Y) == 1;

// out[i] = in[i], which every T represents.
template <typename T>
inline void to_numbers(const i8* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_n(out + i, load_n(in + i, n - i), n - i);
}

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

  // hidden[i][j] = scale * x[i] . a[j]; hidden: [count, stride], columns from rank on stay as they are.
  template <typename Y>
  void shrink(const LoraSiteArgs& site, float* hidden, int64_t stride, T* memory) const {
    constexpr int64_t kStep = 4;  // rank rows of A between two requests for B
    const int64_t num_rows = rank(site), width = args.in_features;
    for (int64_t j = 0; j < num_rows; j += kStep) {
      const int64_t n = min(kStep, num_rows - j);
      // Prefetches the rows of B that expand needs while A is multiplied.
      prefetch(rows<Y>(site, site.b_rows, j, site.width), n * site.width * sizeof(Y));
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
    const float scale = args.scales[slot * args.table_sites + site.index];
    for (int64_t i = 0; i < count; ++i) {
      const Vec factor = set1(args.row_scales ? scale * args.row_scales[first + i] : scale);
      for (int64_t j = i * stride; j < (i + 1) * stride; j += kLanes) store(hidden + j, mul(load(hidden + j), factor));
    }
  }

  // out[rows[i]] += hidden[i] times b, columns in runs that stay in the first-level cache.
  template <typename Y>
  void expand(const LoraSiteArgs& site, const float* hidden, int64_t stride, float* memory) const {
    const int64_t num_rows = rank(site);
    int64_t col = 0;
    const auto out_row = [&](int64_t i) {
      return static_cast<T*>(site.out.data) + args.rows[first + i] * site.out.stride + col;
    };
    if (is_direct() && num_rows <= kPageRows) {
      const Y* b = rows<Y>(site, site.b_rows, 0, site.width);
      update<DirectProduct<Y>>(hidden, stride, b, site.width, out_row, count, num_rows, site.width);
      return;
    }
    auto* left = reinterpret_cast<typename P::Left*>(memory);
    for (int64_t j = 0; j < count * stride; j += kLanes) store(left + j, load(hidden + j));
    auto* right = reinterpret_cast<typename P::Right*>(memory + count * stride);
    auto* numbers = reinterpret_cast<T*>(memory + stride * (count + kTileCols));
    for (; col < site.width; col += kTileCols) {
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
      update<P>(left, stride, right, kTileCols, out_row, count, ceil_div(num_rows, P::kDepth), cols);
    }
  }

  template <typename Y>
  void add(const LoraSiteArgs& site) const {
    const int64_t stride = ceil_div(rank(site), kPageRows) * kPageRows;
    const int64_t num_numbers = is_int8<Y> ? kPageRows * max(kTileCols, args.in_features) : 0;
    float* hidden = scratch(stride * (2 * count + kTileCols) + num_numbers);
    // An odd rank is multiplied in pairs: the missing partner is zero.
    for (int64_t i = 0; i < count * stride; i += kLanes) store(hidden + i, zero());
    shrink<Y>(site, hidden, stride, reinterpret_cast<T*>(hidden + count * stride));
    expand<Y>(site, hidden, stride, hidden + count * stride);
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
    for (int64_t s = 0; s < args.num_sites; ++s) {
      const LoraSiteArgs& site = args.sites[s];
      if (s + 1 < args.num_sites)
        touch(args.sites[s + 1]);
      else if (next)
        next->touch(args.sites[0]);
      if (rank(site) > 0) site.factors ? add<i8>(site) : add<T>(site);
    }
  }
};

void lora_add(const LoraArgs& args) {
  run(args.num_tiles, [&](int64_t tile) {
    with_dtype(args.dtype, [&]<typename T>() {
      const int32_t* own = args.tiles + 3 * tile;
      if (tile + 1 == args.num_tiles) return LoraTile<T>(args, own).run(nullptr);
      const LoraTile<T> next(args, own + 3);
      LoraTile<T>(args, own).run(&next);
    });
  });
}
