// Gated delta rules and causal convolutions, starting each run of tokens from its sequence's state. A task is some
// columns of a state, or some channels, of all runs in order. Included inside the instruction set's namespace, after
// pointwise.h.
#pragma once

constexpr int kDeltaVecs = 4;
constexpr int64_t kDeltaColumns = kDeltaVecs * kLanes;  // per task: these stay in registers
constexpr int64_t kConvChannels = 128;                  // per task
constexpr int64_t kGateWork = 8;                        // a gate takes as long as this many entries of other rows
constexpr int64_t kConvAhead = 8;                       // tokens between reading and prefetching

template <typename T>
inline float length_of(const T* x, int64_t dim) {
  Vec squares = zero();
  for (int64_t j = 0; j < dim; j += kLanes) {
    const Vec v = load_n(x + j, min(kLanes, dim - j));
    squares = fma(v, v, squares);
  }
  return __builtin_sqrtf(sum(squares) + 1e-6f);
}

// The effect of a token on the rows of a head's state, each [key_dim] in fp32.
struct DeltaKeys {
  float *decay, *decayed, *key, *query;
  int64_t known_rows;  // number of rows whose values are subtracted from the token's: all or none
};

template <typename T>
inline void prepare_keys(const DeltaArgs& args, int64_t token, int64_t head, const DeltaKeys& keys) {
  const int64_t dim = args.key_dim, key_head = head / (args.heads / args.key_heads);
  const T* q = static_cast<const T*>(args.q) + token * args.q_token + key_head * args.q_head;
  const T* k = static_cast<const T*>(args.k) + token * args.k_token + key_head * args.k_head;
  const float* rates = args.decay + (token * args.heads + head) * (args.per_channel ? dim : 1);
  const float q_scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const Vec q_factor = set1(args.normalize ? q_scale / length_of(q, dim) : q_scale);
  const Vec k_factor = set1(args.normalize ? 1.0f / length_of(k, dim) : 1.0f);
  Vec decay = args.per_channel ? zero() : exp(set1(*rates));
  for (int64_t j = 0; j < dim; j += kLanes) {
    const int64_t n = min(kLanes, dim - j);
    if (args.per_channel) decay = exp(load_n(rates + j, n));
    const Vec key = mul(load_n(k + j, n), k_factor);
    store(keys.decay + j, decay);
    store(keys.decayed + j, mul(decay, key));
    store(keys.key + j, key);
    store(keys.query + j, mul(load_n(q + j, n), q_factor));
  }
}

// Updates `columns` columns of a state for one token, from rows `from` to rows `to`, and prefetches `next` meanwhile.
template <int Vecs, typename T>
inline void delta_token(const DeltaKeys& keys, int64_t rows, const float* from, int64_t from_stride, float* to,
                        int64_t to_stride, const T* v, float beta, T* out, int64_t columns, const float* next,
                        int64_t next_stride) {
  const auto in_vec = [&](int i) { return min(kLanes, columns - i * kLanes); };
  Vec known[Vecs], known2[Vecs];
  for (int i = 0; i < Vecs; ++i) known[i] = known2[i] = zero();
  int64_t r = 0;
  for (; r + 2 <= keys.known_rows; r += 2) {
    const Vec one = set1(keys.decayed[r]), two = set1(keys.decayed[r + 1]);
    for (int i = 0; i < Vecs; ++i) {
      known[i] = fma(load(from + r * from_stride + i * kLanes), one, known[i]);
      known2[i] = fma(load(from + (r + 1) * from_stride + i * kLanes), two, known2[i]);
    }
  }
  for (; r < keys.known_rows; ++r)
    for (int i = 0; i < Vecs; ++i)
      known[i] = fma(load(from + r * from_stride + i * kLanes), set1(keys.decayed[r]), known[i]);
  Vec change[Vecs], sums[Vecs];
  for (int i = 0; i < Vecs; ++i) {
    const Vec value = load_n(v + i * kLanes, in_vec(i));
    change[i] = mul(sub(value, add(known[i], known2[i])), set1(beta));
    sums[i] = zero();
  }
  for (r = 0; r < rows; ++r) {
    const Vec decay = set1(keys.decay[r]), key = set1(keys.key[r]), query = set1(keys.query[r]);
    if (next) prefetch(next + r * next_stride, columns * sizeof(float));
    for (int i = 0; i < Vecs; ++i) {
      const Vec kept = mul(load(from + r * from_stride + i * kLanes), decay);
      const Vec now = fma(key, change[i], kept);
      store(to + r * to_stride + i * kLanes, now);
      sums[i] = fma(now, query, sums[i]);
    }
  }
  for (int i = 0; i < Vecs; ++i) store_n(out + i * kLanes, sums[i], in_vec(i));
}

inline void copy_block(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * to_stride, from + r * from_stride, n * sizeof(float));
}

template <int Vecs, typename T>
inline void delta_columns(const DeltaArgs& args, int64_t head, int64_t first, int64_t n) {
  const int64_t rows = args.key_dim, padded = ceil_div(rows, kLanes) * kLanes, block_stride = Vecs * kLanes;
  float* memory = scratch(4 * padded + rows * block_stride);
  const DeltaKeys keys{memory, memory + padded, memory + 2 * padded, memory + 3 * padded,
                       args.additive ? 0 : rows};
  float* block = memory + 4 * padded;
  for (int64_t j = 0; n < block_stride && j < rows * block_stride; ++j) block[j] = 0;
  const auto at = [&](int64_t slot) {
    return args.states + ((slot * args.heads + head) * rows) * args.width + first;
  };
  for (int64_t i = 0; i < args.num_runs; ++i) {
    const StateRun& run = args.runs[i];
    const auto token = [&](int64_t t, const float* from, int64_t from_stride, float* to, int64_t to_stride,
                           const float* next) {
      prepare_keys<T>(args, t, head, keys);
      const T* v = static_cast<const T*>(args.v) + t * args.v_token + head * args.v_head + first;
      T* out = static_cast<T*>(args.out) + (t * args.heads + head) * args.width + first;
      delta_token<Vecs>(keys, rows, from, from_stride, to, to_stride, v, args.beta[t * args.heads + head], out, n, next,
                        args.width);
    };
    if (run.end - run.start == 1 && n == block_stride) {
      const float* next = i + 1 < args.num_runs ? at(args.runs[i + 1].read) : nullptr;
      token(run.start, at(run.read), args.width, at(run.write), args.width, next);
    } else {
      copy_block(at(run.read), args.width, block, block_stride, rows, n);
      for (int64_t t = run.start; t < run.end; ++t) token(t, block, block_stride, block, block_stride, nullptr);
      copy_block(block, block_stride, at(run.write), args.width, rows, n);
    }
    if (run.save >= 0) copy_block(at(run.write), args.width, at(run.save), args.width, rows, n);
  }
}

void delta_rule(const DeltaArgs& args) {
  const int64_t blocks = ceil_div(args.width, kDeltaColumns);
  run(args.heads * blocks, [&](int64_t i) {
    const int64_t first = i % blocks * kDeltaColumns, n = min(kDeltaColumns, args.width - first);
    with_size<kDeltaVecs>(ceil_div(n, kLanes), [&]<int Vecs>() {
      with_dtype(args.dtype, [&]<typename T>() { delta_columns<Vecs, T>(args, i / blocks, first, n); });
    });
  });
}

template <typename T>
inline void gates_of_token(const DeltaGatesArgs& args, int64_t token) {
  const T* a = static_cast<const T*>(args.a.data) + token * args.a.stride;
  const T* b = static_cast<const T*>(args.b.data) + token * args.b.stride;
  float *decay = args.decay + token * args.heads, *beta = args.beta + token * args.heads;
  each_vector(args.heads, [&](int64_t h, auto n) {
    const Vec step = softplus(add(load_n(a + h, n), load_n(args.bias + h, n)));
    store_n(decay + h, mul(load_n(args.rates + h, n), step), n);
    T rounded[kLanes];
    store(rounded, activate(load_n(b + h, n), Activation::kSigmoid));
    store_n(beta + h, load(rounded), n);
  });
}

void delta_gates(const DeltaGatesArgs& args) {
  run_rows(args.tokens, kGateWork * args.heads,
           [&](int64_t token) { with_dtype(args.dtype, [&]<typename T>() { gates_of_token<T>(args, token); }); });
}

template <typename T>
inline void scan_inputs_of_token(const ScanInputsArgs& args, int64_t token) {
  const T* mixed = static_cast<const T*>(args.mixed.data) + token * args.mixed.stride;
  const T* dt = static_cast<const T*>(args.dt.data) + token * args.dt.stride;
  float *wide = args.wide + token * args.channels, *decay = args.decay + token * args.heads;
  float* steps = args.steps + token * args.heads;
  each_vector(args.scaled_from, [&](int64_t c, auto n) { store_n(wide + c, load_n(mixed + c, n), n); });
  wide += args.scaled_from, mixed += args.scaled_from;
  each_vector(args.channels - args.scaled_from, [&](int64_t c, auto n) {
    store_n(wide + c, mul(load_n(mixed + c, n), set1(args.scale)), n);
  });
  each_vector(args.heads, [&](int64_t h, auto n) {
    const Vec step = softplus(add(load_n(dt + h, n), load_n(args.bias + h, n)));
    store_n(steps + h, step, n);
    store_n(decay + h, mul(load_n(args.rates + h, n), step), n);
  });
}

void scan_inputs(const ScanInputsArgs& args) {
  run_rows(args.tokens, args.channels + kGateWork * args.heads,
           [&](int64_t token) { with_dtype(args.dtype, [&]<typename T>() { scan_inputs_of_token<T>(args, token); }); });
}

template <typename T>
inline void scan_norm_of_token(const ScanNormArgs& args, int64_t token) {
  const int64_t width = args.width, all = args.heads * width;
  const T* gate = static_cast<const T*>(args.gate.data) + token * args.gate.stride;
  T* out = static_cast<T*>(args.out.data) + token * args.out.stride;
  float* y = args.y + token * all;
  const float* x = args.x + token * args.x_stride;
  for (int64_t first = 0; first < all; first += args.group) {
    Vec squares = zero();
    for (int64_t begin = first; begin < first + args.group; begin += width) {
      const Vec skip = set1(args.skip[begin / width]);
      each_vector(width, [&](int64_t j, auto n) {
        const Vec sum = fma(skip, load_n(x + begin + j, n), load_n(y + begin + j, n));
        const Vec v = mul(sum, activate(load_n(gate + begin + j, n), Activation::kSilu));
        store_n(y + begin + j, v, n);
        squares = fma(v, v, squares);
      });
    }
    const Vec factor = set1(1.0f / __builtin_sqrtf(sum(squares) / args.group + args.eps));
    const T* weight = static_cast<const T*>(args.weight) + first;
    each_vector(args.group, [&](int64_t j, auto n) {
      store_n(out + first + j, mul(load_n(weight + j, n), mul(load_n(y + first + j, n), factor)), n);
    });
  }
}

void scan_norm(const ScanNormArgs& args) {
  run_rows(args.tokens, args.heads * args.width,
           [&](int64_t token) { with_dtype(args.dtype, [&]<typename T>() { scan_norm_of_token<T>(args, token); }); });
}

template <typename T>
inline void conv_channels(const ConvArgs& args, int64_t first, int64_t n) {
  const int64_t taps = args.taps, padded = ceil_div(n, kLanes) * kLanes;
  const T* weight = static_cast<const T*>(args.weight) + first * taps;
  T* by_tap = reinterpret_cast<T*>(scratch(taps * padded));
  for (int64_t c = 0; c < n; ++c)
    for (int64_t j = 0; j < taps; ++j) by_tap[j * padded + c] = weight[c * taps + j];
  const auto state = [&](int64_t slot) {
    return static_cast<T*>(args.states) + slot * taps * args.channels + first;
  };
  for (int64_t i = 0; i < args.num_runs; ++i) {
    const StateRun& run = args.runs[i];
    const T* x = static_cast<const T*>(args.x.data) + run.start * args.x.stride + first;
    const T* before = state(run.read);
    // The input of token t of the run, or, for negative t, of a token before the run.
    const auto input = [&](int64_t t) {
      return t >= 0 ? x + t * args.x.stride : before + (taps + t) * args.channels;
    };
    for (int64_t t = 0; t < run.end - run.start; ++t) {
      T* out = static_cast<T*>(args.out.data) + (run.start + t) * args.out.stride + first;
      prefetch(input(t + kConvAhead), n * sizeof(T));  // rows are too far apart for a core to prefetch them itself
      each_vector(n, [&](int64_t c, auto m) {
        Vec y = args.bias ? load_n(static_cast<const T*>(args.bias) + first + c, m) : zero();
        for (int64_t j = 0; j < taps; ++j)
          y = fma(load_n(by_tap + j * padded + c, m), load_n(input(t + 1 - taps + j) + c, m), y);
        store_n(out + c, args.silu ? activate(y, Activation::kSilu) : y, m);
      });
    }
    // In order, because slots may be equal: an input moves to the place of an older one.
    for (int64_t j = 0; j < taps; ++j) {
      T* to = state(run.write) + j * args.channels;
      __builtin_memmove(to, input(run.end - run.start - taps + j), n * sizeof(T));
      if (run.save >= 0) __builtin_memcpy(state(run.save) + j * args.channels, to, n * sizeof(T));
    }
  }
}

void causal_conv(const ConvArgs& args) {
  run(ceil_div(args.channels, kConvChannels), [&](int64_t i) {
    const int64_t first = i * kConvChannels, n = min(kConvChannels, args.channels - first);
    with_dtype(args.dtype, [&]<typename T>() { conv_channels<T>(args, first, n); });
  });
}
