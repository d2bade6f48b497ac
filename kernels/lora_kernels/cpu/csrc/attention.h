// Paged attention by online softmax. Included inside the instruction set's namespace.
//
// A task's rows are its queries times the query heads of one kv head, so that a decode with grouped heads reads each
// key and value once. Keys are transposed 64 at a time into scratch memory; the rest is rank-1 updates.
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
inline const T* cache_block(const void* cache, const AttentionArgs& args, const AttentionTask& task, int64_t key,
                            int64_t dim) {
  const int64_t block = args.block_tables[task.seq * args.max_blocks + key / kBlockTokens];
  return static_cast<const T*>(cache) + (block * args.kv_heads + task.kv_head) * kBlockTokens * dim;
}

// out[d * kKeys + j] = k[j * dim + d] for the 16 keys of a block.
template <typename T>
inline void transpose_block(const T* k, int64_t dim, float* out) {
  for (int64_t j = 0; j < kBlockTokens; j += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t n = min(kLanes, dim - d);
      Vec tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* from = k + (j + i) * dim + d;
        tile[i] = n == kLanes ? load(from) : load_n(from, n);
      }
      transpose(tile);
      for (int64_t i = 0; i < n; ++i) store(out + (d + i) * kKeys + j, tile[i]);
    }
  }
}

template <typename T>
inline void load_queries(const AttentionArgs& args, const AttentionTask& task, float* q) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t token = args.query_starts[task.seq] + task.first_query;
  for (int64_t i = 0; i < task.num_queries * group; ++i) {
    const T* from = static_cast<const T*>(args.q) + (token + i / group) * args.q_token +
                    (task.kv_head * group + i % group) * args.q_head;
    for (int64_t d = 0; d < args.k_dim; d += kLanes) {
      const int64_t n = min(kLanes, args.k_dim - d);
      store_n(q + i * args.k_dim + d, mul(load_n(from + d, n), set1(args.scale)), n);
    }
  }
}

// One row's step: turns logits [kKeys] into weights, of which only [begin, end) are not zero, and rescales the state.
inline void softmax_row(float* logits, int64_t begin, int64_t end, float softcap, float* acc, int64_t v_dim,
                        float& peak, float& total) {
  constexpr int kVecs = kKeys / kLanes;
  if (begin >= end) {
    for (int v = 0; v < kVecs; ++v) store(logits + v * kLanes, zero());
    return;
  }
  if (softcap > 0) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec capped = tanh(mul(load(logits + v * kLanes), set1(1.0f / softcap)));
      store(logits + v * kLanes, mul(capped, set1(softcap)));
    }
  }
  for (int64_t j = 0; j < begin; ++j) logits[j] = kMasked;
  for (int64_t j = end; j < kKeys; ++j) logits[j] = kMasked;
  Vec highest = set1(peak);
  for (int v = 0; v < kVecs; ++v) highest = max(highest, load(logits + v * kLanes));
  const float new_peak = max_lane(highest);
  if (new_peak > peak) {
    const Vec decay = exp(set1(peak - new_peak));
    for (int64_t d = 0; d < v_dim; d += kLanes) {
      const int64_t n = min(kLanes, v_dim - d);
      store_n(acc + d, mul(load_n(acc + d, n), decay), n);
    }
    total *= first_lane(decay);
    peak = new_peak;
  }
  Vec weights = zero();
  for (int v = 0; v < kVecs; ++v) {
    const Vec weight = exp(sub(load(logits + v * kLanes), set1(peak)));
    store(logits + v * kLanes, weight);
    weights = add(weights, weight);
  }
  total += sum(weights);
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

template <typename T>
void attention_task(const AttentionArgs& args, const AttentionTask& task) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t rows = task.num_queries * group;
  float* q = scratch(rows * (args.k_dim + kKeys + args.v_dim + 2) + args.k_dim * kKeys);
  float* keys = q + rows * args.k_dim;           // [k_dim, kKeys]
  float* logits = keys + args.k_dim * kKeys;     // [rows, kKeys]
  float* memory = logits + rows * kKeys;
  if (task.partial >= 0) memory = args.partials + task.partial * args.partial_floats;
  const SoftmaxState state = softmax_state(memory, rows, args.v_dim);
  load_queries<T>(args, task, q);
  for (int64_t i = 0; i < rows * args.v_dim; ++i) state.acc[i] = 0;
  for (int64_t r = 0; r < rows; ++r) state.peak[r] = kMasked, state.total[r] = 0;

  const int64_t query_len = args.query_starts[task.seq + 1] - args.query_starts[task.seq];
  const int64_t first_position = args.kv_lens[task.seq] - query_len + task.first_query;
  for (int64_t key = task.first_key; key < task.end_key; key += kKeys) {
    const int64_t num_keys = min(kKeys, task.end_key - key);
    const int64_t num_blocks = ceil_div(num_keys, kBlockTokens);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const T* k = cache_block<T>(args.k_cache, args, task, key + b * kBlockTokens, args.k_dim);
      transpose_block(k, args.k_dim, keys + b * kBlockTokens);
    }
    for (int64_t i = 0; i < rows * kKeys; i += kLanes) store(logits + i, zero());
    update(q, args.k_dim, keys, kKeys, logits, kKeys, rows, args.k_dim, num_blocks * kBlockTokens);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group;
      const int64_t begin = args.window > 0 ? max(0, position + 1 - args.window - key) : 0;
      const int64_t end = min(num_keys, position + 1 - key);
      softmax_row(logits + r * kKeys, begin, end, args.softcap, state.acc + r * args.v_dim, args.v_dim, state.peak[r],
                  state.total[r]);
    }
    for (int64_t b = 0; b < num_blocks; ++b) {
      const T* v = cache_block<T>(args.v_cache, args, task, key + b * kBlockTokens, args.v_dim);
      const int64_t depth = min(kBlockTokens, num_keys - b * kBlockTokens);
      update(logits + b * kBlockTokens, kKeys, v, args.v_dim, state.acc, args.v_dim, rows, depth, args.v_dim);
    }
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
    with_dtype(args.dtype, [&]<typename T>() { attention_task<T>(args, args.tasks[i]); });
  });
  run(args.num_merges, [&](int64_t i) {
    with_dtype(args.dtype, [&]<typename T>() { merge_tasks<T>(args, args.merges[i]); });
  });
}
