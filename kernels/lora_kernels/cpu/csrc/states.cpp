// Argument checks for the operations of layers with a state.
#include <cmath>

#include "operations.h"

namespace lorafleet {
namespace {

const float* floats(const OptionalTensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  if (!t) return nullptr;
  std::string wanted;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  LORAFLEET_CHECK(t->has_sizes(sizes), name, " must be float32 [", wanted, "]");
  return entries_of<float>(*t, name);
}

// Checks runs, int64 [n, 5]: a step's rows and state slots must exist.
const StateRun* runs_of(const Tensor& runs, int64_t tokens, int64_t slots) {
  static_assert(sizeof(StateRun) == 5 * sizeof(int64_t));
  LORAFLEET_CHECK(runs.dim() == 2 && runs.size(1) == 5, "runs must be int64 [n, 5]");
  const auto* found = reinterpret_cast<const StateRun*>(entries_of<int64_t>(runs, "runs"));
  for (int64_t i = 0; i < runs.size(0); ++i) {
    const StateRun& run = found[i];
    LORAFLEET_CHECK(0 <= run.start && run.start < run.end && run.end <= tokens, "run ", i, " is of tokens ", run.start,
                " to ", run.end, " of ", tokens);
    LORAFLEET_CHECK(0 <= run.read && run.read < slots && 0 <= run.write && run.write < slots && run.save < slots, "run ",
                i, " has a slot that is not there");
  }
  return found;
}

}  // namespace

Tensor selective_scan(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                      const Tensor& state, const OptionalTensor& skip, const OptionalTensor& gate,
                      const OptionalTensor& dt_bias, bool softplus) {
  LORAFLEET_CHECK(x.dim() == 2 && a.dim() == 2, "x must be [T, C], a [N, C]");
  const int64_t tokens = x.size(0), channels = x.size(1), states = a.size(0);
  if (gate) {
    LORAFLEET_CHECK(gate->has_sizes(x.sizes()), "gate must have the shape of x");
    check_same_dtype(*gate, x, "gate");
  }
  floats(state, {states, channels}, "state");
  const Tensor out = empty(x.sizes(), x.type);
  const Matrix gates = gate ? rows_of(*gate, "gate") : Matrix{nullptr, 0};
  const float *steps = floats(dt, {tokens, channels}, "dt"), *rates = floats(a, {states, channels}, "a");
  const float *into = floats(b, {tokens, states}, "b"), *from = floats(c, {tokens, states}, "c");
  const float *skips = floats(skip, {channels}, "skip"), *biases = floats(dt_bias, {channels}, "dt_bias");
  active->scan({dtype_of(x), rows_of(x, "x"), gates, {out.data, channels}, steps, rates, into, from, skips,
                biases, entries_of<float>(state, "state"), tokens, channels, states, softplus});
  return out;
}

Tensor delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                  const Tensor& states, const Tensor& runs, bool normalize, bool additive) {
  LORAFLEET_CHECK(q.dim() == 3 && v.dim() == 3 && q.has_sizes(k.sizes()) && q.size(0) == v.size(0),
              "q and k must be [T, H, K], v [T, G, V]");
  const int64_t tokens = v.size(0), heads = v.size(1), key_heads = k.size(1), key_dim = k.size(2), width = v.size(2);
  LORAFLEET_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " heads of values, ", key_heads, " of keys");
  LORAFLEET_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1, "heads need entries that are contiguous");
  check_same_dtype(k, q, "k");
  check_same_dtype(v, q, "v");
  const bool per_channel = g.dim() == 3;
  const float* decays = per_channel ? floats(g, {tokens, heads, key_dim}, "g") : floats(g, {tokens, heads}, "g");
  floats(states, {states.size(0), heads, key_dim, width}, "states");
  const Tensor out = empty(v.sizes(), v.type);
  active->delta_rule({
      .dtype = dtype_of(q),
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .q_token = q.stride(0),
      .q_head = q.stride(1),
      .k_token = k.stride(0),
      .k_head = k.stride(1),
      .v_token = v.stride(0),
      .v_head = v.stride(1),
      .out = out.data,
      .decay = decays,
      .beta = floats(beta, {tokens, heads}, "beta"),
      .states = entries_of<float>(states, "states"),
      .runs = runs_of(runs, tokens, states.size(0)),
      .num_runs = runs.size(0),
      .heads = heads,
      .key_heads = key_heads,
      .key_dim = key_dim,
      .width = width,
      .per_channel = per_channel,
      .normalize = normalize,
      .additive = additive,
  });
  return out;
}

Tensor causal_conv(const Tensor& x, const Tensor& weight, const Tensor& states, const Tensor& runs,
                   const OptionalTensor& bias, bool silu) {
  LORAFLEET_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) == x.size(1), "x must be [T, C], weight [C, K]");
  const int64_t channels = x.size(1), taps = weight.size(1);
  check_same_dtype(weight, x, "weight");
  check_same_dtype(states, x, "states");
  LORAFLEET_CHECK(weight.is_contiguous() && states.is_contiguous(), "weight and states must be contiguous");
  LORAFLEET_CHECK(states.dim() == 3 && states.size(1) == taps && states.size(2) == channels, "states must be [slots, ",
              taps, ", ", channels, "]");
  if (bias) {
    check_same_dtype(*bias, x, "bias");
    LORAFLEET_CHECK(bias->is_contiguous() && bias->numel() == channels, "bias needs ", channels, " entries");
  }
  const Tensor out = empty(x.sizes(), x.type);
  active->causal_conv({
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .out = {out.data, channels},
      .weight = weight.data,
      .bias = bias ? bias->data : nullptr,
      .states = states.data,
      .runs = runs_of(runs, x.size(0), states.size(0)),
      .num_runs = runs.size(0),
      .channels = channels,
      .taps = taps,
      .silu = silu,
  });
  return out;
}

Tensor gated_delta(const Tensor& qkv, const Tensor& b, const Tensor& a, const DeltaLayer& layer, const Tensor& runs) {
  const Tensor& states = layer.states;
  LORAFLEET_CHECK(states.dim() == 4 && qkv.dim() == 2, "states must be [slots, G, K, V], qkv [T, channels]");
  const int64_t tokens = qkv.size(0), heads = states.size(1), key_dim = states.size(2), width = states.size(3);
  LORAFLEET_CHECK(states.numel() > 0, "states have no entries");
  const int64_t keys = (qkv.size(1) - heads * width) / 2, key_heads = keys / key_dim;
  LORAFLEET_CHECK(key_heads > 0 && qkv.size(1) == 2 * key_heads * key_dim + heads * width, qkv.size(1),
                  " channels are no keys of ", key_dim, " and values of ", width);
  for (const Tensor* t : {&a, &b}) {
    LORAFLEET_CHECK(t->has_sizes({tokens, heads}), "a and b must be [", tokens, ", ", heads, "]");
    check_same_dtype(*t, qkv, "a or b");
  }
  const Tensor convolved = causal_conv(qkv, layer.conv_weight, layer.conv_states, runs, layer.conv_bias, true);
  const Tensor decay = empty({tokens, heads}, Scalar::kFloat), beta = empty({tokens, heads}, Scalar::kFloat);
  active->delta_gates({
      .dtype = dtype_of(qkv),
      .a = rows_of(a, "a"),
      .b = rows_of(b, "b"),
      .rates = floats(layer.rates, {heads}, "rates"),
      .bias = floats(layer.dt_bias, {heads}, "dt_bias"),
      .decay = entries_of<float>(decay, "decay"),
      .beta = entries_of<float>(beta, "beta"),
      .tokens = tokens,
      .heads = heads,
  });
  return delta_rule(convolved.heads(0, key_heads, key_dim), convolved.heads(keys, key_heads, key_dim),
                    convolved.heads(2 * keys, heads, width), decay, beta, states, runs, true, false);
}

Tensor gated_scan(const Tensor& gate, const Tensor& xbc, const Tensor& dt, const ScanLayer& layer, const Tensor& runs) {
  const Tensor& states = layer.states;
  LORAFLEET_CHECK(states.dim() == 4 && xbc.dim() == 2, "states must be [slots, H, N, P], xbc [T, channels]");
  const int64_t tokens = xbc.size(0), channels = xbc.size(1), heads = states.size(1), key_dim = states.size(2);
  LORAFLEET_CHECK(states.numel() > 0, "states have no entries");
  const int64_t width = states.size(3), inner = heads * width, keys = (channels - inner) / 2, groups = keys / key_dim;
  LORAFLEET_CHECK(groups > 0 && channels == inner + 2 * groups * key_dim, channels, " channels are no values of ", inner,
                  " and keys of ", key_dim);
  LORAFLEET_CHECK(layer.group > 0 && inner % layer.group == 0 && layer.group % width == 0, "groups of ", layer.group,
                  " columns are no whole heads of ", width);
  LORAFLEET_CHECK(gate.has_sizes({tokens, inner}) && dt.has_sizes({tokens, heads}), "gate must be [T, ", inner,
                  "], dt [T, ", heads, "]");
  LORAFLEET_CHECK(layer.norm_weight.is_contiguous() && layer.norm_weight.numel() == inner, "the norm needs ", inner,
                  " entries");
  for (const Tensor* t : {&gate, &dt, &layer.norm_weight}) check_same_dtype(*t, xbc, "gate, dt or the norm");
  const Tensor mixed = causal_conv(xbc, layer.conv_weight, layer.conv_states, runs, layer.conv_bias, true);
  const Tensor wide = empty({tokens, channels}, Scalar::kFloat), out = empty({tokens, inner}, xbc.type);
  const Tensor decay = empty({tokens, heads}, Scalar::kFloat), steps = empty({tokens, heads}, Scalar::kFloat);
  active->scan_inputs({
      .dtype = dtype_of(xbc),
      .mixed = rows_of(mixed, "mixed"),
      .dt = rows_of(dt, "dt"),
      .rates = floats(layer.rates, {heads}, "rates"),
      .bias = floats(layer.dt_bias, {heads}, "dt_bias"),
      .wide = entries_of<float>(wide, "wide"),
      .decay = entries_of<float>(decay, "decay"),
      .steps = entries_of<float>(steps, "steps"),
      .tokens = tokens,
      .channels = channels,
      .heads = heads,
      .scaled_from = inner + keys,
      .scale = std::sqrt(static_cast<float>(key_dim)),  // cancels the rule's division
  });
  const Tensor x = wide.heads(0, heads, width), into = wide.heads(inner, groups, key_dim);
  const Tensor y = delta_rule(wide.heads(inner + keys, groups, key_dim), into, x, decay, steps, states, runs, false, true);
  active->scan_norm({
      .dtype = dtype_of(xbc),
      .gate = rows_of(gate, "gate"),
      .out = {out.data, inner},
      .y = entries_of<float>(y, "y"),
      .x = entries_of<float>(wide, "wide"),
      .x_stride = channels,
      .skip = floats(layer.skip, {heads}, "skip"),
      .weight = layer.norm_weight.data,
      .tokens = tokens,
      .heads = heads,
      .width = width,
      .group = layer.group,
      .eps = static_cast<float>(layer.eps),
  });
  return out;
}

}  // namespace lorafleet
