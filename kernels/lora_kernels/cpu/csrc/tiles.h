// Register tiles every kernel is built from. Included inside the instruction set's namespace.
#pragma once

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename F>
void run(int64_t num_tasks, const F& task) {
  run_tasks(num_tasks, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &task);
}

// Calls f.template operator()<N>() for the run-time n in [1, Max].
template <int Max, typename F>
inline void with_size(int64_t n, const F& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_size<Max - 1>(n, f);
  }
  f.template operator()<Max>();
}

// Rows of `a` times a block of `b`, both walked once: c[r][j] += sum_k a[r][k] * b[k][j].
// a, c: fp32; b: any type, rows of contiguous columns. Columns: kTileVecs vectors; see update_tile for the rest.
constexpr int kTileRows = 4;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
constexpr int kTileCols = kTileVecs * kLanes;

template <int Rows, int Vecs, typename T>
inline void update_full(const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride,
                        int64_t depth) {
  Vec acc[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) acc[r][v] = load(c + r * c_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[Vecs];
    for (int v = 0; v < Vecs; ++v) bv[v] = load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec ar = set1(a[r * a_stride + k]);
      for (int v = 0; v < Vecs; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) store(c + r * c_stride + v * kLanes, acc[r][v]);
}

template <int Rows, typename T>
inline void update_edge(const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride,
                        int64_t depth, int64_t cols) {
  Vec acc[Rows];
  for (int r = 0; r < Rows; ++r) acc[r] = load_n(c + r * c_stride, cols);
  for (int64_t k = 0; k < depth; ++k) {
    const Vec bv = load_n(b + k * b_stride, cols);
    for (int r = 0; r < Rows; ++r) acc[r] = fma(set1(a[r * a_stride + k]), bv, acc[r]);
  }
  for (int r = 0; r < Rows; ++r) store_n(c + r * c_stride, acc[r], cols);
}

// The same over any number of rows and columns.
template <typename T>
inline void update(const float* a, int64_t a_stride, const T* b, int64_t b_stride, float* c, int64_t c_stride,
                   int64_t rows, int64_t depth, int64_t cols) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    with_size<kTileRows>(min(kTileRows, rows - r), [&]<int Rows>() {
      const float* ar = a + r * a_stride;
      float* cr = c + r * c_stride;
      int64_t j = 0;
      for (; j + kTileCols <= cols; j += kTileCols)
        update_full<Rows, kTileVecs>(ar, a_stride, b + j, b_stride, cr + j, c_stride, depth);
      for (; j + kLanes <= cols; j += kLanes)
        update_full<Rows, 1>(ar, a_stride, b + j, b_stride, cr + j, c_stride, depth);
      if (j < cols) update_edge<Rows>(ar, a_stride, b + j, b_stride, cr + j, c_stride, depth, cols - j);
    });
  }
}

// Dot products of rows along their contiguous dimension: out[i * out_stride + j] = x[i] . y[j].
template <int Rows, int Cols, typename T>
inline void dots_tile(const T* const* x, const T* y, int64_t y_stride, int64_t depth, float* out, int64_t out_stride) {
  Vec acc[Rows][Cols];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) acc[i][j] = zero();
  int64_t k = 0;
  if constexpr (kHasPairDot<T>) {
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      Pairs yv[Cols];
      for (int j = 0; j < Cols; ++j) yv[j] = load_pairs(&y[j * y_stride + k].bits);
      for (int i = 0; i < Rows; ++i) {
        const Pairs xv = load_pairs(&x[i][k].bits);
        for (int j = 0; j < Cols; ++j) acc[i][j] = dot_pairs(acc[i][j], xv, yv[j]);
      }
    }
  }
  for (; k < depth; k += kLanes) {
    const int64_t n = min(kLanes, depth - k);
    Vec yv[Cols];
    for (int j = 0; j < Cols; ++j) yv[j] = n == kLanes ? load(y + j * y_stride + k) : load_n(y + j * y_stride + k, n);
    for (int i = 0; i < Rows; ++i) {
      const Vec xv = n == kLanes ? load(x[i] + k) : load_n(x[i] + k, n);
      for (int j = 0; j < Cols; ++j) acc[i][j] = fma(xv, yv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Cols; ++j) out[i * out_stride + j] = sum(acc[i][j]);
}

template <typename T>
inline void dots(const T* const* x, int64_t rows, const T* y, int64_t y_stride, int64_t cols, int64_t depth, float* out,
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
