// The operations as torch operators, through torch's stable ABI: a library built once loads in any torch from the
// version in TORCH_TARGET_VERSION (build.py) on, with any Python. Only this file depends on torch.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "operations.h"

namespace lorafleet {
namespace {

void check(AOTITorchError error) {
  LORAFLEET_CHECK(error == AOTI_TORCH_SUCCESS, "torch refused a call of the native kernels; it says above why");
}

// A view of a torch tensor; the result keeps it alive.
Tensor adopt(AtenTensorHandle handle) {
  Tensor t;
  t.memory = std::shared_ptr<void>(handle, [](void* own) {
    aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(own));
  });
  void* data;
  int64_t *sizes, *strides;
  int32_t type, device;
  check(aoti_torch_get_device_type(handle, &device));
  check(aoti_torch_get_data_ptr(handle, &data));
  check(aoti_torch_get_dim(handle, &t.dims));
  check(aoti_torch_get_sizes(handle, &sizes));
  check(aoti_torch_get_strides(handle, &strides));
  check(aoti_torch_get_dtype(handle, &type));
  LORAFLEET_CHECK(device == aoti_torch_device_type_cpu(), "a tensor is not on the CPU");
  LORAFLEET_CHECK(t.dims <= kMaxDims, "a tensor has ", t.dims, " dimensions; the native kernels take ", kMaxDims);
  t.data = static_cast<char*>(data), t.type = static_cast<Scalar>(type);
  std::copy_n(sizes, t.dims, t.shape.data());
  std::copy_n(strides, t.dims, t.steps.data());
  return t;
}

// A new reference, for torch, to the tensor that a whole tensor keeps alive.
AtenTensorHandle release(const Tensor& t) {
  AtenTensorHandle handle;
  check(aoti_torch_new_tensor_handle(static_cast<AtenTensorHandle>(t.memory.get()), &handle));
  return handle;
}

namespace stable = torch::stable::detail;

// How a parameter of a type is read from torch's stack, and held while the operation runs.
template <typename T>
struct Parameter {
  using Kept = T;
  static T read(StableIValue value) { return stable::to<T>(value); }
};
template <>
struct Parameter<Tensor> {
  using Kept = Tensor;
  static Tensor read(StableIValue value) { return adopt(stable::to<AtenTensorHandle>(value)); }
};
template <>
struct Parameter<OptionalTensor> {
  using Kept = OptionalTensor;
  static OptionalTensor read(StableIValue value) {
    const auto handle = stable::to<std::optional<AtenTensorHandle>>(value);
    return handle ? OptionalTensor(adopt(*handle)) : std::nullopt;
  }
};
template <>
struct Parameter<Tensors> {
  using Kept = std::vector<Tensor>;
  static Kept read(StableIValue value) {
    Kept tensors;
    for (const auto handle : stable::to<std::vector<AtenTensorHandle>>(value)) tensors.push_back(adopt(handle));
    return tensors;
  }
};
template <>
struct Parameter<Ints> {
  using Kept = std::vector<int64_t>;
  static Kept read(StableIValue value) { return stable::to<Kept>(value); }
};
template <>
struct Parameter<std::string_view> {
  using Kept = std::string;
  static Kept read(StableIValue value) { return stable::to<Kept>(value); }
};

template <typename T>
StableIValue result(const T& value) {
  return stable::from(value);
}
template <>
StableIValue result(const Tensor& value) {
  return stable::from(release(value));
}

template <auto function, typename Result, typename... Parameters, size_t... places>
void call(StableIValue* stack, Result (*)(Parameters...), std::index_sequence<places...>) {
  std::tuple<typename Parameter<std::remove_cvref_t<Parameters>>::Kept...> kept{
      Parameter<std::remove_cvref_t<Parameters>>::read(stack[places])...};
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, kept);
  } else if constexpr (requires { typename std::tuple_size<Result>::type; }) {
    size_t output = 0;
    std::apply([&](const auto&... part) { ((stack[output++] = result(part)), ...); }, std::apply(function, kept));
  } else {
    stack[0] = result(std::apply(function, kept));
  }
}

template <auto function, typename Result, typename... Parameters>
void call(StableIValue* stack, Result (*as)(Parameters...)) {
  call<function>(stack, as, std::index_sequence_for<Parameters...>());
}

Tensor gated_delta_of(const Tensor& qkv, const Tensor& b, const Tensor& a, const Tensor& conv_weight,
                      const OptionalTensor& conv_bias, const Tensor& conv_states, const Tensor& rates,
                      const Tensor& dt_bias, const Tensor& states, const Tensor& runs) {
  return gated_delta(qkv, b, a, {conv_weight, conv_bias, conv_states, rates, dt_bias, states}, runs);
}

Tensor gated_scan_of(const Tensor& gate, const Tensor& xbc, const Tensor& dt, const Tensor& conv_weight,
                     const OptionalTensor& conv_bias, const Tensor& conv_states, const Tensor& rates,
                     const Tensor& dt_bias, const Tensor& skip, const Tensor& states, const Tensor& norm_weight,
                     double eps, int64_t group, const Tensor& runs) {
  return gated_scan(
      gate, xbc, dt, {conv_weight, conv_bias, conv_states, rates, dt_bias, skip, states, norm_weight, eps, group}, runs);
}

// An operation in torch's calling convention: takes arguments from the stack and leaves results there.
template <auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call<function>(stack, function);
}

}  // namespace

Tensor empty(Ints sizes, Scalar type) {
  std::array<int64_t, kMaxDims> strides;
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(1, sizes[d])) strides[d] = step;
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(type),
                                 aoti_torch_device_type_cpu(), 0, &handle));
  return adopt(handle);
}

int num_threads() {
  uint32_t number;
  check(torch_get_num_threads(&number));
  return static_cast<int>(number);
}

Tensor plain_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  AtenTensorHandle rows;  // for x as seen here, whose shape may differ from that of the tensor behind it
  check(aoti_torch_create_tensor_from_blob(x.data, x.dims, x.shape.data(), x.steps.data(), 0,
                                           static_cast<int32_t>(x.type), aoti_torch_device_type_cpu(), 0, &rows));
  StableIValue stack[] = {stable::from(rows), stable::from(release(weight)),
                          stable::from(bias ? std::optional<AtenTensorHandle>(release(*bias)) : std::nullopt)};
  check(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return adopt(stable::to<AtenTensorHandle>(stack[0]));
}

STABLE_TORCH_LIBRARY(lorafleet, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("use_isa(str name, str library) -> str");
  m.def("fix_sums(bool is_fixed) -> ()");
  m.def("pack_linear_(Tensor(a!) packed, Tensor[] weights) -> ()");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor packed, Tensor ends, int form, bool int8_inputs) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, int[] forms, bool int8_inputs, str act, "
      "int num_experts) -> Tensor");
  m.def("quantised_form(str kind, int in_features) -> (int, int)");
  m.def("pack_quantised(Tensor rows, str kind, int in_features) -> (Tensor, int)");
  m.def("quant_linear(Tensor x, Tensor[] panels, int[] forms, int[] sizes, Tensor? bias, "
      "bool int8_inputs) -> Tensor");
  m.def(
      "lora_add_(Tensor(a!)[] outs, Tensor x, Tensor[] a_rows, Tensor[] b_rows, Tensor[] factors, int[] indices, "
      "int[] groups, Tensor ranks, Tensor scales, Tensor pages, Tensor rows, Tensor small_tiles, Tensor large_tiles, Tensor counts, "
      "Tensor? row_scales) -> ()");
  m.def("copy_rows_(Tensor(a!)[] pools, Tensor buffer, Tensor pieces) -> ()");
  m.def("kv_write_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_starts, "
      "Tensor kv_lens, float scale, int window, float softcap, Tensor? sinks) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, bool plus_one) -> Tensor");
  m.def("rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
  m.def("gated_act(Tensor gate, Tensor up, str act) -> Tensor");
  m.def("mask_logits_(Tensor(a!) logits, Tensor rows, Tensor words) -> ()");
  m.def("argmax(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor(a!) state, Tensor? skip, Tensor? gate, "
      "Tensor? dt_bias, bool softplus) -> Tensor");
  m.def(
      "delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) states, Tensor runs, "
      "bool normalize, bool additive) -> Tensor");
  m.def("causal_conv(Tensor x, Tensor weight, Tensor(a!) states, Tensor runs, Tensor? bias, bool silu) -> Tensor");
  m.def(
      "gated_delta(Tensor qkv, Tensor b, Tensor a, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_states, "
      "Tensor rates, Tensor dt_bias, Tensor(b!) states, Tensor runs) -> Tensor");
  m.def(
      "gated_scan(Tensor gate, Tensor xbc, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_states, "
      "Tensor rates, Tensor dt_bias, Tensor skip, Tensor(b!) states, Tensor norm_weight, float eps, int group, "
      "Tensor runs) -> Tensor");
  m.def("gate_heads_(Tensor(a!) x, Tensor gate) -> ()");
  m.def("changes_new() -> int");
  m.def("changes_free(int changes) -> ()");
  m.def(
      "changes_add(int changes, int site, bool of_inputs, int kind, Tensor first, Tensor? second, int size) -> ()");
  m.def("stack_new() -> int");
  m.def("stack_free(int stack) -> ()");
  m.def("stack_norm(int stack, Tensor weight, float eps, bool plus_one) -> ()");
  m.def(
      "stack_linears(int stack, Tensor[] weights, int[] forms, bool int8_inputs, Tensor? bias, int[] sizes, "
      "Tensor[] a_rows, Tensor[] b_rows, Tensor[] factors, int[] indices, int[] groups) -> ()");
  m.def(
      "stack_layer(int stack, int[] shape, float scale, float softcap, Tensor k_cache, Tensor v_cache, Tensor? sinks, "
      "str act) -> ()");
  m.def(
      "stack_delta(int stack, Tensor conv_weight, Tensor? conv_bias, Tensor conv_states, Tensor rates, Tensor dt_bias, "
      "Tensor states, str act) -> ()");
  m.def(
      "stack_run(int stack, Tensor(a!) x, Tensor cos, Tensor sin, Tensor[] attention, Tensor[] table, Tensor[] lora, "
      "Tensor? row_scales, Tensor[] changes) -> ()");
  m.def("stack_ends(int stack, Tensor? embedding) -> ()");
  m.def(
      "stack_logits(int stack, Tensor(a!) tokens, Tensor positions, Tensor angles, Tensor? logit_rows, "
      "Tensor[] attention, Tensor[] table, Tensor[] lora, Tensor? row_scales, Tensor[] changes, Tensor[] head_lora, "
      "Tensor? head_scales, Tensor[] head_changes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lorafleet, CompositeExplicitAutograd, m) {
  m.impl("isa", &boxed<isa>);
  m.impl("isas", &boxed<isas>);
  m.impl("use_isa", &boxed<use_isa>);
  m.impl("fix_sums", &boxed<fix_sums>);
  m.impl("quantised_form", &boxed<quantised_form>);
  m.impl("changes_new", &boxed<changes_new>);
  m.impl("changes_free", &boxed<changes_free>);
  m.impl("stack_new", &boxed<stack_new>);
  m.impl("stack_free", &boxed<stack_free>);
  m.impl("stack_ends", &boxed<stack_ends>);
}

STABLE_TORCH_LIBRARY_IMPL(lorafleet, CPU, m) {
  m.impl("pack_linear_", &boxed<pack_linear_>);
  m.impl("linear", &boxed<linear>);
  m.impl("grouped_linear", &boxed<grouped_linear>);
  m.impl("experts", &boxed<experts>);
  m.impl("pack_quantised", &boxed<pack_quantised>);
  m.impl("quant_linear", &boxed<quant_linear>);
  m.impl("lora_add_", &boxed<lora_add_>);
  m.impl("copy_rows_", &boxed<copy_rows_>);
  m.impl("kv_write_", &boxed<kv_write_>);
  m.impl("paged_attention", &boxed<paged_attention>);
  m.impl("rms_norm", &boxed<static_cast<Tensor (*)(const Tensor&, const Tensor&, double, const OptionalTensor&, bool)>(rms_norm)>);
  m.impl("rotary_", &boxed<rotary_>);
  m.impl("gated_act", &boxed<static_cast<Tensor (*)(const Tensor&, const Tensor&, std::string_view)>(gated_act)>);
  m.impl("mask_logits_", &boxed<mask_logits_>);
  m.impl("argmax", &boxed<argmax>);
  m.impl("selective_scan", &boxed<selective_scan>);
  m.impl("delta_rule", &boxed<delta_rule>);
  m.impl("causal_conv", &boxed<causal_conv>);
  m.impl("gated_delta", &boxed<gated_delta_of>);
  m.impl("gated_scan", &boxed<gated_scan_of>);
  m.impl("gate_heads_", &boxed<gate_heads_>);
  m.impl("changes_add", &boxed<changes_add>);
  m.impl("stack_norm", &boxed<stack_norm>);
  m.impl("stack_linears", &boxed<stack_linears>);
  m.impl("stack_layer", &boxed<stack_layer>);
  m.impl("stack_delta", &boxed<stack_delta>);
  m.impl("stack_run", &boxed<stack_run>);
  m.impl("stack_logits", &boxed<stack_logits>);
}

}  // namespace lorafleet
