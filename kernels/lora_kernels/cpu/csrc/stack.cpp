// Consecutive pre-norm decoder layers as one call. Run layer by layer from Python, a step crosses between the
// interpreter and the kernels some two hundred times, and each time another thread may take the interpreter.
#include <ATen/ops/linear.h>
#include <torch/custom_class.h>

#include <string>
#include <tuple>
#include <vector>

#include "bind.h"

namespace lorafleet {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What reads one input: sibling linear layers as one product, and their places in the adapter pool.
struct Sites {
  std::vector<Tensor> weights;  // one, packed [panels, K / 2, 32, 2] or [N, K]; or panels of quantised ones
  std::vector<int64_t> forms;   // of quantised ones; none: they are not
  OptionalTensor bias;
  std::vector<int64_t> sizes;  // output widths of the siblings
  std::vector<Tensor> a_rows, b_rows;  // none: no adapter touches these layers
  std::vector<int64_t> indices, groups;
};
using SitesTuple = std::tuple<std::vector<Tensor>, std::vector<int64_t>, OptionalTensor, std::vector<int64_t>,
                              std::vector<Tensor>, std::vector<Tensor>, std::vector<int64_t>, std::vector<int64_t>>;

struct Norm {
  Tensor weight;
  double eps;
  bool plus_one;

  Tensor operator()(const Tensor& x, const OptionalTensor& residual = {}) const {
    return rms_norm(x, weight, eps, residual, plus_one);
  }
};
using NormTuple = std::tuple<Tensor, double, bool>;

struct Attention {
  int64_t heads, kv_heads, head_dim, value_dim, window;
  double scale, softcap;
  Tensor k_cache, v_cache;
  OptionalTensor sinks;
};

struct Layer {
  Norm first, second;
  std::vector<Norm> head_norms;  // of queries and keys, or none
  Sites qkv, out, gate_up, down;
  Attention attention;
  std::string act;
};

// The step's work lists: lora_kernels.segments names and explains them.
struct Step {
  Tensor cos, sin;
  std::vector<Tensor> attention;  // block_tables, query_starts, kv_lens, slot_mapping
  std::vector<Tensor> table;      // ranks, scales, pages
  std::vector<Tensor> lora;       // rows, small_tiles, large_tiles, counts; none: no row has an adapter
  OptionalTensor row_scales;
};

Sites sites_of(const SitesTuple& t) {
  return std::apply([](const auto&... part) { return Sites{part...}; }, t);
}

Norm norm_of(const NormTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

int64_t width_of(const Sites& sites) {
  int64_t width = 0;
  for (const int64_t size : sites.sizes) width += size;
  return width;
}

// With few rows the weights come from memory, and other operations give the threads but one something to do.
constexpr int64_t kFewRows = 4;

// Tells idle threads which weights are read next.
void announce_weights(const Sites& sites, const Tensor& x) {
  if (x.size(0) > kFewRows || sites.weights.size() > kMaxAheadParts) return;
  std::array<ReadAhead, kMaxAheadParts> parts;
  for (size_t i = 0; i < sites.weights.size(); ++i)
    parts[i] = {sites.weights[i].const_data_ptr(), static_cast<int64_t>(sites.weights[i].nbytes())};
  announce(parts);
}

// Returns the outputs of all siblings side by side: [T, sum of sizes].
Tensor project(const Sites& sites, const Tensor& x, const Step& step) {
  const Tensor& weight = sites.weights[0];
  Tensor out = !sites.forms.empty() ? quant_linear(x, sites.weights, sites.forms, sites.sizes, sites.bias)
               : weight.dim() == 4  ? linear(x, weight, sites.bias, width_of(sites))
                                    : at::linear(x, weight, sites.bias);
  if (step.lora.empty() || sites.a_rows.empty()) return out;
  const std::vector<Tensor> outs = out.split_with_sizes(sites.sizes, -1);
  lora_add_(outs, x, sites.a_rows, sites.b_rows, sites.indices, sites.groups, step.table[0], step.table[1],
            step.table[2], step.lora[0], step.lora[1], step.lora[2], step.lora[3], step.row_scales);
  return out;
}

Tensor attend(const Layer& layer, const Tensor& x, const Step& step) {
  const Attention& a = layer.attention;
  const int64_t q_width = a.heads * a.head_dim, k_width = a.kv_heads * a.head_dim, v_width = a.kv_heads * a.value_dim;
  const Tensor out = project(layer.qkv, x, step);
  announce_weights(layer.out, x);
  Tensor q = out.narrow(1, 0, q_width).unflatten(1, {a.heads, a.head_dim});
  Tensor k = out.narrow(1, q_width, k_width).unflatten(1, {a.kv_heads, a.head_dim});
  const Tensor v = out.narrow(1, q_width + k_width, v_width).unflatten(1, {a.kv_heads, a.value_dim});
  if (!layer.head_norms.empty()) {
    q = layer.head_norms[0](q.contiguous());
    k = layer.head_norms[1](k.contiguous());
  }
  rotary_(q, k, step.cos, step.sin);
  kv_write_(k, v, a.k_cache, a.v_cache, step.attention[3]);
  const Tensor attended = paged_attention(q, a.k_cache, a.v_cache, step.attention[0], step.attention[1],
                                          step.attention[2], a.scale, a.window, a.softcap, a.sinks);
  return project(layer.out, attended.view({x.size(0), a.heads * a.value_dim}), step);
}

Tensor feed_forward(const Layer& layer, const Tensor& x, const Step& step) {
  const Tensor out = project(layer.gate_up, x, step);
  announce_weights(layer.down, x);
  const int64_t width = out.size(1) / 2;
  return project(layer.down, gated_act(out.narrow(1, 0, width), out.narrow(1, width, width), layer.act), step);
}

struct DecoderStack : torch::CustomClassHolder {
  std::vector<Layer> layers;

  void add_layer(const std::vector<NormTuple>& norms, const SitesTuple& qkv, const SitesTuple& out,
                 const SitesTuple& gate_up, const SitesTuple& down, const std::vector<int64_t>& shape,
                 const std::vector<double>& scale_softcap, const std::vector<Tensor>& caches,
                 const OptionalTensor& sinks, const std::string& act) {
    TORCH_CHECK((norms.size() == 2 || norms.size() == 4) && shape.size() == 5 && scale_softcap.size() == 2 &&
                    caches.size() == 2,
                "a layer needs 2 or 4 norms, 5 sizes, a scale, a softcap and 2 caches");
    Layer layer = {norm_of(norms[0]), norm_of(norms[1]), {}, sites_of(qkv), sites_of(out), sites_of(gate_up),
                   sites_of(down), {shape[0], shape[1], shape[2], shape[3], shape[4], scale_softcap[0],
                   scale_softcap[1], caches[0], caches[1], sinks}, act};
    for (size_t i = 2; i < norms.size(); ++i) layer.head_norms.push_back(norm_of(norms[i]));
    layers.push_back(std::move(layer));
  }

  // x [T, width] becomes, in place, what the last layer gives.
  void run(Tensor x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& attention,
           const std::vector<Tensor>& table, const std::vector<Tensor>& lora, const OptionalTensor& row_scales) {
    const c10::InferenceMode guard;
    const Step step = {cos, sin, attention, table, lora, row_scales};
    OptionalTensor update;  // what the layer before has yet to add to x
    for (const Layer& layer : layers) {
      announce_weights(layer.qkv, x);
      const Tensor normed = update ? layer.first(*update, x) : layer.first(x);
      const Tensor attended = attend(layer, normed, step);
      announce_weights(layer.gate_up, x);
      update = feed_forward(layer, layer.second(attended, x), step);
    }
    if (update) x.add_(*update);
  }
};

}  // namespace

void register_stack(torch::Library& library) {
  library.class_<DecoderStack>("DecoderStack")
      .def(torch::init<>())
      .def("add_layer", &DecoderStack::add_layer)
      .def("run", &DecoderStack::run);
}

}  // namespace lorafleet
