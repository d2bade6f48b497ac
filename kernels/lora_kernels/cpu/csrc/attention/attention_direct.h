// The products of a round of attention for few rows, which read keys and values in place in the cache. Included inside
// the instruction set's namespace, if it has the instructions.
//
// Packing 64 keys for three rows takes longer than multiplying them. Instead, 16 bytes of a key are broadcast to all
// four quarters of a vector, and each quarter multiplies them by another row; values of adjacent keys are interleaved
// in registers.
#pragma once

constexpr int kQuarters = 4;
constexpr int64_t kDirectAttentionRows = 8;  // maximum rows for which packing costs more than it saves

// Lane r * 4 + j of the result: the sum of the four lanes of quarter r of keys[j].
template <typename V, typename Add>
inline V sum_quarters(V a, V b, V c, V d, const Add& add_up) {
  const auto low = [](V x, V y) { return (V)_mm512_unpacklo_ps((Vec)x, (Vec)y); };
  const auto high = [](V x, V y) { return (V)_mm512_unpackhi_ps((Vec)x, (Vec)y); };
  const V ab = add_up(low(a, b), high(a, b)), cd = add_up(low(c, d), high(c, d));  // a b a b, c d c d in each quarter
  const auto lows = [](V x, V y) { return (V)_mm512_shuffle_ps((Vec)x, (Vec)y, 0x44); };
  const auto highs = [](V x, V y) { return (V)_mm512_shuffle_ps((Vec)x, (Vec)y, 0xee); };
  return add_up(lows(ab, cd), highs(ab, cd));
}

// Stores quarter r of a vector at products + r * kKeys, for the first `rows` quarters.
inline void store_quarters(float* products, Vec v, int64_t rows) {
  _mm_storeu_ps(products, _mm512_castps512_ps128(v));
  if (rows > 1) _mm_storeu_ps(products + kKeys, _mm512_extractf32x4_ps(v, 1));
  if (rows > 2) _mm_storeu_ps(products + 2 * kKeys, _mm512_extractf32x4_ps(v, 2));
  if (rows > 3) _mm_storeu_ps(products + 3 * kKeys, _mm512_extractf32x4_ps(v, 3));
}

inline __m512i in_all_quarters(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

#ifdef __AVX512VNNI__
// Bit-identical to SplitRounds, for keys and values whose widths are multiples of 64. Loops over sums are unrolled: the
// compiler keeps an array that is indexed by a variable, or exceeds the registers, in memory.
template <typename T>
struct DirectSplitRounds : SplitRounds<T> {
  using Base = SplitRounds<T>;
  using Base::args, Base::rows, Base::num_heads, Base::products, Base::weights, Base::k_scales, Base::v_scales;
  static constexpr int kAheadOfRow = 0;

  const int64_t sets, steps;  // per KV head: groups of four rows; groups of 16 entries of keys
  __m512i *high, *low;        // [num_heads, sets, steps]: bytes of 16 entries of four queries
  const uint8_t *keys[kKeys / kBlockTokens], *values[kKeys / kBlockTokens];  // codes of the round

  static bool fits(const AttentionArgs& args, int64_t rows) {
    return rows <= kDirectAttentionRows && args.k_dim % 64 == 0 && args.v_dim % 64 == 0;
  }

  DirectSplitRounds(const AttentionArgs& args, int64_t rows, int64_t num_heads)
      : Base(args, rows, num_heads, 2 * num_heads * ceil_div(rows, kQuarters) * args.k_dim),
        sets(ceil_div(rows, kQuarters)), steps(args.k_dim / 16) {
    high = reinterpret_cast<__m512i*>(this->more), low = high + num_heads * sets * steps;
  }

  void load_queries(const AttentionTask& task) {
    Base::load_queries(task);
    for (int64_t i = 0; i < 2 * num_heads * sets * steps; ++i) high[i] = _mm512_setzero_si512();
    for (int64_t i = 0; i < num_heads * rows; ++i) {
      const int64_t at = (i / rows * sets + i % rows / kQuarters) * steps, quarter = i % rows % kQuarters * 16;
      for (int64_t d = 0; d < steps; ++d) {
        __builtin_memcpy(reinterpret_cast<char*>(high + at + d) + quarter, this->q[i].high + d * 16, 16);
        __builtin_memcpy(reinterpret_cast<char*>(low + at + d) + quarter, this->q[i].low + d * 16, 16);
      }
    }
  }

  void pack(const AttentionTask& task, int64_t head, int64_t key, int64_t num_keys, Ahead&) {
    for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
      const char *k = k_block(args, task, head, key + b), *v = v_block(args, task, head, key + b);
      keys[b / kBlockTokens] = reinterpret_cast<const uint8_t*>(k);
      values[b / kBlockTokens] = reinterpret_cast<const uint8_t*>(v);
      store(k_scales + b, load(block_scales(k, args.k_dim)));
      store(v_scales + b, load(block_scales(v, args.v_dim)));
    }
  }

  void multiply_keys(int64_t first_row, int64_t num_keys, Ahead& ahead) {
    const SplitRow* q = this->q + first_row;
    if (sets == 1)
      multiply<1>(q, first_row / rows * steps, num_keys, ahead);
    else
      multiply<2>(q, first_row / rows * 2 * steps, num_keys, ahead);
    for (int64_t r = 0; r < rows; ++r) scale_products(products + r * kKeys, k_scales, q[r].scale);
  }

  template <int Sets>
  void multiply(const SplitRow* q, int64_t first, int64_t num_keys, Ahead& ahead) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto add_up = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
    __m512i excess[Sets];
    for (int s = 0; s < Sets; ++s) {
      int32_t lanes[kLanes] = {};
      for (int64_t i = 0; i < kLanes; ++i)
        if (s * kQuarters + i / 4 < rows) lanes[i] = q[s * kQuarters + i / 4].excess;
      excess[s] = _mm512_loadu_si512(lanes);
    }
    for (int64_t j = 0; j < num_keys; j += 4) {
      const uint8_t* from = keys[j / kBlockTokens] + j % kBlockTokens * args.k_dim;
      __m512i above[Sets][4], below[Sets][4];
      for (int s = 0; s < Sets; ++s)
        for (int i = 0; i < 4; ++i) above[s][i] = below[s][i] = _mm512_setzero_si512();
      for (int64_t d = 0; d < steps; d += 4) {
        ahead();
        // Four entries per iteration: with a call inside, the compiler copied sums between registers.
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m512i codes = _mm512_xor_si512(in_all_quarters(from + i * args.k_dim + (d + e) * 16), sign);
#pragma GCC unroll 2
            for (int s = 0; s < Sets; ++s) {
              above[s][i] = _mm512_dpbusd_epi32(above[s][i], codes, high[first + s * steps + d + e]);
              below[s][i] = _mm512_dpbusd_epi32(below[s][i], codes, low[first + s * steps + d + e]);
            }
          }
        }
      }
      for (int s = 0; s < Sets; ++s) {
        for (int i = 0; i < 4; ++i) below[s][i] = add_up(below[s][i], _mm512_slli_epi32(above[s][i], 8));
        const __m512i sums = sum_quarters(below[s][0], below[s][1], below[s][2], below[s][3], add_up);
        store_quarters(products + s * kQuarters * kKeys + j, _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, excess[s])),
                       rows - s * kQuarters);
      }
    }
  }

  void add_values(int64_t num_keys, float* acc, Ahead& ahead) {
    const int64_t whole_blocks = ceil_div(num_keys, kBlockTokens) * kBlockTokens;
    for (int64_t d = 0; d < args.v_dim; d += 64) {
      for (int64_t r = 0; r < rows; r += kQuarters) {
        with_size<kQuarters>(min(kQuarters, rows - r), [&]<int Rows>() {
          float* to = acc + r * args.v_dim + d;
          add_tile<Rows>(r, d, whole_blocks, to, ahead, [](__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); });
          add_tile<Rows>(r, d, whole_blocks, to + 8, ahead,
                         [](__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); });
        });
      }
    }
  }

  // Weights are not negative, so they are the products' unsigned bytes, and codes the signed ones, unchanged.
  template <int Rows>
  void put_weights(int64_t first, const KeyRange* keys, const SoftmaxState& state) {
    softmax_rows<Rows>(args, products + first * kKeys, keys, this->weight_rows, state);
    for (int r = 0; r < Rows; ++r) {
      float* row = this->weight_rows + r * kKeys;
      SplitRow& own = weights[first + r];
      own.scale = scale_weights(row, v_scales, keys[r]) / 32512;
      const Vec inverse = set1(own.scale > 0 ? 1.0f / own.scale : 0.0f);
      for (int64_t j = 0; j < kKeys; j += kLanes) {
        const __m512i whole = _mm512_cvtps_epi32(mul(load(row + j), inverse));
        _mm512_mask_cvtepi32_storeu_epi8(own.high + j, 0xffff, _mm512_srli_epi32(whole, 8));
        _mm512_mask_cvtepi32_storeu_epi8(own.low + j, 0xffff, whole);
      }
    }
  }

  // Adds the columns that `half` selects, eight of each sixteen in [d, d + 64), to rows [first, first + Rows). All 64
  // at once would need too many registers.
  template <int Rows, typename Half>
  void add_tile(int64_t first, int64_t d, int64_t num_keys, float* acc, Ahead& ahead, const Half& half) {
    __m512i above[Rows][2], below[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      above[r][0] = above[r][1] = below[r][0] = below[r][1] = _mm512_setzero_si512();
    for (int64_t j = 0; j < num_keys; j += 4) {
      ahead();
      const uint8_t* from = values[j / kBlockTokens] + j % kBlockTokens * args.v_dim + d;
      const auto row = [&](int64_t r) { return _mm512_loadu_si512(from + r * args.v_dim); };
      const __m512i front = half(row(0), row(1)), back = half(row(2), row(3));
      // The four codes of columns 0 to 3, and of 4 to 7, of each eight.
      const __m512i fours[2] = {_mm512_unpacklo_epi16(front, back), _mm512_unpackhi_epi16(front, back)};
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int four[2];
        __builtin_memcpy(&four[0], weights[first + r].high + j, 4);
        __builtin_memcpy(&four[1], weights[first + r].low + j, 4);
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          above[r][p] = _mm512_dpbusd_epi32(above[r][p], _mm512_set1_epi32(four[0]), fours[p]);
          below[r][p] = _mm512_dpbusd_epi32(below[r][p], _mm512_set1_epi32(four[1]), fours[p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      Vec parts[2];
      for (int p = 0; p < 2; ++p)
        parts[p] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(above[r][p], 8), below[r][p]));
      // Quarters 0 and 1 of both, and 2 and 3: each quarter of parts[0] precedes that of parts[1].
      const __m512i lows = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      const __m512i highs = _mm512_add_epi64(lows, _mm512_set1_epi64(4));
      const auto pick = [&](__m512i places) {
        return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(parts[0]), places, _mm512_castps_pd(parts[1])));
      };
      const Vec columns[2] = {pick(lows), pick(highs)};
      const __m256 scale = _mm256_set1_ps(weights[first + r].scale);
      for (int q = 0; q < 4; ++q) {
        float* to = acc + r * args.v_dim + q * 16;
        const __m256 own = q % 2 ? _mm512_extractf32x8_ps(columns[q / 2], 1) : _mm512_castps512_ps256(columns[q / 2]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(own, scale, _mm256_loadu_ps(to)));
      }
    }
  }
};
#endif

#ifdef __AVX512F__
// For bf16 caches whose keys and values have widths that are multiples of 32.
struct DirectRounds {
  static constexpr int kAheadOfRow = 0;

  const AttentionArgs& args;
  const int64_t rows, num_heads, sets;  // per KV head: rows; groups of four rows
  Pairs* q;               // [num_heads, sets, k_dim / 8]: 8 entries of four rows
  bf16* weights;          // [rows, kKeys]
  float *products, *state;  // [rows, kKeys], [num_heads * rows, v_dim + 2]
  const bf16 *keys[kKeys / kBlockTokens], *values[kKeys / kBlockTokens];  // blocks of the round

  static bool fits(const AttentionArgs& args, int64_t rows) {
    return rows <= kDirectAttentionRows && args.k_dim % 32 == 0 && args.v_dim % 32 == 0;
  }

  DirectRounds(const AttentionArgs& args, int64_t rows, int64_t num_heads)
      : args(args), rows(rows), num_heads(num_heads), sets(ceil_div(rows, kQuarters)) {
    float* parts[4];
    carve<4>({num_heads * sets * args.k_dim * 2, rows * kKeys / 2, rows * kKeys, num_heads * rows * (args.v_dim + 2)},
             parts);
    q = reinterpret_cast<Pairs*>(parts[0]), weights = reinterpret_cast<bf16*>(parts[1]);
    products = parts[2], state = parts[3];
  }

  void load_queries(const AttentionTask& task) {
    for (int64_t i = 0; i < num_heads * sets * args.k_dim / 8; ++i) q[i] = _mm512_setzero_si512();
    for (int64_t i = 0; i < num_heads * rows; ++i) {
      const int64_t head = i / rows, row = i % rows;
      char* to = reinterpret_cast<char*>(q + (head * sets + row / kQuarters) * args.k_dim / 8) + row % kQuarters * 16;
      const bf16* from = query_of<bf16>(args, task, i);
      for (int64_t d = 0; d < args.k_dim; d += 8) __builtin_memcpy(to + d * 8, from + d, 16);
    }
  }

  void pack(const AttentionTask& task, int64_t head, int64_t key, int64_t num_keys, Ahead&) {
    for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
      keys[b / kBlockTokens] = reinterpret_cast<const bf16*>(k_block(args, task, head, key + b));
      values[b / kBlockTokens] = reinterpret_cast<const bf16*>(v_block(args, task, head, key + b));
    }
  }

  void multiply_keys(int64_t first_row, int64_t num_keys, Ahead& ahead) {
    const Pairs* own = q + first_row / rows * sets * args.k_dim / 8;
    if (sets == 1)
      multiply<1>(own, num_keys, ahead);
    else
      multiply<2>(own, num_keys, ahead);
  }

  template <int Sets>
  void multiply(const Pairs* own, int64_t num_keys, Ahead& ahead) {
    const int64_t steps = args.k_dim / 8;
    for (int64_t j = 0; j < num_keys; j += 4) {
      const bf16* from = keys[j / kBlockTokens] + j % kBlockTokens * args.k_dim;
      Vec acc[Sets][4];
      for (auto& set : acc)
        for (Vec& sums : set) sums = zero();
      for (int64_t d = 0; d < steps; d += 4) {
        ahead();
#pragma GCC unroll 4
        for (int64_t e = d; e < d + 4; ++e) {
          for (int i = 0; i < 4; ++i) {
            const Pairs entries = in_all_quarters(from + i * args.k_dim + e * 8);
            for (int s = 0; s < Sets; ++s) acc[s][i] = dot_pairs(acc[s][i], entries, own[s * steps + e]);
          }
        }
      }
      for (int s = 0; s < Sets; ++s) {
        const Vec sums = sum_quarters(acc[s][0], acc[s][1], acc[s][2], acc[s][3], add);
        store_quarters(products + s * kQuarters * kKeys + j, sums, rows - s * kQuarters);
      }
    }
  }

  template <int Rows>
  void put_weights(int64_t first, const KeyRange* keys, const SoftmaxState& state) {
    softmax_rows<Rows>(args, products + first * kKeys, keys, weights + first * kKeys, state);
  }

  void add_values(int64_t num_keys, float* acc, Ahead& ahead) {
    for (int64_t d = 0; d < args.v_dim; d += 64) {
      for (int64_t r = 0; r < rows; r += kQuarters) {
        with_size<kQuarters>(min(kQuarters, rows - r), [&]<int Rows>() {
          if (d + 64 <= args.v_dim)
            add_tile<Rows, 2>(r, d, num_keys, acc + r * args.v_dim + d, ahead);
          else
            add_tile<Rows, 1>(r, d, num_keys, acc + r * args.v_dim + d, ahead);
        });
      }
    }
  }

  // Adds columns [d, d + Parts * 32) to rows [first, first + Rows).
  template <int Rows, int Parts>
  void add_tile(int64_t first, int64_t d, int64_t num_keys, float* acc, Ahead& ahead) {
    Vec sums[Rows][2 * Parts];
    for (auto& row : sums)
      for (Vec& part : row) part = zero();
    const auto add_pair = [&](int64_t j, const bf16* from, __mmask32 second) {
      Pairs pairs[2 * Parts];
      for (int p = 0; p < Parts; ++p) {
        const Pairs a = load_pairs(&from[p * 32].bits);
        const Pairs b = _mm512_maskz_loadu_epi16(second, from + args.v_dim + p * 32);
        pairs[2 * p] = _mm512_unpacklo_epi16(a, b), pairs[2 * p + 1] = _mm512_unpackhi_epi16(a, b);
      }
      for (int r = 0; r < Rows; ++r) {
        int pair;
        __builtin_memcpy(&pair, weights + (first + r) * kKeys + j, 4);
        for (int p = 0; p < 2 * Parts; ++p) sums[r][p] = dot_pairs(sums[r][p], pairs[p], set1_pair(pair));
      }
    };
    for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
      const bf16* from = values[b / kBlockTokens] + d;
      const int64_t end = min(b + kBlockTokens, num_keys);
      int64_t j = b;
      for (; j + 1 < end; j += 2, from += 2 * args.v_dim) {
        ahead();
        add_pair(j, from, ~__mmask32{0});
      }
      if (j < end) add_pair(j, from, 0);  // the value after an odd last one is undefined
    }
    // Interleaved, one half has columns 0 to 3, 8 to 11, ... of 32, the other half the rest.
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Parts; ++p) {
        float* to = acc + r * args.v_dim + p * 32;
        const Vec a = sums[r][2 * p], b = sums[r][2 * p + 1];
        store(to, add(load(to), _mm512_permutex2var_ps(a, front, b)));
        store(to + kLanes, add(load(to + kLanes), _mm512_permutex2var_ps(a, back, b)));
      }
    }
  }
};
#endif
