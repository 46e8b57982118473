// Working memory of one call, and its steps on torch's threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "bindings/cpu/parameters.h"
#include "cpu/arguments.h"

namespace dsnet {

struct alignas(64) Line {
  char bytes[64];
};

// Memory that a thread keeps between calls: fresh memory costs a page fault for every 4 KiB,
// together as much as a kernel. Valid until the thread asks for more at the same place.
inline void* kept_memory(size_t place, int64_t bytes) {
  thread_local std::vector<std::vector<Line>> all;
  if (all.size() <= place) all.resize(place + 1);
  std::vector<Line>& lines = all[place];
  const size_t needed = static_cast<size_t>(bytes) / sizeof(Line) + 1;
  if (lines.size() < needed) {
    lines.clear();
    lines.resize(needed);
  }
  return lines.data();
}

class Workspace {
 public:
  const cpu::Storage storage;

  // `leader` gives dtype and device, `leader_name` is what errors call it.
  Workspace(const char* leader_name, const Tensor& leader)
      : storage(storage_of(leader)), leader_name_(leader_name), leader_(leader) {}

  ScalarType accumulator() const {
    return storage == cpu::Storage::float64 ? ScalarType::Double : ScalarType::Float;
  }

  // What a forward has saved for its backward.
  void check_accumulators(const char* name, const Tensor& saved) const {
    check(saved.scalar_type() == accumulator(), name, ": expected ",
        torch::headeronly::toString(accumulator()), ", got ",
        torch::headeronly::toString(saved.scalar_type()));
  }

  int64_t item() const { return storage == cpu::Storage::float64 ? 8 : 4; }

  // Accumulators of the caller or, with `held`, of this call.
  Tensor memory(std::initializer_list<int64_t> sizes) const {
    return torch::stable::empty(sizes, accumulator(), std::nullopt, leader_.device());
  }
  void* held(std::initializer_list<int64_t> sizes) {
    constexpr int64_t most_kept = 16 << 20;
    int64_t bytes = item();
    for (int64_t size : sizes) bytes *= size;
    if (bytes <= most_kept) return kept_memory(++places_, bytes);
    held_.push_back(memory(sizes));
    return held_.back().mutable_data_ptr();
  }

  // Gives back, at its end, the memory held since.
  class Mark {
   public:
    explicit Mark(Workspace& space)
        : space_(space), places_(space.places_), held_(space.held_.size()) {}
    ~Mark() {
      space_.places_ = places_;
      while (space_.held_.size() > held_) space_.held_.pop_back();
    }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;

   private:
    Workspace& space_;
    size_t places_, held_;
  };

  cpu::Parameter view_of(const char* name, const Tensor& contiguous) const {
    const ScalarType dtype = contiguous.scalar_type();
    check(dtype == leader_.scalar_type() || dtype == accumulator(), name, ": expected ",
        leader_name_, "'s dtype or float32, got ", torch::headeronly::toString(dtype));
    return {contiguous.const_data_ptr(), dtype == accumulator()};
  }

  // Runs all tasks of a step, each of so many multiplications and additions.
  template <typename Arguments>
  void run(cpu::Step<std::type_identity_t<Arguments>> step, const Arguments& args,
      int64_t scratch_size, int64_t tasks, int64_t products) const {
    // About 20 µs of work: less is not worth waking a thread.
    constexpr int64_t products_per_grain = 500000;
    const int64_t grain = std::max<int64_t>(1, products_per_grain / std::max<int64_t>(1, products));
    const int64_t bytes = scratch_size * item();
    torch::stable::parallel_for(0, tasks, grain,
        [&](int64_t begin, int64_t end) { step(args, kept_memory(0, bytes), begin, end); });
  }

 private:
  const char* leader_name_;
  Tensor leader_;
  size_t places_ = 0;  // The first is the steps' scratch memory.
  std::vector<Tensor> held_;
};

// Sums the blocks in order, in double.
template <typename Acc>
void sum_blocks(const Acc* partials, int64_t blocks, int64_t stride, int64_t count, Acc* out) {
  for (int64_t c = 0; c < count; ++c) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      sum += static_cast<double>(partials[block * stride + c]);
    }
    out[c] = static_cast<Acc>(sum);
  }
}

}  // namespace dsnet
