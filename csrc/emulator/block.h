// One block of CUDA threads: fibers in a seeded random order, barriers, and warp rendezvous.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/memory.h"

namespace dsnet::emulator {

inline constexpr unsigned warp_size = 32;
inline constexpr unsigned max_threads = 1024;

struct Index {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// A fault of the kernel; the message names kernel, block and thread.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error for the running thread.
[[noreturn]] void fail(const std::string& what);
// "thread (x, y, z)" of the running block.
std::string thread_text(unsigned thread);

// Computes the results of a warp rendezvous from the operands of its lanes; called once, by the
// lane that comes last.
using Complete = void (*)(void* const operands[warp_size], uint32_t mask);

struct AsyncCopy {
  void* shared;
  const void* global;
  unsigned bytes;
  unsigned source_bytes;
  unsigned group;
};

class Block {
 public:
  Block(std::string kernel, Index grid, Index threads, uint64_t seed);

  // Runs body() once per thread of block `block`.
  void run(Index block, const std::function<void()>& body);

  // For the running thread:
  void barrier(const char* file, unsigned line);
  // Waits for all lanes of `mask` at the same operation; the last one calls complete. With a place
  // the lanes must meet there: at one instruction, not at another of the same name.
  void rendezvous(const char* operation, uint32_t mask, void* operand, Complete complete,
      const char* file = "", unsigned line = 0);
  // A rendezvous after which the lanes see each other's shared memory.
  void warp_barrier(uint32_t mask);
  void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
  void commit_copies();
  void wait_copies(unsigned groups_left);

  uint64_t id() const { return id_; }
  unsigned lane() const { return running_ % warp_size; }
  Stamp stamp() const;
  // Whether what left this stamp happened before the running thread's next access.
  bool ordered(const Stamp& earlier) const;

  // "kernel k, block (…), thread (…)".
  std::string place() const;
  std::string thread_text(unsigned thread) const;

 private:
  enum class State : uint8_t { ready, at_barrier, at_rendezvous, finished };
  struct Thread {
    Fiber fiber;
    Index index;
    State state = State::ready;
    const char* operation = nullptr;  // of a rendezvous
    uint32_t mask = 0;
    void* operand = nullptr;
    const char* file = nullptr;  // of a barrier or an operation
    unsigned line = 0;
    // Warp barriers of each lane that this one has heard of.
    std::array<uint32_t, warp_size> heard{};
    std::vector<AsyncCopy> copies;
    unsigned groups = 0;  // committed so far
  };

  static void enter(void* block);
  bool choose();
  void make_ready(unsigned thread);
  void suspend(State state);
  void complete_copies(Thread& thread, unsigned below_group);
  [[noreturn]] void fail_deadlock();
  std::string waiting_text(unsigned thread) const;
  // Whether a thread waits for this operation, with this mask and at this place.
  static bool waits_for(
      const Thread& thread, const char* operation, uint32_t mask, const char* file, unsigned line);
  unsigned warps() const { return (count_ + warp_size - 1) / warp_size; }

  std::string kernel_;
  Index grid_, size_, block_{0, 0, 0};
  unsigned count_;
  std::mt19937_64 random_;
  uint64_t id_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<uint32_t> ready_;    // lanes by warp
  std::vector<uint32_t> meeting_;  // lanes at a rendezvous, likewise
  unsigned ready_count_ = 0;
  unsigned running_ = 0;
  unsigned warp_ = 0;          // of the last choice
  unsigned stay_percent_ = 0;  // how often the next choice stays in that warp
  unsigned at_barrier_ = 0;
  uint32_t block_barriers_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::string error_;
};

// The block that runs now, and the number of its launch: one that no Buffer's host has.
Block& current_block();
uint64_t current_launch();

// Seeds the order of blocks, warps and threads of the launches that follow.
void set_seed(uint64_t seed);

// Runs body() for every thread of every block. One launch at a time.
void launch(const std::string& kernel, Index grid, Index threads, size_t dynamic_shared_bytes,
    const std::function<void()>& body);
// Names the stream that launches must use from now on; null until it is called.
void expect_stream(const void* stream);
// Throws Error if a launch of `kernel` uses another stream than the expected one.
void check_stream(const std::string& kernel, const void* stream);
// Start of the launch's dynamic shared memory, 1024-byte aligned.
std::byte* dynamic_shared();

}  // namespace dsnet::emulator

// What CUDA predefines, for the running thread.
inline dsnet::emulator::Index threadIdx, blockIdx, blockDim, gridDim;
