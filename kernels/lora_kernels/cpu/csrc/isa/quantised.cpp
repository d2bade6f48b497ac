#include "isa.h"

namespace lorafleet {
namespace {
#include "../products/quant_codes.h"
#include "../products/quant_int8.h"
#include "../products/quant.h"
}

void put_quantised(Kernels& kernels) {
  kernels.quant_uses_integers = quant_uses_integers;
  kernels.quant_prepare = quant_prepare;
  kernels.quant_digits = quant_digits;
  kernels.quant_encode = quant_encode;
  kernels.quant_linear = quant_linear;
  kernels.quant_groups = quant_groups;
}

}  // namespace lorafleet
