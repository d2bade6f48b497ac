// Shrink and expand of every site of one input, fused. Included inside the instruction set's namespace.
//
// A task is a tile: rows of one adapter. Its rank products stay in the thread's scratch memory, so there is no barrier
// between shrink and expand and no buffer shared by threads.
#pragma once

constexpr int64_t kMaxTileRows = 64;
constexpr int64_t kDirectRows = 3;  // up to here B is read in place

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

  // The rank rows of a page, in a pool of rows `width` wide.
  const T* page(const LoraSiteArgs& site, const void* pool, int64_t page, int64_t width) const {
    const int64_t index = args.pages[(slot * args.groups + site.group) * args.max_pages + page];
    return static_cast<const T*>(pool) + index * kPageRows * width;
  }

  // hidden[i][j] = scale * x[i] . a[j]; hidden: [count, stride], columns from rank on stay as they are.
  void shrink(const LoraSiteArgs& site, float* hidden, int64_t stride) const {
    constexpr int64_t kStep = 4;  // rank rows of A between two requests for B
    const int64_t num_rows = rank(site), width = args.in_features;
    for (int64_t j = 0; j < num_rows; j += kStep) {
      const int64_t n = min(kStep, num_rows - j), offset = j % kPageRows;
      // Prefetches the rows of B that expand needs while A is multiplied.
      prefetch(page(site, site.b_rows, j / kPageRows, site.width) + offset * site.width, n * site.width * sizeof(T));
      const T* a = page(site, site.a_rows, j / kPageRows, width) + offset * width;
      dots(x, count, a, width, n, width, hidden + j, stride);
    }
    const float scale = args.scales[slot * args.table_sites + site.index];
    for (int64_t i = 0; i < count; ++i) {
      const Vec factor = set1(args.row_scales ? scale * args.row_scales[first + i] : scale);
      for (int64_t j = i * stride; j < (i + 1) * stride; j += kLanes) store(hidden + j, mul(load(hidden + j), factor));
    }
  }

  // out[rows[i]] += hidden[i] times b, columns in runs that stay in the first-level cache.
  void expand(const LoraSiteArgs& site, const float* hidden, int64_t stride, float* memory) const {
    const int64_t num_rows = rank(site);
    int64_t col = 0;
    const auto out_row = [&](int64_t i) {
      return static_cast<T*>(site.out.data) + args.rows[first + i] * site.out.stride + col;
    };
    if (count <= kDirectRows && num_rows <= kPageRows && !args.fixed_sums) {
      const T* b = page(site, site.b_rows, 0, site.width);
      update<DirectProduct<T>>(hidden, stride, b, site.width, out_row, count, num_rows, site.width);
      return;
    }
    auto* left = reinterpret_cast<typename P::Left*>(memory);
    for (int64_t j = 0; j < count * stride; j += kLanes) store(left + j, load(hidden + j));
    auto* right = reinterpret_cast<typename P::Right*>(memory + count * stride);
    for (; col < site.width; col += kTileCols) {
      const int64_t cols = min(kTileCols, site.width - col);
      for (int64_t j = 0; j < num_rows; j += kPageRows) {
        const T* b = page(site, site.b_rows, j / kPageRows, site.width) + col;
        P::pack_rows(b, site.width, min(kPageRows, num_rows - j), cols, right + j / P::kDepth * kTileCols, kTileCols);
      }
      update<P>(left, stride, right, kTileCols, out_row, count, ceil_div(num_rows, P::kDepth), cols);
    }
  }

  void run() const {
    for (int64_t s = 0; s < args.num_sites; ++s) {
      const LoraSiteArgs& site = args.sites[s];
      if (rank(site) == 0) continue;
      const int64_t stride = ceil_div(rank(site), kPageRows) * kPageRows;
      float* hidden = scratch(stride * (2 * count + kTileCols));
      // An odd rank is multiplied in pairs: the missing partner is zero.
      for (int64_t i = 0; i < count * stride; i += kLanes) store(hidden + i, zero());
      shrink(site, hidden, stride);
      expand(site, hidden, stride, hidden + count * stride);
    }
  }
};

void lora_add(const LoraArgs& args) {
  run(args.num_tiles, [&](int64_t tile) {
    with_dtype(args.dtype, [&]<typename T>() { LoraTile<T>(args, args.tiles + 3 * tile).run(); });
  });
}
