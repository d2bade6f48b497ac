// Lays out bf16 weights for `linear`: panels of columns, each with the pairs of inputs of all its columns side by side.
#include <cstring>

#include "operations.h"

namespace lorafleet {

namespace {

// Transposes rows of pairs to a panel; columns beyond the rows become 0.
void pack_panel(const uint32_t* const* rows, int64_t num_rows, int64_t pairs, uint32_t* to) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  const int64_t whole = num_rows < kPanel ? 0 : pairs / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4)
    for (int64_t c = 0; c < kPanel; c += 4) {
      Four a, b, d, e;
      std::memcpy(&a, rows[c] + k, 16), std::memcpy(&b, rows[c + 1] + k, 16);
      std::memcpy(&d, rows[c + 2] + k, 16), std::memcpy(&e, rows[c + 3] + k, 16);
      const Four ab = __builtin_shuffle(a, b, Four{0, 4, 1, 5}), ba = __builtin_shuffle(a, b, Four{2, 6, 3, 7});
      const Four de = __builtin_shuffle(d, e, Four{0, 4, 1, 5}), ed = __builtin_shuffle(d, e, Four{2, 6, 3, 7});
      const Four out[4] = {__builtin_shuffle(ab, de, Four{0, 1, 4, 5}), __builtin_shuffle(ab, de, Four{2, 3, 6, 7}),
                           __builtin_shuffle(ba, ed, Four{0, 1, 4, 5}), __builtin_shuffle(ba, ed, Four{2, 3, 6, 7})};
      for (int64_t i = 0; i < 4; ++i) std::memcpy(to + (k + i) * kPanel + c, &out[i], 16);
    }
  for (int64_t k = whole; k < pairs; ++k)
    for (int64_t c = 0; c < kPanel; ++c) to[k * kPanel + c] = c < num_rows ? rows[c][k] : 0;
}

}  // namespace

void pack_linear_(const Tensor& packed, Tensors weights) {
  LORAFLEET_CHECK(!weights.empty(), "no weight to pack");
  const int64_t in_features = weights[0].dim() == 2 ? weights[0].size(1) : 1, pairs = in_features / 2;
  std::vector<const uint32_t*> rows;
  for (const Tensor& weight : weights) {
    LORAFLEET_CHECK(weight.dim() == 2 && weight.type == Scalar::kBFloat16 && in_features % 2 == 0 &&
                        weight.size(1) == in_features && weight.is_contiguous(),
                    "a packed weight is made of contiguous bfloat16 [N, K] with K even and the same for all");
    for (int64_t row = 0; row < weight.size(0); ++row)
      rows.push_back(reinterpret_cast<const uint32_t*>(weight.data) + row * pairs);
  }
  const int64_t out_features = rows.size(), panels = (out_features + kPanel - 1) / kPanel;
  LORAFLEET_CHECK(packed.has_sizes({panels, pairs, kPanel, 2}) && packed.is_contiguous() &&
                      packed.type == Scalar::kBFloat16,
                  "packed must be contiguous bfloat16 [", panels, ", ", pairs, ", ", kPanel, ", 2]");
  auto* to = reinterpret_cast<uint32_t*>(packed.data);
  run_tasks(panels, [&](int64_t p) {
    pack_panel(rows.data() + p * kPanel, std::min<int64_t>(kPanel, out_features - p * kPanel), pairs,
               to + p * pairs * kPanel);
  });
}

}  // namespace lorafleet
