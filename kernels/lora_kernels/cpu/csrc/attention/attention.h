// Paged attention by online softmax. Included inside the instruction set's namespace.
//
// The rows of a KV head are a task's queries times the query heads that share it, so that a decode with grouped heads
// reads each key and value once. A round is 64 keys of one KV head. Its products are in attention_rounds.h, which first
// packs keys and values into scratch memory, and in attention_direct.h, which reads them in place, for few rows.
#pragma once

constexpr int64_t kKeys = 64;        // keys per round
constexpr float kMasked = -1.0e30f;  // the logit of a masked key
constexpr float kLowest = -1.0e29f;  // the initial peak: exp(kMasked - kLowest) is zero
constexpr float kSlack = 8.0f;       // how far logits may exceed the peak before it moves
constexpr int kSoftmaxRows = kLanes == 16 ? 4 : 1;  // rows at once: their logits fill half the registers

// Weights accumulated so far are exp(logit - peak).
struct SoftmaxState {
  float *acc, *peak, *total;  // [rows, v_dim], [rows], [rows]

  SoftmaxState from(int64_t row, int64_t v_dim) const { return {acc + row * v_dim, peak + row, total + row}; }
};

inline SoftmaxState softmax_state(float* memory, int64_t rows, int64_t v_dim) {
  return {memory, memory + rows * v_dim, memory + rows * v_dim + rows};
}

// The entries, in the block of a key, of the task's KV head with index `head`.
inline const char* k_block(const AttentionArgs& args, const AttentionTask& task, int64_t head, int64_t key) {
  const int64_t block = args.block_tables[task.seq * args.max_blocks + key / kBlockTokens];
  return static_cast<const char*>(args.k_cache) + block * args.k_stride + (task.kv_head + head) * args.k_block_bytes;
}
inline const char* v_block(const AttentionArgs& args, const AttentionTask& task, int64_t head, int64_t key) {
  const int64_t block = args.block_tables[task.seq * args.max_blocks + key / kBlockTokens];
  return static_cast<const char*>(args.v_cache) + block * args.v_stride + (task.kv_head + head) * args.v_block_bytes;
}

// The blocks that are read kKeys after a round's, in this task and the following ones; as many as the round has, so
// that memory is requested as evenly as it is used. Rounds prefetch them step by step, in memory order: a core has some
// twenty outstanding lines at most, so prefetching all at once would alternate between idle memory and an idle core.
struct Ahead {
  static constexpr int64_t kBlocks = kKeys / kBlockTokens;
  static constexpr int kLines = 4;  // lines per step
  struct Piece {
    const char *at, *end;
  };
  Piece pieces[2 * kBlocks + 1];  // keys and values alternately, and an end marker
  Piece *piece = pieces, *last = pieces;
  const char* at;  // within the piece

  // For a round of num_keys keys of tasks[0], starting at `key`.
  Ahead(const AttentionArgs& args, const AttentionTask* task, int64_t key, int64_t num_keys) {
    const AttentionTask* end = args.tasks + args.num_tasks;
    const int64_t wanted = ceil_div(num_keys, kBlockTokens);
    for (int64_t i = 0; i < 2 * kBlocks + wanted; ++i, key += kBlockTokens) {
      if (key >= task->end_key) {
        if (++task == end) break;
        key = task->first_key;
      }
      if (i < kBlocks) continue;
      const char *k = k_block(args, *task, 0, key), *v = v_block(args, *task, 0, key);
      const int64_t k_bytes = task->num_kv_heads * args.k_block_bytes, v_bytes = task->num_kv_heads * args.v_block_bytes;
      if (i < kBlocks + wanted) *last++ = {k, k + k_bytes}, *last++ = {v, v + v_bytes};
      if (i >= 2 * kBlocks) touch_pages(k, k_bytes), touch_pages(v, v_bytes);
    }
    *last = {};
    at = piece->at;
  }
  void operator()() {
    if (piece == last) return;
    for (int i = 0; i < kLines; ++i) prefetch_line(at + i * 64);
    at += kLines * 64;
    if (at >= piece->end) at = (++piece)->at;
  }
  void rest() {
    while (piece < last) (*this)();
  }
};

// The keys of a round that a row reads.
struct KeyRange {
  int64_t begin, end;

  bool is_whole() const { return begin <= 0 && end >= kKeys; }
};

// Rebases a row's weights to another peak: the sums accumulated so far shrink.
inline void move_peak(const SoftmaxState& state, int64_t row, int64_t v_dim, float peak) {
  const Vec decay = exp(set1(state.peak[row] - peak));
  float* acc = state.acc + row * v_dim;
  each_vector(v_dim, [&](int64_t d, auto n) { store_n(acc + d, mul(load_n(acc + d, n), decay), n); });
  state.total[row] *= first_lane(decay);
  state.peak[row] = peak;
}

// One step for some rows: turns products [Rows, kKeys] into weights, zero outside `keys`, and rescales the state.
// Several rows at once, since computing each row's maximum and sum takes latency rather than throughput. Not inlined:
// all kinds of rounds share the code, and it takes long to compile.
template <int Rows, typename Weight>
__attribute__((noinline)) void softmax_rows(const AttentionArgs& args, const float* products, const KeyRange* keys,
                                            Weight* weights, const SoftmaxState& state) {
  constexpr int kVecs = kKeys / kLanes;
  Vec logits[Rows][kVecs], highest[Rows];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t first = v * kLanes;
      Vec logit = mul(load(products + r * kKeys + first), set1(args.scale));
      if (args.softcap > 0) logit = mul(tanh(mul(logit, set1(1.0f / args.softcap))), set1(args.softcap));
      if (!keys[r].is_whole()) logit = keep_range(logit, keys[r].begin - first, keys[r].end - first, kMasked);
      logits[r][v] = logit;
      highest[r] = v == 0 ? logit : max(highest[r], logit);
    }
  }
  float peaks[Rows], totals[4];
  if constexpr (Rows == 4)
    store_maxima(peaks, highest[0], highest[1], highest[2], highest[3]);
  else
    for (int r = 0; r < Rows; ++r) peaks[r] = max_lane(highest[r]);
  for (int r = 0; r < Rows; ++r)
    if (peaks[r] > state.peak[r] + kSlack) move_peak(state, r, args.v_dim, peaks[r]);
  Vec added[Rows];
  for (int r = 0; r < Rows; ++r) {
    added[r] = zero();
    for (int v = 0; v < kVecs; ++v) {
      const Vec weight = exp(sub(logits[r][v], set1(state.peak[r])));
      store(weights + r * kKeys + v * kLanes, weight);
      added[r] = add(added[r], weight);
    }
  }
  const auto added_to = [&](int r) { return r < Rows ? added[r] : zero(); };
  if constexpr (kSoftmaxRows == 1)
    totals[0] = sum(added[0]);
  else  // also for fewer rows, for the same bits with fixed sums
    store_sums(totals, added[0], added_to(1), added_to(2), added_to(3));
  for (int r = 0; r < Rows; ++r) state.total[r] += totals[r];
}

template <typename T>
inline void write_rows(const AttentionArgs& args, const AttentionTask& task, const SoftmaxState& state) {
  const int64_t group = args.heads / args.kv_heads, rows = task.num_queries * group;
  const int64_t first_token = args.query_starts[task.seq] + task.first_query;
  for (int64_t r = 0; r < task.num_kv_heads * rows; ++r) {
    const int64_t head = (task.kv_head + r / rows) * group + r % group, token = first_token + r % rows / group;
    float total = state.total[r], factor = 1.0f;
    if (args.sinks) {
      const float sink = args.sinks[head];
      const float peak = sink > state.peak[r] ? sink : state.peak[r];
      factor = first_lane(exp(set1(state.peak[r] - peak)));
      total = total * factor + first_lane(exp(set1(sink - peak)));
    }
    T* out = static_cast<T*>(args.out) + (token * args.heads + head) * args.v_dim;
    const Vec inverse = set1(factor / total);
    const float* acc = state.acc + r * args.v_dim;
    each_vector(args.v_dim, [&](int64_t d, auto n) { store_n(out + d, mul(load_n(acc + d, n), inverse), n); });
  }
}

#include "attention_rounds.h"
#ifdef __AVX512F__
#include "attention_direct.h"
#endif

// T: type of queries and outputs. Rounds: how products are computed, see attention_rounds.h.
template <typename T, typename Rounds>
void attention_task(const AttentionArgs& args, const AttentionTask& task) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t head_rows = task.num_queries * group, rows = task.num_kv_heads * head_rows;
  Rounds rounds(args, head_rows, task.num_kv_heads);
  float* memory = task.partial < 0 ? rounds.state : args.partials + task.partial * args.partial_floats;
  const SoftmaxState state = softmax_state(memory, rows, args.v_dim);
  rounds.load_queries(task);
  for (int64_t i = 0; i < rows * args.v_dim; ++i) state.acc[i] = 0;
  for (int64_t r = 0; r < rows; ++r) state.peak[r] = kLowest, state.total[r] = 0;

  const int64_t query_len = args.query_starts[task.seq + 1] - args.query_starts[task.seq];
  const int64_t first_position = args.kv_lens[task.seq] - query_len + task.first_query;
  for (int64_t key = task.first_key; key < task.end_key; key += kKeys) {
    const int64_t num_keys = min(kKeys, task.end_key - key);
    Ahead ahead(args, &task, key, num_keys);
    for (int64_t h = 0; h < task.num_kv_heads; ++h) {
      const int64_t first_row = h * head_rows;
      rounds.pack(task, h, key, num_keys, ahead);
      rounds.multiply_keys(first_row, num_keys, ahead);
      for (int64_t r = 0; r < head_rows; r += kSoftmaxRows) {
        with_size<kSoftmaxRows>(min(kSoftmaxRows, head_rows - r), [&]<int Rows>() {
          KeyRange keys[Rows];
          for (int i = 0; i < Rows; ++i) {
            const int64_t position = first_position + (r + i) / group;
            keys[i] = {args.window > 0 ? position + 1 - args.window - key : 0, min(num_keys, position + 1 - key)};
          }
          rounds.template put_weights<Rows>(r, keys, state.from(first_row + r, args.v_dim));
          for (int i = 0; i < Rounds::kAheadOfRow * Rows; ++i) ahead();
        });
      }
      rounds.add_values(num_keys, state.acc + first_row * args.v_dim, ahead);
    }
    ahead.rest();
  }
  if (task.partial < 0) write_rows<T>(args, task, state);
}

template <typename T>
void merge_tasks(const AttentionArgs& args, const AttentionMerge& merge) {
  const AttentionTask& first = args.tasks[merge.first_task];
  const int64_t rows = first.num_kv_heads * first.num_queries * (args.heads / args.kv_heads);
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

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

template <typename T>
inline void run_task(const AttentionArgs& args, const AttentionTask& task) {
  [[maybe_unused]] const int64_t rows = task.num_queries * (args.heads / args.kv_heads);
#ifdef __AVX512F__
  if constexpr (kIsBf16<T>)
    if (!args.is_coded && !args.fixed_sums && DirectRounds::fits(args, rows))
      return attention_task<T, DirectRounds>(args, task);
#endif
  if (!args.is_coded) return attention_task<T, TypedRounds<T, T>>(args, task);
#ifdef __AVX512VNNI__
  if constexpr (kIsBf16<T>)
    return DirectSplitRounds<T>::fits(args, rows) ? attention_task<T, DirectSplitRounds<T>>(args, task)
                                                  : attention_task<T, SplitRounds<T>>(args, task);
  else
#endif
    attention_task<T, TypedRounds<T, Code>>(args, task);
}

void attention(const AttentionArgs& args) {
  run(args.num_tasks, [&](int64_t i) {
    with_dtype(args.dtype, [&]<typename T>() { run_task<T>(args, args.tasks[i]); });
  });
  run(args.num_merges,
      [&](int64_t i) { with_dtype(args.dtype, [&]<typename T>() { merge_tasks<T>(args, args.merges[i]); }); });
}
