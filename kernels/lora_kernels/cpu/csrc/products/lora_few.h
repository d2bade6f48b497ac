// LoRA for a tile of up to kDirectRows rows, which waits for the adapter's rows to arrive from memory: they are read in
// memory order, A and then B, and prefetched in that order shortly before. Included by lora.h.
//
// A core itself prefetches only what is read sequentially, not four rows of A side by side or some columns of all rows
// of B: an Intel core then alternated between waiting for memory and computing.
#pragma once

constexpr int64_t kBytesAhead = 8192;  // from the read position to the prefetched one
constexpr int kRankRows = 4;           // whose totals are computed together

// The places of the rank rows of a tile's sites and then of the next tile's, in reading order.
template <typename T>
struct RowsAhead {
  const LoraTile<T>*tile, *next;  // next: or null
  int64_t site = 0, row = 0;
  bool is_b = false;
  const char *at = nullptr, *end = nullptr;

  RowsAhead(const LoraTile<T>& first, const LoraTile<T>* second) : tile(&first), next(second) {
    for (int64_t bytes = kBytesAhead; bytes > 0 && (at < end || find_page()); bytes -= 64, at += 64)
      prefetch_to_second_level(at, 64);
  }

  // Returns where to prefetch `bytes` bytes of a page while the same number is read; behind the last page, `read`
  // itself.
  template <typename Y>
  const char* take(const Y* read, int64_t bytes) {
    if (end - at < bytes) {
      prefetch_to_second_level(at, end - at);
      if (!find_page()) return reinterpret_cast<const char*>(read);
    }
    at += bytes;
    return at - bytes;
  }

  // Moves to the next page of rows; returns whether there is one.
  bool find_page() {
    for (;; row = 0, site += is_b, is_b = !is_b) {
      if (site == tile->args.num_sites) {
        if (!next) return false;
        tile = next, next = nullptr, site = 0;
      }
      const LoraSiteArgs& own = tile->args.sites[site];
      const int64_t num_rows = min(kPageRows, tile->rank(own) - row);
      if (num_rows <= 0) continue;
      const int64_t row_bytes = (is_b ? own.width : tile->args.in_features) * (own.factors ? 1 : sizeof(T));
      at = static_cast<const char*>(is_b ? own.b_rows : own.a_rows) + tile->pool_row(own, row) * row_bytes;
      end = at + num_rows * row_bytes, row += kPageRows;
      return true;
    }
  }
};

// A vector of totals whose sum is x . y. Prefetches as many bytes as y has, starting at `next`.
template <typename T, typename Y>
inline Vec dot(const T* x, const Y* y, int64_t depth, const char* next) {
  constexpr bool kIsPairs = Product<T>::kDepth == 2 && sizeof(Y) == sizeof(T);
  constexpr int64_t kChains = 4, kStep = kIsPairs ? 2 * kLanes : kLanes, kBytes = kChains * kStep * sizeof(Y);
  Vec acc[kChains] = {zero(), zero(), zero(), zero()};
  const auto add_step = [&](int64_t k, Vec sums) {
    if constexpr (kIsPairs)
      return dot_pairs(sums, load_pairs(&x[k].bits), load_pairs(&y[k].bits));
    else
      return fma(load(x + k), load(y + k), sums);
  };
  int64_t k = 0;
  for (; k + kChains * kStep <= depth; k += kChains * kStep, next += kBytes) {
    prefetch_to_second_level(next, kBytes);
    for (int64_t c = 0; c < kChains; ++c) acc[c] = add_step(k + c * kStep, acc[c]);
  }
  prefetch_to_second_level(next, (depth - k) * sizeof(Y));
  for (int64_t c = 0; k + kStep <= depth; k += kStep, ++c) acc[c] = add_step(k, acc[c]);
  for (; k < depth; k += kLanes) {
    const int64_t n = min(kLanes, depth - k);
    acc[0] = fma(load_n(x + k, n), load_n(y + k, n), acc[0]);
  }
  return add(add(acc[0], acc[1]), add(acc[2], acc[3]));
}

// hidden[i][j] = scale * x[i] . a[j], like LoraTile::shrink.
template <typename Y, typename T>
inline void multiply_few(const LoraTile<T>& tile, const LoraSiteArgs& site, float* hidden, int64_t stride,
                         RowsAhead<T>& ahead) {
  const int64_t rank = tile.rank(site), width = tile.args.in_features;
  for (int64_t j = 0; j < rank; j += kRankRows) {
    const int64_t num = min(kRankRows, rank - j);
    const Y* a = tile.template rows<Y>(site, site.a_rows, j, width);
    const char* next = ahead.take(a, num * width * sizeof(Y));
    for (int64_t i = 0; i < tile.count; ++i) {
      Vec sums[kRankRows] = {zero(), zero(), zero(), zero()};
      for (int64_t r = 0; r < num; ++r)
        sums[r] = dot(tile.x[i], a + r * width, width, next + r * width * sizeof(Y));
      float* to = hidden + i * stride + j;
      store_sums(to, sums[0], sums[1], sums[2], sums[3]);
      const float scale = tile.scale(site, i);
      for (int64_t r = 0; r < num; ++r) to[r] *= is_int8<Y> ? site.factors[tile.pool_row(site, j + r)] * scale : scale;
    }
  }
}

// Adds hidden[i] times b to out[rows[i]]. sums: [count, site.width rounded up to whole vectors], running totals over
// rows of B.
template <typename Y, typename T>
inline void add_few(const LoraTile<T>& tile, const LoraSiteArgs& site, const float* hidden, int64_t stride, float* sums,
                    RowsAhead<T>& ahead) {
  const int64_t rank = tile.rank(site), width = site.width, padded = ceil_div(width, kLanes) * kLanes;
  for (int64_t j = 0; j < rank; j += kRankRows) {
    const Y* b = tile.template rows<Y>(site, site.b_rows, j, width);
    const char* next = ahead.take(b, min(kRankRows, rank - j) * width * sizeof(Y));
    const bool is_first = j == 0, is_last = j + kRankRows >= rank;
    with_size<kRankRows>(min(kRankRows, rank - j), [&]<int Num>() {
      for (int64_t i = 0; i < tile.count; ++i) {
        T* out = static_cast<T*>(site.out.data) + tile.args.rows[tile.first + i] * site.out.stride;
        float* own = sums + i * padded;
        Vec factors[Num];
        for (int r = 0; r < Num; ++r) factors[r] = set1(hidden[i * stride + j + r]);
        each_vector(width, [&](int64_t col, auto n) {
          prefetch_to_second_level(next + Num * col * sizeof(Y), Num * n * sizeof(Y));
          Vec total = is_first ? zero() : load(own + col);
          for (int r = 0; r < Num; ++r) total = fma(factors[r], load_n(b + r * width + col, n), total);
          if (is_last)
            store_n(out + col, add(load_n(out + col, n), total), n);
          else
            store(own + col, total);
        });
      }
    });
  }
}

template <typename Y, typename T>
inline void add_site_of_few(const LoraTile<T>& tile, const LoraSiteArgs& site, RowsAhead<T>& ahead) {
  const int64_t stride = tile.hidden_stride(site), padded = ceil_div(site.width, kLanes) * kLanes;
  float* hidden = scratch(tile.count * (stride + padded));
  multiply_few<Y>(tile, site, hidden, stride, ahead);
  add_few<Y>(tile, site, hidden, stride, hidden + tile.count * stride, ahead);
}

// Like LoraTile::run.
template <typename T>
inline void add_to_few(const LoraTile<T>& tile, const LoraTile<T>* next) {
  RowsAhead<T> ahead(tile, next);
  for (int64_t s = 0; s < tile.args.num_sites; ++s) {
    const LoraSiteArgs& site = tile.args.sites[s];
    if (tile.rank(site) > 0)
      site.factors ? add_site_of_few<i8>(tile, site, ahead) : add_site_of_few<T>(tile, site, ahead);
  }
}
