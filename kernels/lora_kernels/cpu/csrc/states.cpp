// torch's side of the operations of layers that keep a state.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "bind.h"
#include "kernels.h"

namespace lorafleet {
namespace {

const float* floats(const std::optional<Tensor>& t, at::IntArrayRef sizes, const char* name) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->sizes() == sizes, name, " must be float32 ",
              sizes);
  return t->const_data_ptr<float>();
}

Tensor selective_scan(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                      const Tensor& state, const std::optional<Tensor>& skip, const std::optional<Tensor>& gate,
                      const std::optional<Tensor>& dt_bias, bool softplus) {
  TORCH_CHECK(x.dim() == 2 && a.dim() == 2, "x must be [T, C], a [N, C]");
  const int64_t tokens = x.size(0), channels = x.size(1), states = a.size(0);
  if (gate) {
    TORCH_CHECK(gate->sizes() == x.sizes(), "gate must have the shape of x");
    check_same_dtype(*gate, x, "gate");
  }
  floats(state, {states, channels}, "state");
  Tensor out = at::empty(x.sizes(), x.options());
  const Matrix gates = gate ? rows_of(*gate, "gate") : Matrix{nullptr, 0};
  const float *steps = floats(dt, {tokens, channels}, "dt"), *rates = floats(a, {states, channels}, "a");
  const float *into = floats(b, {tokens, states}, "b"), *from = floats(c, {tokens, states}, "c");
  const float *skips = floats(skip, {channels}, "skip"), *biases = floats(dt_bias, {channels}, "dt_bias");
  active->scan({dtype_of(x), rows_of(x, "x"), gates, {out.data_ptr(), channels}, steps, rates, into, from, skips,
                biases, state.mutable_data_ptr<float>(), tokens, channels, states, softplus});
  return out;
}

// Runs int64 [n, 5] of a step's tokens, whose rows and slots are all there.
const StateRun* runs_of(const Tensor& runs, int64_t tokens, int64_t slots) {
  static_assert(sizeof(StateRun) == 5 * sizeof(int64_t));
  TORCH_CHECK(runs.dim() == 2 && runs.size(1) == 5, "runs must be int64 [n, 5]");
  const auto* found = reinterpret_cast<const StateRun*>(ints<int64_t>(runs, "runs"));
  for (int64_t i = 0; i < runs.size(0); ++i) {
    const StateRun& run = found[i];
    TORCH_CHECK(0 <= run.start && run.start < run.end && run.end <= tokens, "run ", i, " is of tokens ", run.start,
                " to ", run.end, " of ", tokens);
    TORCH_CHECK(0 <= run.read && run.read < slots && 0 <= run.write && run.write < slots && run.save < slots, "run ",
                i, " has a slot that is not there");
  }
  return found;
}

Tensor delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                  const Tensor& states, const Tensor& runs, bool normalize) {
  TORCH_CHECK(q.dim() == 3 && v.dim() == 3 && q.sizes() == k.sizes() && q.size(0) == v.size(0),
              "q and k must be [T, H, K], v [T, G, V]");
  const int64_t tokens = v.size(0), heads = v.size(1), key_heads = k.size(1), key_dim = k.size(2), width = v.size(2);
  TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " heads of values, ", key_heads, " of keys");
  TORCH_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1, "heads need entries that are contiguous");
  check_same_dtype(k, q, "k");
  check_same_dtype(v, q, "v");
  const bool per_channel = g.dim() == 3;
  const float* decays = per_channel ? floats(g, {tokens, heads, key_dim}, "g") : floats(g, {tokens, heads}, "g");
  floats(states, {states.size(0), heads, key_dim, width}, "states");
  Tensor out = at::empty(v.sizes(), v.options());
  active->delta_rule({
      .dtype = dtype_of(q),
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .q_token = q.stride(0),
      .q_head = q.stride(1),
      .k_token = k.stride(0),
      .k_head = k.stride(1),
      .v_token = v.stride(0),
      .v_head = v.stride(1),
      .out = out.data_ptr(),
      .decay = decays,
      .beta = floats(beta, {tokens, heads}, "beta"),
      .states = states.mutable_data_ptr<float>(),
      .runs = runs_of(runs, tokens, states.size(0)),
      .num_runs = runs.size(0),
      .heads = heads,
      .key_heads = key_heads,
      .key_dim = key_dim,
      .width = width,
      .per_channel = per_channel,
      .normalize = normalize,
  });
  return out;
}

Tensor causal_conv(const Tensor& x, const Tensor& weight, const Tensor& states, const Tensor& runs,
                   const std::optional<Tensor>& bias, bool silu) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) == x.size(1), "x must be [T, C], weight [C, K]");
  const int64_t channels = x.size(1), taps = weight.size(1);
  check_same_dtype(weight, x, "weight");
  check_same_dtype(states, x, "states");
  TORCH_CHECK(weight.is_contiguous() && states.is_contiguous(), "weight and states must be contiguous");
  TORCH_CHECK(states.dim() == 3 && states.size(1) == taps && states.size(2) == channels, "states must be [slots, ",
              taps, ", ", channels, "]");
  if (bias) {
    check_same_dtype(*bias, x, "bias");
    TORCH_CHECK(bias->is_contiguous() && bias->numel() == channels, "bias needs ", channels, " entries");
  }
  Tensor out = at::empty(x.sizes(), x.options());
  active->causal_conv({
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .out = {out.data_ptr(), channels},
      .weight = weight.const_data_ptr(),
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .states = states.data_ptr(),
      .runs = runs_of(runs, x.size(0), states.size(0)),
      .num_runs = runs.size(0),
      .channels = channels,
      .taps = taps,
      .silu = silu,
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorafleet, m) {
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor(a!) state, Tensor? skip, Tensor? gate, "
      "Tensor? dt_bias, bool softplus) -> Tensor");
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) states, Tensor runs, "
      "bool normalize) -> Tensor");
  m.def(
      "causal_conv(Tensor x, Tensor weight, Tensor(a!) states, Tensor runs, Tensor? bias, bool silu) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorafleet, CPU, m) {
  m.impl("selective_scan", &selective_scan);
  m.impl("delta_rule", &delta_rule);
  m.impl("causal_conv", &causal_conv);
}

}  // namespace lorafleet
