// The kernels for one instruction set, named by LORAFLEET_ISA (avx2, avx512, avx512_bf16, amx_bf16 or neon) to match the
// compiler's flags. No standard library templates here: the linker could pick this file's copy for code that runs everywhere.
#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "kernels.h"

#define LORAFLEET_JOIN_(a, b) a##b
#define LORAFLEET_JOIN(a, b) LORAFLEET_JOIN_(a, b)
#define LORAFLEET_STRING_(a) #a
#define LORAFLEET_STRING(a) LORAFLEET_STRING_(a)

namespace lorafleet {
namespace LORAFLEET_ISA {
namespace {

#if defined(__aarch64__)
#include "registers/vec_neon.h"
#elif defined(__AVX512F__)
#include "registers/vec_avx512.h"
#else
#include "registers/vec_avx2.h"
#endif

template <typename F>
inline void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kF32:
      return f.template operator()<float>();
    case Dtype::kBf16:
      return f.template operator()<bf16>();
    case Dtype::kF16:
      return f.template operator()<f16>();
  }
}

#include "registers/math.h"
#include "registers/tiles.h"
#include "attention/attention.h"
#include "products/lora.h"
#include "products/linear.h"
#include "products/quant_codes.h"
#include "products/quant_int8.h"
#include "products/quant.h"
#include "pointwise.h"
#include "states/scan.h"
#include "states/delta.h"

constexpr Kernels kKernels = {
    LORAFLEET_STRING(LORAFLEET_ISA), linear, linear_lora, lora_shrink, quant_uses_integers, quant_prepare,
    quant_digits, quant_encode, quant_linear, lora_add, kv_write, attention, rms_norm, rotary, gated_act, mask_logits,
    argmax, scan, delta_rule, causal_conv, kHasTiles ? 96 : 32, kHasTiles ? 0 : 128, !kHasTiles,
};

}  // namespace
}  // namespace LORAFLEET_ISA

const Kernels& LORAFLEET_JOIN(LORAFLEET_ISA, _kernels)() { return LORAFLEET_ISA::kKernels; }

}  // namespace lorafleet
