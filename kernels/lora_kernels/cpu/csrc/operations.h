// The operations on tensors, with checks; stack.cpp combines them, bind.cpp registers them with torch.
#pragma once

#include <string>
#include <string_view>
#include <tuple>

#include "kernels.h"
#include "tensor.h"

namespace lorafleet {

Tensor linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t out_features);
// Writes to `out`: the rows of x, with the weight's output width.
void linear_to(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias);
// The same for rows in chunks, in the layout of LinearArgs::x.
void linear_of_chunks(const Tensor& out, const Tensor& chunks, const Tensor& packed, const OptionalTensor& bias);
void lora_add_(Tensors outs, const Tensor& x, Tensors a_rows, Tensors b_rows, Tensors factors, Ints indices,
               Ints groups, const Tensor& ranks, const Tensor& scales, const Tensor& pages, const Tensor& rows,
               const Tensor& small_tiles, const Tensor& large_tiles, const Tensor& counts,
               const OptionalTensor& row_scales);
void copy_rows_(Tensors pools, const Tensor& buffer, const Tensor& pieces);
void kv_write_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping);
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& query_starts, const Tensor& kv_lens, double scale, int64_t window, double softcap,
                       const OptionalTensor& sinks);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual, bool plus_one);
// in_chunks: returns the layout that `linear_of_chunks` reads.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual, bool plus_one,
                bool in_chunks);
void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin);
Tensor gated_act(const Tensor& gate, const Tensor& up, std::string_view act);
Tensor gated_act(const Tensor& gate, const Tensor& up, std::string_view act, bool in_chunks);
// x *= sigmoid(gate), both [T, H, D].
void gate_heads_(const Tensor& x, const Tensor& gate);
void mask_logits_(const Tensor& logits, const Tensor& rows, const Tensor& words);
std::tuple<Tensor, Tensor> argmax(const Tensor& x);

// experts.cpp
// x [S, K] times the weight of its group: rows up to ends[0], int32 [E], have the first, and so on. packed: weights
// [N, K] one after the other, N a multiple of kPanel. form: of quantized weights, see quant_forms.h; -1 for bf16.
// int8_inputs: as for quant_linear. Returns [S, N].
Tensor grouped_linear(const Tensor& x, const Tensor& packed, const Tensor& ends, int64_t form, bool int8_inputs);
// The weighted sum of gated experts [T, D], for x [T, D] and the ids (int64) and weights (fp32) of its experts [T, k].
// up: packed weights [2 * I, D] of `num` experts, gates first. down: [D, I]. forms: of both, as for grouped_linear.
Tensor experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& up, const Tensor& down,
               Ints forms, bool int8_inputs, std::string_view act, int64_t num);

// lora.cpp
struct LoraSites {  // where the pool holds adapters' rows for sibling linear layers
  Tensors a_rows, b_rows, factors;
  Ints indices, groups;
};
struct LoraStep {  // the adapter of every row of a step
  const Tensor &ranks, &scales, &pages, &rows, &small_tiles, &large_tiles, &counts;
  const OptionalTensor& row_scales;
};
// Whether linear_lora_to takes less time than linear_to followed by lora_add_.
bool linear_lora_pays(const Tensor& x, const LoraStep& step);
// linear_to with LoRA of its sibling layers, whose outputs are outs.
void linear_lora_to(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias, Tensors outs,
                    const LoraSites& sites, const LoraStep& step);

// changes.cpp: an adapter's changes besides rank rows, identified by a number.
struct Changes {
  struct Site {
    std::vector<ChangeOp> inputs, outputs;  // in the order of their application
  };
  std::vector<Site> sites;    // by index
  std::vector<Tensor> kept;  // tensors that own the numbers

  const std::vector<ChangeOp>& at(int64_t site, bool of_inputs) const {
    static const Site none;
    const Site& own = site < static_cast<int64_t>(sites.size()) ? sites[site] : none;
    return of_inputs ? own.inputs : own.outputs;
  }
};
struct ChangedRows {
  std::shared_ptr<const Changes> changes;
  std::vector<int64_t> rows;  // ascending
};
int64_t changes_new();
void changes_free(int64_t changes);
// kind: a ChangeKind. The changes must not be in use.
void changes_add(int64_t changes, int64_t site, bool of_inputs, int64_t kind, const Tensor& first,
                 const OptionalTensor& second, int64_t size);
// lists: numbers of changes, the count of rows for each, and these rows, below num_rows; or empty.
std::vector<ChangedRows> changed_rows(Tensors lists, int64_t num_rows);
// The changes of rows [first, first + count), renumbered from 0.
std::vector<ChangedRows> changed_rows_of(const std::vector<ChangedRows>& all, int64_t first, int64_t count);
// Those with changes to a site's inputs or outputs.
std::vector<ChangedRows> changed_at(const std::vector<ChangedRows>& all, int64_t site, bool of_inputs);
// Changes rows of x, the inputs or outputs of a site, in place.
void change_(const Tensor& x, const std::vector<ChangedRows>& changed, int64_t site, bool of_inputs);

// pack.cpp and quantised.cpp
void pack_linear_(const Tensor& packed, Tensors weights);
std::tuple<int64_t, int64_t> quantised_form(std::string_view kind, int64_t in_features);
std::tuple<Tensor, int64_t> pack_quantised(const Tensor& rows, std::string_view kind, int64_t in_features);
// int8_inputs: x is rounded to int8 codes, with a scale per group of 32 inputs.
Tensor quant_linear(const Tensor& x, Tensors panels, Ints forms, Ints sizes, const OptionalTensor& bias,
                    bool int8_inputs);
struct WeightGroups {  // groups of rows with a weight each, of `num` with the same number of columns
  std::vector<RowGroup> list;
  int64_t num;
};
// groups: of one part; null if all rows have the same weights.
void quant_linear_to(const Tensor& out, const Tensor& x, Tensors panels, Ints forms, Ints sizes,
                     const OptionalTensor& bias, bool int8_inputs, const WeightGroups* groups = nullptr);

// states.cpp
Tensor selective_scan(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                      const Tensor& state, const OptionalTensor& skip, const OptionalTensor& gate,
                      const OptionalTensor& dt_bias, bool softplus);
Tensor delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                  const Tensor& states, const Tensor& runs, bool normalize, bool additive);
Tensor causal_conv(const Tensor& x, const Tensor& weight, const Tensor& states, const Tensor& runs,
                   const OptionalTensor& bias, bool silu);

// A gated delta rule's layer between its projections, without the norm of its output.
struct DeltaLayer {
  Tensor conv_weight;          // [channels, taps]
  OptionalTensor conv_bias;    // [channels]
  Tensor conv_states;          // [slots, taps, channels]
  Tensor rates, dt_bias;       // fp32 [heads]
  Tensor states;               // fp32 [slots, heads, key_dim, width]
};
// qkv: [T, channels], the convolution's input; b, a: [T, heads]. Returns [T, heads, width].
Tensor gated_delta(const Tensor& qkv, const Tensor& b, const Tensor& a, const DeltaLayer& layer, const Tensor& runs);

// Mamba2's mixer between its projections.
struct ScanLayer {
  Tensor conv_weight;             // [channels, taps]
  OptionalTensor conv_bias;       // [channels]
  Tensor conv_states;             // [slots, taps, channels]
  Tensor rates, dt_bias, skip;    // fp32 [heads]
  Tensor states;                  // fp32 [slots, heads, key_dim, width]
  Tensor norm_weight;             // [heads * width]
  double eps;
  int64_t group;  // columns per group of the norm
};
// gate: [T, heads * width]; xbc: [T, channels], the convolution's input; dt: [T, heads]. Returns the shape of gate.
Tensor gated_scan(const Tensor& gate, const Tensor& xbc, const Tensor& dt, const ScanLayer& layer, const Tensor& runs);

// stack.cpp: a stack is identified by a number. The parts of a layer are added one by one before the layer itself.
int64_t stack_new();
void stack_free(int64_t stack);
void stack_norm(int64_t stack, const Tensor& weight, double eps, bool plus_one);
void stack_linears(int64_t stack, Tensors weights, Ints forms, bool int8_inputs, const OptionalTensor& bias, Ints sizes,
                   Tensors a_rows, Tensors b_rows, Tensors factors, Ints indices, Ints groups);
void stack_layer(int64_t stack, Ints shape, double scale, double softcap, const Tensor& k_cache, const Tensor& v_cache,
                 const OptionalTensor& sinks, std::string_view act);
// The layer's third norm is the one of the delta rule's output.
void stack_delta(int64_t stack, const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& conv_states,
                 const Tensor& rates, const Tensor& dt_bias, const Tensor& states, std::string_view act);
void stack_run(int64_t stack, const Tensor& x, const Tensor& cos, const Tensor& sin, Tensors attention, Tensors table,
               Tensors lora, const OptionalTensor& row_scales, Tensors changes);
void stack_ends(int64_t stack, const OptionalTensor& embedding);
Tensor stack_logits(int64_t stack, const Tensor& tokens, const Tensor& positions, const Tensor& angles,
                    const OptionalTensor& logit_rows, Tensors attention, Tensors table, Tensors lora,
                    const OptionalTensor& row_scales, Tensors changes, Tensors head_lora,
                    const OptionalTensor& head_scales, Tensors head_changes);

// The kernels in use; null until use_isa sets them.
extern const Kernels* active;
// The name of their instruction set.
std::string isa();
// The instruction sets that the processor has kernels for, best first, separated by spaces.
std::string isas();
// Switches to the kernels of an instruction set in a library. Returns "" or an error message.
std::string use_isa(std::string_view name, std::string_view library);

// Sets whether a row's sums are added in an order that does not depend on the other rows. See sums.py.
void fix_sums(bool is_fixed);

bool sums_are_fixed();

Dtype dtype_of(const Tensor& t);
int64_t rows_in(const Tensor& t);
void check_same_dtype(const Tensor& t, const Tensor& like, const char* name);

// Rows of a bf16 tensor in the layout of LinearArgs::x; a single row needs no copy.
Tensor chunk_rows(const Tensor& x);
// The same for rows in another order, which may repeat some.
Tensor chunk_rows(const Tensor& x, Ints order);

// Allocates rows in that layout.
Tensor empty_chunks(int64_t rows, int64_t width);

void check_packed(const Tensor& weight);

// A product's checked arguments, and the memory that only they refer to.
struct LinearCall {
  Tensor chunks;
  LinearArgs args;
};
LinearCall linear_call(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias);

// Allocates rows in the shape of x, with another width.
Tensor empty_rows(const Tensor& x, int64_t width);

// A tensor of any number of dimensions as rows of its last one.
Matrix rows_of(const Tensor& t, const char* name);

template <typename F>
void run_tasks(int64_t num_tasks, const F& task) {
  run_tasks(num_tasks, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &task);
}

// Calls copy(row) for each row, 16 rows a task: fewer would not be worth handing out.
template <typename F>
void run_rows(int64_t rows, const F& copy) {
  constexpr int64_t kTaskRows = 16;
  run_tasks((rows + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
    for (int64_t row = task * kTaskRows; row < std::min(rows, (task + 1) * kTaskRows); ++row) copy(row);
  });
}

}  // namespace lorafleet
