// Consecutive pre-norm decoder layers as one call. Run layer by layer from Python, a step crosses between the
// interpreter and the kernels some two hundred times, and each time another thread may take the interpreter.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "operations.h"

namespace lorafleet {
namespace {

// What reads one input: sibling linear layers as one product, and their places in the adapter pool.
struct Sites {
  std::vector<Tensor> weights;  // one, packed [panels, K / 2, 32, 2] or [N, K]; or panels of quantised ones
  std::vector<int64_t> forms;   // of quantised ones; none: they are not
  bool int8_inputs;             // of quantised ones
  OptionalTensor bias;
  std::vector<int64_t> sizes;  // output widths of the siblings
  std::vector<Tensor> a_rows, b_rows;  // none: no adapter touches these layers
  std::vector<Tensor> factors;         // of int8 rows
  std::vector<int64_t> indices, groups;
};

struct Norm {
  Tensor weight;
  double eps;
  bool plus_one;

  Tensor operator()(const Tensor& x, const OptionalTensor& residual = {}) const {
    return rms_norm(x, weight, eps, residual, plus_one);
  }
};

struct Attention {
  int64_t heads, kv_heads, head_dim, value_dim, window;
  double scale, softcap;
  Tensor k_cache, v_cache;
  OptionalTensor sinks;
};

struct Layer {
  std::vector<Norm> norms;   // before attention and MLP; of queries and keys, if there are any
  std::vector<Sites> sites;  // qkv, out, gate_up, down
  Attention attention;
  std::string act;

  const Sites& qkv() const { return sites[0]; }
  const Sites& out() const { return sites[1]; }
  const Sites& gate_up() const { return sites[2]; }
  const Sites& down() const { return sites[3]; }
};

struct Step {
  const Tensor &cos, &sin;
  Tensors attention;  // block_tables, query_starts, kv_lens, slot_mapping
  Tensors table;      // ranks, scales, pages
  Tensors lora;       // rows, small_tiles, large_tiles, counts; none: no row has an adapter
  const OptionalTensor& row_scales;
};

int64_t width_of(const Sites& sites) {
  int64_t width = 0;
  for (const int64_t size : sites.sizes) width += size;
  return width;
}

constexpr int64_t kPairBytes = 4;  // two entries of a packed row, which lie together

// With few rows the weights come from memory, and other operations give the threads but one something to do.
constexpr int64_t kFewRows = 4;

// Tells idle threads which weights are read next.
void announce_weights(const Sites& sites, const Tensor& x) {
  if (x.size(0) > kFewRows || sites.weights.size() > kMaxAheadParts) return;
  std::array<ReadAhead, kMaxAheadParts> parts;
  for (size_t i = 0; i < sites.weights.size(); ++i) parts[i] = {sites.weights[i].data, sites.weights[i].nbytes()};
  announce(parts);
}

// Returns the outputs of all siblings side by side: [T, sum of sizes].
Tensor project(const Sites& sites, const Tensor& x, const Step& step) {
  const Tensor& weight = sites.weights[0];
  const Tensor out =
      !sites.forms.empty()
          ? quant_linear(x, sites.weights, sites.forms, sites.sizes, sites.bias, sites.int8_inputs)
      : weight.dim() == 4 ? linear(x, weight, sites.bias, width_of(sites))
                          : plain_linear(x, weight, sites.bias);
  if (step.lora.empty() || sites.a_rows.empty()) return out;
  std::vector<Tensor> outs;
  int64_t first = 0;
  for (const int64_t size : sites.sizes) outs.push_back(out.columns(first, size)), first += size;
  lora_add_(outs, x, sites.a_rows, sites.b_rows, sites.factors, sites.indices, sites.groups, step.table[0], step.table[1],
            step.table[2], step.lora[0], step.lora[1], step.lora[2], step.lora[3], step.row_scales);
  return out;
}

// A copy of heads [T, H, D] whose tokens lie one after the other, as rows need them.
Tensor packed_heads(const Tensor& x) {
  const Tensor copy = empty(x.sizes(), x.type);
  const int64_t bytes = x.size(1) * x.size(2) * x.element_size();
  for (int64_t t = 0; t < x.size(0); ++t)
    std::memcpy(copy.data + t * bytes, x.data + t * x.stride(0) * x.element_size(), bytes);
  return copy;
}

Tensor attend(const Layer& layer, const Tensor& x, const Step& step) {
  const Attention& a = layer.attention;
  const int64_t q_width = a.heads * a.head_dim, k_width = a.kv_heads * a.head_dim;
  const Tensor out = project(layer.qkv(), x, step);
  announce_weights(layer.out(), x);
  Tensor q = out.heads(0, a.heads, a.head_dim), k = out.heads(q_width, a.kv_heads, a.head_dim);
  const Tensor v = out.heads(q_width + k_width, a.kv_heads, a.value_dim);
  if (layer.norms.size() == 4) {
    q = layer.norms[2](packed_heads(q));
    k = layer.norms[3](packed_heads(k));
  }
  rotary_(q, k, step.cos, step.sin);
  kv_write_(k, v, a.k_cache, a.v_cache, step.attention[3]);
  Tensor attended = paged_attention(q, a.k_cache, a.v_cache, step.attention[0], step.attention[1], step.attention[2],
                                    a.scale, a.window, a.softcap, a.sinks);
  const int64_t width = a.heads * a.value_dim;
  attended.dims = 2, attended.shape = {x.size(0), width}, attended.steps = {width, 1};
  return project(layer.out(), attended, step);
}

Tensor feed_forward(const Layer& layer, const Tensor& x, const Step& step) {
  const Tensor out = project(layer.gate_up(), x, step);
  announce_weights(layer.down(), x);
  const int64_t width = out.size(1) / 2;
  return project(layer.down(), gated_act(out.columns(0, width), out.columns(width, width), layer.act), step);
}

// What makes a model of layers: head(norm(rows)) of their output.
struct Ends {
  OptionalTensor embedding;  // [V, width], packed as a linear layer's weight or not; none: rows are given, not ids
  Norm norm;
  Sites head;
};

struct Stack {
  std::vector<Layer> layers;
  std::optional<Ends> ends;
  Layer next;  // its parts, or those of the ends, until `stack_layer` or `stack_ends` has the rest
};

// Rows of a matrix [N, K], packed as a linear layer's weight or not, by number: [n, K].
Tensor rows_at(const Tensor& matrix, const Tensor& numbers) {
  const bool is_packed = matrix.dim() == 4;
  const int64_t lanes = is_packed ? matrix.size(2) : 1, most = matrix.size(0) * lanes;
  const int64_t width = is_packed ? 2 * matrix.size(1) : matrix.size(1), bytes = width * matrix.element_size();
  LORAFLEET_CHECK(matrix.is_contiguous(), "rows are taken of contiguous matrices");
  const std::span<const int64_t> rows(entries_of<int64_t>(numbers, "row numbers"), numbers.numel());
  for (const int64_t row : rows) LORAFLEET_CHECK(0 <= row && row < most, "there is no row ", row, " of ", most);
  const Tensor out = empty({numbers.numel(), width}, matrix.type);
  if (!is_packed) {
    for (size_t i = 0; i < rows.size(); ++i) std::memcpy(out.data + i * bytes, matrix.data + rows[i] * bytes, bytes);
    return out;
  }
  run_tasks(rows.size(), [&](int64_t i) {  // each pair of entries lies in a cache line of its own
    const char* from = matrix.data + rows[i] / lanes * lanes * bytes + rows[i] % lanes * kPairBytes;
    for (int64_t at = 0; at < bytes; at += kPairBytes)
      std::memcpy(out.data + i * bytes + at, from + at * lanes, kPairBytes);
  });
  return out;
}

std::mutex stacks_mutex;
std::map<int64_t, std::shared_ptr<Stack>> stacks;

std::shared_ptr<Stack> stack_at(int64_t number) {
  const std::lock_guard<std::mutex> lock(stacks_mutex);
  const auto found = stacks.find(number);
  LORAFLEET_CHECK(found != stacks.end(), "there is no stack ", number);
  return found->second;
}

std::vector<Tensor> kept(Tensors tensors) { return {tensors.begin(), tensors.end()}; }
std::vector<int64_t> kept(Ints ints) { return {ints.begin(), ints.end()}; }

}  // namespace

int64_t stack_new() {
  static int64_t number = 0;
  const std::lock_guard<std::mutex> lock(stacks_mutex);
  stacks[++number] = std::make_shared<Stack>();
  return number;
}

void stack_free(int64_t stack) {
  const std::lock_guard<std::mutex> lock(stacks_mutex);
  stacks.erase(stack);
}

void stack_norm(int64_t stack, const Tensor& weight, double eps, bool plus_one) {
  stack_at(stack)->next.norms.push_back({weight, eps, plus_one});
}

void stack_linears(int64_t stack, Tensors weights, Ints forms, bool int8_inputs, const OptionalTensor& bias, Ints sizes,
                   Tensors a_rows, Tensors b_rows, Tensors factors, Ints indices, Ints groups) {
  LORAFLEET_CHECK(!weights.empty(), "linear layers need a weight");
  stack_at(stack)->next.sites.push_back({kept(weights), kept(forms), int8_inputs, bias, kept(sizes), kept(a_rows),
                                         kept(b_rows), kept(factors), kept(indices), kept(groups)});
}

void stack_layer(int64_t stack, Ints shape, double scale, double softcap, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& sinks, std::string_view act) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  Layer layer = std::exchange(found->next, {});
  LORAFLEET_CHECK((layer.norms.size() == 2 || layer.norms.size() == 4) && layer.sites.size() == 4 && shape.size() == 5,
                  "a layer needs 2 or 4 norms, 4 linear layers and 5 sizes");
  layer.attention = {shape[0], shape[1], shape[2], shape[3], shape[4], scale, softcap, k_cache, v_cache, sinks};
  layer.act = act;
  found->layers.push_back(std::move(layer));
}

// Only after this a stack can be asked for logits. Its norm and its linear layer, the head, were added before.
void stack_ends(int64_t stack, const OptionalTensor& embedding) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  const Layer parts = std::exchange(found->next, {});
  LORAFLEET_CHECK(parts.norms.size() == 1 && parts.sites.size() == 1, "the ends of a stack need a norm and a head");
  found->ends = {embedding, parts.norms[0], parts.sites[0]};
}

// x [T, width] becomes, in place, what the last layer gives, but for what is returned, which has yet to be added.
Tensor run_layers(const std::vector<Layer>& layers, const Tensor& x, const Step& step) {
  LORAFLEET_CHECK(!layers.empty(), "a stack needs layers");
  LORAFLEET_CHECK(step.attention.size() == 4 && (step.lora.empty() || (step.lora.size() == 4 && step.table.size() == 3)),
                  "a step has 4 tensors of attention, and 3 and 4, or none, of adapters");
  OptionalTensor update;
  for (const Layer& layer : layers) {
    announce_weights(layer.qkv(), x);
    const Tensor normed = update ? layer.norms[0](*update, x) : layer.norms[0](x);
    const Tensor attended = attend(layer, normed, step);
    announce_weights(layer.gate_up(), x);
    update = feed_forward(layer, layer.norms[1](attended, x), step);
  }
  return *update;
}

void stack_run(int64_t stack, const Tensor& x, const Tensor& cos, const Tensor& sin, Tensors attention, Tensors table,
               Tensors lora, const OptionalTensor& row_scales) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  const Tensor update = run_layers(found->layers, x, {cos, sin, attention, table, lora, row_scales});
  found->layers.back().norms[1](update, x);  // for the sum that it leaves in x
}

// Returns the logits [n, V] of some tokens, or of all. tokens: ids [T], or rows [T, width], which change. angles: cos
// and sin by position, [positions, 2 * R].
Tensor stack_logits(int64_t stack, const Tensor& tokens, const Tensor& positions, const Tensor& angles,
                    const OptionalTensor& logit_rows, Tensors attention, Tensors table, Tensors lora,
                    const OptionalTensor& row_scales, Tensors head_lora, const OptionalTensor& head_scales) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  LORAFLEET_CHECK(found->ends, "the stack has no ends");
  const Ends& ends = *found->ends;
  const bool are_ids = tokens.type == Scalar::kLong;
  LORAFLEET_CHECK(!are_ids || ends.embedding, "the stack has no embedding");
  const Tensor x = are_ids ? rows_at(*ends.embedding, tokens) : tokens, both = rows_at(angles, positions);
  const int64_t width = both.size(1) / 2;
  const Tensor cos = both.columns(0, width), sin = both.columns(width, width);
  const Tensor update = run_layers(found->layers, x, {cos, sin, attention, table, lora, row_scales});
  const Tensor normed = ends.norm(update, x);
  announce_weights(ends.head, x);
  return project(ends.head, logit_rows ? rows_at(normed, *logit_rows) : normed,
                 {cos, sin, attention, table, head_lora, head_scales});
}

}  // namespace lorafleet
