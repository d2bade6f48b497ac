// The operations with torch's tensors, checked; bind.cpp has them, stack.cpp strings them together.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "kernels.h"

namespace lorafleet {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features);
Tensor quant_linear(const Tensor& x, at::TensorList panels, at::IntArrayRef forms, at::IntArrayRef sizes,
                    const std::optional<Tensor>& bias);
void lora_add_(at::TensorList outs, const Tensor& x, at::TensorList a_rows, at::TensorList b_rows,
               at::IntArrayRef indices, at::IntArrayRef groups, const Tensor& ranks, const Tensor& scales,
               const Tensor& pages, const Tensor& rows, const Tensor& small_tiles, const Tensor& large_tiles,
               const Tensor& counts, const std::optional<Tensor>& row_scales);
void kv_write_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping);
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& query_starts, const Tensor& kv_lens, double scale, int64_t window, double softcap,
                       const std::optional<Tensor>& sinks);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::optional<Tensor>& residual,
                bool plus_one);
void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin);
Tensor gated_act(const Tensor& gate, const Tensor& up, c10::string_view act);

// The kernels in use; null where the processor has none.
extern const Kernels* active;

Dtype dtype_of(const Tensor& t);
void check_same_dtype(const Tensor& t, const Tensor& like, const char* name);

// Rows of a bf16 tensor as LinearArgs::x has them; a single row is its own chunks.
Tensor chunk_rows(const Tensor& x);

// A tensor of any number of dimensions as rows of its last one.
Matrix rows_of(const Tensor& t, const char* name);

template <typename T>
const T* ints(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.const_data_ptr<T>();
}

// Adds the class DecoderStack to the library.
void register_stack(torch::Library& library);

}  // namespace lorafleet
