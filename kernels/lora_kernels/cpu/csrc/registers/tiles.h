// Register tiles that the kernels use. Included inside the instruction set's namespace.
#pragma once

constexpr int kPanelVecs = kPanel / kLanes;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename F>
void run(int64_t num_tasks, const F& task) {
  run_tasks(num_tasks, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &task);
}

// Calls f.template operator()<N>() for the run-time n in [Min, Max].
template <int Max, int Min = 1, typename F>
inline void with_size(int64_t n, const F& f) {
  if constexpr (Max > Min) {
    if (n < Max) return with_size<Max - 1, Min>(n, f);
  }
  f.template operator()<Max>();
}

// The number of entries of a whole vector, loaded and stored without masks.
struct Whole {
  constexpr operator int64_t() const { return kLanes; }
};
template <typename T>
inline Vec load_n(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline void store_n(T* p, Vec v, Whole) {
  store(p, v);
}

// Calls f(first, n) for each vector of a row.
template <typename F>
inline void each_vector(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) f(j, Whole());
  if (j < width) f(j, width - j);
}

inline void prefetch_line(const void* from) { __builtin_prefetch(from, 0, 3); }
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_line(static_cast<const char*>(from) + i);
}

inline void prefetch_to_second_level(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// Bytes from weights being read to the lines that are prefetched, and to the pages that are touched.
constexpr int64_t kLinesAhead = 8192, kPagesAhead = 32768;

// Prefetches a line of each page that is read soon. Scattered data waits longer for address translation than for its
// bytes, and a core itself prefetches only up to the end of a page.
inline void touch_pages(const void* from, int64_t bytes) {
  constexpr int64_t kPageBytes = 4096;
  const auto* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kPageBytes) prefetch_line(at + i);
  if (bytes > 0) prefetch_line(at + bytes - 1);
}

// Prefetches lines that are read once. An AMD core keeps them out of its second-level cache and is faster for it. An
// Intel core would use only one way of its first-level cache for them, and replace most before they are read.
template <int64_t Bytes>
inline void prefetch_once(const uint8_t* from) {
#ifdef __x86_64__
  if (!is_amd) {
#pragma GCC unroll 32
    for (int64_t i = 0; i < Bytes; i += 64) prefetch_line(from + i);
    return;
  }
#endif
#pragma GCC unroll 32
  for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(from + i, 0, 0);
}

// The multiplication of left [rows, depth] by right [depth, columns]. Left rows are broadcast, right rows are vectors.
// A packed right operand has an entry per column for every kDepth rows.
template <typename T>
struct Product {  // in fp32
  using Left = float;
  using Right = float;
  static constexpr int kDepth = 1;
  static Vec broadcast(const Left* left, int64_t k) { return set1(left[k]); }
  static Vec load_right(const Right* right) { return load(right); }
  static Vec load_right_n(const Right* right, int64_t n) { return load_n(right, n); }
  static Vec add_product(Vec acc, Vec left, Vec right) { return fma(left, right, acc); }

  // out[i][j] = rows[i][j]
  static void pack_rows(const T* rows, int64_t stride, int64_t num_rows, int64_t cols, Right* out, int64_t out_stride) {
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        const int64_t n = min(kLanes, cols - j);
        store_n(out + i * out_stride + j, load_n(rows + i * stride + j, n), n);
      }
    }
  }
  // out[j][i] = rows[i][j] for kLanes rows
  static void pack_columns(const T* rows, int64_t stride, int64_t cols, Right* out, int64_t out_stride) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t n = min(kLanes, cols - j);
      Vec tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load_n(rows + i * stride + j, n);
      transpose(tile);
      for (int64_t i = 0; i < n; ++i) store(out + (j + i) * out_stride, tile[i]);
    }
  }
};

#ifdef __AVX512BF16__
struct Pair {
  bf16 values[2];
};

template <>
struct Product<bf16> {  // two bf16 products per lane and instruction, summed in fp32
  using Left = bf16;
  using Right = Pair;
  static constexpr int kDepth = 2;
  static Pairs broadcast(const Left* left, int64_t k) {
    int pair;
    __builtin_memcpy(&pair, left + 2 * k, 4);
    return set1_pair(pair);
  }
  static Pairs load_right(const Right* right) { return load_pairs(&right->values[0].bits); }
  static Pairs load_right_n(const Right* right, int64_t n) { return _mm512_maskz_loadu_epi32(first_lanes(n), right); }
  static Vec add_product(Vec acc, Pairs left, Pairs right) { return dot_pairs(acc, right, left); }

  // out[i / 2][j] = (rows[i][j], rows[i + 1][j]), with zero for a row past the last
  static void pack_rows(const bf16* rows, int64_t stride, int64_t num_rows, int64_t cols, Right* out,
                        int64_t out_stride) {
    for (int64_t i = 0; i < num_rows; i += 2) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        const __mmask16 mask = first_lanes(min(kLanes, cols - j));
        const bf16* from = rows + i * stride + j;
        __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        if (i + 1 < num_rows) {
          const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + stride));
          pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(odd, 16));
        }
        _mm512_mask_storeu_epi32(out + i / 2 * out_stride + j, mask, pairs);
      }
    }
  }
  // out[j / 2][i] = (rows[i][j], rows[i][j + 1]) for kLanes rows; cols is even
  static void pack_columns(const bf16* rows, int64_t stride, int64_t cols, Right* out, int64_t out_stride) {
    Product<float>::pack_columns(reinterpret_cast<const float*>(rows), stride / 2, cols / 2,
                                 reinterpret_cast<float*>(out), out_stride);
  }
};
#endif

// In fp32, with the right operand in place: for few rows, where packing would cost more than it saves.
template <typename T>
struct DirectProduct {
  using Left = float;
  using Right = T;
  static constexpr int kDepth = 1;
  static Vec broadcast(const Left* left, int64_t k) { return set1(left[k]); }
  static Vec load_right(const Right* right) { return load(right); }
  static Vec load_right_n(const Right* right, int64_t n) { return load_n(right, n); }
  static Vec add_product(Vec acc, Vec left, Vec right) { return fma(left, right, acc); }
};

constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
constexpr int kTileCols = kTileVecs * kLanes;

struct Nothing {
  void operator()() const {}
};

// between: called regularly, to prefetch.
template <typename P, bool IsFirst, int Rows, int Vecs, typename OutRow, typename Between>
inline void update_tile(const typename P::Left* left, int64_t left_stride, const typename P::Right* right,
                        int64_t right_stride, const OutRow& out_row, int64_t depth, int64_t cols, Between& between) {
  Vec acc[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) acc[r][v] = zero();
  const bool whole = cols >= Vecs * kLanes;
  for (int64_t k = 0; k < depth; ++k) {
    if (k % 2 == 0) between();
    const typename P::Right* from = right + k * right_stride;
    decltype(P::load_right(right)) b[Vecs];
    for (int v = 0; v < Vecs; ++v) b[v] = whole ? P::load_right(from + v * kLanes) : P::load_right_n(from, cols);
    for (int r = 0; r < Rows; ++r) {
      const auto a = P::broadcast(left + r * left_stride, k);
      for (int v = 0; v < Vecs; ++v) acc[r][v] = P::add_product(acc[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    auto* out = out_row(r);
    for (int v = 0; v < Vecs; ++v, out += kLanes) {
      if (whole)
        store(out, IsFirst ? acc[r][v] : add(load(out), acc[r][v]));
      else
        store_n(out, IsFirst ? acc[r][v] : add(load_n(out, cols), acc[r][v]), cols);
    }
  }
}

// fp32 rows at a constant distance, an OutRow of `update`.
struct FloatRows {
  float* first;
  int64_t stride;
  float* operator()(int64_t r) const { return first + r * stride; }
};
template <typename OutRow>
constexpr bool is_float_rows = false;
template <>
constexpr bool is_float_rows<FloatRows> = true;

#ifdef __AMX_BF16__
#include "amx.h"
constexpr bool kHasTiles = true;
constexpr int64_t kWholeDepth = kTileInputs / 2;  // pairs that a bf16 product multiplies at once
#else
constexpr bool kHasTiles = false;
constexpr int64_t kWholeDepth = 1;
struct Tiles {
  explicit Tiles(int64_t) {}  // there are no tile registers
};
#endif

// Entries per column of a packed right operand with `rows` rows: entries past the rows must be zero.
template <typename P>
constexpr int64_t packed_depth(int64_t rows) {
  const int64_t depth = ceil_div(rows, P::kDepth);
  return P::kDepth == 2 ? ceil_div(depth, kWholeDepth) * kWholeDepth : depth;
}

// out_row(r)[j] += left[r, depth * kDepth] times column j of a right operand with `depth` entries per column. IsFirst:
// = instead of +=. With tile registers, bf16 products need an object `Tiles` for that many rows.
template <typename P, bool IsFirst = false, typename OutRow, typename Between = const Nothing>
inline void update(const typename P::Left* left, int64_t left_stride, const typename P::Right* right,
                   int64_t right_stride, const OutRow& out_row, int64_t rows, int64_t depth, int64_t cols,
                   Between&& between = {}) {
#ifdef __AMX_BF16__
  if constexpr (P::kDepth == 2) {
    const int64_t done =
        update_in_tiles<IsFirst>(left, left_stride, right, right_stride, out_row, rows, depth, cols, between);
    if (done == depth) return;
    if (done > 0)
      return update<P>(left + done * P::kDepth, left_stride, right + done * right_stride, right_stride, out_row, rows,
                       depth - done, cols, between);
  }
#endif
  for (int64_t first = 0; first < rows; first += kTileRows) {
    with_size<kTileRows>(min(kTileRows, rows - first), [&]<int Rows>() {
      const typename P::Left* a = left + first * left_stride;
      int64_t j = 0;
      const auto at = [&](int64_t r) { return out_row(first + r) + j; };
      for (; j + kTileCols <= cols; j += kTileCols)
        update_tile<P, IsFirst, Rows, kTileVecs>(a, left_stride, right + j, right_stride, at, depth, kTileCols, between);
      for (; j < cols; j += kLanes)
        update_tile<P, IsFirst, Rows, 1>(a, left_stride, right + j, right_stride, at, depth, min(kLanes, cols - j),
                                         between);
    });
  }
}

// Dot products of rows along their contiguous dimension: out[i * out_stride + j] = x[i] . y[j].
template <int Rows, int Cols, typename T, typename Y>
inline void dots_tile(const T* const* x, const Y* y, int64_t y_stride, int64_t depth, float* out, int64_t out_stride) {
  Vec acc[Rows][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) acc[i][j] = zero();
  int64_t k = 0;
  if constexpr (Product<T>::kDepth == 2 && sizeof(Y) == sizeof(T)) {
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      Pairs yv[Cols];
      for (int j = 0; j < Cols; ++j) yv[j] = load_pairs(&y[j * y_stride + k].bits);
      for (int i = 0; i < Rows; ++i) {
        const Pairs xv = load_pairs(&x[i][k].bits);
        for (int j = 0; j < Cols; ++j) acc[i][j] = dot_pairs(acc[i][j], xv, yv[j]);
      }
    }
  }
  for (; k + kLanes <= depth; k += kLanes) {
    Vec yv[Cols];
    for (int j = 0; j < Cols; ++j) yv[j] = load(y + j * y_stride + k);
    for (int i = 0; i < Rows; ++i) {
      const Vec xv = load(x[i] + k);
      for (int j = 0; j < Cols; ++j) acc[i][j] = fma(xv, yv[j], acc[i][j]);
    }
  }
  if (const int64_t n = depth - k; n > 0) {
    Vec yv[Cols];
    for (int j = 0; j < Cols; ++j) yv[j] = load_n(y + j * y_stride + k, n);
    for (int i = 0; i < Rows; ++i) {
      const Vec xv = load_n(x[i] + k, n);
      for (int j = 0; j < Cols; ++j) acc[i][j] = fma(xv, yv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    if constexpr (Cols == 4) {
      store_sums(out + i * out_stride, acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    } else {
      for (int j = 0; j < Cols; ++j) out[i * out_stride + j] = sum(acc[i][j]);
    }
  }
}

template <typename T, typename Y>
inline void dots(const T* const* x, int64_t rows, const Y* y, int64_t y_stride, int64_t cols, int64_t depth, float* out,
                 int64_t out_stride) {
  constexpr int kRows = kLanes == 16 ? 4 : 2, kCols = 4;
  for (int64_t j = 0; j < cols; j += kCols) {
    with_size<kCols>(min(kCols, cols - j), [&]<int Cols>() {
      for (int64_t i = 0; i < rows; i += kRows) {
        with_size<kRows>(min(kRows, rows - i), [&]<int Rows>() {
          dots_tile<Rows, Cols>(x + i, y + j * y_stride, y_stride, depth, out + i * out_stride + j, out_stride);
        });
      }
    });
  }
}
