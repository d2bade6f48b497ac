// What `HelperCores` does to one helper, which computes or sleeps. Exits with the number of the first check that fails,
// 0 if none does, and 77 where the system has only one core for it.
#include <atomic>
#include <thread>

#include "cores.h"

namespace {

cpu_set_t cores_of(pthread_t thread) {
  cpu_set_t cores;
  pthread_getaffinity_np(thread, sizeof cores, &cores);
  return cores;
}

bool is_only(const cpu_set_t& cores, int core) { return CPU_COUNT(&cores) == 1 && CPU_ISSET(core, &cores); }

std::atomic<bool> may_end{false};

void sleep_until_end() { may_end.wait(false); }

void compute_until_end() {
  while (!may_end) {
  }
}

// Calls the function again while the caller is moved to another core meanwhile: then what it saw means nothing.
template <typename See>
bool on_one_core(See see) {
  for (;;) {
    const int core = sched_getcpu();
    const bool seen = see(core);
    if (sched_getcpu() == core) return seen;
  }
}

int check(void (*run)(), bool sleeps) {
  const cpu_set_t all = cores_of(pthread_self());
  lorafleet::HelperCores cores;
  may_end = false;
  std::thread helper(run);
  const pthread_t handle = helper.native_handle();
  cores.add(handle);
  int failed = 0;
  const auto keeps_off = [&](int core) {
    cores.leave_to_caller();
    const cpu_set_t now = cores_of(handle);
    return !CPU_ISSET(core, &now) && CPU_COUNT(&now) == CPU_COUNT(&all) - 1;
  };
  if (!on_one_core(keeps_off)) failed = 1;
  if (sleeps) {
    const auto is_given = [&](int core) {
      while (!cores.give_to(0)) {  // it has not gone to sleep yet
      }
      return is_only(cores_of(handle), core);
    };
    if (!on_one_core(is_given)) failed = 2;
    cores.take_back();
    if (!on_one_core(keeps_off)) failed = 3;
  } else {
    while (cores.give_to(0)) cores.take_back();  // another program had its core
    if (!on_one_core(keeps_off)) failed = 4;
  }
  may_end = true;
  may_end.notify_all();
  helper.join();
  return failed;
}

}  // namespace

int main() {
  const cpu_set_t all = cores_of(pthread_self());
  if (CPU_COUNT(&all) < 2) return 77;
  if (const int failed = check(sleep_until_end, true)) return failed;
  if (const int failed = check(compute_until_end, false)) return 10 + failed;
  // A caller that may use one core alone, as `taskset` makes it: its helpers are left where they are.
  cpu_set_t here;
  CPU_ZERO(&here);
  CPU_SET(sched_getcpu(), &here);
  pthread_setaffinity_np(pthread_self(), sizeof here, &here);
  lorafleet::HelperCores cores;
  may_end = false;
  std::thread helper(sleep_until_end);
  cores.add(helper.native_handle());
  cores.leave_to_caller();
  const bool was_given = cores.give_to(0);
  const cpu_set_t now = cores_of(helper.native_handle());
  may_end = true;
  may_end.notify_all();
  helper.join();
  return was_given || !CPU_EQUAL(&now, &here) ? 20 : 0;
}
