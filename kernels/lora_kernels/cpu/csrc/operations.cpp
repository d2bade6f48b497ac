// The operations on tensors: argument checks, the plan of attention, scratch memory.
#include "operations.h"

#include <cstdlib>
#include <cstring>
#include <numeric>

namespace lorafleet {

void run_tasks(int64_t num_tasks, void (*task)(const void*, int64_t), const void* context) {
  run_tasks(num_threads(), num_tasks, task, context);
}

float* scratch(int64_t num_floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (num_floats > size) {
    size = (num_floats + num_floats / 2 + 15) / 16 * 16;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float))));
    LORAFLEET_CHECK(memory, "no memory for ", size, " floats of kernel scratch");
  }
  return memory.get();
}

// Whether a row's sums are added in an order that does not depend on the other rows. See sums.py.
bool fixed_sums = false;

void fix_sums(bool is_fixed) { fixed_sums = is_fixed; }
bool sums_are_fixed() { return fixed_sums; }

std::string_view name_of(Scalar type) {
  static constexpr const char* kNames[] = {"Byte",   "Char",          "Short",        "Int",
                                           "Long",   "Half",          "Float",        "Double",
                                           "ComplexHalf", "ComplexFloat", "ComplexDouble", "Bool",
                                           "QInt8",  "QUInt8",        "QInt32",       "BFloat16"};
  const auto number = static_cast<size_t>(type);
  return number < std::size(kNames) ? kNames[number] : "of a type that no operation takes";
}

Dtype dtype_of(const Tensor& t) {
  switch (t.type) {
    case Scalar::kFloat:
      return Dtype::kF32;
    case Scalar::kBFloat16:
      return Dtype::kBf16;
    case Scalar::kHalf:
      return Dtype::kF16;
    default:
      fail("dtype is ", t.type, "; the native kernels know float32, bfloat16 and float16");
  }
}

void check_same_dtype(const Tensor& t, const Tensor& like, const char* name) {
  LORAFLEET_CHECK(t.type == like.type, name, " is ", t.type, ", not ", like.type);
}

int64_t rows_in(const Tensor& t) { return t.size(-1) == 0 ? 0 : t.numel() / t.size(-1); }

Matrix rows_of(const Tensor& t, const char* name) {
  LORAFLEET_CHECK(t.dim() >= 2 && t.stride(-1) == 1, name, " needs rows whose entries are contiguous");
  int64_t expected = t.stride(-2) * t.size(-2);
  for (int64_t d = t.dim() - 3; d >= 0; --d) {
    LORAFLEET_CHECK(t.size(d) == 1 || t.stride(d) == expected, name, " needs rows at one stride");
    expected *= t.size(d);
  }
  return {t.data, t.stride(-2)};
}

Tensor empty_chunks(int64_t rows, int64_t width) {
  return empty({(width + kXChunk - 1) / kXChunk, rows, kXChunk}, Scalar::kBFloat16);
}

Tensor chunk_rows(const Tensor& x, Ints order) {
  const Matrix from = rows_of(x, "x");
  const int64_t rows = order.size(), width = x.size(-1), chunks = (width + kXChunk - 1) / kXChunk;
  const Tensor chunked = empty_chunks(rows, width);
  auto* to = reinterpret_cast<uint16_t*>(chunked.data);
  run_rows(rows, [&](int64_t row) {
    const auto* own = static_cast<const uint16_t*>(from.data) + order[row] * from.stride;
    for (int64_t c = 0; c < chunks; ++c)
      std::memcpy(to + (c * rows + row) * kXChunk, own + c * kXChunk, 2 * std::min<int64_t>(kXChunk, width - c * kXChunk));
  });
  return chunked;
}

Tensor chunk_rows(const Tensor& x) {
  if (rows_in(x) == 1) return x;
  std::vector<int64_t> order(rows_in(x));
  std::iota(order.begin(), order.end(), 0);
  return chunk_rows(x, order);
}

// Allocates rows of another width.
Tensor empty_rows(const Tensor& x, int64_t width) {
  std::array<int64_t, kMaxDims> shape = x.shape;
  shape[x.dim() - 1] = width;
  return empty(Ints(shape.data(), x.dim()), x.type);
}

void check_packed(const Tensor& weight) {
  LORAFLEET_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.type == Scalar::kBFloat16,
                  "the weight is not packed");
}

LinearArgs linear_args(const Tensor& out, const Tensor& chunks, const Tensor& packed, const OptionalTensor& bias) {
  const int64_t out_features = out.size(-1);
  if (bias) {
    check_same_dtype(*bias, packed, "bias");
    LORAFLEET_CHECK(bias->is_contiguous() && bias->numel() == out_features, "bias needs ", out_features, " entries");
  }
  return {
      .x = reinterpret_cast<const uint16_t*>(chunks.data),
      .panels = reinterpret_cast<const uint16_t*>(packed.data),
      .bias = bias ? reinterpret_cast<const uint16_t*>(bias->data) : nullptr,
      .out = rows_of(out, "out"),
      .rows = rows_in(out),
      .in_features = 2 * packed.size(1),
      .out_features = out_features,
  };
}

LinearCall linear_call(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias) {
  check_packed(packed);
  LORAFLEET_CHECK(x.size(-1) == 2 * packed.size(1), "x has ", x.size(-1), " features; the weight takes ",
                  2 * packed.size(1));
  check_same_dtype(x, packed, "x");
  const Tensor chunks = chunk_rows(x);
  return {chunks, linear_args(out, chunks, packed, bias)};
}

void linear_to(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias) {
  active->linear(linear_call(out, x, packed, bias).args);
}

void linear_of_chunks(const Tensor& out, const Tensor& chunks, const Tensor& packed, const OptionalTensor& bias) {
  check_packed(packed);
  check_same_dtype(chunks, packed, "x");
  const int64_t num_chunks = (2 * packed.size(1) + kXChunk - 1) / kXChunk;
  LORAFLEET_CHECK(chunks.size(0) == num_chunks && chunks.size(1) == rows_in(out), "x has ", chunks.size(0), " chunks of ",
                  chunks.size(1), " rows; the weight takes ", num_chunks, " of ", rows_in(out));
  active->linear(linear_args(out, chunks, packed, bias));
}

Tensor linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t out_features) {
  const Tensor out = empty_rows(x, out_features);
  linear_to(out, x, packed, bias);
  return out;
}

// In an int8 cache, an fp32 scale per row of a block follows the block's codes, as four more entries per row.
bool is_coded(const Tensor& cache) { return cache.type == Scalar::kChar; }
int64_t bytes_to_next_block(const Tensor& cache) { return cache.stride(0) * cache.element_size(); }
int64_t cache_dim(const Tensor& cache) {
  return cache.size(3) - (is_coded(cache) ? static_cast<int64_t>(sizeof(float)) : 0);
}

// Blocks may lie at any distance; each is contiguous.
void check_cache(const Tensor& cache, int64_t kv_heads, int64_t dim, const Tensor& like, const char* name) {
  LORAFLEET_CHECK(cache.dim() == 4 && cache.size(1) == kv_heads && cache.size(2) == kBlockTokens && cache_dim(cache) == dim,
              name, " must be [blocks, ", kv_heads, ", ", kBlockTokens, ", ", dim, "], with scales if int8");
  Tensor block = cache;
  block.shape[0] = 1;
  LORAFLEET_CHECK(block.is_contiguous(), name, " needs blocks that are contiguous");
  if (!is_coded(cache)) return check_same_dtype(cache, like, name);
  LORAFLEET_CHECK(dim % 4 == 0, "an int8 cache needs rows of a multiple of 4 entries; there are ", dim);
}

void copy_rows_(Tensors pools, const Tensor& buffer, const Tensor& pieces) {
  const uint8_t* bytes = entries_of<uint8_t>(buffer, "buffer");
  LORAFLEET_CHECK(pieces.dim() == 2 && pieces.size(1) == 4, "pieces must be [n, 4]");
  const int64_t* piece = entries_of<int64_t>(pieces, "pieces");
  for (int64_t i = 0; i < pieces.size(0); ++i, piece += 4) {
    const auto [index, row, num, begin] = std::tuple(piece[0], piece[1], piece[2], piece[3]);
    LORAFLEET_CHECK(0 <= index && index < static_cast<int64_t>(pools.size()), "pool ", index, " is not there");
    const Tensor& pool = pools[index];
    LORAFLEET_CHECK(pool.dim() > 0 && pool.is_contiguous(), "pools must have contiguous rows");
    LORAFLEET_CHECK(0 <= row && 0 <= num && num <= pool.size(0) - row, "rows ", row, " to ", row + num, " of ",
                    pool.size(0), " are not there");
    const int64_t row_bytes = pool.stride(0) * pool.element_size();
    LORAFLEET_CHECK(0 <= begin && begin <= buffer.numel() && num * row_bytes <= buffer.numel() - begin, "the buffer of ",
                    buffer.numel(), " bytes has no ", num * row_bytes, " at ", begin);
    std::memcpy(pool.data + row * row_bytes, bytes + begin, num * row_bytes);
  }
}

void kv_write_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  LORAFLEET_CHECK(k.dim() == 3 && v.dim() == 3 && k.stride(2) == 1 && v.stride(2) == 1 && k.size(0) == v.size(0) &&
                  k.size(1) == v.size(1) && k.size(0) == slot_mapping.numel(),
              "k and v must be [T, Hkv, D] with contiguous heads, T as slot_mapping has it");
  check_cache(k_cache, k.size(1), k.size(2), k, "k_cache");
  check_cache(v_cache, v.size(1), v.size(2), k, "v_cache");
  check_same_dtype(v_cache, k_cache, "v_cache");
  check_same_dtype(k, v, "k");
  active->kv_write({
      .dtype = dtype_of(k),
      .k = k.data,
      .v = v.data,
      .k_token = k.stride(0),
      .k_head = k.stride(1),
      .v_token = v.stride(0),
      .v_head = v.stride(1),
      .k_cache = k_cache.data,
      .v_cache = v_cache.data,
      .k_stride = bytes_to_next_block(k_cache),
      .v_stride = bytes_to_next_block(v_cache),
      .is_coded = is_coded(k_cache),
      .slots = entries_of<int64_t>(slot_mapping, "slot_mapping"),
      .num_tokens = k.size(0),
      .kv_heads = k.size(1),
      .k_dim = k.size(2),
      .v_dim = v.size(2),
  });
}

constexpr int64_t kTaskBytes = 8192;   // of a block's keys: longer contiguous reads are no faster
constexpr int64_t kSplitKeys = 256;    // minimum keys per part of a split task

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<AttentionMerge> merges;
  int64_t num_partials = 0;
  int64_t task_queries, task_rows;  // at most
};

// Queries that share their keys, and the keys that they read, starting at a block boundary.
struct AttentionTile {
  int64_t seq, first_query, num_queries, first_key, end_key;
};

// Prefill chunks come last in a step and make the longest tasks, so sequences are taken from the end.
std::vector<AttentionTile> attention_tiles(const AttentionArgs& args, int64_t most_queries) {
  std::vector<AttentionTile> tiles;
  for (int64_t s = args.num_seqs - 1; s >= 0; --s) {
    const int64_t query_len = args.query_starts[s + 1] - args.query_starts[s];
    for (int64_t first = 0; first < query_len; first += most_queries) {
      const int64_t queries = std::min(most_queries, query_len - first);
      const int64_t position = args.kv_lens[s] - query_len + first;
      const int64_t begin = args.window > 0 ? std::max<int64_t>(0, position + 1 - args.window) : 0;
      tiles.push_back({s, first, queries, begin / kBlockTokens * kBlockTokens, position + queries});
    }
  }
  return tiles;
}

// A task gets as many KV heads as leave several tasks per thread, and no more keys than its share of all. Heads of a
// block are adjacent, and long contiguous reads are up to twice as fast as reads of one head's 2 KB each.
AttentionPlan plan_attention(const AttentionArgs& args) {
  AttentionPlan plan;
  const int64_t group = args.heads / args.kv_heads;
  plan.task_queries = std::max<int64_t>(1, active->attention_rows / group);
  if (fixed_sums && args.window > 0) plan.task_queries = 1;  // rounds of keys start at the first query's window
  plan.task_rows = std::max(active->attention_rows, group);
  const std::vector<AttentionTile> tiles = attention_tiles(args, plan.task_queries);
  int64_t work = 0;
  for (const AttentionTile& tile : tiles) work += (tile.end_key - tile.first_key) * args.kv_heads;
  const int64_t share = work / (4 * num_threads());
  for (const auto& [seq, first_query, num_queries, first_key, end_key] : tiles) {
    const int64_t keys = end_key - first_key;
    const int64_t most_splits = fixed_sums ? 1 : std::max<int64_t>(1, keys / kSplitKeys);
    const int64_t most_heads = std::min({share * most_splits / keys, plan.task_rows / (num_queries * group),
                                         kTaskBytes / args.k_block_bytes, args.kv_heads});
    const int64_t parts = most_heads > 1 ? (args.kv_heads + most_heads - 1) / most_heads : args.kv_heads;
    const int64_t task_heads = (args.kv_heads + parts - 1) / parts;
    const int64_t splits = std::clamp<int64_t>(keys * task_heads / std::max<int64_t>(1, share), 1, most_splits);
    const int64_t split_keys = ((keys + kBlockTokens - 1) / kBlockTokens + splits - 1) / splits * kBlockTokens;
    for (int64_t head = 0; head < args.kv_heads; head += task_heads) {
      const int64_t first_task = plan.tasks.size();
      for (int64_t key = first_key; key < end_key; key += split_keys) {
        AttentionTask task;
        task.seq = seq, task.first_query = first_query, task.num_queries = num_queries;
        task.kv_head = head, task.num_kv_heads = std::min(task_heads, args.kv_heads - head);
        task.first_key = key, task.end_key = std::min(end_key, key + split_keys);
        task.partial = split_keys >= keys ? -1 : plan.num_partials++;
        plan.tasks.push_back(task);
      }
      const int64_t num_tasks = plan.tasks.size() - first_task;
      if (num_tasks > 1) plan.merges.push_back({static_cast<int32_t>(first_task), static_cast<int32_t>(num_tasks)});
    }
  }
  return plan;
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& query_starts, const Tensor& kv_lens, double scale, int64_t window, double softcap,
                       const OptionalTensor& sinks) {
  LORAFLEET_CHECK(q.dim() == 3 && q.stride(2) == 1, "q must be [T, Hq, D] with contiguous heads");
  const int64_t heads = q.size(1), kv_heads = k_cache.size(1);
  LORAFLEET_CHECK(heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " kv heads");
  check_cache(k_cache, kv_heads, q.size(2), q, "k_cache");
  check_cache(v_cache, kv_heads, cache_dim(v_cache), q, "v_cache");
  check_same_dtype(v_cache, k_cache, "v_cache");
  LORAFLEET_CHECK(!sinks || sinks->numel() == heads, "sinks needs ", heads, " entries");
  const int64_t seqs = kv_lens.numel();
  LORAFLEET_CHECK(query_starts.numel() == seqs + 1 && block_tables.dim() == 2 && block_tables.size(0) >= seqs, seqs,
                  " sequences need as many tables, and one more start");
  const int64_t end = entries_of<int32_t>(query_starts, "query_starts")[seqs];
  LORAFLEET_CHECK(end <= q.size(0), "sequences of ", end, " queries are not of ", q.size(0));
  const Tensor out = empty({q.size(0), heads, cache_dim(v_cache)}, q.type);
  AttentionArgs args = {
      .dtype = dtype_of(q),
      .q = q.data,
      .q_token = q.stride(0),
      .q_head = q.stride(1),
      .k_cache = k_cache.data,
      .v_cache = v_cache.data,
      .k_stride = bytes_to_next_block(k_cache),
      .v_stride = bytes_to_next_block(v_cache),
      .k_block_bytes = kBlockTokens * k_cache.size(3) * k_cache.element_size(),
      .v_block_bytes = kBlockTokens * v_cache.size(3) * v_cache.element_size(),
      .is_coded = is_coded(k_cache),
      .fixed_sums = fixed_sums,
      .out = out.data,
      .block_tables = entries_of<int32_t>(block_tables, "block_tables"),
      .max_blocks = block_tables.size(1),
      .query_starts = entries_of<int32_t>(query_starts, "query_starts"),
      .kv_lens = entries_of<int32_t>(kv_lens, "kv_lens"),
      .num_seqs = kv_lens.numel(),
      .heads = heads,
      .kv_heads = kv_heads,
      .k_dim = q.size(2),
      .v_dim = cache_dim(v_cache),
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .window = window,
      .sinks = sinks ? entries_of<float>(*sinks, "sinks") : nullptr,
      .tasks = nullptr,
      .num_tasks = 0,
      .merges = nullptr,
      .num_merges = 0,
      .partials = nullptr,
      .partial_floats = 0,
  };
  const AttentionPlan plan = plan_attention(args);
  args.tasks = plan.tasks.data();
  args.num_tasks = plan.tasks.size();
  args.merges = plan.merges.data();
  args.num_merges = plan.merges.size();
  args.partial_floats = plan.task_rows * (args.v_dim + 2);
  const Tensor partials = empty({plan.num_partials, args.partial_floats}, Scalar::kFloat);
  args.partials = reinterpret_cast<float*>(partials.data);
  active->attention(args);
  return out;
}

// Allocates the result of an operation on rows [n, width], in chunks or as plain rows.
std::tuple<Tensor, Chunked> empty_result(const Tensor& x, bool in_chunks) {
  const int64_t width = x.size(-1);
  if (!in_chunks) {
    const Tensor out = empty(x.sizes(), x.type);
    return {out, {out.data, width, kXChunk}};
  }
  LORAFLEET_CHECK(x.type == Scalar::kBFloat16, "only bfloat16 is put in chunks");
  const Tensor out = empty_chunks(rows_in(x), width);
  return {out, {out.data, kXChunk, rows_in(x) * kXChunk}};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual, bool plus_one,
                bool in_chunks) {
  check_same_dtype(weight, x, "weight");
  LORAFLEET_CHECK(weight.is_contiguous() && weight.numel() == x.size(-1), "weight needs ", x.size(-1), " entries");
  Matrix sum = {nullptr, 0};
  if (residual) {
    LORAFLEET_CHECK(residual->has_sizes(x.sizes()), "residual must have the shape of x");
    check_same_dtype(*residual, x, "residual");
    sum = rows_of(*residual, "residual");
  }
  const auto [out, places] = empty_result(x, in_chunks);
  active->rms_norm({
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .residual = sum,
      .out = places,
      .weight = weight.data,
      .rows = rows_in(x),
      .width = x.size(-1),
      .eps = static_cast<float>(eps),
      .plus_one = plus_one,
  });
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual, bool plus_one) {
  return rms_norm(x, weight, eps, residual, plus_one, false);
}

void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  LORAFLEET_CHECK(q.dim() == 3 && k.dim() == 3 && q.stride(2) == 1 && k.stride(2) == 1 && q.size(0) == k.size(0),
              "q and k must be [T, H, D] with contiguous heads");
  LORAFLEET_CHECK(cos.has_sizes(sin.sizes()) && rows_in(cos) == q.size(0) && cos.size(-1) % 2 == 0 &&
                  cos.size(-1) <= std::min(q.size(2), k.size(2)),
              "cos and sin must be [T, R], R even and at most D");
  for (const Tensor* t : {&k, &cos, &sin}) check_same_dtype(*t, q, "k, cos or sin");
  active->rotary({
      .dtype = dtype_of(q),
      .q = q.data,
      .k = k.data,
      .q_token = q.stride(0),
      .q_head = q.stride(1),
      .k_token = k.stride(0),
      .k_head = k.stride(1),
      .cos = rows_of(cos, "cos"),
      .sin = rows_of(sin, "sin"),
      .num_tokens = q.size(0),
      .q_heads = q.size(1),
      .k_heads = k.size(1),
      .rotary_dim = cos.size(-1),
  });
}

Activation activation_of(std::string_view act) {
  if (act == "silu") return Activation::kSilu;
  if (act == "gelu") return Activation::kGelu;
  LORAFLEET_CHECK(act == "gelu_tanh", "act is ", act, "; it must be silu, gelu or gelu_tanh");
  return Activation::kGeluTanh;
}

Tensor gated_act(const Tensor& gate, const Tensor& up, std::string_view act, bool in_chunks) {
  LORAFLEET_CHECK(gate.has_sizes(up.sizes()), "gate and up must have one shape");
  check_same_dtype(up, gate, "up");
  const auto [out, places] = empty_result(gate, in_chunks);
  active->gated_act({
      .dtype = dtype_of(gate),
      .gate = rows_of(gate, "gate"),
      .up = rows_of(up, "up"),
      .out = places,
      .rows = rows_in(gate),
      .width = gate.size(-1),
      .act = activation_of(act),
  });
  return out;
}

Tensor gated_act(const Tensor& gate, const Tensor& up, std::string_view act) { return gated_act(gate, up, act, false); }

void gate_heads_(const Tensor& x, const Tensor& gate) {
  LORAFLEET_CHECK(x.dim() == 3 && gate.has_sizes(x.sizes()) && x.stride(2) == 1 && gate.stride(2) == 1,
                  "x and gate must be [T, H, D] with contiguous heads");
  check_same_dtype(gate, x, "gate");
  for (int64_t head = 0; head < x.size(1); ++head) {
    char* const own = x.data + head * x.stride(1) * x.element_size();
    active->gated_act({
        .dtype = dtype_of(x),
        .gate = {gate.data + head * gate.stride(1) * gate.element_size(), gate.stride(0)},
        .up = {own, x.stride(0)},
        .out = {own, x.stride(0), kXChunk},
        .rows = x.size(0),
        .width = x.size(2),
        .act = Activation::kSigmoid,
    });
  }
}

void mask_logits_(const Tensor& logits, const Tensor& rows, const Tensor& words) {
  LORAFLEET_CHECK(logits.dim() == 2 && words.dim() == 2 && words.size(0) == rows.numel() &&
                  words.size(1) == (logits.size(1) + 31) / 32,
              "words must be [rows, ", (logits.size(-1) + 31) / 32, "] for logits [n, ", logits.size(-1), "]");
  const int64_t* row_numbers = entries_of<int64_t>(rows, "rows");
  for (int64_t i = 0; i < rows.numel(); ++i)
    LORAFLEET_CHECK(0 <= row_numbers[i] && row_numbers[i] < logits.size(0), "row ", row_numbers[i], " is not there");
  active->mask_logits({
      .dtype = dtype_of(logits),
      .logits = rows_of(logits, "logits"),
      .width = logits.size(1),
      .rows = row_numbers,
      .words = reinterpret_cast<const uint32_t*>(entries_of<int32_t>(words, "words")),
      .num_rows = rows.numel(),
      .num_words = words.size(1),
  });
}

std::tuple<Tensor, Tensor> argmax(const Tensor& x) {
  LORAFLEET_CHECK(x.dim() == 2 && x.size(1) > 0, "x must be [n, V], V > 0");
  const Tensor ids = empty({x.size(0)}, Scalar::kLong), finite = empty({x.size(0)}, Scalar::kBool);
  active->argmax({
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .rows = x.size(0),
      .width = x.size(1),
      .ids = reinterpret_cast<int64_t*>(ids.data),
      .finite = reinterpret_cast<bool*>(finite.data),
  });
  return {ids, finite};
}

}  // namespace lorafleet
