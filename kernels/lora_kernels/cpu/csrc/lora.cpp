// LoRA of sibling linear layers: as a separate operation, or together with their product.
#include "operations.h"

namespace lorafleet {
namespace {

// For fewer tiles, LoRA after a product takes less time than prefetching during the product.
constexpr int32_t kFewestTiles = 8;
// With fewer rows a product waits for its own weights; with more rows prefetching costs more than it saves.
constexpr int64_t kFewestRows = 15, kMostRows = 56;
// Minimum tasks per thread: threads that are delayed can then compute fewer of them.
constexpr int64_t kThreadTasks = 4;

struct LoraCall {
  std::vector<LoraSiteArgs> sites;
  LoraArgs args;
};

// outs: [rows, width] of each site.
LoraCall lora_call(const LoraSites& own, const LoraStep& step, const Tensor& x, Tensors outs) {
  const size_t num_sites = own.a_rows.size();
  LORAFLEET_CHECK(num_sites > 0 && own.b_rows.size() == num_sites && own.indices.size() == num_sites &&
                  own.groups.size() == num_sites && outs.size() == num_sites,
              "every output needs one site");
  LoraCall call;
  const int64_t in_features = own.a_rows[0].size(1);
  LORAFLEET_CHECK(step.rows.numel() <= rows_in(x), "a list of ", step.rows.numel(), " rows is not of an input of ",
                  rows_in(x));
  for (size_t i = 0; i < num_sites; ++i) {
    const Tensor &a = own.a_rows[i], &b = own.b_rows[i];
    const bool is_int8 = a.type == Scalar::kChar;
    if (!is_int8) check_same_dtype(a, x, "a_rows");
    check_same_dtype(b, a, "b_rows");
    LORAFLEET_CHECK(!is_int8 || (own.factors.size() == num_sites && own.factors[i].numel() == a.size(0)),
                    "int8 rows of site ", i, " need a factor each");
    LORAFLEET_CHECK(a.is_contiguous() && b.is_contiguous() && a.size(1) == in_features, "site ", i,
                    " does not fit its input");
    check_same_dtype(outs[i], x, "an output");
    LORAFLEET_CHECK(a.size(1) == x.size(-1) && b.size(1) == outs[i].size(-1) && rows_in(outs[i]) == rows_in(x), "site ",
                    i, " does not fit its input and output");
    call.sites.push_back({rows_of(outs[i], "an output"),
                          a.data,
                          b.data,
                          is_int8 ? entries_of<float>(own.factors[i], "factors") : nullptr,
                          b.size(1),
                          own.indices[i],
                          own.groups[i]});
  }
  const int32_t *num_rows = entries_of<int32_t>(step.counts, "counts"), *num_tiles = num_rows + 2;
  const bool large = num_tiles[1] >= 2 * num_threads();  // else too few tiles for all threads
  call.args = {
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .in_features = in_features,
      .sites = call.sites.data(),
      .num_sites = static_cast<int64_t>(num_sites),
      .ranks = entries_of<int32_t>(step.ranks, "ranks"),
      .scales = entries_of<float>(step.scales, "scales"),
      .table_sites = step.ranks.size(1),
      .pages = entries_of<int32_t>(step.pages, "pages"),
      .groups = step.pages.size(1),
      .max_pages = step.pages.size(2),
      .tiles = entries_of<int32_t>(large ? step.large_tiles : step.small_tiles, "tiles"),
      .num_tiles = num_tiles[large],
      .rows = entries_of<int32_t>(step.rows, "rows"),
      .num_rows = *num_rows,
      .row_scales = step.row_scales ? entries_of<float>(*step.row_scales, "row_scales") : nullptr,
      .fixed_sums = sums_are_fixed(),
      .apart = nullptr,
  };
  return call;
}

}  // namespace

void lora_add_(Tensors outs, const Tensor& x, Tensors a_rows, Tensors b_rows, Tensors factors, Ints indices,
               Ints groups, const Tensor& ranks, const Tensor& scales, const Tensor& pages, const Tensor& rows,
               const Tensor& small_tiles, const Tensor& large_tiles, const Tensor& counts,
               const OptionalTensor& row_scales) {
  LORAFLEET_CHECK(outs.size() == a_rows.size(), "every output needs one site");
  if (outs.empty()) return;
  const LoraStep step = {ranks, scales, pages, rows, small_tiles, large_tiles, counts, row_scales};
  active->lora_add(lora_call({a_rows, b_rows, factors, indices, groups}, step, x, outs).args);
}

bool linear_lora_pays(const Tensor& x, const LoraStep& step) {
  return active->has_slow_products && kFewestRows <= rows_in(x) && rows_in(x) <= kMostRows &&
         entries_of<int32_t>(step.counts, "counts")[2] >= kFewestTiles;
}

void linear_lora_to(const Tensor& out, const Tensor& x, const Tensor& packed, const OptionalTensor& bias, Tensors outs,
                    const LoraSites& sites, const LoraStep& step) {
  const LinearCall product = linear_call(out, x, packed, bias);
  LoraCall lora = lora_call(sites, step, x, outs);
  const Tensor apart = empty({lora.args.num_rows, product.args.out_features}, Scalar::kFloat);
  lora.args.apart = reinterpret_cast<float*>(apart.data);
  const int64_t panels = (product.args.out_features + kPanel - 1) / kPanel;
  const int64_t most_tasks = std::max<int64_t>(lora.args.num_tiles, kThreadTasks * num_threads());
  active->linear_lora(product.args, {lora.args, std::min(panels, most_tasks)});
}

}  // namespace lorafleet
