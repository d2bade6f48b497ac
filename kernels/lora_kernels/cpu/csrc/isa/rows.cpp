// Operations on rows and states, and the table of all kernels.
#include "isa.h"

namespace lorafleet {
namespace {
#include "../pointwise.h"
#include "../changes.h"
#include "../states/scan.h"
#include "../states/delta.h"
}

void put_rows(Kernels& kernels) {
  kernels.kv_write = kv_write;
  kernels.rms_norm = rms_norm;
  kernels.rotary = rotary;
  kernels.gated_act = gated_act;
  kernels.weighted_rows = weighted_rows;
  kernels.change = change;
  kernels.mask_logits = mask_logits;
  kernels.argmax = argmax;
  kernels.scan = scan;
  kernels.delta_gates = delta_gates;
  kernels.scan_inputs = scan_inputs;
  kernels.scan_norm = scan_norm;
  kernels.delta_rule = delta_rule;
  kernels.causal_conv = causal_conv;
}

}  // namespace lorafleet

const lorafleet::Kernels* lorafleet_kernels() {
  static lorafleet::Kernels kernels = {};
  lorafleet::put_attention(kernels);
  lorafleet::put_products(kernels);
  lorafleet::put_quantised(kernels);
  lorafleet::put_rows(kernels);
  return &kernels;
}
