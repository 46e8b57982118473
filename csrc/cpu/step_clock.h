// How long the steps of a whole block take, for profiles: off until asked for.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "capability.h"

namespace dsnet::cpu {

enum class BlockStep {
  position,
  split_local,
  local,
  split_global,
  global_attention,
  co_attention,
  upsample_concat,
  pointwise_mlp,
};
constexpr int block_steps = 8;

// Starts from zero, or stops.
DSNET_EXPORT void watch_steps(bool on);
DSNET_EXPORT std::vector<std::string> step_names();
// Of all calls since, in every thread.
DSNET_EXPORT std::vector<double> step_seconds();

extern std::atomic<bool> steps_are_watched;
extern std::atomic<int64_t> step_nanoseconds[block_steps];

// Adds the time from here to the end of the scope.
class TimedStep {
 public:
  explicit TimedStep(BlockStep step)
      : step_(step), watched_(steps_are_watched.load(std::memory_order_relaxed)) {
    if (watched_) start_ = Clock::now();
  }
  ~TimedStep() {
    if (!watched_) return;
    const auto time = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_);
    step_nanoseconds[static_cast<int>(step_)].fetch_add(time.count(), std::memory_order_relaxed);
  }
  TimedStep(const TimedStep&) = delete;
  TimedStep& operator=(const TimedStep&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  const BlockStep step_;
  const bool watched_;
  Clock::time_point start_;
};

}  // namespace dsnet::cpu
