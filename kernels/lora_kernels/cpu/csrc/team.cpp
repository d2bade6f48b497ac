// The threads that share an operation's tasks.
//
// Tasks are claimed one by one from a published job, and the caller waits for claimed tasks only. With OpenMP every
// operation ends in a barrier that all threads must reach: a thread whose core is taken by another process stops the
// step until it is scheduled again. Here such a thread claims no task. A thread that loses its core during a task, for
// up to some milliseconds, gets the core of the caller, which only waits for it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#include "cores.h"
#include "kernels.h"

namespace lorafleet {
namespace {

constexpr int64_t kMaxTasks = 1 << 20;  // of one job
// A helper that waits for work keeps its core for this time: the next operation of a step comes within microseconds.
constexpr auto kSpin = std::chrono::microseconds(100);
// A waiting helper prefetches this much of the next operation's data: it fits into the second-level cache beside the
// rest.
constexpr int64_t kMaxAhead = 256 * 1024;
constexpr int kPatience = 2000;  // pauses after which a waiting caller yields its core

// A run of neighboring tasks: job number << 40 | next task << 20 | end. A claim is one compare-and-swap of the word,
// so a helper that wakes up late cannot claim from a finished job. (Job numbers repeat after 16 million jobs.)
struct alignas(64) Run {
  std::atomic<uint64_t> word{0};
  std::atomic<bool> is_working{false};  // whether the run's helper may hold a claimed task
};

// A job's fields are written before its runs and read after a claim; they cannot change then.
struct Team {
  std::mutex busy;
  int num_helpers = 0;
  Run runs[kMaxThreads];
  HelperCores cores;
  // Whether the caller has given its core to a helper, which must leave it as soon as it holds no task.
  std::atomic<bool> is_given{false};
  alignas(64) std::atomic<int> number{0};
  std::atomic<int> num_runs{1};
  std::atomic<void (*)(const void*, int64_t)> task{nullptr};
  std::atomic<const void*> context{nullptr};
  alignas(64) std::atomic<int64_t> num_done{0};
  // The data that the next operation reads. A helper may see parts of two announcements: it then prefetches useless
  // data.
  alignas(64) std::atomic<int> num_announced{0};
  std::atomic<const char*> ahead[kMaxAheadParts] = {};
  std::atomic<int64_t> ahead_bytes[kMaxAheadParts] = {};
};

// Never destroyed: its helpers live as long as the process.
Team& team() {
  static Team& only = *new Team;
  return only;
}

thread_local bool in_task = false;

int64_t claim(Run& run, uint64_t number) {
  uint64_t word = run.word.load(std::memory_order_acquire);
  while (word >> 40 == number) {
    const int64_t next = word >> 20 & (kMaxTasks - 1), end = word & (kMaxTasks - 1);
    if (next == end) return -1;
    if (run.word.compare_exchange_weak(word, word + (1 << 20), std::memory_order_acquire)) return next;
  }
  return -1;
}

// Runs the thread's own tasks in order, so that what one task prefetches is used by the next; then helps the others.
void work(Team& team, int self, int number) {
  const uint64_t tag = number & 0xffffff;
  const int num_runs = team.num_runs.load(std::memory_order_relaxed);
  int64_t num_done = 0;
  in_task = true;
  for (int i = 0; i < num_runs; ++i) {
    Run& run = team.runs[(self + i) % num_runs];
    for (int64_t index; (index = claim(run, tag)) >= 0; ++num_done)
      team.task.load(std::memory_order_relaxed)(team.context.load(std::memory_order_relaxed), index);
  }
  in_task = false;
  if (num_done) team.num_done.fetch_add(num_done, std::memory_order_release);
}

struct Span {
  const char *at = nullptr, *end = nullptr;
};

// The bytes at the start of a thread's run of the announced operation.
Span ahead_of(const Team& team, int self) {
  int64_t total = 0;
  for (const auto& bytes : team.ahead_bytes) total += bytes.load(std::memory_order_relaxed);
  int64_t begin = total * self / team.num_runs.load(std::memory_order_relaxed);
  for (int i = 0; i < kMaxAheadParts; ++i) {
    const int64_t bytes = team.ahead_bytes[i].load(std::memory_order_relaxed);
    if (begin < bytes) {
      const char* at = team.ahead[i].load(std::memory_order_relaxed) + begin;
      return {at, at + std::min(bytes - begin, kMaxAhead)};
    }
    begin -= bytes;
  }
  return {};
}

void help(Team& team, int self) {
  int seen = 0, announced = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    Span ahead;
    while (team.number.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
      if (const int now = team.num_announced.load(std::memory_order_acquire); now != announced) {
        announced = now;
        ahead = ahead_of(team, self);
      }
      if (ahead.at < ahead.end) {
        for (int i = 0; i < 16; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
      } else {
        for (int i = 0; i < 16; ++i) pause();
      }
    }
    team.number.wait(seen, std::memory_order_acquire);
    seen = team.number.load(std::memory_order_acquire);
    team.runs[self].is_working.store(true, std::memory_order_relaxed);
    work(team, self, seen);
    team.runs[self].is_working.store(false, std::memory_order_relaxed);
    if (team.is_given.load(std::memory_order_relaxed)) std::this_thread::yield();
  }
}

void add_helper(Team& team) {
  std::thread helper(help, std::ref(team), team.num_helpers + 1);
  ++team.num_helpers;
  team.cores.add(helper.native_handle());
  helper.detach();
}

// Gives the caller's core to a helper that holds a task but has no core.
void give_core(Team& team, int helper) {
  if (team.runs[helper + 1].is_working.load(std::memory_order_relaxed) && team.cores.give_to(helper))
    team.is_given.store(true, std::memory_order_relaxed);
}

void wait_for_end(Team& team, int64_t num_tasks) {
  for (int i = 0; team.num_done.load(std::memory_order_acquire) < num_tasks; ++i) {
    if (i < kPatience) {
      pause();
      continue;
    }
    give_core(team, i % team.num_helpers);  // one at a time: checking many would delay the end
    std::this_thread::yield();
  }
  if (team.is_given.exchange(false, std::memory_order_relaxed)) team.cores.take_back();
}

void run_job(Team& team, int num_runs, int64_t num_tasks, void (*task)(const void*, int64_t), const void* context) {
  while (team.num_helpers < num_runs - 1) add_helper(team);
  team.cores.leave_to_caller();
  const int number = team.number.load(std::memory_order_relaxed) + 1;
  team.task.store(task, std::memory_order_relaxed);
  team.context.store(context, std::memory_order_relaxed);
  team.num_runs.store(num_runs, std::memory_order_relaxed);
  team.num_done.store(0, std::memory_order_relaxed);
  for (int64_t t = 0; t < num_runs; ++t) {
    const uint64_t next = num_tasks * t / num_runs, end = num_tasks * (t + 1) / num_runs;
    team.runs[t].word.store((number & 0xffffffull) << 40 | next << 20 | end, std::memory_order_release);
  }
  team.number.store(number, std::memory_order_release);
  team.number.notify_all();
  work(team, 0, number);
  wait_for_end(team, num_tasks);
}

}  // namespace

void announce(const std::array<ReadAhead, kMaxAheadParts>& parts) {
  Team& shared = team();
  for (int i = 0; i < kMaxAheadParts; ++i) {
    shared.ahead[i].store(static_cast<const char*>(parts[i].data), std::memory_order_relaxed);
    shared.ahead_bytes[i].store(parts[i].bytes, std::memory_order_relaxed);
  }
  shared.num_announced.fetch_add(1, std::memory_order_release);
}

void run_tasks(int num_threads, int64_t num_tasks, void (*task)(const void*, int64_t), const void* context) {
  num_threads = std::min<int64_t>({num_threads, num_tasks, kMaxThreads});
  Team& shared = team();
  // A task that starts tasks itself, or a second caller while the team is busy: on one thread.
  if (num_threads <= 1 || num_tasks >= kMaxTasks || in_task || !shared.busy.try_lock()) {
    for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
    return;
  }
  const std::lock_guard<std::mutex> lock(shared.busy, std::adopt_lock);
  run_job(shared, num_threads, num_tasks, task, context);
}

}  // namespace lorafleet
