// The products of a round of attention: 64 keys and values, packed into scratch memory. Included inside the instruction
// set's namespace.
//
// An int8 cache holds codes, and an fp32 scale per token and head. Codes are multiplied directly: a key's scale is
// applied to its logits, a value's scale to its weights.
#pragma once

// The query of one of a task's rows: first the rows of its first KV head, then those of its second, and so on.
template <typename T>
inline const T* query_of(const AttentionArgs& args, const AttentionTask& task, int64_t row) {
  const int64_t group = args.heads / args.kv_heads, rows = task.num_queries * group;
  const int64_t token = args.query_starts[task.seq] + task.first_query + row % rows / group;
  const int64_t head = (task.kv_head + row / rows) * group + row % group;
  return static_cast<const T*>(args.q) + token * args.q_token + head * args.q_head;
}

// The queries of a task: [rows, k_dim].
template <typename T, typename Left>
inline void load_task_queries(const AttentionArgs& args, const AttentionTask& task, int64_t rows, Left* q) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = query_of<T>(args, task, i);
    each_vector(args.k_dim, [&](int64_t d, auto n) { store_n(q + i * args.k_dim + d, load_n(from + d, n), n); });
  }
}

// Splits the thread's scratch memory into parts of at least the given number of floats, each aligned to a cache line.
template <int N>
inline void carve(const int64_t (&sizes)[N], float* (&parts)[N]) {
  int64_t total = 0;
  for (const int64_t size : sizes) total += ceil_div(size, 16) * 16;
  float* next = scratch(total);
  for (int i = 0; i < N; ++i) {
    parts[i] = next;
    next += ceil_div(sizes[i], 16) * 16;
  }
}

inline const float* block_scales(const char* block, int64_t dim) {
  return reinterpret_cast<const float*>(block + kBlockTokens * dim);
}

// Codes as fp32, for pack_rows and pack_columns of Product<float>.
struct Code {
  uint8_t bits;
};
inline Vec load_n(const Code* p, int64_t n) {
  if (n == kLanes) return widen_i8(&p->bits);
  uint8_t lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n);
  return widen_i8(lanes);
}

// products[j] *= scale * scales[j]
inline void scale_products(float* products, const float* scales, float scale) {
  for (int64_t j = 0; j < kKeys; j += kLanes)
    store(products + j, mul(load(products + j), mul(load(scales + j), set1(scale))));
}

// weights[j] *= scales[j] for keys in `keys`; others, whose scales are undefined, become zero. Returns the largest, or
// NaN if any is not finite.
inline float scale_weights(float* weights, const float* scales, const KeyRange& keys) {
  Vec largest = zero(), total = zero();
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    const Vec scaled = keep_range(mul(load(weights + j), load(scales + j)), keys.begin - j, keys.end - j, 0.0f);
    store(weights + j, scaled);
    largest = max(scaled, largest);
    total = add(total, scaled);
  }
  return max_lane(largest) + 0 * sum(total);
}

// Products in the type that Product has for the cache's entries: T, the type of queries and outputs, or Code.
template <typename T, typename Entry>
struct TypedRounds {
  static constexpr bool kIsCoded = sizeof(Entry) == 1;
  using P = Product<Entry>;
  using Left = typename P::Left;
  using Right = typename P::Right;

  static constexpr int kAheadOfRow = 4;  // number of prefetch steps in a row's softmax

  const Tiles registers;
  const AttentionArgs& args;
  const int64_t rows, num_heads;  // rows per KV head, KV heads
  Left *q, *weights;       // [num_heads * rows, k_dim], [rows, kKeys]
  Right *keys, *values;    // [k_dim / kDepth, kKeys], [kKeys / kDepth, v_dim]
  float *products, *state;  // [rows, kKeys], [num_heads * rows, v_dim + 2]
  float *k_scales, *v_scales;  // [kKeys], for codes

  TypedRounds(const AttentionArgs& args, int64_t rows, int64_t num_heads)
      : registers(rows), args(args), rows(rows), num_heads(num_heads) {
    // Every part is sized in floats, the widest entry.
    float* parts[8];
    carve<8>({num_heads * rows * args.k_dim, rows * kKeys, args.k_dim * kKeys, kKeys * args.v_dim, rows * kKeys,
              num_heads * rows * (args.v_dim + 2), kKeys, kKeys},
             parts);
    q = reinterpret_cast<Left*>(parts[0]), weights = reinterpret_cast<Left*>(parts[1]);
    keys = reinterpret_cast<Right*>(parts[2]), values = reinterpret_cast<Right*>(parts[3]);
    products = parts[4], state = parts[5], k_scales = parts[6], v_scales = parts[7];
  }

  void load_queries(const AttentionTask& task) { load_task_queries<T>(args, task, num_heads * rows, q); }

  void pack(const AttentionTask& task, int64_t head, int64_t key, int64_t num_keys, Ahead& ahead) {
    // Weights of keys past the round's are zero, but zero times NaN is not zero.
    for (int64_t d = ceil_div(num_keys, P::kDepth); d < packed_depth<P>(num_keys); ++d)
      __builtin_memset(static_cast<void*>(values + d * args.v_dim), 0, args.v_dim * sizeof(Right));
    for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
      const char *k_from = k_block(args, task, head, key + b), *v_from = v_block(args, task, head, key + b);
      const auto* k = reinterpret_cast<const Entry*>(k_from);
      for (int64_t i = 0; i < kBlockTokens; i += kLanes) {
        P::pack_columns(k + i * args.k_dim, args.k_dim, args.k_dim, keys + b + i, kKeys);
        ahead(), ahead();
      }
      P::pack_rows(reinterpret_cast<const Entry*>(v_from), args.v_dim, min(kBlockTokens, num_keys - b), args.v_dim,
                   values + b / P::kDepth * args.v_dim, args.v_dim);
      ahead(), ahead();
      if constexpr (kIsCoded) {
        __builtin_memcpy(k_scales + b, block_scales(k_from, args.k_dim), kBlockTokens * sizeof(float));
        __builtin_memcpy(v_scales + b, block_scales(v_from, args.v_dim), kBlockTokens * sizeof(float));
      }
    }
  }

  void multiply_keys(int64_t first_row, int64_t num_keys, Ahead& ahead) {
    update<P, true>(q + first_row * args.k_dim, args.k_dim, keys, kKeys, FloatRows{products, kKeys}, rows,
              args.k_dim / P::kDepth, ceil_div(num_keys, kBlockTokens) * kBlockTokens, ahead);
    if constexpr (kIsCoded)
      for (int64_t r = 0; r < rows; ++r) scale_products(products + r * kKeys, k_scales, 1.0f);
  }

  template <int Rows>
  void put_weights(int64_t first, const KeyRange* keys, const SoftmaxState& state) {
    softmax_rows<Rows>(args, products + first * kKeys, keys, weights + first * kKeys, state);
    if constexpr (kIsCoded)
      for (int r = 0; r < Rows; ++r) scale_weights(weights + (first + r) * kKeys, v_scales, keys[r]);
  }

  void add_values(int64_t num_keys, float* acc, Ahead& ahead) {
    update<P>(weights, kKeys, values, args.v_dim, FloatRows{acc, args.v_dim}, rows, packed_depth<P>(num_keys),
              args.v_dim, ahead);
  }
};

#ifdef __AVX512VNNI__
// Products of four codes per column of a tile with four 16-bit integers per row, which are split into two bytes. Codes
// are packed with the sign bit flipped, as unsigned numbers, larger by 128.
struct SplitRow {
  int8_t *high, *low;
  float scale;  // the unit of the integers
  int32_t excess;  // by how much a product with packed codes is too large
};

// Splits x [n], n a multiple of 4, into integers of magnitude up to about `largest_integer`. largest: max |x|.
inline void split_row(const float* x, int64_t n, float largest, float largest_integer, SplitRow* row) {
  row->scale = largest / largest_integer;
  const Vec inverse = set1(row->scale > 0 ? 1.0f / row->scale : 0.0f);
  __m512i total = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t num = min(kLanes, n - j);
    const __m512i whole = _mm512_cvtps_epi32(mul(load_n(x + j, num), inverse));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm512_mask_cvtepi32_storeu_epi8(row->high + j, first_lanes(num), high);
    _mm512_mask_cvtepi32_storeu_epi8(row->low + j, first_lanes(num), whole);  // its low byte, as a signed number
    total = _mm512_add_epi32(total, whole);
  }
  row->excess = 128 * _mm512_reduce_add_epi32(total);
}

// The largest absolute value, or NaN if any is not finite.
inline float largest_of(const float* x, int64_t n) {
  Vec largest = zero(), total = zero();
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec part = _mm512_abs_ps(load_n(x + j, min(kLanes, n - j)));
    largest = max(part, largest);
    total = add(total, part);
  }
  return max_lane(largest) + 0 * sum(total);
}

// Calls put(r, j, sums) for columns j to j + kLanes of rows [first, first + Rows): sums of `depth` products of four.
template <int Rows, int Vecs, typename Put>
inline void split_tile(const SplitRow* left, const int32_t* right, int64_t stride, int64_t depth, const Put& put,
                       Ahead& ahead) {
  __m512i high[Rows][Vecs], low[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) high[r][v] = low[r][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; ++k) {
    ahead();
    __m512i codes[Vecs];
    for (int v = 0; v < Vecs; ++v) codes[v] = _mm512_loadu_si512(right + k * stride + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      int four[2];
      __builtin_memcpy(&four[0], left[r].high + 4 * k, 4);
      __builtin_memcpy(&four[1], left[r].low + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(four[0]), b = _mm512_set1_epi32(four[1]);
      for (int v = 0; v < Vecs; ++v) {
        high[r][v] = _mm512_dpbusd_epi32(high[r][v], codes[v], a);
        low[r][v] = _mm512_dpbusd_epi32(low[r][v], codes[v], b);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vecs; ++v) {
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[r][v], 8), low[r][v]);
      put(r, v * kLanes, _mm512_cvtepi32_ps(_mm512_sub_epi32(whole, _mm512_set1_epi32(left[r].excess))));
    }
  }
}

template <typename Put>
inline void split_products(const SplitRow* left, int64_t rows, const int32_t* right, int64_t stride, int64_t depth,
                           const Put& put, Ahead& ahead) {
  constexpr int kRows = 3, kVecs = 4;
  for (int64_t first = 0; first < rows; first += kRows) {
    with_size<kRows>(min(kRows, rows - first), [&]<int Rows>() {
      int64_t j = 0;
      const auto at = [&](int64_t r, int64_t column, Vec sums) { put(first + r, j + column, sums); };
      for (; j + kVecs * kLanes <= stride; j += kVecs * kLanes)
        split_tile<Rows, kVecs>(left + first, right + j, stride, depth, at, ahead);
      for (; j < stride; j += kLanes) split_tile<Rows, 1>(left + first, right + j, stride, depth, at, ahead);
    });
  }
}

// For int8 codes and queries in bf16: products of integers, exact except that queries and weights are rounded to 16-bit
// integers.
template <typename T>
struct SplitRounds {
  static constexpr int kAheadOfRow = 4;

  const AttentionArgs& args;
  const int64_t rows, num_heads, v_stride;  // columns of packed values: v_dim rounded up to vectors
  SplitRow *q, *weights;          // for num_heads * rows, for rows
  float* weight_rows;             // [kSoftmaxRows, kKeys]
  int32_t *keys, *values;         // [k_dim / 4, kKeys], [kKeys / 4, v_stride]
  float *products, *state;        // [rows, kKeys], [num_heads * rows, v_dim + 2]
  float *k_scales, *v_scales;     // [kKeys]
  float* more;                    // scratch memory of more_floats

  SplitRounds(const AttentionArgs& args, int64_t rows, int64_t num_heads, int64_t more_floats = 0)
      : args(args), rows(rows), num_heads(num_heads), v_stride(ceil_div(args.v_dim, kLanes) * kLanes) {
    constexpr int64_t kRowFloats = sizeof(SplitRow) / sizeof(float);
    const int64_t all_rows = num_heads * rows;
    float* parts[12];
    carve<12>({all_rows * kRowFloats, rows * kRowFloats, all_rows * args.k_dim / 2, rows * kKeys / 2,
               max(args.k_dim, kSoftmaxRows * kKeys), args.k_dim / 4 * kKeys, kKeys / 4 * v_stride, rows * kKeys,
               all_rows * (args.v_dim + 2), kKeys, kKeys, more_floats},
              parts);
    q = reinterpret_cast<SplitRow*>(parts[0]), weights = reinterpret_cast<SplitRow*>(parts[1]);
    auto *q_bytes = reinterpret_cast<int8_t*>(parts[2]), *w_bytes = reinterpret_cast<int8_t*>(parts[3]);
    for (int64_t r = 0; r < all_rows; ++r)
      q[r].high = q_bytes + 2 * r * args.k_dim, q[r].low = q[r].high + args.k_dim;
    for (int64_t r = 0; r < rows; ++r) {
      weights[r].high = w_bytes + 2 * r * kKeys, weights[r].low = weights[r].high + kKeys;
    }
    weight_rows = parts[4];
    keys = reinterpret_cast<int32_t*>(parts[5]), values = reinterpret_cast<int32_t*>(parts[6]);
    products = parts[7], state = parts[8], k_scales = parts[9], v_scales = parts[10], more = parts[11];
  }

  void load_queries(const AttentionTask& task) {
    // Keeps sums of k_dim products of such an integer and a code below 2^31.
    const float most = static_cast<float>(min(32512, (int64_t{1} << 31) / (128 * args.k_dim) - 1));
    for (int64_t i = 0; i < num_heads * rows; ++i) {
      const T* from = query_of<T>(args, task, i);
      for (int64_t d = 0; d < args.k_dim; d += kLanes) {
        const int64_t n = min(kLanes, args.k_dim - d);
        store_n(weight_rows + d, load_n(from + d, n), n);
      }
      split_row(weight_rows, args.k_dim, largest_of(weight_rows, args.k_dim), most, q + i);
    }
  }

  // keys[d / 4][i] = codes d to d + 3 of row i, for kLanes rows
  void pack_keys(const uint8_t* codes, int32_t* out) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const int64_t depth = args.k_dim / 4;
    for (int64_t j = 0; j < depth; j += kLanes) {
      const int64_t n = min(kLanes, depth - j);
      Vec tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const __m512i row = _mm512_maskz_loadu_epi32(first_lanes(n), codes + i * args.k_dim + 4 * j);
        tile[i] = _mm512_castsi512_ps(_mm512_xor_si512(row, sign));
      }
      transpose(tile);
      for (int64_t i = 0; i < n; ++i) store(reinterpret_cast<float*>(out + (j + i) * kKeys), tile[i]);
    }
  }

  // values[i / 4][d] = code d of rows i to i + 3, for kBlockTokens rows
  void pack_values(const uint8_t* codes, int32_t* out) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    // Lane r has 16 codes of row r. First each lane gets four codes of every row, then each four bytes one code per
    // row.
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ones = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int64_t i = 0; i < kBlockTokens; i += 4, out += v_stride) {
      for (int64_t d = 0; d < v_stride; d += kLanes) {  // past v_dim are other codes or scales; their sums are not read
        const auto row = [&](int64_t r) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (i + r) * args.v_dim + d));
        };
        __m512i four = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
        four = _mm512_inserti32x4(_mm512_inserti32x4(four, row(2), 2), row(3), 3);
        four = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, four), ones);
        _mm512_storeu_si512(out + d, _mm512_xor_si512(four, sign));
      }
    }
  }

  void pack(const AttentionTask& task, int64_t head, int64_t key, int64_t num_keys, Ahead& ahead) {
    for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
      const char *k = k_block(args, task, head, key + b), *v = v_block(args, task, head, key + b);
      pack_keys(reinterpret_cast<const uint8_t*>(k), keys + b);
      ahead();
      pack_values(reinterpret_cast<const uint8_t*>(v), values + b / 4 * v_stride);
      ahead();
      store(k_scales + b, load(block_scales(k, args.k_dim)));
      store(v_scales + b, load(block_scales(v, args.v_dim)));
    }
  }

  void multiply_keys(int64_t first_row, int64_t, Ahead& ahead) {
    // Columns past the round's keys are left from the previous round; their logits are not read.
    const auto put = [&](int64_t r, int64_t j, Vec sums) { store(products + r * kKeys + j, sums); };
    split_products(q + first_row, rows, keys, kKeys, args.k_dim / 4, put, ahead);
    for (int64_t r = 0; r < rows; ++r) scale_products(products + r * kKeys, k_scales, q[first_row + r].scale);
  }

  template <int Rows>
  void put_weights(int64_t first, const KeyRange* keys, const SoftmaxState& state) {
    softmax_rows<Rows>(args, products + first * kKeys, keys, weight_rows, state);
    for (int r = 0; r < Rows; ++r) {
      float* own = weight_rows + r * kKeys;
      split_row(own, kKeys, scale_weights(own, v_scales, keys[r]), 32512, weights + first + r);
    }
  }

  void add_values(int64_t num_keys, float* acc, Ahead& ahead) {
    const auto put = [&](int64_t r, int64_t d, Vec sums) {
      float* to = acc + r * args.v_dim + d;
      const int64_t n = min(kLanes, args.v_dim - d);
      store_n(to, fma(sums, set1(weights[r].scale), load_n(to, n)), n);
    };
    split_products(weights, rows, values, v_stride, ceil_div(num_keys, kBlockTokens) * kBlockTokens / 4, put, ahead);
  }
};
#endif
