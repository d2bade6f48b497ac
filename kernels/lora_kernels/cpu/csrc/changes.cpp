// Adapters' changes to inputs and outputs of layers besides rank rows. One adapter's changes are assembled once and
// then referred to by number: a step lists the number with the rows that have it.
#include <algorithm>
#include <map>
#include <mutex>

#include "operations.h"

namespace lorafleet {
namespace {

constexpr int64_t kMaxSites = 1 << 20;
constexpr int64_t kTaskRows = 16;      // rows of one adapter per task; threads share more rows
constexpr int64_t kRunNumbers = 16384;  // numbers read per thread, approximately: less is not worth waking one

std::mutex changes_mutex;
std::map<int64_t, std::shared_ptr<Changes>> all_changes;

std::shared_ptr<Changes> changes_at(int64_t number) {
  const std::lock_guard<std::mutex> lock(changes_mutex);
  const auto found = all_changes.find(number);
  LORAFLEET_CHECK(found != all_changes.end(), "there are no changes ", number);
  return found->second;
}

}  // namespace

int64_t changes_new() {
  static int64_t number = 0;
  const std::lock_guard<std::mutex> lock(changes_mutex);
  all_changes[++number] = std::make_shared<Changes>();
  return number;
}

void changes_free(int64_t changes) {
  const std::lock_guard<std::mutex> lock(changes_mutex);
  all_changes.erase(changes);
}

void changes_add(int64_t changes, int64_t site, bool of_inputs, int64_t kind, const Tensor& first,
                 const OptionalTensor& second, int64_t size) {
  const std::shared_ptr<Changes> found = changes_at(changes);
  LORAFLEET_CHECK(0 <= site && site < kMaxSites, "there is no site ", site);
  LORAFLEET_CHECK(0 <= kind && kind <= static_cast<int64_t>(ChangeKind::kBlocks), "there is no kind of change ", kind);
  ChangeOp op = {static_cast<ChangeKind>(kind), entries_of<float>(first, "first"), nullptr, first.numel(), size};
  if (op.kind == ChangeKind::kBlocks) {
    LORAFLEET_CHECK(first.dim() == 3 && first.size(1) == first.size(2) && first.size(1) > 0 && !second,
                    "blocks must be square, and have no second numbers");
    op.width = first.size(0) * first.size(1), op.size = first.size(1);
  } else if (second) {
    op.second = entries_of<float>(*second, "second");
    LORAFLEET_CHECK(second->numel() == op.width, "there are ", second->numel(), " second numbers of ", op.width);
    LORAFLEET_CHECK(op.kind != ChangeKind::kScale || (size > 0 && size % 2 == 0 && op.width % size == 0),
                    "groups of ", size, " do not divide ", op.width, " evenly");
  }
  if (site >= static_cast<int64_t>(found->sites.size())) found->sites.resize(site + 1);
  (of_inputs ? found->sites[site].inputs : found->sites[site].outputs).push_back(op);
  found->kept.push_back(first);
  if (second) found->kept.push_back(*second);
}

std::vector<ChangedRows> changed_rows(Tensors lists, int64_t num_rows) {
  if (lists.empty()) return {};
  LORAFLEET_CHECK(lists.size() == 3, "changes have 3 lists");
  const int64_t *numbers = entries_of<int64_t>(lists[0], "numbers of changes"),
                *counts = entries_of<int64_t>(lists[1], "counts of changed rows"),
                *rows = entries_of<int64_t>(lists[2], "changed rows");
  const int64_t *const end = rows + lists[2].numel();
  LORAFLEET_CHECK(lists[0].numel() == lists[1].numel(), "each adapter's changes need a count of rows");
  std::vector<ChangedRows> found;
  for (int64_t i = 0; i < lists[0].numel(); rows += counts[i++]) {
    LORAFLEET_CHECK(0 <= counts[i] && counts[i] <= end - rows, "there are too few changed rows");
    found.push_back({changes_at(numbers[i]), {rows, rows + counts[i]}});
    for (int64_t r = 0; r < counts[i]; ++r)
      LORAFLEET_CHECK((r ? rows[r - 1] : -1) < rows[r] && rows[r] < num_rows, "row ", rows[r], " of ", num_rows,
                      " is not there, or not in ascending order");
  }
  return found;
}

std::vector<ChangedRows> changed_rows_of(const std::vector<ChangedRows>& all, int64_t first, int64_t count) {
  std::vector<ChangedRows> block;
  for (const ChangedRows& own : all) {
    const auto begin = std::lower_bound(own.rows.begin(), own.rows.end(), first);
    const auto end = std::lower_bound(begin, own.rows.end(), first + count);
    if (begin == end) continue;
    block.push_back({own.changes, {begin, end}});
    for (int64_t& row : block.back().rows) row -= first;
  }
  return block;
}

std::vector<ChangedRows> changed_at(const std::vector<ChangedRows>& all, int64_t site, bool of_inputs) {
  std::vector<ChangedRows> found;
  for (const ChangedRows& own : all)
    if (!own.changes->at(site, of_inputs).empty()) found.push_back(own);
  return found;
}

void change_(const Tensor& x, const std::vector<ChangedRows>& changed, int64_t site, bool of_inputs) {
  std::vector<ChangeTask> tasks;
  int64_t numbers = 0;
  for (const auto& [changes, rows] : changed) {
    const std::vector<ChangeOp>& ops = changes->at(site, of_inputs);
    if (ops.empty()) continue;
    const auto num_rows = static_cast<int64_t>(rows.size());
    for (const ChangeOp& op : ops) {
      LORAFLEET_CHECK(op.width == x.size(-1), "a change of ", op.width, " numbers does not fit ", x.size(-1));
      numbers += op.width * (num_rows + (op.kind == ChangeKind::kBlocks ? op.size * (1 + num_rows / 4) : 0));
    }
    for (int64_t first = 0; first < num_rows; first += kTaskRows)
      tasks.push_back({ops.data(), static_cast<int64_t>(ops.size()), rows.data() + first,
                       std::min(kTaskRows, num_rows - first)});
  }
  if (tasks.empty()) return;
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  active->change({
      .dtype = dtype_of(x),
      .x = rows_of(x, "x"),
      .tasks = tasks.data(),
      .num_tasks = num_tasks,
      .num_runs = std::clamp<int64_t>(numbers / kRunNumbers, 1, num_tasks),
  });
}

}  // namespace lorafleet
