// Consecutive pre-norm decoder layers as one call. Run layer by layer from Python, a step switches between the
// interpreter and the kernels some two hundred times, and each time another thread may take the interpreter.
#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "stack.h"

namespace lorafleet {
namespace {

int64_t width_of(const Sites& sites) {
  int64_t width = 0;
  for (const int64_t size : sites.sizes) width += size;
  return width;
}

constexpr int64_t kPairBytes = 4;  // two adjacent entries of a packed row

// With few rows weights come from memory, and other operations occupy only one thread.
constexpr int64_t kFewRows = 4;

// Tells idle threads which weights are read next.
void announce_weights(const Sites& sites, const Tensor& x) {
  if (x.size(0) > kFewRows || sites.weights.size() > kMaxAheadParts) return;
  std::array<ReadAhead, kMaxAheadParts> parts;
  for (size_t i = 0; i < sites.weights.size(); ++i) parts[i] = {sites.weights[i].data, sites.weights[i].nbytes()};
  announce(parts);
}

bool changes_inputs(const Sites& sites, const Rows& rows) {
  return std::ranges::any_of(rows.changes, [&](const ChangedRows& own) {
    return std::ranges::any_of(sites.indices, [&](int64_t site) { return !own.changes->at(site, true).empty(); });
  });
}

// Whether an input is read only by a product that takes it in chunks: the preceding operation can then write chunks
// directly.
bool takes_chunks(const Sites& sites, const Rows& rows) {
  return sites.forms.empty() && !sites.is_plain() && (rows.lora.empty() || sites.a_rows.empty()) &&
         !changes_inputs(sites, rows);
}

void multiply_to(const Tensor& out, const Tensor& x, const Sites& sites) {
  if (x.dim() == 3)
    linear_of_chunks(out, x, sites.weights[0], sites.bias);
  else if (!sites.forms.empty())
    quant_linear_to(out, x, sites.weights, sites.forms, sites.sizes, sites.bias, sites.int8_inputs);
  else
    linear_to(out, x, sites.weights[0], sites.bias);
}

void copy_rows(const Tensor& to, const Tensor& from) {
  for (int64_t row = 0; row < from.size(0); ++row)
    std::memcpy(to.rows(row, 1).data, from.rows(row, 1).data, from.size(1) * from.element_size());
}

// The outputs of one of several siblings, whose columns start at `first`: [n, size].
Tensor product_of(const Sites& sites, size_t sibling, int64_t first, const Tensor& x) {
  const int64_t size = sites.sizes[sibling];
  const OptionalTensor bias = sites.bias ? OptionalTensor(sites.bias->rows(first, size)) : std::nullopt;
  if (sites.is_plain()) return plain_linear(x, sites.weights[0], sites.bias).columns(first, size);
  Sites own = {{}, {}, sites.int8_inputs, bias, {size}, {}, {}, {}, {}, {}};
  if (!sites.forms.empty()) {
    own.weights = {sites.weights[sibling]}, own.forms = {sites.forms[sibling]};
  } else if (first % kPanel == 0) {
    own.weights = {sites.weights[0].rows(first / kPanel, (size + kPanel - 1) / kPanel)};
  } else {  // it starts within a panel
    const Tensor all = empty({x.size(0), width_of(sites)}, x.type);
    multiply_to(all, x, sites);
    return all.columns(first, size);
  }
  const Tensor out = empty({x.size(0), size}, x.type);
  multiply_to(out, x, own);
  return out;
}

// Overwrites siblings' outputs in rows where adapters change their inputs x.
void multiply_changed(const Sites& sites, const Tensor& x, const Rows& rows, const std::vector<Tensor>& outs) {
  int64_t first = 0;
  for (size_t i = 0; i < sites.sizes.size(); first += sites.sizes[i++]) {
    std::vector<ChangedRows> changed = changed_at(rows.changes, sites.indices[i], true);
    std::vector<int64_t> places;
    for (ChangedRows& own : changed)
      for (int64_t& row : own.rows) places.push_back(row), row = static_cast<int64_t>(places.size()) - 1;
    if (places.empty()) continue;
    const Tensor inputs = empty({static_cast<int64_t>(places.size()), x.size(1)}, x.type);
    for (size_t row = 0; row < places.size(); ++row) copy_rows(inputs.rows(row, 1), x.rows(places[row], 1));
    change_(inputs, changed, sites.indices[i], true);
    const Tensor product = product_of(sites, i, first, inputs);
    for (size_t row = 0; row < places.size(); ++row) copy_rows(outs[i].rows(places[row], 1), product.rows(row, 1));
  }
}

// x with adapters' changes, for a layer without siblings.
Tensor changed_inputs(const Sites& sites, const Tensor& x, const Rows& rows) {
  const Tensor changed = empty({x.size(0), x.size(1)}, x.type);
  copy_rows(changed, x);
  change_(changed, rows.changes, sites.indices[0], true);
  return changed;
}

// The outputs of all siblings side by side: [n, sum of sizes]. x: [n, width] or [chunks, n, kXChunk]. out: memory for
// the outputs, if given; unused for plain weights.
Tensor project(const Sites& sites, const Tensor& x, const Step& step, const Rows& rows, OptionalTensor out = {}) {
  const bool has_lora = !rows.lora.empty() && !sites.a_rows.empty(), is_changed = changes_inputs(sites, rows);
  const Tensor inputs = is_changed && sites.sizes.size() == 1 ? changed_inputs(sites, x, rows) : x;
  if (sites.is_plain())
    out = plain_linear(inputs, sites.weights[0], sites.bias);
  else if (!out)
    out = empty({x.size(-2), width_of(sites)}, x.type);
  std::vector<Tensor> outs;
  int64_t first = 0;
  for (const int64_t size : sites.sizes) outs.push_back(out->columns(first, size)), first += size;
  const auto change_outputs = [&] {
    for (size_t i = 0; i < sites.indices.size(); ++i) change_(outs[i], rows.changes, sites.indices[i], false);
    return *out;
  };
  if (has_lora && !is_changed && !sites.is_plain() && sites.forms.empty()) {
    const LoraStep lora = {step.table[0], step.table[1], step.table[2], rows.lora[0],
                           rows.lora[1],  rows.lora[2],  rows.lora[3],  rows.row_scales};
    if (linear_lora_pays(x, lora)) {
      linear_lora_to(*out, x, sites.weights[0], sites.bias, outs, sites.lora(), lora);
      return change_outputs();
    }
  }
  if (!sites.is_plain()) multiply_to(*out, inputs, sites);
  if (is_changed && sites.sizes.size() > 1) multiply_changed(sites, x, rows, outs);
  if (has_lora)
    lora_add_(outs, x, sites.a_rows, sites.b_rows, sites.factors, sites.indices, sites.groups, step.table[0],
              step.table[1], step.table[2], rows.lora[0], rows.lora[1], rows.lora[2], rows.lora[3], rows.row_scales);
  return change_outputs();
}

// Normalizes heads [n, H, D] in place, through a copy: Norm needs rows at one stride.
void norm_heads(const Norm& norm, const Tensor& x) {
  const Tensor packed = empty(x.sizes(), x.type);
  const int64_t bytes = x.size(2) * x.element_size(), heads = x.size(1);
  const auto each_head = [&](const Tensor& other, const auto& copy) {
    for (int64_t i = 0; i < x.size(0) * heads; ++i)
      copy(x.data + (i / heads * x.stride(0) + i % heads * x.stride(1)) * x.element_size(), other.data + i * bytes);
  };
  each_head(packed, [&](char* own, char* other) { std::memcpy(other, own, bytes); });
  each_head(norm(packed), [&](char* own, char* other) { std::memcpy(own, other, bytes); });
}

// Queries, keys and values, adjacent in [n, width].
struct Heads {
  Tensor q, k, v;

  Heads(const Attention& a, const Tensor& qkv)
      : q(qkv.heads(0, a.heads, a.head_dim)),
        k(qkv.heads(a.heads * a.query_width(), a.kv_heads, a.head_dim)),
        v(qkv.heads(a.heads * a.query_width() + a.kv_heads * a.head_dim, a.kv_heads, a.value_dim)) {
    q.steps[1] = a.query_width();
  }
};

// A layer's computations before its attention: queries, keys and values, with the latter two also written to the cache;
// or the inputs of a delta rule.
//
// update: what the preceding layer still has to add to x. out: see `project`.
Tensor before_attention(const Layer& layer, const OptionalTensor& update, const Step& step, const Rows& rows,
                        const OptionalTensor& out) {
  announce_weights(layer.qkv(), rows.x);
  const bool in_chunks = takes_chunks(layer.qkv(), rows);
  const Tensor normed = update ? layer.norms[0](*update, rows.x, in_chunks) : layer.norms[0](rows.x, {}, in_chunks);
  const Tensor qkv = project(layer.qkv(), normed, step, rows, out);
  announce_weights(layer.out(), rows.x);
  if (layer.delta) return qkv;
  const Heads heads(layer.attention, qkv);
  if (layer.norms.size() == 4) norm_heads(layer.norms[2], heads.q), norm_heads(layer.norms[3], heads.k);
  rotary_(heads.q, heads.k, rows.cos, rows.sin);
  kv_write_(heads.k, heads.v, layer.attention.k_cache, layer.attention.v_cache, rows.slots);
  return qkv;
}

// Adjacent heads [T, H, D] as [T, H * D].
Tensor as_rows(Tensor heads) {
  const int64_t width = heads.size(1) * heads.size(2);
  heads.dims = 2, heads.shape = {heads.size(0), width}, heads.steps = {width, 1};
  return heads;
}

// Returns [T, heads * value_dim].
Tensor attend(const Attention& a, const Tensor& qkv, const Step& step) {
  Tensor attended = paged_attention(Heads(a, qkv).q, a.k_cache, a.v_cache, step.attention[0], step.attention[1],
                                    step.attention[2], a.scale, a.window, a.softcap, a.sinks);
  if (a.is_gated) {
    Tensor gate = qkv.heads(a.head_dim, a.heads, a.value_dim);
    gate.steps[1] = a.query_width();
    gate_heads_(attended, gate);
  }
  return as_rows(attended);
}

// The outputs of a delta rule, normed and gated: [T, heads * width]. projected: result of `before_attention`.
Tensor mix(const Layer& layer, const Tensor& projected, const Step& step) {
  const std::vector<int64_t>& sizes = layer.qkv().sizes;
  const int64_t gate = sizes[0], b = gate + sizes[1], a = b + sizes[2];
  const Tensor out = gated_delta(projected.columns(0, gate), projected.columns(b, sizes[2]),
                                 projected.columns(a, sizes[3]), *layer.delta, step.attention[4]);
  return gated_act(projected.columns(gate, sizes[1]), as_rows(layer.norms[2](out)), "silu");
}

// A layer's computations after its attention; returns what still has to be added to x.
Tensor behind_attention(const Layer& layer, const Tensor& attended, const Step& step, const Rows& rows) {
  const Tensor projected = project(layer.out(), attended, step, rows);
  announce_weights(layer.gate_up(), rows.x);
  const Tensor normed = layer.norms[1](projected, rows.x, takes_chunks(layer.gate_up(), rows));
  const Tensor out = project(layer.gate_up(), normed, step, rows);
  announce_weights(layer.down(), rows.x);
  const int64_t width = out.size(1) / 2;
  const Tensor activated =
      gated_act(out.columns(0, width), out.columns(width, width), layer.act, takes_chunks(layer.down(), rows));
  return project(layer.down(), activated, step, rows);
}

// Restricts adapters' tiles to the rows of a block.
void cut_lora(const Rows& whole, Rows& block) {
  const int32_t* from = entries_of<int32_t>(whole.lora[0], "rows");
  const int32_t* tiles = entries_of<int32_t>(whole.lora[2], "tiles");
  const int32_t num_tiles = entries_of<int32_t>(whole.lora[3], "counts")[3];
  const float* scales = whole.row_scales ? entries_of<float>(*whole.row_scales, "row_scales") : nullptr;
  const int32_t begin = static_cast<int32_t>(block.first), end = static_cast<int32_t>(block.first + block.count());
  const Tensor rows = empty({block.count()}, Scalar::kInt), kept = empty({num_tiles, 3}, Scalar::kInt);
  const Tensor counts = empty({4}, Scalar::kInt), row_scales = empty({block.count()}, Scalar::kFloat);
  int32_t *row = entries_of<int32_t>(rows, "rows"), *tile = entries_of<int32_t>(kept, "tiles");
  float* scale = entries_of<float>(row_scales, "row_scales");
  int32_t num_rows = 0, num_kept = 0;
  for (int32_t t = 0; t < num_tiles; ++t) {
    const int32_t* own = from + tiles[3 * t + 1];  // ascending
    const int32_t* const last = std::lower_bound(own, own + tiles[3 * t + 2], end);
    own = std::lower_bound(own, last, begin);
    if (own == last) continue;
    const auto num = static_cast<int32_t>(last - own);
    tile[0] = tiles[3 * t], tile[1] = num_rows, tile[2] = num;
    tile += 3, ++num_kept;
    for (; own < last; ++own, ++num_rows) {
      row[num_rows] = *own - begin;
      if (scales) scale[num_rows] = scales[own - from];
    }
  }
  if (!num_rows) return;
  int32_t* count = entries_of<int32_t>(counts, "counts");
  count[0] = num_rows, count[1] = 0, count[2] = count[3] = num_kept;
  block.lora = {rows, kept, kept, counts};
  if (scales) block.row_scales = row_scales;
}

// Splits rows into even blocks, the same number for every thread. Returns the whole if there are too few rows for that
// or blocks bring no gain.
std::vector<Rows> cut(const Rows& whole) {
  const int64_t rows = whole.count(), rows_at_once = active->block_rows * num_threads();
  if (rows_at_once == 0 || rows < rows_at_once) return {whole};
  const int64_t num = (rows + rows_at_once / 2) / rows_at_once * num_threads();
  std::vector<Rows> blocks;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t first = rows * i / num, count = rows * (i + 1) / num - first;
    Rows block = {first, whole.x.rows(first, count), whole.cos.rows(first, count), whole.sin.rows(first, count),
                  whole.slots.rows(first, count), {}, {}, changed_rows_of(whole.changes, first, count)};
    if (!whole.lora.empty()) cut_lora(whole, block);
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// Whether torch computes some product, in its own threads, with bits that may depend on the other rows.
bool is_plain(const std::vector<Layer>& layers) {
  return std::ranges::any_of(
      layers, [](const Layer& layer) { return std::ranges::any_of(layer.sites, &Sites::is_plain); });
}

// Calls f for each block; several blocks run in parallel, each computed by one thread.
template <typename F>
void each(const std::vector<Rows>& blocks, const F& f) {
  if (blocks.size() == 1) return f(blocks[0]);
  std::exception_ptr error;
  std::mutex error_mutex;
  run_tasks(blocks.size(), [&](int64_t i) {
    try {
      f(blocks[i]);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Turns layers into a model: head(norm(rows)) of their output.
struct Ends {
  OptionalTensor embedding;  // [V, width], packed like a linear layer's weight or not; none: inputs are rows, not ids
  Norm norm;
  Sites head;
};

struct Stack {
  std::vector<Layer> layers;
  std::optional<Ends> ends;
  Layer next;  // parts of the next layer, or of the ends, until `stack_layer` or `stack_ends` completes it
};

// Rows of a matrix [N, K], packed like a linear layer's weight or not, by number: [n, K].
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
  run_tasks(rows.size(), [&](int64_t i) {  // every pair of entries is in another cache line
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
  LORAFLEET_CHECK(indices.empty() || indices.size() == sizes.size(), "each of ", sizes.size(), " layers needs a site");
  stack_at(stack)->next.sites.push_back({kept(weights), kept(forms), int8_inputs, bias, kept(sizes), kept(a_rows),
                                         kept(b_rows), kept(factors), kept(indices), kept(groups)});
}

void stack_layer(int64_t stack, Ints shape, double scale, double softcap, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& sinks, std::string_view act) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  Layer layer = std::exchange(found->next, {});
  LORAFLEET_CHECK((layer.norms.size() == 2 || layer.norms.size() == 4) && layer.sites.size() == 4 && shape.size() == 6,
                  "a layer needs 2 or 4 norms, 4 linear layers and 6 sizes");
  layer.attention = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5] != 0, scale, softcap, k_cache, v_cache,
                     sinks};
  layer.act = act;
  found->layers.push_back(std::move(layer));
}

void stack_delta(int64_t stack, const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& conv_states,
                 const Tensor& rates, const Tensor& dt_bias, const Tensor& states, std::string_view act) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  Layer layer = std::exchange(found->next, {});
  LORAFLEET_CHECK(layer.norms.size() == 3 && layer.sites.size() == 4 && layer.sites[0].sizes.size() == 4,
                  "a layer with a delta rule needs 3 norms and 4 linear layers, of which the first are 4 siblings");
  layer.delta = {conv_weight, conv_bias, conv_states, rates, dt_bias, states};
  layer.act = act;
  found->layers.push_back(std::move(layer));
}

// Required for computing logits. The norm and the linear layer (the head) were added before.
void stack_ends(int64_t stack, const OptionalTensor& embedding) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  const Layer parts = std::exchange(found->next, {});
  LORAFLEET_CHECK(parts.norms.size() == 1 && parts.sites.size() == 1, "the ends of a stack need a norm and a head");
  found->ends = {embedding, parts.norms[0], parts.sites[0]};
}

// Runs layers up to the last one's attention: changes x in place and returns the attention's output.
Tensor run_to_last_attention(const std::vector<Layer>& layers, const Tensor& x, const Step& step) {
  Tensor attended;
  for (size_t i = 0; i < layers.size(); ++i) {
    OptionalTensor qkv;
    if (!step.is_whole()) qkv = empty({x.size(0), width_of(layers[i].qkv())}, x.type);
    each(step.blocks, [&](const Rows& rows) {
      OptionalTensor update;
      if (i > 0) update = behind_attention(layers[i - 1], rows.of(attended), step, rows);
      const Tensor own = before_attention(layers[i], update, step, rows, qkv ? rows.of(*qkv) : OptionalTensor());
      if (!qkv) qkv = own;
    });
    attended = layers[i].delta ? mix(layers[i], *qkv, step) : attend(layers[i].attention, *qkv, step);
  }
  return attended;
}

Step step_of(const std::vector<Layer>& layers, Rows whole, Tensors attention, Tensors table) {
  LORAFLEET_CHECK(!layers.empty(), "a stack needs layers");
  const bool has_states = std::ranges::any_of(layers, [](const Layer& layer) { return layer.delta.has_value(); });
  LORAFLEET_CHECK(attention.size() == 4u + has_states &&
                  (whole.lora.empty() || (whole.lora.size() == 4 && table.size() == 3)),
                  "a step has 4 tensors of attention, one more with states, and 3 and 4, or none, of adapters");
  whole.slots = attention[3];
  return {attention, table, is_plain(layers) ? std::vector<Rows>{whole} : cut(whole)};
}

// Replaces x [T, width] in place by the last layer's output.
void stack_run(int64_t stack, const Tensor& x, const Tensor& cos, const Tensor& sin, Tensors attention, Tensors table,
               Tensors lora, const OptionalTensor& row_scales, Tensors changes) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  const std::vector<Layer>& layers = found->layers;
  const Rows whole = {0, x, cos, sin, {}, {lora.begin(), lora.end()}, row_scales, changed_rows(changes, x.size(0))};
  const Step step = step_of(layers, whole, attention, table);
  const Tensor attended = run_to_last_attention(layers, x, step);
  each(step.blocks, [&](const Rows& rows) {
    // The norm is called for the sum that it writes to x.
    layers.back().norms[1](behind_attention(layers.back(), rows.of(attended), step, rows), rows.x);
  });
}

// The logits [n, V] of some tokens, or of all. tokens: ids [T], or rows [T, width], which change. angles: cos and sin
// by position, [positions, 2 * R].
//
// After the last attention only the rows for logits are computed, except with plain weights, whose products could then
// have other bits.
Tensor stack_logits(int64_t stack, const Tensor& tokens, const Tensor& positions, const Tensor& angles,
                    const OptionalTensor& logit_rows, Tensors attention, Tensors table, Tensors lora,
                    const OptionalTensor& row_scales, Tensors changes, Tensors head_lora,
                    const OptionalTensor& head_scales, Tensors head_changes) {
  const std::shared_ptr<Stack> found = stack_at(stack);
  LORAFLEET_CHECK(found->ends, "the stack has no ends");
  const Ends& ends = *found->ends;
  const std::vector<Layer>& layers = found->layers;
  const bool are_ids = tokens.type == Scalar::kLong;
  LORAFLEET_CHECK(!are_ids || ends.embedding, "the stack has no embedding");
  const Tensor x = are_ids ? rows_at(*ends.embedding, tokens) : tokens, both = rows_at(angles, positions);
  const int64_t width = both.size(1) / 2;
  const Tensor cos = both.columns(0, width), sin = both.columns(width, width);
  const Rows whole = {0, x, cos, sin, {}, {lora.begin(), lora.end()}, row_scales, changed_rows(changes, x.size(0))};
  const Step step = step_of(layers, whole, attention, table);
  const Tensor attended = run_to_last_attention(layers, x, step);
  const int64_t num_last = logit_rows ? logit_rows->numel() : x.size(0);
  Rows last = {0, x, {}, {}, {}, {head_lora.begin(), head_lora.end()}, head_scales, changed_rows(head_changes, num_last)};
  Tensor normed;
  if (logit_rows && !is_plain(layers)) {
    last.x = rows_at(x, *logit_rows);
    normed = ends.norm(behind_attention(layers.back(), rows_at(attended, *logit_rows), step, last), last.x);
  } else {
    normed = ends.norm(behind_attention(layers.back(), attended, step, whole), x);
    if (logit_rows) normed = rows_at(normed, *logit_rows);
  }
  announce_weights(ends.head, normed);
  return project(ends.head, normed, step, last);
}

}  // namespace lorafleet
