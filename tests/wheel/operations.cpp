// Computes every native operation on made-up inputs and prints the results, a line for each: a name, and its numbers.
// It has no torch, so that it can be built for any processor: the lines of two processors are compared.
#include "operations.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>

namespace lorafleet {

Tensor empty(Ints sizes, Scalar type) {
  Tensor t;
  t.type = type, t.dims = static_cast<int64_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), t.shape.begin());
  int64_t step = 1;
  for (int64_t d = t.dims - 1; d >= 0; step *= t.shape[d--]) t.steps[d] = step;
  const size_t bytes = (t.nbytes() + 64) / 64 * 64;
  t.memory = std::shared_ptr<void>(std::aligned_alloc(64, bytes), std::free);
  t.data = static_cast<char*>(t.memory.get());
  std::memset(t.data, 0xff, bytes);  // NaN: nobody reads what was not written
  return t;
}
int num_threads() { return 3; }
Tensor plain_linear(const Tensor&, const Tensor&, const OptionalTensor&) { fail("there is no torch here"); }

namespace {

uint32_t state = 1;
uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
float random_number() { return static_cast<float>(random_bits() % 20001) / 10000.0f - 1.0f; }

float number_at(const Tensor& t, int64_t i) {
  switch (t.type) {
    case Scalar::kBFloat16: {
      const uint32_t bits = reinterpret_cast<const uint16_t*>(t.data)[i] << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    case Scalar::kHalf:
      return static_cast<float>(reinterpret_cast<const _Float16*>(t.data)[i]);
    case Scalar::kFloat:
      return reinterpret_cast<const float*>(t.data)[i];
    case Scalar::kLong:
      return static_cast<float>(reinterpret_cast<const int64_t*>(t.data)[i]);
    default:
      return static_cast<float>(reinterpret_cast<const uint8_t*>(t.data)[i]);
  }
}

void put(const Tensor& t, int64_t i, float value) {
  if (t.type == Scalar::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    reinterpret_cast<uint16_t*>(t.data)[i] = static_cast<uint16_t>(bits >> 16);
  } else if (t.type == Scalar::kHalf) {
    reinterpret_cast<_Float16*>(t.data)[i] = static_cast<_Float16>(value);
  } else {
    reinterpret_cast<float*>(t.data)[i] = value;
  }
}

// Numbers in [from, to) that depend on the place of the call: compilers differ in which argument they evaluate first.
Tensor filled(std::initializer_list<int64_t> sizes, Scalar type, float from = -1, float to = 1,
              std::source_location place = std::source_location::current()) {
  state = place.line() * 1000 + place.column();
  const Tensor t = empty(sizes, type);
  for (int64_t i = 0; i < t.numel(); ++i) put(t, i, from + (to - from) * (random_number() + 1) / 2);
  return t;
}

template <typename T>
Tensor integers(std::initializer_list<int64_t> sizes, std::initializer_list<T> values) {
  const Tensor t = empty(sizes, kScalarOf<T>);
  std::copy(values.begin(), values.end(), reinterpret_cast<T*>(t.data));
  return t;
}

void print(const char* name, const Tensor& t) {
  std::printf("%s:%s", name, std::string(name_of(t.type)).c_str());
  for (int64_t i = 0; i < t.numel(); ++i) std::printf(" %.9g", number_at(t, i));
  std::printf("\n");
}

void print_linear() {
  const Tensor weights[] = {filled({40, 300}, Scalar::kBFloat16), filled({27, 300}, Scalar::kBFloat16)};
  const Tensor packed = filled({3, 150, 32, 2}, Scalar::kBFloat16);  // 67 columns in panels of 32, pairs of 300 inputs
  pack_linear_(packed, weights);
  for (const int64_t rows : {1, 3, 17})
    print("linear", linear(filled({rows, 300}, Scalar::kBFloat16), packed, filled({67}, Scalar::kBFloat16), 67));
}

struct Blocks {
  const char* kind;
  int64_t bytes, inputs;
  std::initializer_list<int64_t> halves;  // where scales and minima are
};

void print_quantised(Scalar type) {
  const Blocks kinds[] = {{"q4_0", 18, 32, {0}},      {"q4_1", 20, 32, {0, 2}},   {"q5_0", 22, 32, {0}},
                          {"q5_1", 24, 32, {0, 2}},   {"q8_0", 34, 32, {0}},      {"q4_k", 144, 256, {0, 2}},
                          {"q5_k", 176, 256, {0, 2}}, {"q6_k", 210, 256, {208}}};
  for (const Blocks& kind : kinds) {
    state = static_cast<uint32_t>(kind.bytes);
    const int64_t blocks = 512 / kind.inputs;
    const Tensor rows = empty({45, blocks * kind.bytes}, Scalar::kByte);
    for (int64_t i = 0; i < rows.numel(); ++i) rows.data[i] = static_cast<char>(random_bits());
    for (int64_t block = 0; block < 45 * blocks; ++block)
      for (const int64_t at : kind.halves) {
        const auto half = static_cast<_Float16>(random_number() / 64);
        std::memcpy(rows.data + block * kind.bytes + at, &half, 2);
      }
    const auto [panels, form] = pack_quantised(rows, kind.kind, 512);
    const int64_t size = 45;
    for (const int64_t tokens : {1, 9})
      for (const bool int8_inputs : {false, true})
        print(kind.kind,
              quant_linear(filled({tokens, 512}, type), {&panels, 1}, {&form, 1}, {&size, 1}, {}, int8_inputs));
  }
}

void print_pointwise(Scalar type) {
  const Tensor x = filled({5, 50}, type), residual = filled({5, 50}, type), weight = filled({50}, type);
  print("rms_norm", rms_norm(x, weight, 1e-5, residual, false));
  print("residual", residual);
  print("rms_norm", rms_norm(x, weight, 1e-5, {}, true));
  const Tensor wide = filled({5, 50}, type, -9, 9);
  for (const char* act : {"silu", "gelu", "gelu_tanh"}) print(act, gated_act(wide, x, act));
  const Tensor q = filled({5, 3, 24}, type), k = filled({5, 1, 24}, type);
  rotary_(q, k, filled({5, 20}, type), filled({5, 20}, type));
  print("rotary_q", q), print("rotary_k", k);
  const Tensor logits = filled({3, 50}, type);
  const auto [ids, finite] = argmax(logits);
  print("argmax", ids), print("finite", finite);
  mask_logits_(logits, integers<int64_t>({1}, {1}), integers<int32_t>({1, 2}, {0x5a5a5a5a, 0x1234}));
  print("mask_logits", logits);
  const Tensor pool = filled({9, 8}, type), numbers = filled({4, 8}, type);
  Tensor bytes = numbers;
  bytes.type = Scalar::kByte, bytes.dims = 1, bytes.shape = {numbers.nbytes()}, bytes.steps = {1};
  copy_rows_({&pool, 1}, bytes, integers<int64_t>({2, 4}, {0, 5, 3, 8 * pool.element_size(), 0, 1, 1, 0}));
  print("copy_rows", pool);
}

void print_attention(Scalar type) {
  // A decode over 40 keys and a prompt of 21; blocks in any order.
  const Tensor k_cache = filled({6, 2, 16, 24}, type), v_cache = filled({6, 2, 16, 20}, type);
  const Tensor slots = empty({22}, Scalar::kLong);
  for (int64_t i = 0; i < 22; ++i) reinterpret_cast<int64_t*>(slots.data)[i] = i ? (i > 16 ? 80 + i - 17 : i - 1) : 39;
  kv_write_(filled({22, 2, 24}, type), filled({22, 2, 20}, type), k_cache, v_cache, slots);
  const Tensor tables = integers<int32_t>({2, 3}, {4, 1, 2, 0, 5, 0});
  const Tensor starts = integers<int32_t>({3}, {0, 1, 22}), lens = integers<int32_t>({2}, {40, 21});
  const Tensor q = filled({22, 4, 24}, type), sinks = filled({4}, Scalar::kFloat);
  print("attention", paged_attention(q, k_cache, v_cache, tables, starts, lens, 0.2, 0, 0.0, {}));
  print("attention", paged_attention(q, k_cache, v_cache, tables, starts, lens, 0.2, 7, 5.0, sinks));

  const Tensor k_codes = empty({6, 2, 16, 28}, Scalar::kChar), v_codes = empty({6, 2, 16, 24}, Scalar::kChar);
  const Tensor all = empty({96}, Scalar::kLong);
  for (int64_t i = 0; i < 96; ++i) reinterpret_cast<int64_t*>(all.data)[i] = 95 - i;
  kv_write_(filled({96, 2, 24}, type), filled({96, 2, 20}, type), k_codes, v_codes, all);
  print("attention_over_codes", paged_attention(q, k_codes, v_codes, tables, starts, lens, 0.2, 7, 5.0, sinks));
}

void print_lora(Scalar type) {
  // Rows 0, 2 and 3 have the first adapter, row 4 the second; rank 20 takes two pages, rank 3 one.
  const Tensor outs[] = {filled({6, 33}, type), filled({6, 40}, type)}, x = filled({6, 70}, type);
  const Tensor a_rows[] = {filled({64, 70}, type), filled({64, 70}, type)};
  const Tensor b_rows[] = {filled({64, 33}, type), filled({64, 40}, type)};
  const int64_t indices[] = {0, 1}, groups[] = {0, 0};
  const Tensor ranks = integers<int32_t>({2, 2}, {20, 20, 3, 3}), scales = filled({2, 2}, Scalar::kFloat);
  const Tensor pages = integers<int32_t>({2, 1, 2}, {2, 0, 1, 0});
  const Tensor rows = integers<int32_t>({4}, {0, 2, 3, 4});
  const Tensor tiles = integers<int32_t>({2, 3}, {0, 0, 3, 1, 3, 1}), counts = integers<int32_t>({4}, {4, 2, 2, 2});
  lora_add_(outs, x, a_rows, b_rows, {}, indices, groups, ranks, scales, pages, rows, tiles, tiles, counts, {});
  for (const Tensor& out : outs) print("lora_add", out);
  const auto bytes = [](int64_t width) {
    const Tensor t = empty({64, width}, Scalar::kChar);
    for (int64_t i = 0; i < 64 * width; ++i) t.data[i] = static_cast<char>(static_cast<int>(random_bits() % 255) - 127);
    return t;
  };
  const Tensor a_bytes[] = {bytes(70), bytes(70)}, b_bytes[] = {bytes(33), bytes(40)};
  const Tensor factors[] = {filled({64}, Scalar::kFloat, 0, 1e-4f), filled({64}, Scalar::kFloat, 0, 1e-4f)};
  lora_add_(outs, x, a_bytes, b_bytes, factors, indices, groups, ranks, scales, pages, rows, tiles, tiles, counts, {});
  for (const Tensor& out : outs) print("lora_add_int8", out);
  if (type != Scalar::kBFloat16) return;
  const Tensor packed = filled({3, 35, 32, 2}, type), many = filled({17, 70}, type), out = empty({17, 73}, type);
  const Tensor both[] = {out.columns(0, 33), out.columns(33, 40)};
  const LoraStep step = {ranks, scales, pages, rows, tiles, tiles, counts, {}};
  const LoraSites plain = {a_rows, b_rows, {}, indices, groups}, coded = {a_bytes, b_bytes, factors, indices, groups};
  linear_lora_to(out, many, packed, {}, both, plain, step);
  print("linear_lora", out);
  linear_lora_to(out, many, packed, {}, both, coded, step);
  print("linear_lora_int8", out);
}

void print_changes(Scalar type) {
  const Tensor x = filled({9, 48}, type);
  const int64_t changes = changes_new();
  const auto add = [&](ChangeKind kind, const Tensor& first, const OptionalTensor& second = {}, int64_t size = 0) {
    changes_add(changes, 0, true, static_cast<int64_t>(kind), first, second, size);
  };
  add(ChangeKind::kAdd, filled({48}, Scalar::kFloat));
  add(ChangeKind::kScale, filled({48}, Scalar::kFloat));
  add(ChangeKind::kScale, filled({48}, Scalar::kFloat), filled({48}, Scalar::kFloat), 12);
  add(ChangeKind::kAround, filled({48}, Scalar::kFloat), filled({48}, Scalar::kFloat));
  add(ChangeKind::kBlocks, filled({4, 12, 12}, Scalar::kFloat));
  const Tensor lists[] = {integers<int64_t>({1}, {changes}), integers<int64_t>({1}, {6}),
                          integers<int64_t>({6}, {0, 1, 3, 4, 6, 8})};
  change_(x, changed_rows(lists, 9), 0, true);
  print("change", x);
  changes_free(changes);
}

void print_states(Scalar type) {
  const Tensor state = filled({4, 19}, Scalar::kFloat);
  print("scan", selective_scan(filled({5, 19}, type), filled({5, 19}, Scalar::kFloat),
                               filled({4, 19}, Scalar::kFloat, -2, 0), filled({5, 4}, Scalar::kFloat),
                               filled({5, 4}, Scalar::kFloat), state, filled({19}, Scalar::kFloat),
                               filled({5, 19}, type), filled({19}, Scalar::kFloat), true));
  print("scan_state", state);
  const Tensor runs = integers<int64_t>({2, 5}, {0, 1, 1, 0, -1, 1, 5, 2, 2, 0});
  const Tensor states = filled({3, 4, 16, 20}, Scalar::kFloat);
  print("delta", delta_rule(filled({5, 2, 16}, type), filled({5, 2, 16}, type), filled({5, 4, 20}, type),
                            filled({5, 4}, Scalar::kFloat, -1, 0), filled({5, 4}, Scalar::kFloat, 0, 1), states, runs,
                            true, false));
  print("delta_state", states);
  const Tensor convs = filled({3, 4, 144}, type), gates = filled({5, 8}, type);
  const DeltaLayer layer = {filled({144, 4}, type), {}, convs, filled({4}, Scalar::kFloat, -1, 0),
                            filled({4}, Scalar::kFloat), states};
  print("gated_delta", gated_delta(filled({5, 144}, type), gates.columns(0, 4), gates.columns(4, 4), layer, runs));
  print("gated_delta_state", states), print("gated_delta_conv", convs);
  const ScanLayer mixer = {layer.conv_weight, {}, convs, layer.rates, layer.dt_bias, filled({4}, Scalar::kFloat), states,
                           filled({80}, type), 1e-5, 40};
  print("gated_scan", gated_scan(filled({5, 80}, type), filled({5, 144}, type), gates.columns(0, 4), mixer, runs));
  print("gated_scan_state", states);
  const Tensor heads = filled({5, 2, 16}, type);
  gate_heads_(heads, filled({5, 2, 16}, type));
  print("gate_heads", heads);
  const Tensor taps = filled({3, 4, 37}, type);
  print("conv", causal_conv(filled({5, 37}, type), filled({37, 4}, type), taps, runs, filled({37}, type), true));
  print("conv_state", taps);
}

}  // namespace
}  // namespace lorafleet

int main() {
  using namespace lorafleet;
  active = lorafleet_kernels();
  print_linear();
  for (const Scalar type : {Scalar::kFloat, Scalar::kBFloat16, Scalar::kHalf}) {
    print_quantised(type), print_pointwise(type), print_attention(type), print_lora(type);
    print_changes(type), print_states(type);
  }
  return 0;
}
