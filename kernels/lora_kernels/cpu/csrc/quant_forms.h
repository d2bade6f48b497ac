// The packed layout of quantized weights for matrix products: panels of kPanel output columns, read sequentially.
//
// A panel is a sequence of groups of 32 inputs: their scales (and minima), then their codes. A super form has fp16
// scales for 256 inputs before their groups, which then contain 8-bit factors of these scales. Bytes are laid out
// [inputs, columns].
//
// Nibbles are in 16-bit words, [columns, 2] for each of four runs of 8 inputs: word (c, odd) holds inputs odd, odd + 2,
// odd + 4, odd + 6 of column c, lowest bits first, matching bf16 pairs. Codes of six bits consist of their nibbles and
// then, in such words for two runs of 16 inputs, their upper two bits at the places given by `upper_place`.
#pragma once

#include <cstdint>

namespace lorafleet {

constexpr int64_t kSuperInputs = 256;

struct QuantForm {
  int bits;    // per code: 4, 6, or 8 for signed bytes
  bool super;
  bool min;    // weight = scale * code + addend, else scale * code
  int group;   // inputs that share a scale: 32 or 16
  int offset;  // subtracted from codes of 4 or 6 bits
};

constexpr QuantForm kQuantForms[] = {
    {4, false, false, 32, 8},  // 0: Q4_0
    {4, false, true, 32, 0},   // 1: Q4_1
    {4, true, true, 32, 0},    // 2: Q4_K
    {8, false, false, 32, 0},  // 3: Q8_0, Q5_0
    {8, false, true, 32, 0},   // 4: Q5_1
    {8, true, true, 32, 0},    // 5: Q5_K
    {6, true, false, 16, 32},  // 6: Q6_K
};
constexpr int kNumQuantForms = sizeof(kQuantForms) / sizeof(QuantForm);

constexpr int64_t code_bytes(const QuantForm& f) { return f.bits * 128; }
constexpr int64_t group_head_bytes(const QuantForm& f) { return !f.super && f.min ? 128 : 64; }
constexpr int64_t group_bytes(const QuantForm& f) { return group_head_bytes(f) + code_bytes(f); }
constexpr int64_t super_head_bytes(const QuantForm& f) { return f.super ? (f.min ? 128 : 64) : 0; }
// From a super-block's start to the group of its input k, which is not 0.
constexpr int64_t super_offset(const QuantForm& f, int64_t k) { return super_head_bytes(f) + k / 32 * group_bytes(f); }
constexpr int64_t panel_bytes(const QuantForm& f, int64_t in_features) {
  return in_features / 32 * group_bytes(f) + (f.super ? in_features / kSuperInputs * super_head_bytes(f) : 0);
}

// The bit place of the upper two bits of pair i (0 to 7) in a run of 16 inputs: 4 + 2 i, the last two pairs at the
// bottom of the word. Most are one right shift away from bits 4 and 5.
constexpr int upper_place(int i) { return (4 + 2 * i) % 16; }

// The bf16 integers of all codes of up to six bits. A word permutation of one register uses five index bits, so the
// table of nibbles repeats.
struct CodeTable {
  uint16_t bits[64];
};
constexpr CodeTable code_table(int num_bits, int offset) {
  CodeTable table = {};
  for (int i = 0; i < 64; ++i) {
    const int value = (i & ((1 << num_bits) - 1)) - offset, size = value < 0 ? -value : value;
    int exponent = 0;
    while (size >> (exponent + 1)) ++exponent;
    const int bits = size ? (exponent + 127) << 7 | ((size << 7 >> exponent) & 127) : 0;
    table.bits[i] = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
  }
  return table;
}

}  // namespace lorafleet
