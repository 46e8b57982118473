// How long the steps of a whole block take.
#include "step_clock.h"

namespace dsnet::cpu {

std::atomic<bool> steps_are_watched{false};
std::atomic<int64_t> step_nanoseconds[block_steps];

void watch_steps(bool on) {
  for (auto& each : step_nanoseconds) each.store(on ? 0 : each.load());
  steps_are_watched.store(on);
}

std::vector<std::string> step_names() {
  return {"position", "split_local", "local", "split_global", "global_attention", "co_attention",
      "upsample_concat", "pointwise_mlp"};
}

std::vector<double> step_seconds() {
  std::vector<double> seconds;
  for (const auto& each : step_nanoseconds)
    seconds.push_back(1e-9 * static_cast<double>(each.load()));
  return seconds;
}

}  // namespace dsnet::cpu
