// The parts of a stack of decoder layers, and its inputs for a step.
#pragma once

#include <string>
#include <vector>

#include "operations.h"

namespace lorafleet {

// The layers that read one input: sibling linear layers as one product, and their places in the adapter pool.
struct Sites {
  std::vector<Tensor> weights;  // one, packed [panels, K / 2, 32, 2] or [N, K]; or panels of quantized ones
  std::vector<int64_t> forms;   // of quantized weights; empty: not quantized
  bool int8_inputs;             // for quantized weights
  OptionalTensor bias;
  std::vector<int64_t> sizes;  // output widths of the siblings
  std::vector<Tensor> a_rows, b_rows;  // empty: no adapter has these layers
  std::vector<Tensor> factors;         // of int8 rows
  std::vector<int64_t> indices, groups;

  bool is_plain() const { return forms.empty() && weights[0].dim() != 4; }
  LoraSites lora() const { return {a_rows, b_rows, factors, indices, groups}; }
};

struct Norm {
  Tensor weight;
  double eps;
  bool plus_one;

  Tensor operator()(const Tensor& x, const OptionalTensor& residual = {}, bool in_chunks = false) const {
    return rms_norm(x, weight, eps, residual, plus_one, in_chunks);
  }
};

struct Attention {
  int64_t heads, kv_heads, head_dim, value_dim, window;
  bool is_gated;  // a head's queries are followed by its gates
  double scale, softcap;
  Tensor k_cache, v_cache;
  OptionalTensor sinks;

  int64_t query_width() const { return is_gated ? head_dim + value_dim : head_dim; }
};

struct Layer {
  std::vector<Norm> norms;   // before attention and MLP; optionally of queries and keys, or of a delta rule's output
  std::vector<Sites> sites;  // qkv, out, gate_up, down; for a delta rule the first has qkv, its output's gate, b and a
  Attention attention;
  std::optional<DeltaLayer> delta;  // replaces attention
  std::string act;

  const Sites& qkv() const { return sites[0]; }
  const Sites& out() const { return sites[1]; }
  const Sites& gate_up() const { return sites[2]; }
  const Sites& down() const { return sites[3]; }
};

// Rows of a step, all or a block of them, with their data.
struct Rows {
  int64_t first;
  Tensor x;                  // [n, width]
  Tensor cos, sin, slots;    // [n, rotary_dim], and the places in the KV cache
  std::vector<Tensor> lora;  // rows, small_tiles, large_tiles, counts; empty: no row has an adapter
  OptionalTensor row_scales;
  std::vector<ChangedRows> changes;

  int64_t count() const { return x.size(0); }
  // The same rows of a matrix with all rows of the step.
  Tensor of(const Tensor& matrix) const { return matrix.rows(first, count()); }
};

struct Step {
  Tensors attention;  // block_tables, query_starts, kv_lens, slot_mapping, and runs of states if a layer has any
  Tensors table;      // of adapters: ranks, scales, pages
  std::vector<Rows> blocks;

  bool is_whole() const { return blocks.size() == 1; }
};

}  // namespace lorafleet
