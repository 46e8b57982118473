// Bilinear interpolation along one axis. No torch here.
#pragma once

#include <cstdint>
#include <vector>

namespace dsnet::cpu {

// align_corners=False, up or down: sample i takes 1 − fraction of the source position index and
// fraction of the next one, which is there wherever fraction > 0.
struct Taps {
  const int64_t* index;    // (samples), ascending
  const double* fraction;  // (samples)
  const int64_t* begin;    // (sources + 1): index is j in [begin[j], begin[j + 1])
};

class Axis {
 public:
  Axis(int64_t sources, int64_t samples);
  Taps taps() const { return {index_.data(), fraction_.data(), begin_.data()}; }

 private:
  std::vector<int64_t> index_;
  std::vector<double> fraction_;
  std::vector<int64_t> begin_;
};

}  // namespace dsnet::cpu
