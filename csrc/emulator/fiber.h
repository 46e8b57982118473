// A fiber: a call that can be suspended and resumed, for one CUDA thread.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace dsnet::emulator {

// Stacks that fibers use one after another, with an unmapped page below each.
class StackPool {
 public:
  static constexpr size_t stack_bytes = 128 * 1024;
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  // Lowest usable address of stack `index`, mapped on first use.
  std::byte* stack(size_t index);

 private:
  std::vector<std::byte*> mappings_;
};

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Prepares entry(argument), which must not throw, to run on `stack` at the next resume.
  void start(std::byte* stack, void (*entry)(void*), void* argument);
  // Runs the fiber until it suspends or returns; not from within a fiber.
  void resume();
  // Returns to the resume that runs this fiber.
  void suspend();

 private:
  struct Context;
  static void run(Fiber* fiber);
  std::unique_ptr<Context> context_;
};

}  // namespace dsnet::emulator
