// The cores on which an operation's helper threads may run.
#pragma once

#include <cstdint>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <time.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace lorafleet {

constexpr int kMaxThreads = 256;

// Leaves more execution resources to the core's other hardware thread, if any.
inline void pause() {
#ifdef __x86_64__
  _mm_pause();
#else
  asm volatile("yield");
#endif
}

#ifdef __linux__
// Keeps helpers off the caller's core, where one of the two would wait for the other while another core is idle, and
// gives that core to a helper that the caller waits for. Does neither with more threads than cores: the system then
// decides which of them share a core. All methods are for the current caller.
class HelperCores {
 public:
  void add(pthread_t helper) {
    helpers_[num_helpers_++] = helper;
    caller_core_ = kUnknown;
  }

  // Let the helpers run on all cores allowed for the calling thread, except its current one.
  void leave_to_caller() {
    const int core = sched_getcpu();
    if (core == caller_core_) return;
    caller_core_ = core;
    cpu_set_t cores;
    const bool could_move = can_move_;
    can_move_ = false;
    if (core < 0 || sched_getaffinity(0, sizeof cores, &cores)) return;
    can_move_ = CPU_COUNT(&cores) > num_helpers_;
    if (can_move_) CPU_CLR(core, &cores);
    if (can_move_ || could_move)
      for (int i = 0; i < num_helpers_; ++i) move(i, cores);
  }

  // Restrict a helper to the calling thread's core, unless it is running, which its CPU clock shows. Returns whether it
  // was moved.
  bool give_to(int helper) {
    if (!can_move_) {
      caller_core_ = kUnknown;  // the caller waits anyway: recheck next time whether it may use more cores
      return false;
    }
    const int64_t before = processor_ns(helper);
    for (int i = 0; i < kLook; ++i) pause();
    if (before < 0 || processor_ns(helper) != before) return false;
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    move(helper, here);
    return true;
  }

  // Move all helpers off the calling thread's core again.
  void take_back() {
    caller_core_ = kUnknown;
    leave_to_caller();
  }

 private:
  static constexpr int kUnknown = -1;
  static constexpr int kLook = 100;  // pauses, some microseconds

  void move(int helper, const cpu_set_t& cores) { pthread_setaffinity_np(helpers_[helper], sizeof cores, &cores); }

  int64_t processor_ns(int helper) const {
    clockid_t clock;
    timespec used;
    if (pthread_getcpuclockid(helpers_[helper], &clock) || clock_gettime(clock, &used)) return -1;
    return used.tv_sec * int64_t{1000000000} + used.tv_nsec;
  }

  int num_helpers_ = 0;
  pthread_t helpers_[kMaxThreads];
  int caller_core_ = kUnknown;
  bool can_move_ = false;
};
#else
// Other systems do not let a program choose its cores.
struct HelperCores {
  void add(std::thread::native_handle_type) {}
  void leave_to_caller() {}
  bool give_to(int) { return false; }
  void take_back() {}
};
#endif

}  // namespace lorafleet
