// Paged attention by online softmax. Included inside the instruction set's namespace.
//
// A task's rows are its queries times the query heads of one kv head, so that a decode with grouped heads reads each
// key and value once. Keys and values are packed 64 at a time into scratch memory for the tile product.
#pragma once

constexpr int64_t kKeys = 64;        // keys per round
constexpr float kMasked = -1.0e30f;  // exp(kMasked - anything finite) is zero

struct SoftmaxState {
  float *acc, *peak, *total;  // [rows, v_dim], [rows], [rows]
};

inline SoftmaxState softmax_state(float* memory, int64_t rows, int64_t v_dim) {
  return {memory, memory + rows * v_dim, memory + rows * v_dim + rows};
}

template <typename T>
inline const T* cache_block(const AttentionArgs& args, const AttentionTask& task, const void* cache, int64_t dim,
                            int64_t key) {
  const int64_t block = args.block_tables[task.seq * args.max_blocks + key / kBlockTokens];
  return static_cast<const T*>(cache) + (block * args.kv_heads + task.kv_head) * kBlockTokens * dim;
}

// The block that the next round reads in the place of the one at `key`: of this task, or else of the next task.
template <typename T>
inline const T* block_after(const AttentionArgs& args, const AttentionTask& task, const AttentionTask* next,
                            const void* cache, int64_t dim, int64_t key) {
  if (key + kKeys < task.end_key) return cache_block<T>(args, task, cache, dim, key + kKeys);
  if (next) {
    const int64_t next_key = next->first_key + (key - task.first_key) % kKeys;
    if (next_key < next->end_key) return cache_block<T>(args, *next, cache, dim, next_key);
  }
  return cache_block<T>(args, task, cache, dim, key);
}

template <typename T>
inline void load_queries(const AttentionArgs& args, const AttentionTask& task, typename Product<T>::Left* q) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t token = args.query_starts[task.seq] + task.first_query;
  for (int64_t i = 0; i < task.num_queries * group; ++i) {
    const T* from = static_cast<const T*>(args.q) + (token + i / group) * args.q_token +
                    (task.kv_head * group + i % group) * args.q_head;
    for (int64_t d = 0; d < args.k_dim; d += kLanes) {
      const int64_t n = min(kLanes, args.k_dim - d);
      store_n(q + i * args.k_dim + d, load_n(from + d, n), n);
    }
  }
}

// One row's step: turns products [kKeys] into weights, of which only [begin, end) are not zero, and rescales the state.
template <typename Weight>
inline void softmax_row(const AttentionArgs& args, const float* products, int64_t begin, int64_t end, Weight* weights,
                        float* acc, float& peak, float& total) {
  constexpr int kVecs = kKeys / kLanes;
  if (begin >= end) {
    for (int v = 0; v < kVecs; ++v) store(weights + v * kLanes, zero());
    return;
  }
  Vec logits[kVecs];
  for (int v = 0; v < kVecs; ++v) logits[v] = mul(load(products + v * kLanes), set1(args.scale));
  if (args.softcap > 0) {
    for (int v = 0; v < kVecs; ++v)
      logits[v] = mul(tanh(mul(logits[v], set1(1.0f / args.softcap))), set1(args.softcap));
  }
  if (begin > 0 || end < kKeys) {
    for (int v = 0; v < kVecs; ++v) logits[v] = keep_range(logits[v], begin - v * kLanes, end - v * kLanes, kMasked);
  }
  Vec highest = set1(peak);
  for (int v = 0; v < kVecs; ++v) highest = max(highest, logits[v]);
  const float new_peak = max_lane(highest);
  if (new_peak > peak) {
    const Vec decay = exp(set1(peak - new_peak));
    for (int64_t d = 0; d < args.v_dim; d += kLanes) {
      const int64_t n = min(kLanes, args.v_dim - d);
      store_n(acc + d, mul(load_n(acc + d, n), decay), n);
    }
    total *= first_lane(decay);
    peak = new_peak;
  }
  Vec added = zero();
  for (int v = 0; v < kVecs; ++v) {
    const Vec weight = exp(sub(logits[v], set1(peak)));
    store(weights + v * kLanes, weight);
    added = add(added, weight);
  }
  total += sum(added);
}

template <typename T>
inline void write_rows(const AttentionArgs& args, const AttentionTask& task, const SoftmaxState& state) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t token = args.query_starts[task.seq] + task.first_query;
  for (int64_t r = 0; r < task.num_queries * group; ++r) {
    const int64_t head = task.kv_head * group + r % group;
    float total = state.total[r], factor = 1.0f;
    if (args.sinks) {
      const float sink = args.sinks[head];
      const float peak = sink > state.peak[r] ? sink : state.peak[r];
      factor = first_lane(exp(set1(state.peak[r] - peak)));
      total = total * factor + first_lane(exp(set1(sink - peak)));
    }
    T* out = static_cast<T*>(args.out) + ((token + r / group) * args.heads + head) * args.v_dim;
    const Vec inverse = set1(factor / total);
    for (int64_t d = 0; d < args.v_dim; d += kLanes) {
      const int64_t n = min(kLanes, args.v_dim - d);
      store_n(out + d, mul(load_n(state.acc + r * args.v_dim + d, n), inverse), n);
    }
  }
}

template <typename P>
struct AttentionScratch {
  typename P::Left *q, *weights;     // [rows, k_dim], [rows, kKeys]
  typename P::Right *keys, *values;  // [k_dim / kDepth, kKeys], [kKeys / kDepth, v_dim]
  float *products, *state;           // [rows, kKeys], [rows, v_dim + 2]

  AttentionScratch(int64_t rows, int64_t k_dim, int64_t v_dim) {
    // Every part is counted in floats, the widest entry, and starts on a cache line.
    const int64_t sizes[] = {rows * k_dim,  rows * kKeys, k_dim * kKeys,
                             kKeys * v_dim, rows * kKeys, rows * (v_dim + 2)};
    float* parts[6];
    int64_t total = 0;
    for (const int64_t size : sizes) total += ceil_div(size, 16) * 16;
    float* next = scratch(total);
    for (int i = 0; i < 6; ++i) {
      parts[i] = next;
      next += ceil_div(sizes[i], 16) * 16;
    }
    q = reinterpret_cast<typename P::Left*>(parts[0]), weights = reinterpret_cast<typename P::Left*>(parts[1]);
    keys = reinterpret_cast<typename P::Right*>(parts[2]), values = reinterpret_cast<typename P::Right*>(parts[3]);
    products = parts[4], state = parts[5];
  }
};

// Packs the keys and values [key, key + num_keys), num_keys <= kKeys. The blocks of the next round are
// prefetched in between, one at a time: all at once, they would stall the computation until they have arrived.
template <typename T>
inline void pack_round(const AttentionArgs& args, const AttentionTask& task, const AttentionTask* next, int64_t key,
                       int64_t num_keys, const AttentionScratch<Product<T>>& s) {
  using P = Product<T>;
  for (int64_t b = 0; b < num_keys; b += kBlockTokens) {
    const T* k = cache_block<T>(args, task, args.k_cache, args.k_dim, key + b);
    for (int64_t i = 0; i < kBlockTokens; i += kLanes)
      P::pack_columns(k + i * args.k_dim, args.k_dim, args.k_dim, s.keys + b + i, kKeys);
    prefetch(block_after<T>(args, task, next, args.k_cache, args.k_dim, key + b),
             kBlockTokens * args.k_dim * sizeof(T));
    const T* v = cache_block<T>(args, task, args.v_cache, args.v_dim, key + b);
    P::pack_rows(v, args.v_dim, min(kBlockTokens, num_keys - b), args.v_dim, s.values + b / P::kDepth * args.v_dim,
                 args.v_dim);
    prefetch(block_after<T>(args, task, next, args.v_cache, args.v_dim, key + b),
             kBlockTokens * args.v_dim * sizeof(T));
  }
}

template <typename T>
void attention_task(const AttentionArgs& args, const AttentionTask& task, const AttentionTask* next) {
  using P = Product<T>;
  const int64_t group = args.heads / args.kv_heads;
  const int64_t rows = task.num_queries * group;
  const AttentionScratch<P> s(rows, args.k_dim, args.v_dim);
  float* memory = task.partial < 0 ? s.state : args.partials + task.partial * args.partial_floats;
  const SoftmaxState state = softmax_state(memory, rows, args.v_dim);
  load_queries<T>(args, task, s.q);
  for (int64_t i = 0; i < rows * args.v_dim; ++i) state.acc[i] = 0;
  for (int64_t r = 0; r < rows; ++r) state.peak[r] = kMasked, state.total[r] = 0;

  const int64_t query_len = args.query_starts[task.seq + 1] - args.query_starts[task.seq];
  const int64_t first_position = args.kv_lens[task.seq] - query_len + task.first_query;
  for (int64_t key = task.first_key; key < task.end_key; key += kKeys) {
    const int64_t num_keys = min(kKeys, task.end_key - key);
    pack_round<T>(args, task, next, key, num_keys, s);
    for (int64_t i = 0; i < rows * kKeys; i += kLanes) store(s.products + i, zero());
    const auto products_row = [&](int64_t r) { return s.products + r * kKeys; };
    update<P>(s.q, args.k_dim, s.keys, kKeys, products_row, rows, args.k_dim / P::kDepth,
              ceil_div(num_keys, kBlockTokens) * kBlockTokens);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group;
      const int64_t begin = args.window > 0 ? max(0, position + 1 - args.window - key) : 0;
      const int64_t end = min(num_keys, position + 1 - key);
      softmax_row(args, s.products + r * kKeys, begin, end, s.weights + r * kKeys, state.acc + r * args.v_dim,
                  state.peak[r], state.total[r]);
    }
    const auto acc_row = [&](int64_t r) { return state.acc + r * args.v_dim; };
    update<P>(s.weights, kKeys, s.values, args.v_dim, acc_row, rows, ceil_div(num_keys, P::kDepth), args.v_dim);
  }
  if (task.partial < 0) write_rows<T>(args, task, state);
}

template <typename T>
void merge_tasks(const AttentionArgs& args, const AttentionMerge& merge) {
  const AttentionTask& first = args.tasks[merge.first_task];
  const int64_t rows = first.num_queries * (args.heads / args.kv_heads);
  const auto state_of = [&](int64_t i) {
    const int64_t slot = args.tasks[merge.first_task + i].partial;
    return softmax_state(args.partials + slot * args.partial_floats, rows, args.v_dim);
  };
  const SoftmaxState into = state_of(0);
  for (int64_t i = 1; i < merge.num_tasks; ++i) {
    const SoftmaxState from = state_of(i);
    for (int64_t r = 0; r < rows; ++r) {
      const float peak = into.peak[r] > from.peak[r] ? into.peak[r] : from.peak[r];
      const Vec into_factor = exp(set1(into.peak[r] - peak)), from_factor = exp(set1(from.peak[r] - peak));
      for (int64_t d = 0; d < args.v_dim; d += kLanes) {
        const int64_t n = min(kLanes, args.v_dim - d);
        float* acc = into.acc + r * args.v_dim + d;
        const Vec added = mul(load_n(from.acc + r * args.v_dim + d, n), from_factor);
        store_n(acc, fma(load_n(acc, n), into_factor, added), n);
      }
      into.total[r] = into.total[r] * first_lane(into_factor) + from.total[r] * first_lane(from_factor);
      into.peak[r] = peak;
    }
  }
  write_rows<T>(args, first, into);
}

void attention(const AttentionArgs& args) {
  run(args.num_tasks, [&](int64_t i) {
    const AttentionTask* next = i + 1 < args.num_tasks ? &args.tasks[i + 1] : nullptr;
    with_dtype(args.dtype, [&]<typename T>() { attention_task<T>(args, args.tasks[i], next); });
  });
  run(args.num_merges,
      [&](int64_t i) { with_dtype(args.dtype, [&]<typename T>() { merge_tasks<T>(args, args.merges[i]); }); });
}
