// The native kernels as plain C++: raw pointers, element strides, no torch. operations.cpp checks arguments and calls
// the kernels; the files of isa/ are compiled once per instruction set, into a library that fills a Kernels table.
#pragma once

#include <array>
#include <cstdint>

#include "quant_forms.h"

namespace lorafleet {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {
  int8_t value;
};

enum class Dtype { kF32, kBf16, kF16 };

constexpr int kPageRows = 16;     // rank rows in an adapter-pool page
constexpr int kBlockTokens = 16;  // tokens in a KV block
constexpr int kPanel = 32;        // output columns in a packed weight panel
constexpr int kXChunk = 256;      // inputs per chunk of rows in bf16 products

// Rows of a matrix whose last dimension is contiguous.
struct Matrix {
  void* data;
  int64_t stride;  // elements between rows
};

// Rows in chunks of kXChunk entries, or a matrix. bf16 products read [chunks, rows, kXChunk]: a chunk of a few rows
// lies in adjacent cache lines at constant distances. Rows whose length is a power of two would compete for the same
// few cache sets.
struct Chunked {
  void* data;
  int64_t stride, chunk;  // elements between rows, and between chunks of a row
};

struct LinearArgs {
  const uint16_t* x;       // bf16 [chunks, rows, kXChunk]
  const uint16_t* panels;  // bf16 [panels, in_features / 2, kPanel, 2]
  const uint16_t* bias;    // bf16 [out_features] or null
  Matrix out;              // bf16 [rows, out_features]
  int64_t rows, in_features, out_features;
};

// Rows of a product that have a weight of their own, such as an expert's.
struct RowGroup {
  int64_t first, rows;  // at most kGroupRows rows
  int64_t panel;        // the weight's first panel among all groups'
};
constexpr int64_t kGroupRows = 256;

// out[t] = sum of factors[t, j] * rows[places[t, j]], for k rows per token.
struct WeightedRowsArgs {
  Dtype dtype;
  Matrix rows, out;      // [tokens * k, width], [tokens, width]
  const int64_t* places;  // [tokens, k]
  const float* factors;   // [tokens, k]
  int64_t tokens, k, width;
};

struct QuantPart {
  const uint8_t* panels;  // [panels, panel_bytes], see quant_forms.h
  int64_t form;           // index into kQuantForms
  int64_t out_features;
};

struct QuantArgs {
  Dtype dtype;  // of x, bias and out
  Matrix x;     // [rows, in_features]
  const float* x32;     // x in fp32, for fp32 products; null: products are of bf16 or of codes
  int64_t x32_stride;
  const uint16_t* x_chunks;  // x as in LinearArgs, for bf16 products
  const float* x_sums;  // sums of x's groups: [rows, in_features / 32]; null: no part has minima, or x32 is set
  // x as int8 codes, laid out as x_chunks, every eight in the order 0, 4, 1, 5, 2, 6, 3, 7; or null. A row of x is the
  // sum of `digits` rows of codes, each times its scales: one rounded row, or three exact ones. If `digits` is 2, the
  // space of two rows has one of 16-bit integers, rounded or not, in order, with one row of scales and sums.
  const int8_t* x_codes;
  const float* x_scales;    // of x_codes' groups: [in_features / 32, rows * digits]
  // Sums of x_codes' halves of groups, of digits with those before: [in_features / 16, rows * digits]. Three entries
  // behind them can be read.
  const int32_t* x_halves;
  int64_t digits;
  const QuantPart* parts;  // side by side in out
  int64_t num_parts;
  const void* bias;  // [out_features of all parts] or null
  Matrix out;
  int64_t rows, in_features;
  int64_t weight_rows;  // that share a weight: all rows, or in groups an average; what pays depends on it
  bool rounds_inputs;   // whether x's numbers are rounded to int8 codes
  bool fixed_sums;      // whether a row's sums must not depend on the number of rows
  int num_threads;      // that share the tasks
};

struct LoraSiteArgs {
  Matrix out;  // [tokens, width]
  const void* a_rows;
  const void* b_rows;
  const float* factors;  // of int8 rank rows, each for the product of its A and its B; null: rank rows have dtype
  int64_t width;
  int64_t index, group;  // column in ranks and scales; row in pages
};

struct LoraArgs {
  Dtype dtype;
  Matrix x;  // [tokens, in_features]
  int64_t in_features;
  const LoraSiteArgs* sites;
  int64_t num_sites;
  const int32_t* ranks;  // [slots, table_sites]
  const float* scales;   // [slots, table_sites]
  int64_t table_sites;
  const int32_t* pages;  // [slots, groups, max_pages]
  int64_t groups, max_pages;
  const int32_t* tiles;  // [num_tiles, 3] slot, first index into rows, row count
  int64_t num_tiles;
  const int32_t* rows;
  int64_t num_rows;
  const float* row_scales;  // by index into rows, or null
  bool fixed_sums;          // whether a row's sums must not depend on the number of rows in its tile
  float* apart;             // for linear_lora: what to add, for each site [num_rows, width]
};

// LoRA that a matrix product adds. Each task prefetches the rank rows for some tiles while it multiplies some panels,
// then multiplies these tiles by them.
struct LinearLora {
  const LoraArgs& lora;
  int64_t num_tasks;  // at most the number of panels
};

struct KvWriteArgs {
  Dtype dtype;
  const void *k, *v;
  int64_t k_token, k_head, v_token, v_head;  // strides in elements
  char *k_cache, *v_cache;                   // see AttentionArgs
  int64_t k_stride, v_stride;
  bool is_coded;
  const int64_t* slots;
  int64_t num_tokens, kv_heads, k_dim, v_dim;
};

// Queries [first_query, first_query + num_queries) of a sequence, KV heads [kv_head, kv_head + num_kv_heads), keys
// [first_key, end_key).
//
// Consecutive tasks that differ only in their keys form a split: each writes its partial result to a slot of
// AttentionArgs.partials, and the rows are merged afterwards.
struct AttentionTask {
  int32_t seq, kv_head, num_kv_heads, first_query, num_queries;
  int32_t first_key, end_key;  // first_key is a multiple of kBlockTokens
  int32_t partial;             // slot, or -1: the task covers all keys of its queries and writes the output
};
struct AttentionMerge {
  int32_t first_task, num_tasks;
};

struct AttentionArgs {
  Dtype dtype;
  const void* q;
  int64_t q_token, q_head;  // strides in elements
  // [blocks, kv_heads] of block bytes: kBlockTokens rows of k_dim or v_dim entries; for int8 codes, followed by an fp32
  // scale per row.
  const void *k_cache, *v_cache;
  int64_t k_stride, v_stride;  // bytes between blocks
  int64_t k_block_bytes, v_block_bytes;
  bool is_coded;
  bool fixed_sums;  // whether a row's sums must not depend on the number of rows in its task
  void* out;  // [tokens, heads, v_dim] contiguous
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t *query_starts, *kv_lens;
  int64_t num_seqs, heads, kv_heads, k_dim, v_dim;
  float scale, softcap;
  int64_t window;
  const float* sinks;  // [heads] or null
  const AttentionTask* tasks;
  int64_t num_tasks;
  const AttentionMerge* merges;
  int64_t num_merges;
  float* partials;         // [slots, partial_floats]
  int64_t partial_floats;  // at least (v_dim + 2) * rows of a task
};

struct RmsNormArgs {
  Dtype dtype;
  Matrix x, residual;  // residual.data may be null
  Chunked out;
  const void* weight;
  int64_t rows, width;
  float eps;
  bool plus_one;
};

struct RotaryArgs {
  Dtype dtype;
  void *q, *k;
  int64_t q_token, q_head, k_token, k_head;  // strides in elements
  Matrix cos, sin;                           // [tokens, rotary_dim]
  int64_t num_tokens, q_heads, k_heads, rotary_dim;
};

enum class Activation { kSilu, kGelu, kGeluTanh, kSigmoid };

struct GatedActArgs {
  Dtype dtype;
  Matrix gate, up;
  Chunked out;
  int64_t rows, width;
  Activation act;
};

// Sets logits[rows[i], v] to -inf wherever bit v % 32 of words[i, v / 32] is 0.
struct MaskArgs {
  Dtype dtype;
  Matrix logits;  // [rows, width]
  int64_t width;
  const int64_t* rows;
  const uint32_t* words;  // [num_rows, num_words]
  int64_t num_rows, num_words;
};

struct ArgmaxArgs {
  Dtype dtype;
  Matrix x;  // [rows, width]
  int64_t rows, width;
  int64_t* ids;  // [rows]
  bool* finite;  // [rows]
};

// Per token: h[c, n] = exp(dt * a[c, n]) * h[c, n] + dt * x * b[n]; out is sum(h * c[n]) + skip * x, times silu(gate).
// If softplus is true, dt is softplus(dt + bias).
struct ScanArgs {
  Dtype dtype;
  Matrix x, gate, out;       // [tokens, channels]; gate.data may be null
  const float* dt;           // [tokens, channels]
  const float* a;            // [states, channels]
  const float *b, *c;        // [tokens, states]
  const float *skip, *bias;  // [channels] or null
  float* state;              // [states, channels]
  int64_t tokens, channels, states;
  bool softplus;
};

// Consecutive tokens of one sequence. Runs are computed in order: one may begin with the state that another wrote.
struct StateRun {
  int64_t start, end;         // rows
  int64_t read, write, save;  // slots of the initial and the final state; another copy of the latter, or -1
};

// Per token: s = exp(decay) * s; s += k (x) beta * (v - s^T k); out = s^T q / sqrt(key_dim).
struct DeltaArgs {
  Dtype dtype;
  const void *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
  void* out;                                                  // [tokens, heads, width]
  const float* decay;                                         // [tokens, heads] or [tokens, heads, key_dim]
  const float* beta;                                          // [tokens, heads]
  float* states;                                              // [slots, heads, key_dim, width]
  const StateRun* runs;
  int64_t num_runs, heads, key_heads, key_dim, width;
  bool per_channel;  // whether decay is per channel of a key
  bool normalize;    // whether q and k are scaled to length 1
  bool additive;     // whether s += k (x) beta * v, without subtracting s^T k
};

// The gates of a delta rule, computed from two small projections a and b: decay = rates * softplus(a + bias), beta =
// sigmoid(b) rounded to b's dtype.
struct DeltaGatesArgs {
  Dtype dtype;
  Matrix a, b;                // [tokens, heads]
  const float *rates, *bias;  // [heads]
  float *decay, *beta;        // [tokens, heads]
  int64_t tokens, heads;
};

// The fp32 inputs of Mamba2's scan: wide is the convolution's output, with the columns from `scaled_from` on times
// `scale`; steps = softplus(dt + bias), decay = rates * steps.
struct ScanInputsArgs {
  Dtype dtype;
  Matrix mixed, dt;           // [tokens, channels], [tokens, heads]
  const float *rates, *bias;  // [heads]
  float *wide, *decay, *steps;
  int64_t tokens, channels, heads, scaled_from;
  float scale;
};

// out = y * weight / rms(y) per group of columns, for y = (y + skip * x) * silu(gate); y is overwritten.
struct ScanNormArgs {
  Dtype dtype;         // of gate, weight and out
  Matrix gate, out;    // [tokens, heads * width]
  float* y;            // [tokens, heads, width]
  const float* x;      // [tokens, heads, width], tokens x_stride apart
  int64_t x_stride;
  const float* skip;   // [heads]
  const void* weight;  // [heads * width]
  int64_t tokens, heads, width, group;  // a group consists of whole heads
  float eps;
};

// out[t] = sum(weight[:, j] * x[t - taps + 1 + j]) + bias. A run starts from its state: its last `taps` inputs.
struct ConvArgs {
  Dtype dtype;
  Matrix x, out;       // [tokens, channels]
  const void* weight;  // [channels, taps]
  const void* bias;    // [channels] or null
  void* states;        // [slots, taps, channels]
  const StateRun* runs;
  int64_t num_runs, channels, taps;
  bool silu;
};

// How an adapter changes vectors of a layer, its inputs or its outputs, besides adding rank rows. All numbers are fp32.
enum class ChangeKind {
  kAdd,     // x + first
  kScale,   // x * first; with a second, rotations: plus the second times the other half of each group of `size`,
            // negated for the group's first half
  kAround,  // (x - second) * first + second; without a second: x * first
  kBlocks,  // every `size` numbers, as a row, times their matrix from first [width / size, size, size]
};
struct ChangeOp {
  ChangeKind kind;
  const float *first, *second;  // [width] except for kBlocks; the second may be null
  int64_t width, size;
};
struct ChangeTask {  // changes of some rows, in order
  const ChangeOp* ops;
  int64_t num_ops;
  const int64_t* rows;
  int64_t num_rows;
};
struct ChangeArgs {
  Dtype dtype;
  Matrix x;  // changed in place; every change rounds to its dtype
  const ChangeTask* tasks;
  int64_t num_tasks, num_runs;  // runs: of tasks, one thread each; few enough to be worth a thread
};

// The kernels of one instruction set.
struct Kernels {
  void (*linear)(const LinearArgs&);
  void (*linear_lora)(const LinearArgs&, const LinearLora&);
  // The arguments' panels are those of all weights, each with out_features columns, a multiple of kPanel; no bias.
  void (*linear_groups)(const LinearArgs&, const RowGroup*, int64_t num_groups);
  void (*weighted_rows)(const WeightedRowsArgs&);
  bool (*quant_uses_integers)(Dtype);
  void (*quant_prepare)(const QuantArgs&, float* x32, float* x_sums);
  int64_t (*quant_digits)(const QuantArgs&);  // see QuantArgs; 0: use x's numbers, never if they are rounded
  void (*quant_encode)(const QuantArgs&, int8_t* x_codes, float* x_scales, int32_t* x_halves);
  void (*quant_linear)(const QuantArgs&);
  // The arguments have one part: the panels of all weights, each with its out_features, a multiple of kPanel; no bias.
  void (*quant_groups)(const QuantArgs&, const RowGroup*, int64_t num_groups);
  void (*lora_add)(const LoraArgs&);
  void (*kv_write)(const KvWriteArgs&);
  void (*attention)(const AttentionArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*rotary)(const RotaryArgs&);
  void (*gated_act)(const GatedActArgs&);
  void (*change)(const ChangeArgs&);
  void (*mask_logits)(const MaskArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*scan)(const ScanArgs&);
  void (*delta_gates)(const DeltaGatesArgs&);
  void (*scan_inputs)(const ScanInputsArgs&);
  void (*scan_norm)(const ScanNormArgs&);
  void (*delta_rule)(const DeltaArgs&);
  void (*causal_conv)(const ConvArgs&);
  int64_t attention_rows;  // per task: enough to amortize packing keys
  // Approximate rows in a block that one thread computes between two attentions: results stay in its second-level
  // cache. Every block reads all weights. 0: products are so fast that threads should share them.
  int64_t block_rows;
  // Whether linear_lora exists and is faster. Products in tile registers finish too soon to prefetch adapters' rows
  // meanwhile.
  bool has_slow_products;
};

// What the library of an instruction set uses from the library that opens it.
#define LORAFLEET_SHARED __attribute__((visibility("default")))

// Whether the processor is made by AMD.
extern const LORAFLEET_SHARED bool is_amd;

// Runs task(context, i) for i in [0, num_tasks), on torch's number of threads or on up to num_threads; neighboring
// tasks mostly run on one thread, in order.
LORAFLEET_SHARED void run_tasks(int64_t num_tasks, void (*task)(const void* context, int64_t index), const void* context);
void run_tasks(int num_threads, int64_t num_tasks, void (*task)(const void* context, int64_t index),
               const void* context);

// Memory that the next operation reads completely, split among threads as run_tasks splits tasks. Threads waiting for
// that operation prefetch the beginning of their part. Only a hint: results do not depend on it.
struct ReadAhead {
  const void* data = nullptr;
  int64_t bytes = 0;
};
constexpr int kMaxAheadParts = 4;
void announce(const std::array<ReadAhead, kMaxAheadParts>& parts);

// The calling thread's scratch memory, 64-byte aligned, valid until its next call to scratch.
LORAFLEET_SHARED float* scratch(int64_t num_floats);

}  // namespace lorafleet

// In the library of an instruction set: its kernels.
extern "C" LORAFLEET_SHARED const lorafleet::Kernels* lorafleet_kernels();
