#include "isa.h"

namespace lorafleet {
namespace {
#include "../products/lora.h"
#include "../products/linear.h"
}

void put_products(Kernels& kernels) {
  kernels.linear = linear;
  kernels.linear_groups = linear_groups;
  kernels.lora_add = lora_add;
#ifdef __AMX_BF16__
  kernels.block_rows = 0;
#else
  kernels.linear_lora = linear_lora;
  kernels.block_rows = 128;
  kernels.has_slow_products = true;
#endif
}

}  // namespace lorafleet
