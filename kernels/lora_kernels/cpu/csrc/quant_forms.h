// How quantised weights are packed for the matrix product: in panels of kPanel output columns, read from end to end.
//
// A panel is a sequence of groups of 32 inputs: their scales (and minima), then their codes. In a super form 256 inputs
// have fp16 scales in front of their groups, which then have 8-bit factors of these. Bytes lie [inputs, columns].
// Nibbles lie in 16-bit words, for each of four runs of 8 inputs [columns, 2]: word (c, odd) holds the inputs odd,
// odd + 2, odd + 4, odd + 6 of column c, lowest bits first, as pairs of bf16 want them.
#pragma once

#include <cstdint>

namespace lorafleet {

constexpr int64_t kSuperInputs = 256;

struct QuantForm {
  bool bytes;  // codes are signed bytes, else nibbles
  bool super;
  bool min;    // weight = scale * code + addend, else scale * code
  int group;   // inputs that share a scale: 32 or 16
  int offset;  // subtracted from a nibble
};

constexpr QuantForm kQuantForms[] = {
    {false, false, false, 32, 8},  // 0: Q4_0
    {false, false, true, 32, 0},   // 1: Q4_1
    {false, true, true, 32, 0},    // 2: Q4_K
    {true, false, false, 32, 0},   // 3: Q8_0, Q5_0
    {true, false, true, 32, 0},    // 4: Q5_1
    {true, true, true, 32, 0},     // 5: Q5_K
    {true, true, false, 16, 0},    // 6: Q6_K
};
constexpr int kNumQuantForms = sizeof(kQuantForms) / sizeof(QuantForm);

constexpr int64_t code_bytes(const QuantForm& f) { return f.bytes ? 1024 : 512; }
constexpr int64_t group_head_bytes(const QuantForm& f) { return !f.super && f.min ? 128 : 64; }
constexpr int64_t group_bytes(const QuantForm& f) { return group_head_bytes(f) + code_bytes(f); }
constexpr int64_t super_head_bytes(const QuantForm& f) { return f.super ? (f.min ? 128 : 64) : 0; }
// From a super-block's start to the group of its input k, which is not 0.
constexpr int64_t super_offset(const QuantForm& f, int64_t k) { return super_head_bytes(f) + k / 32 * group_bytes(f); }
constexpr int64_t panel_bytes(const QuantForm& f, int64_t in_features) {
  return in_features / 32 * group_bytes(f) + (f.super ? in_features / kSuperInputs * super_head_bytes(f) : 0);
}

// The bf16 integers of all nibbles, twice: a permutation by words looks at five bits.
struct NibbleTable {
  uint16_t bits[32];
};
constexpr NibbleTable nibble_table(int offset) {
  NibbleTable table = {};
  for (int i = 0; i < 32; ++i) {
    const int value = (i & 15) - offset, size = value < 0 ? -value : value;
    int exponent = 0;
    while (size >> (exponent + 1)) ++exponent;
    const int bits = size ? (exponent + 127) << 7 | ((size << 7 >> exponent) & 127) : 0;
    table.bits[i] = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
  }
  return table;
}

}  // namespace lorafleet
