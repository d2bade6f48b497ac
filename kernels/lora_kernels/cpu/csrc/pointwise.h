// Operations on single rows: KV write, RMS norm, rotary embedding, gated activation, masks, argmax. Included inside
// the instruction set's namespace.
#pragma once

// Rows are split evenly into runs of about this many elements at most, so that a small step stays on the calling
// thread.
constexpr int64_t kRunElements = 16384;

template <typename F>
inline void run_runs(int64_t rows, int64_t width, const F& some) {
  const int64_t runs = ceil_div(rows, max(1, kRunElements / max(1, width)));
  run(runs, [&](int64_t i) { some(rows * i / runs, rows * (i + 1) / runs); });
}

template <typename F>
inline void run_rows(int64_t rows, int64_t width, const F& row) {
  run_runs(rows, width, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) row(r);
  });
}

template <typename T>
inline void copy_row(const T* from, int64_t dim, char* block, int64_t row) {
  __builtin_memcpy(block + row * dim * sizeof(T), from, dim * sizeof(T));
}

// Codes are from / scale, rounded, with a scale that maps the largest to 127. A NaN or an infinity makes the scale NaN,
// so that it is not lost.
template <typename T>
inline void code_row(const T* from, int64_t dim, char* block, int64_t row) {
  Vec largest = zero(), poison = zero();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec x = load_n(from + d, min(kLanes, dim - d));
    largest = max(max(x, sub(zero(), x)), largest);
    poison = fma(x, zero(), poison);
  }
  float scale = max_lane(largest) / 127.0f;
  if (scale < 1.1754944e-38f) scale = 0;  // otherwise dividing by it would overflow
  const Vec divisor = set1(scale > 0 ? scale : 1.0f);
  int8_t* codes = reinterpret_cast<int8_t*>(block) + row * dim;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t n = min(kLanes, dim - d);
    store_codes(codes + d, round(div(load_n(from + d, n), divisor)), n);
  }
  scale += sum(poison);
  __builtin_memcpy(block + kBlockTokens * dim + row * sizeof(float), &scale, sizeof(float));
}

template <typename T>
inline void kv_write_row(const KvWriteArgs& args, const T* from, char* block, int64_t dim, int64_t row) {
  args.is_coded ? code_row(from, dim, block, row) : copy_row(from, dim, block, row);
}

void kv_write(const KvWriteArgs& args) {
  // Calls f with every head's block of a cache and the token's row in it.
  const auto places = [&]<typename T>(char* cache, int64_t block_stride, int64_t dim, int64_t t, const auto& f) {
    const int64_t block = args.slots[t] / kBlockTokens, offset = args.slots[t] % kBlockTokens;
    const int64_t bytes = kBlockTokens * (args.is_coded ? dim + sizeof(float) : dim * sizeof(T));
    for (int64_t h = 0; h < args.kv_heads; ++h) f(h, cache + block * block_stride + h * bytes, offset);
  };
  const auto ask = [&]<typename T>(char* cache, int64_t block_stride, int64_t dim, int64_t t) {
    const int64_t bytes = args.is_coded ? dim : dim * sizeof(T);
    places.template operator()<T>(cache, block_stride, dim, t, [&](int64_t, const char* block, int64_t row) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(block + row * bytes + i, 1, 3);
    });
  };
  const auto write = [&]<typename T>(const void* from, int64_t token_stride, int64_t head_stride, char* cache,
                                     int64_t block_stride, int64_t dim, int64_t t) {
    places.template operator()<T>(cache, block_stride, dim, t, [&](int64_t h, char* block, int64_t row) {
      kv_write_row(args, static_cast<const T*>(from) + t * token_stride + h * head_stride, block, dim, row);
    });
  };
  run_runs(args.num_tokens, args.kv_heads * (args.k_dim + args.v_dim), [&](int64_t first, int64_t end) {
    with_dtype(args.dtype, [&]<typename T>() {
      // The rows are scattered in memory: all are prefetched before the first is written.
      for (int64_t t = first; t < end; ++t) {
        ask.template operator()<T>(args.k_cache, args.k_stride, args.k_dim, t);
        ask.template operator()<T>(args.v_cache, args.v_stride, args.v_dim, t);
      }
      for (int64_t t = first; t < end; ++t) {
        write.template operator()<T>(args.k, args.k_token, args.k_head, args.k_cache, args.k_stride, args.k_dim, t);
        write.template operator()<T>(args.v, args.v_token, args.v_head, args.v_cache, args.v_stride, args.v_dim, t);
      }
    });
  });
}

// each_vector for a row that may be in chunks: f also gets the vector's place.
template <typename T, typename F>
inline void each_vector_to(const Chunked& out, int64_t row, int64_t width, const F& f) {
  T* to = static_cast<T*>(out.data) + row * out.stride;
  for (int64_t first = 0; first < width; first += kXChunk, to += out.chunk)
    each_vector(min(kXChunk, width - first), [&](int64_t j, auto n) { f(to + j, first + j, n); });
}

template <typename T>
inline void rms_norm_row(const RmsNormArgs& args, int64_t row) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  Vec squares = zero();
  if (args.residual.data) {
    T* residual = static_cast<T*>(args.residual.data) + row * args.residual.stride;
    each_vector(args.width, [&](int64_t j, auto n) {
      store_n(residual + j, add(load_n(residual + j, n), load_n(x + j, n)), n);
      const Vec v = load_n(residual + j, n);
      squares = fma(v, v, squares);
    });
    x = residual;
  } else {
    each_vector(args.width, [&](int64_t j, auto n) {
      const Vec v = load_n(x + j, n);
      squares = fma(v, v, squares);
    });
  }
  const Vec factor = set1(1.0f / __builtin_sqrtf(sum(squares) / args.width + args.eps));
  const T* weight = static_cast<const T*>(args.weight);
  each_vector_to<T>(args.out, row, args.width, [&](T* to, int64_t j, auto n) {
    Vec v = mul(load_n(x + j, n), factor);
    Vec w = load_n(weight + j, n);
    if (args.plus_one) {
      w = add(w, set1(1.0f));
    } else {
      T rounded[kLanes];
      store(rounded, v);
      v = load(rounded);
    }
    store_n(to, mul(v, w), n);
  });
}

void rms_norm(const RmsNormArgs& args) {
  run_rows(args.rows, args.width,
           [&](int64_t row) { with_dtype(args.dtype, [&]<typename T>() { rms_norm_row<T>(args, row); }); });
}

template <typename T>
inline void rotate_head(T* head, const T* cos, const T* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  each_vector(half, [&](int64_t j, auto n) {
    const Vec first = load_n(head + j, n), second = load_n(head + half + j, n);
    const Vec turned_first = mul(second, load_n(sin + j, n)), turned_second = mul(first, load_n(sin + half + j, n));
    store_n(head + j, sub(mul(first, load_n(cos + j, n)), turned_first), n);
    store_n(head + half + j, fma(second, load_n(cos + half + j, n), turned_second), n);
  });
}

template <typename T>
inline void rotate_token(const RotaryArgs& args, int64_t token) {
  const T* cos = static_cast<const T*>(args.cos.data) + token * args.cos.stride;
  const T* sin = static_cast<const T*>(args.sin.data) + token * args.sin.stride;
  for (int64_t h = 0; h < args.q_heads; ++h)
    rotate_head(static_cast<T*>(args.q) + token * args.q_token + h * args.q_head, cos, sin, args.rotary_dim);
  for (int64_t h = 0; h < args.k_heads; ++h)
    rotate_head(static_cast<T*>(args.k) + token * args.k_token + h * args.k_head, cos, sin, args.rotary_dim);
}

void rotary(const RotaryArgs& args) {
  run_rows(args.num_tokens, (args.q_heads + args.k_heads) * args.rotary_dim,
           [&](int64_t token) { with_dtype(args.dtype, [&]<typename T>() { rotate_token<T>(args, token); }); });
}

inline Vec activate(Vec x, Activation act) {
  switch (act) {
    case Activation::kSilu:
      return div(x, add(set1(1.0f), exp(sub(zero(), x))));
    case Activation::kSigmoid:
      return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x))));
    case Activation::kGelu:
      return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678f)))));
    case Activation::kGeluTanh: {
      const Vec inner = mul(set1(0.79788456f), fma(mul(mul(x, x), x), set1(0.044715f), x));
      return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
    }
  }
  __builtin_unreachable();
}

void gated_act(const GatedActArgs& args) {
  run_rows(args.rows, args.width, [&](int64_t row) {
    with_dtype(args.dtype, [&]<typename T>() {
      const T* gate = static_cast<const T*>(args.gate.data) + row * args.gate.stride;
      const T* up = static_cast<const T*>(args.up.data) + row * args.up.stride;
      each_vector_to<T>(args.out, row, args.width, [&](T* to, int64_t j, auto n) {
        store_n(to, mul(activate(load_n(gate + j, n), args.act), load_n(up + j, n)), n);
      });
    });
  });
}

void weighted_rows(const WeightedRowsArgs& args) {
  run_rows(args.tokens, args.k * args.width, [&](int64_t token) {
    const int64_t* places = args.places + token * args.k;
    const float* factors = args.factors + token * args.k;
    with_dtype(args.dtype, [&]<typename T>() {
      const auto* rows = static_cast<const T*>(args.rows.data);
      T* out = static_cast<T*>(args.out.data) + token * args.out.stride;
      each_vector(args.width, [&](int64_t j, auto n) {
        Vec sum = zero();
        for (int64_t i = 0; i < args.k; ++i)
          sum = fma(set1(factors[i]), load_n(rows + places[i] * args.rows.stride + j, n), sum);
        store_n(out + j, sum, n);
      });
    });
  });
}

template <typename Bits>
inline void mask_row(Bits* logits, const uint32_t* words, int64_t width, Bits minus_infinity) {
  const auto mask = [&](int64_t first, int64_t n) {
    const uint32_t word = words[first / 32];
    for (int64_t j = 0; j < n; ++j) logits[first + j] = word >> j & 1 ? logits[first + j] : minus_infinity;
  };
  int64_t first = 0;
  for (; first + 32 <= width; first += 32) mask(first, 32);
  if (first < width) mask(first, width - first);
}

void mask_logits(const MaskArgs& args) {
  run_rows(args.num_rows, args.width, [&](int64_t i) {
    const int64_t at = args.rows[i] * args.logits.stride;
    const uint32_t* words = args.words + i * args.num_words;
    if (args.dtype == Dtype::kF32) {
      mask_row<uint32_t>(static_cast<uint32_t*>(args.logits.data) + at, words, args.width, 0xff800000u);
    } else {
      mask_row<uint16_t>(static_cast<uint16_t*>(args.logits.data) + at, words, args.width,
                         args.dtype == Dtype::kBf16 ? 0xff80 : 0xfc00);
    }
  });
}

// Compared as integers: the bits of a positive number order as the number does, those of a negative one in reverse.
template <typename Int>
constexpr Int kNoSign = static_cast<Int>(~(Int{1} << (8 * sizeof(Int) - 1)));

template <typename Int>
inline Int order(Int bits) {
  return bits ^ ((bits >> (8 * sizeof(Int) - 1)) & kNoSign<Int>);
}

template <typename Int>
inline void argmax_row(const Int* x, int64_t width, Int infinity, int64_t* id, bool* finite) {
  constexpr int64_t kRun = 2048;  // entries to find a maximum in before locating it
  Int best = order(x[0]), largest = 0;
  int64_t best_run = 0;
  for (int64_t first = 0; first < width; first += kRun) {
    const int64_t end = min(width, first + kRun);
    Int top = best;
    for (int64_t j = first; j < end; ++j) {
      const Int key = order(x[j]), magnitude = x[j] & kNoSign<Int>;
      top = top < key ? key : top;
      largest = largest < magnitude ? magnitude : largest;
    }
    if (top > best) best = top, best_run = first;
  }
  *id = best_run;
  while (order(x[*id]) != best) ++*id;
  *finite = largest <= infinity && (x[*id] & kNoSign<Int>) < infinity;  // above infinity: a NaN
}

void argmax(const ArgmaxArgs& args) {
  run_rows(args.rows, args.width, [&](int64_t row) {
    const int64_t at = row * args.x.stride;
    if (args.dtype == Dtype::kF32) {
      const auto* x = static_cast<const int32_t*>(args.x.data) + at;
      argmax_row<int32_t>(x, args.width, 0x7f800000, args.ids + row, args.finite + row);
    } else {
      const auto* x = static_cast<const int16_t*>(args.x.data) + at;
      const int16_t infinity = args.dtype == Dtype::kBf16 ? 0x7f80 : 0x7c00;
      argmax_row<int16_t>(x, args.width, infinity, args.ids + row, args.finite + row);
    }
  });
}
