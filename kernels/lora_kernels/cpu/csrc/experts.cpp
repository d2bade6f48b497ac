// Products whose rows have different weights: the experts of a mixture.
#include "operations.h"

namespace lorafleet {

namespace {

// Rows [first, end) times the weight that begins at a panel, in groups of at most kGroupRows.
void add_groups(std::vector<RowGroup>& groups, int64_t first, int64_t end, int64_t panel) {
  const int64_t rows = end - first, parts = (rows + kGroupRows - 1) / kGroupRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts;
    groups.push_back({first + begin, rows * (part + 1) / parts - begin, panel});
  }
}

// The columns of each of `num` weights in one packed tensor.
int64_t columns_of(const Tensor& packed, int64_t num) {
  check_packed(packed);
  LORAFLEET_CHECK(num > 0 && packed.size(0) % num == 0, packed.size(0), " panels are not of ", num, " weights");
  return packed.size(0) / num * kPanel;
}

// chunks: rows in the layout of LinearArgs::x. Their groups' weights have `columns` columns each.
Tensor products_of(const Tensor& chunks, int64_t rows, const Tensor& packed, int64_t columns,
                   const std::vector<RowGroup>& groups) {
  const Tensor out = empty({rows, columns}, packed.type);
  active->linear_groups(
      {
          .x = reinterpret_cast<const uint16_t*>(chunks.data),
          .panels = reinterpret_cast<const uint16_t*>(packed.data),
          .bias = nullptr,
          .out = rows_of(out, "out"),
          .rows = rows,
          .in_features = 2 * packed.size(1),
          .out_features = columns,
      },
      groups.data(), groups.size());
  return out;
}

void check_inputs(const Tensor& x, const Tensor& packed) {
  check_same_dtype(x, packed, "x");
  LORAFLEET_CHECK(x.dim() == 2 && x.size(1) == 2 * packed.size(1), "x must be [rows, ", 2 * packed.size(1), "]");
}

}  // namespace

Tensor grouped_linear(const Tensor& x, const Tensor& packed, const Tensor& ends) {
  const int64_t num = ends.numel(), columns = columns_of(packed, num);
  check_inputs(x, packed);
  const int32_t* end = entries_of<int32_t>(ends, "ends");
  std::vector<RowGroup> groups;
  for (int64_t i = 0, first = 0; i < num; first = end[i++]) {
    LORAFLEET_CHECK(first <= end[i] && end[i] <= x.size(0), "ends must ascend to at most ", x.size(0));
    add_groups(groups, first, end[i], i * columns / kPanel);
  }
  LORAFLEET_CHECK(end[num - 1] == x.size(0), "ends must ascend to ", x.size(0));
  return products_of(chunk_rows(x), x.size(0), packed, columns, groups);
}

Tensor experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& up, const Tensor& down,
               std::string_view act, int64_t num) {
  LORAFLEET_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && weights.has_sizes(ids.sizes()),
                  "ids and weights must be [tokens, k]");
  const int64_t up_columns = columns_of(up, num), columns = columns_of(down, num), width = 2 * down.size(1);
  check_inputs(x, up);
  LORAFLEET_CHECK(up_columns == 2 * width, "an expert's first product has ", up_columns, " columns, not ", 2 * width);
  const int64_t pairs = ids.numel(), k = ids.size(1);
  const int64_t* expert = entries_of<int64_t>(ids, "ids");
  std::vector<int64_t> starts(num + 1), places(pairs), tokens(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    LORAFLEET_CHECK(0 <= expert[i] && expert[i] < num, "expert ", expert[i], " of ", num, " is not there");
    ++starts[expert[i] + 1];
  }
  std::vector<RowGroup> up_groups, groups;
  for (int64_t i = 0; i < num; ++i) {
    starts[i + 1] += starts[i];
    add_groups(up_groups, starts[i], starts[i + 1], i * up_columns / kPanel);
    add_groups(groups, starts[i], starts[i + 1], i * columns / kPanel);
  }
  for (int64_t i = 0; i < pairs; ++i) tokens[places[i] = starts[expert[i]]++] = i / k;
  const Tensor first = products_of(chunk_rows(x, tokens), pairs, up, up_columns, up_groups);
  const Tensor hidden = gated_act(first.columns(0, width), first.columns(width, width), act, true);
  const Tensor rows = products_of(hidden, pairs, down, columns, groups);
  const Tensor out = empty({x.size(0), columns}, x.type);
  active->weighted_rows({
      .dtype = dtype_of(x),
      .rows = rows_of(rows, "rows"),
      .out = rows_of(out, "out"),
      .places = places.data(),
      .factors = entries_of<float>(weights, "weights"),
      .tokens = x.size(0),
      .k = k,
      .width = columns,
  });
  return out;
}

}  // namespace lorafleet
