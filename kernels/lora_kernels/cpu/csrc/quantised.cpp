// Linear layers with weights that stay quantized: argument checks for quant.h, and the packing of GGUF blocks for it.
#include <cstring>

#include "operations.h"

namespace lorafleet {
namespace {

// 32 inputs of one row: their codes and scales.
struct Group {
  uint8_t codes[32];       // 4 or 6 bits each, or signed bytes
  uint16_t d, min;         // fp16 bits; of the super-block in super forms
  uint8_t scales[2], sub;  // super forms only: factors of d (per 16 inputs, or the first for all), and of min
};

uint16_t half_at(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }

void read_nibbles(const uint8_t* from, Group& g) {
  for (int j = 0; j < 16; ++j) g.codes[j] = from[j] & 15, g.codes[j + 16] = from[j] >> 4;
}

void add_fifth_bits(const uint8_t* bits, int minus, Group& g) {
  for (int j = 0; j < 32; ++j)
    g.codes[j] = static_cast<uint8_t>((g.codes[j] | (bits[j / 8] >> (j % 8) & 1) << 4) - minus);
}

void read_q4_0(const uint8_t* block, int64_t, Group& g) { g.d = half_at(block), read_nibbles(block + 2, g); }

void read_q4_1(const uint8_t* block, int64_t, Group& g) {
  g.d = half_at(block), g.min = half_at(block + 2);
  read_nibbles(block + 4, g);
}

void read_q5_0(const uint8_t* block, int64_t, Group& g) {
  g.d = half_at(block);
  read_nibbles(block + 6, g);
  add_fifth_bits(block + 2, 16, g);
}

void read_q5_1(const uint8_t* block, int64_t, Group& g) {
  g.d = half_at(block), g.min = half_at(block + 2);
  read_nibbles(block + 8, g);
  add_fifth_bits(block + 4, 0, g);
}

void read_q8_0(const uint8_t* block, int64_t, Group& g) { g.d = half_at(block), std::memcpy(g.codes, block + 2, 32); }

// The six-bit factors of group i of a Q4_K or Q5_K block.
void read_factors(const uint8_t* from, int64_t i, Group& g) {
  if (i < 4) {
    g.scales[0] = from[i] & 63, g.sub = from[i + 4] & 63;
  } else {
    g.scales[0] = static_cast<uint8_t>((from[i + 4] & 15) | (from[i - 4] >> 6) << 4);
    g.sub = static_cast<uint8_t>(from[i + 4] >> 4 | (from[i] >> 6) << 4);
  }
}

void read_q4_k(const uint8_t* block, int64_t i, Group& g) {
  g.d = half_at(block), g.min = half_at(block + 2);
  read_factors(block + 4, i, g);
  const uint8_t* from = block + 16 + i / 2 * 32;
  for (int j = 0; j < 32; ++j) g.codes[j] = from[j] >> (i % 2 * 4) & 15;
}

void read_q5_k(const uint8_t* block, int64_t i, Group& g) {
  g.d = half_at(block), g.min = half_at(block + 2);
  read_factors(block + 4, i, g);
  const uint8_t *fifth = block + 16, *from = block + 48 + i / 2 * 32;
  for (int j = 0; j < 32; ++j)
    g.codes[j] = static_cast<uint8_t>((from[j] >> (i % 2 * 4) & 15) | (fifth[j] >> i & 1) << 4);
}

void read_q6_k(const uint8_t* block, int64_t i, Group& g) {
  const int64_t half = i / 4, quarter = i % 4;
  const uint8_t *low = block + half * 64 + quarter % 2 * 32, *high = block + 128 + half * 32;
  for (int j = 0; j < 32; ++j)
    g.codes[j] = static_cast<uint8_t>((low[j] >> (quarter / 2 * 4) & 15) | (high[j] >> (quarter * 2) & 3) << 4);
  std::memcpy(g.scales, block + 192 + i * 2, 2);
  g.d = half_at(block + 208);
}

struct Kind {
  const char* name;
  int64_t block_bytes, block_inputs, form;
  void (*read)(const uint8_t* block, int64_t group, Group&);
};
constexpr Kind kKinds[] = {
    {"q4_0", 18, 32, 0, read_q4_0},   {"q4_1", 20, 32, 1, read_q4_1},   {"q4_k", 144, 256, 2, read_q4_k},
    {"q8_0", 34, 32, 3, read_q8_0},   {"q5_0", 22, 32, 3, read_q5_0},   {"q5_1", 24, 32, 4, read_q5_1},
    {"q5_k", 176, 256, 5, read_q5_k}, {"q6_k", 210, 256, 6, read_q6_k},
};

const Kind& kind_of(std::string_view name) {
  for (const Kind& kind : kKinds)
    if (name == kind.name) return kind;
  fail("weights of the kind ", name, " are not packed");
}

// Column c of a packed group. head: of the group; super: of the super-block, null for other forms.
void put_column(const QuantForm& form, const Group& g, int c, uint8_t* super, uint8_t* head) {
  uint8_t* halves = form.super ? super : head;
  std::memcpy(halves + 2 * c, &g.d, 2);
  if (form.min) std::memcpy(halves + 64 + 2 * c, &g.min, 2);
  if (form.super) {
    head[c] = g.scales[0];
    head[32 + c] = form.min ? g.sub : g.scales[1];
  }
  uint8_t* codes = head + group_head_bytes(form);
  if (form.bits == 8) {
    for (int k = 0; k < 32; ++k) codes[k * kPanel + c] = g.codes[k];
    return;
  }
  for (int quad = 0; quad < 4; ++quad) {
    for (int odd = 0; odd < 2; ++odd) {
      const uint8_t* from = g.codes + quad * 8 + odd;
      int word = 0;
      for (int i = 0; i < 4; ++i) word |= (from[2 * i] & 15) << 4 * i;
      std::memcpy(codes + quad * 128 + c * 4 + odd * 2, &word, 2);
    }
  }
  if (form.bits == 4) return;
  for (int run = 0; run < 2; ++run) {
    for (int odd = 0; odd < 2; ++odd) {
      int word = 0;
      for (int i = 0; i < 8; ++i) word |= g.codes[run * 16 + odd + 2 * i] >> 4 << upper_place(i);
      std::memcpy(codes + 512 + run * 128 + c * 4 + odd * 2, &word, 2);
    }
  }
}

}  // namespace

// The packed form of weights of a kind, and the bytes of a panel.
std::tuple<int64_t, int64_t> quantised_form(std::string_view kind, int64_t in_features) {
  const int64_t form = kind_of(kind).form;
  return {form, panel_bytes(kQuantForms[form], in_features)};
}

std::tuple<Tensor, int64_t> pack_quantised(const Tensor& rows, std::string_view kind_name, int64_t in_features) {
  const Kind& kind = kind_of(kind_name);
  LORAFLEET_CHECK(rows.dim() == 2 && rows.type == Scalar::kByte && rows.is_contiguous() &&
                  in_features % kind.block_inputs == 0 &&
                  rows.size(1) == in_features / kind.block_inputs * kind.block_bytes,
              "rows of ", kind.name, " must be contiguous bytes [N, ", kind.block_bytes, " for every ",
              kind.block_inputs, " of ", in_features, " inputs]");
  const QuantForm& form = kQuantForms[kind.form];
  const int64_t out_features = rows.size(0), row_bytes = rows.size(1), bytes = panel_bytes(form, in_features);
  const int64_t panels = (out_features + kPanel - 1) / kPanel, per_block = kind.block_inputs / 32;
  const Tensor packed = empty({panels, bytes}, Scalar::kByte);
  const uint8_t* from = entries_of<uint8_t>(rows, "rows");
  uint8_t* to = entries_of<uint8_t>(packed, "packed");
  run_tasks(panels, [&](int64_t p) {
    uint8_t *at = to + p * bytes, *super = nullptr;
    const int64_t columns = std::min<int64_t>(kPanel, out_features - p * kPanel);
    if (columns < kPanel) std::memset(at, 0, bytes);
    for (int64_t k = 0; k < in_features / 32; ++k, at += group_bytes(form)) {
      if (form.super && k % (kSuperInputs / 32) == 0) super = at, at += super_head_bytes(form);
      for (int64_t c = 0; c < columns; ++c) {
        Group group = {};
        kind.read(from + (p * kPanel + c) * row_bytes + k / per_block * kind.block_bytes, k % per_block, group);
        put_column(form, group, static_cast<int>(c), super, at);
      }
    }
  });
  return {packed, kind.form};
}

void quant_linear_to(const Tensor& out, const Tensor& x, Tensors panels, Ints forms, Ints sizes,
                     const OptionalTensor& bias, bool int8_inputs, const WeightGroups* groups) {
  const int64_t num_parts = panels.size(), in_features = x.size(-1), rows = x.numel() / std::max<int64_t>(1, in_features);
  LORAFLEET_CHECK(num_parts > 0 && forms.size() == panels.size() && sizes.size() == panels.size(),
              "every part needs panels, a form and a size");
  std::vector<QuantPart> parts(num_parts);
  int64_t out_features = 0;
  bool has_min = false;
  for (int64_t i = 0; i < num_parts; ++i) {
    LORAFLEET_CHECK(0 <= forms[i] && forms[i] < kNumQuantForms, "there is no form ", forms[i]);
    const QuantForm& form = kQuantForms[forms[i]];
    LORAFLEET_CHECK(in_features % (form.super ? kSuperInputs : 32) == 0 && panels[i].dim() == 2 && sizes[i] > 0 &&
                    panels[i].type == Scalar::kByte && panels[i].is_contiguous() &&
                    panels[i].size(0) == (sizes[i] + kPanel - 1) / kPanel &&
                    panels[i].size(1) == panel_bytes(form, in_features),
                "part ", i, " is not packed for ", in_features, " inputs and ", sizes[i], " outputs");
    parts[i] = {entries_of<uint8_t>(panels[i], "panels"), forms[i], sizes[i]};
    out_features += sizes[i];
    has_min |= form.min;
  }
  if (bias) {
    check_same_dtype(*bias, x, "bias");
    LORAFLEET_CHECK(bias->is_contiguous() && bias->numel() == out_features, "bias needs ", out_features, " entries");
  }
  if (groups) {
    LORAFLEET_CHECK(num_parts == 1 && !bias && out_features % (groups->num * kPanel) == 0, "one part without a bias is "
                    "split among groups, at whole panels");
    parts[0].out_features = out_features /= groups->num;
  }
  LORAFLEET_CHECK(out.size(-1) == out_features, "out has ", out.size(-1), " columns; there are ", out_features);
  QuantArgs args = {
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .x32 = nullptr,
      .x32_stride = in_features,
      .x_chunks = nullptr,
      .x_sums = nullptr,
      .x_codes = nullptr,
      .x_scales = nullptr,
      .x_halves = nullptr,
      .digits = 0,
      .parts = parts.data(),
      .num_parts = num_parts,
      .bias = bias ? bias->data : nullptr,
      .out = rows_of(out, "out"),
      .rows = rows,
      .in_features = in_features,
      .weight_rows = groups ? rows / std::max<int64_t>(1, groups->list.size()) : rows,
      .rounds_inputs = int8_inputs,
      .fixed_sums = sums_are_fixed(),
      .num_threads = num_threads(),
  };
  Tensor chunks, prepared;  // own the memory of data computed from x
  args.digits = active->quant_digits(args);
  if (args.digits) {
    const int64_t code_rows = rows * args.digits, groups = code_rows * (in_features / 32);
    const int64_t codes = (in_features + kXChunk - 1) / kXChunk * code_rows * kXChunk;
    prepared = empty({codes + groups * 12 + 3 * 4}, Scalar::kByte);
    uint8_t* const at = entries_of<uint8_t>(prepared, "x");
    auto* const x_codes = reinterpret_cast<int8_t*>(at);
    auto* const x_scales = reinterpret_cast<float*>(at + codes);
    auto* const x_halves = reinterpret_cast<int32_t*>(at + codes + groups * 4);
    active->quant_encode(args, x_codes, x_scales, x_halves);
    args.x_codes = x_codes, args.x_scales = x_scales, args.x_halves = x_halves;
  } else if (active->quant_uses_integers(args.dtype)) {
    chunks = chunk_rows(x);
    args.x_chunks = reinterpret_cast<const uint16_t*>(chunks.data);
    if (has_min) {
      prepared = empty({rows, in_features / 32}, Scalar::kFloat);
      active->quant_prepare(args, nullptr, entries_of<float>(prepared, "x"));
      args.x_sums = entries_of<float>(prepared, "x");
    }
  } else if (args.dtype == Dtype::kF32) {
    args.x32 = static_cast<const float*>(args.x.data), args.x32_stride = args.x.stride;
  } else {
    prepared = empty({rows, in_features}, Scalar::kFloat);
    active->quant_prepare(args, entries_of<float>(prepared, "x"), nullptr);
    args.x32 = entries_of<float>(prepared, "x");
  }
  groups ? active->quant_groups(args, groups->list.data(), groups->list.size()) : active->quant_linear(args);
}

Tensor quant_linear(const Tensor& x, Tensors panels, Ints forms, Ints sizes, const OptionalTensor& bias,
                    bool int8_inputs) {
  int64_t out_features = 0;
  for (const int64_t size : sizes) out_features += size;
  const Tensor out = empty_rows(x, out_features);
  quant_linear_to(out, x, panels, forms, sizes, bias, int8_inputs);
  return out;
}

}  // namespace lorafleet
