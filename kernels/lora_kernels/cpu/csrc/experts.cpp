// Products whose rows have different weights: the experts of a mixture.
#include <cstring>

#include "operations.h"

namespace lorafleet {

namespace {

constexpr int64_t kBf16Form = -1;  // in place of a quantized form

// The packed weights of `num` experts, each with the same number of columns.
struct ExpertWeights {
  const Tensor& packed;
  int64_t form, num;
  bool int8_inputs;

  int64_t columns() const {
    if (form == kBf16Form) check_packed(packed);
    LORAFLEET_CHECK(packed.dim() >= 2 && num > 0 && packed.size(0) % num == 0, packed.size(0), " panels are not of ",
                    num, " weights");
    return packed.size(0) / num * kPanel;
  }
};

// Adds rows [first, end) times weight number `weight` of several, in groups of at most kGroupRows.
void add_groups(WeightGroups& groups, int64_t first, int64_t end, int64_t weight, int64_t columns) {
  const int64_t rows = end - first, parts = (rows + kGroupRows - 1) / kGroupRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts;
    groups.list.push_back({first + begin, rows * (part + 1) / parts - begin, weight * columns / kPanel});
  }
}

// x: rows, or those of bf16 weights in chunks, in the layout of LinearArgs::x.
Tensor products_of(const Tensor& x, int64_t rows, const ExpertWeights& weights, const WeightGroups& groups) {
  const int64_t columns = weights.columns();
  const Tensor out = empty({rows, columns}, x.type);
  if (weights.form != kBf16Form) {
    const int64_t all_columns = columns * weights.num;
    quant_linear_to(out, x, {&weights.packed, 1}, {&weights.form, 1}, {&all_columns, 1}, std::nullopt,
                    weights.int8_inputs, &groups);
    return out;
  }
  active->linear_groups(
      {
          .x = reinterpret_cast<const uint16_t*>(x.data),
          .panels = reinterpret_cast<const uint16_t*>(weights.packed.data),
          .bias = nullptr,
          .out = rows_of(out, "out"),
          .rows = rows,
          .in_features = 2 * weights.packed.size(1),
          .out_features = columns,
      },
      groups.list.data(), groups.list.size());
  return out;
}

void check_inputs(const Tensor& x, const ExpertWeights& weights) {
  LORAFLEET_CHECK(x.dim() == 2, "x must be a matrix");
  if (weights.form != kBf16Form) return;  // checked by quant_linear_to
  check_same_dtype(x, weights.packed, "x");
  const int64_t width = 2 * weights.packed.size(1);
  LORAFLEET_CHECK(x.size(1) == width, "x must be [rows, ", width, "]");
}

// Rows of x in another order, which may repeat some.
Tensor gather_rows(const Tensor& x, Ints order) {
  const int64_t rows = order.size(), bytes = x.size(1) * x.element_size();
  const Tensor gathered = empty({rows, x.size(1)}, x.type);
  const Matrix from = rows_of(x, "x");
  run_rows(rows, [&](int64_t row) {
    std::memcpy(gathered.data + row * bytes, x.data + order[row] * from.stride * x.element_size(), bytes);
  });
  return gathered;
}

}  // namespace

Tensor grouped_linear(const Tensor& x, const Tensor& packed, const Tensor& ends, int64_t form, bool int8_inputs) {
  const ExpertWeights weights = {packed, form, ends.numel(), int8_inputs};
  const int64_t columns = weights.columns();
  check_inputs(x, weights);
  const int32_t* end = entries_of<int32_t>(ends, "ends");
  WeightGroups groups = {{}, weights.num};
  for (int64_t i = 0, first = 0; i < weights.num; first = end[i++]) {
    LORAFLEET_CHECK(first <= end[i] && end[i] <= x.size(0), "ends must ascend to at most ", x.size(0));
    add_groups(groups, first, end[i], i, columns);
  }
  LORAFLEET_CHECK(end[weights.num - 1] == x.size(0), "ends must ascend to ", x.size(0));
  return products_of(form == kBf16Form ? chunk_rows(x) : x, x.size(0), weights, groups);
}

Tensor experts(const Tensor& x, const Tensor& ids, const Tensor& factors, const Tensor& up_packed,
               const Tensor& down_packed, Ints forms, bool int8_inputs, std::string_view act, int64_t num) {
  LORAFLEET_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && factors.has_sizes(ids.sizes()),
                  "ids and weights must be [tokens, k]");
  LORAFLEET_CHECK(forms.size() == 2, "there are two forms");
  const ExpertWeights up = {up_packed, forms[0], num, int8_inputs}, down = {down_packed, forms[1], num, int8_inputs};
  const int64_t up_columns = up.columns(), columns = down.columns(), width = up_columns / 2;
  const bool is_chunked = down.form == kBf16Form;
  check_inputs(x, up);
  if (is_chunked) {
    check_same_dtype(x, down_packed, "x");
    LORAFLEET_CHECK(width == 2 * down_packed.size(1), "an expert's first product has ", up_columns, " columns, not ",
                    4 * down_packed.size(1));
  }
  const int64_t pairs = ids.numel(), k = ids.size(1);
  const int64_t* expert = entries_of<int64_t>(ids, "ids");
  std::vector<int64_t> starts(num + 1), places(pairs), tokens(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    LORAFLEET_CHECK(0 <= expert[i] && expert[i] < num, "expert ", expert[i], " of ", num, " is not there");
    ++starts[expert[i] + 1];
  }
  WeightGroups up_groups = {{}, num}, groups = {{}, num};
  for (int64_t i = 0; i < num; ++i) {
    starts[i + 1] += starts[i];
    add_groups(up_groups, starts[i], starts[i + 1], i, up_columns);
    add_groups(groups, starts[i], starts[i + 1], i, columns);
  }
  for (int64_t i = 0; i < pairs; ++i) tokens[places[i] = starts[expert[i]]++] = i / k;
  const Tensor sorted = up.form == kBf16Form ? chunk_rows(x, tokens) : gather_rows(x, tokens);
  const Tensor first = products_of(sorted, pairs, up, up_groups);
  const Tensor hidden = gated_act(first.columns(0, width), first.columns(width, width), act, is_chunked);
  const Tensor rows = products_of(hidden, pairs, down, groups);
  const Tensor out = empty({x.size(0), columns}, x.type);
  active->weighted_rows({
      .dtype = dtype_of(x),
      .rows = rows_of(rows, "rows"),
      .out = rows_of(out, "out"),
      .places = places.data(),
      .factors = entries_of<float>(factors, "weights"),
      .tokens = x.size(0),
      .k = k,
      .width = columns,
  });
  return out;
}

}  // namespace lorafleet
