#include "isa.h"

namespace lorafleet {
namespace {
#include "../attention/attention.h"
}

void put_attention(Kernels& kernels) {
  kernels.attention = attention;
  kernels.attention_rows = kHasTiles ? 96 : 32;
}

}  // namespace lorafleet
