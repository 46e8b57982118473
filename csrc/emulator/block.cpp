#include "emulator/block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <optional>
#include <sstream>

namespace dsnet::emulator {
namespace {

constexpr uint64_t max_grid[3] = {0x7fffffff, 65535, 65535};
// The limit of compute capabilities 8.6, 8.9 and 12.0: no GPU that the kernels run on has a lower
// one.
constexpr size_t max_dynamic_shared = 99 * 1024;

struct Machine {
  StackPool stacks;
  uint64_t seed = 0;
  uint64_t blocks_run = 0;
  uint64_t launch = Buffer::host;
  Block* block = nullptr;
  std::byte* dynamic_shared = nullptr;
  const void* stream = nullptr;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::string text(Index i) {
  std::ostringstream out;
  out << '(' << i.x << ", " << i.y << ", " << i.z << ')';
  return out.str();
}

Index unravel(uint64_t linear, Index size) {
  return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
      static_cast<unsigned>(linear / size.x / size.y)};
}

std::string lanes_text(uint32_t mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

// Where in its file an operation is, if that matters.
std::string place_text(unsigned line) {
  return line == 0 ? "" : " of line " + std::to_string(line);
}

// Whether two names are alike; mostly they are one literal.
bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

Block& current_block() {
  if (!machine().block) throw Error("device code called outside a launch");
  return *machine().block;
}

uint64_t current_launch() { return machine().launch; }

void fail(const std::string& what) { throw Error(current_block().place() + ": " + what); }

std::string thread_text(unsigned thread) { return current_block().thread_text(thread); }

void set_seed(uint64_t seed) { machine().seed = seed; }

std::byte* dynamic_shared() { return machine().dynamic_shared; }

void expect_stream(const void* stream) { machine().stream = stream; }

void check_stream(const std::string& kernel, const void* stream) {
  if (stream == machine().stream) return;
  throw Error("kernel " + kernel + ": launched on another stream than the current device's");
}

Block::Block(std::string kernel, Index grid, Index threads, uint64_t seed)
    : kernel_(std::move(kernel)),
      grid_(grid),
      size_(threads),
      count_(static_cast<unsigned>(threads.count())),
      random_(seed),
      ready_(warps()),
      meeting_(warps()) {
  for (unsigned i = 0; i < count_; ++i) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->index = unravel(i, threads);
  }
}

std::string Block::thread_text(unsigned thread) const {
  return "thread " + text(threads_[thread]->index);
}

std::string Block::place() const {
  return "kernel " + kernel_ + ", block " + text(block_) + ", " + thread_text(running_);
}

Stamp Block::stamp() const {
  return {static_cast<uint16_t>(running_), block_barriers_,
      threads_[running_]->heard[running_ % warp_size]};
}

bool Block::ordered(const Stamp& earlier) const {
  if (earlier.thread == running_ || earlier.block_barriers < block_barriers_) return true;
  return earlier.thread / warp_size == running_ / warp_size &&
         earlier.warp_barriers < threads_[running_]->heard[earlier.thread % warp_size];
}

void Block::make_ready(unsigned thread) {
  threads_[thread]->state = State::ready;
  ready_[thread / warp_size] |= 1u << thread % warp_size;
  meeting_[thread / warp_size] &= ~(1u << thread % warp_size);
  ++ready_count_;
}

// Draws the next thread: mostly from the same warp, or from any, as drawn for the block.
bool Block::choose() {
  if (ready_count_ == 0) return false;
  if (ready_[warp_] == 0 || random_() % 100 >= stay_percent_) {
    do {
      warp_ = static_cast<unsigned>(random_() % ready_.size());
    } while (ready_[warp_] == 0);
  }
  unsigned lane;
  do {
    lane = static_cast<unsigned>(random_() % warp_size);
  } while (!(ready_[warp_] >> lane & 1));
  ready_[warp_] &= ~(1u << lane);
  --ready_count_;
  running_ = warp_ * warp_size + lane;
  return true;
}

void Block::enter(void* self) {
  Block& block = *static_cast<Block*>(self);
  try {
    (*block.body_)();
  } catch (const Error& error) {
    block.error_ = error.what();
  } catch (const std::exception& error) {
    block.error_ = block.place() + ": " + error.what();
  }
  block.threads_[block.running_]->state = State::finished;
}

void Block::run(Index block, const std::function<void()>& body) {
  block_ = block;
  body_ = &body;
  id_ = ++machine().blocks_run;
  block_barriers_ = 0;
  at_barrier_ = 0;
  const unsigned stays[] = {0, 90, 100};
  stay_percent_ = stays[random_() % 3];
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.fiber.start(machine().stacks.stack(i), &Block::enter, this);
    thread.heard.fill(0);
    thread.copies.clear();
    thread.groups = 0;
    make_ready(i);
  }
  while (choose()) {
    threadIdx = threads_[running_]->index;
    threads_[running_]->fiber.resume();
    if (!error_.empty()) throw Error(error_);
  }
  for (const auto& thread : threads_) {
    if (thread->state != State::finished) fail_deadlock();
  }
}

void Block::suspend(State state) {
  Thread& thread = *threads_[running_];
  thread.state = state;
  thread.fiber.suspend();
}

void Block::barrier(const char* file, unsigned line) {
  Thread& mine = *threads_[running_];
  mine.file = file;
  mine.line = line;
  for (unsigned i = 0; at_barrier_ > 0 && i < count_; ++i) {
    const Thread& other = *threads_[i];
    if (other.state != State::at_barrier) continue;
    if (other.line == line && is_same(other.file, file)) break;
    fail("divergent barrier: at __syncthreads of line " + std::to_string(line) + " while " +
         thread_text(i) + " " + waiting_text(i));
  }
  if (++at_barrier_ < count_) {
    suspend(State::at_barrier);
    return;
  }
  at_barrier_ = 0;
  ++block_barriers_;
  for (unsigned i = 0; i < count_; ++i) {
    if (i != running_) make_ready(i);
  }
}

bool Block::waits_for(
    const Thread& thread, const char* operation, uint32_t mask, const char* file, unsigned line) {
  return thread.mask == mask && is_same(thread.operation, operation) && thread.line == line &&
         is_same(thread.file, file);
}

void Block::rendezvous(const char* operation, uint32_t mask, void* operand, Complete complete,
    const char* file, unsigned line) {
  Thread& mine = *threads_[running_];
  const unsigned first = running_ / warp_size * warp_size;
  if (!(mask >> lane() & 1)) {
    fail(std::string(operation) + ": mask " + lanes_text(mask) + " lacks the calling lane " +
         std::to_string(lane()));
  }
  const unsigned lanes = std::min(count_ - first, warp_size);
  if (lanes < warp_size && mask >> lanes != 0) {
    fail(std::string(operation) + ": mask " + lanes_text(mask) + " names lane " +
         std::to_string(lanes + std::countr_zero(mask >> lanes)) +
         ", which the block does not have");
  }
  void* operands[warp_size] = {};
  uint32_t here = 1u << lane();
  uint32_t& meeting = meeting_[running_ / warp_size];
  for (uint32_t others = mask & meeting; others != 0; others &= others - 1) {
    const auto l = static_cast<unsigned>(std::countr_zero(others));
    const Thread& other = *threads_[first + l];
    if (waits_for(other, operation, mask, file, line)) {
      operands[l] = other.operand;
      here |= 1u << l;
    } else if (other.mask >> lane() & 1) {
      fail(std::string("mismatched warp primitives: ") + operation + place_text(line) +
           " with mask " + lanes_text(mask) + " while " + thread_text(first + l) + " " +
           waiting_text(first + l));
    }
  }
  if (here != mask) {
    mine.operation = operation;
    mine.mask = mask;
    mine.operand = operand;
    mine.file = file;
    mine.line = line;
    meeting |= 1u << lane();
    suspend(State::at_rendezvous);
    return;
  }
  operands[lane()] = operand;
  complete(operands, mask);
  for (unsigned l = 0; l < warp_size; ++l) {
    if ((mask >> l & 1) && first + l != running_) make_ready(first + l);
  }
}

void Block::warp_barrier(uint32_t mask) {
  auto& heard = threads_[running_]->heard;
  ++heard[lane()];
  rendezvous("__syncwarp", mask, &heard, [](void* const operands[warp_size], uint32_t lanes) {
    std::array<uint32_t, warp_size> all{};
    for (unsigned l = 0; l < warp_size; ++l) {
      if (!(lanes >> l & 1)) continue;
      const auto& one = *static_cast<std::array<uint32_t, warp_size>*>(operands[l]);
      for (unsigned k = 0; k < warp_size; ++k) all[k] = std::max(all[k], one[k]);
    }
    for (unsigned l = 0; l < warp_size; ++l) {
      if (lanes >> l & 1) *static_cast<std::array<uint32_t, warp_size>*>(operands[l]) = all;
    }
  });
}

void Block::copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
  Thread& mine = *threads_[running_];
  check_store_in_flight(shared, bytes);
  if (source_bytes > bytes) {
    fail("cp.async: expected at most " + std::to_string(bytes) + " source bytes, got " +
         std::to_string(source_bytes));
  }
  if (source_bytes > 0) check_load(Space::global, global, source_bytes, bytes);
  mine.copies.push_back({shared, global, bytes, source_bytes, mine.groups});
}

void Block::commit_copies() { ++threads_[running_]->groups; }

// Copies of the older groups land now, which is as late as the wait allows.
void Block::wait_copies(unsigned groups_left) {
  Thread& mine = *threads_[running_];
  const unsigned below = mine.groups > groups_left ? mine.groups - groups_left : 0;
  complete_copies(mine, below);
}

void Block::complete_copies(Thread& thread, unsigned below_group) {
  std::erase_if(thread.copies, [&](const AsyncCopy& copy) {
    if (copy.group >= below_group) return false;
    land(copy.shared, copy.bytes);
    std::memset(copy.shared, 0, copy.bytes);
    std::memcpy(copy.shared, copy.global, copy.source_bytes);
    return true;
  });
}

std::string Block::waiting_text(unsigned thread) const {
  const Thread& other = *threads_[thread];
  switch (other.state) {
    case State::at_barrier: return "waits at __syncthreads of line " + std::to_string(other.line);
    case State::at_rendezvous:
      return std::string("waits at ") + other.operation + place_text(other.line) + " with mask " +
             lanes_text(other.mask);
    case State::finished: return "has returned";
    case State::ready: break;
  }
  return "runs";
}

// Every thread waits or has returned: names one that waits and one that keeps it waiting.
void Block::fail_deadlock() {
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& waiting = *threads_[i];
    if (waiting.state != State::at_rendezvous) continue;
    running_ = i;
    const unsigned first = i / warp_size * warp_size;
    for (unsigned l = 0; l < warp_size; ++l) {
      if (!(waiting.mask >> l & 1)) continue;
      const Thread& other = *threads_[first + l];
      const bool same =
          other.state == State::at_rendezvous &&
          waits_for(other, waiting.operation, waiting.mask, waiting.file, waiting.line);
      if (same) continue;
      fail(std::string(waiting.operation) + " with mask " + lanes_text(waiting.mask) +
           " is never reached by " + thread_text(first + l) + ", which " + waiting_text(first + l));
    }
  }
  const auto find = [&](bool at_barrier) {
    unsigned i = 0;
    while (i + 1 < count_ && (threads_[i]->state == State::at_barrier) != at_barrier) ++i;
    return i;
  };
  running_ = find(true);
  const unsigned absent = find(false);
  fail("divergent barrier: " + waiting_text(running_) + " while " + thread_text(absent) + " " +
       waiting_text(absent));
}

void launch(const std::string& kernel, Index grid, Index threads, size_t dynamic_shared_bytes,
    const std::function<void()>& body) {
  Machine& m = machine();
  if (m.block) throw Error("kernel " + kernel + ": launched while another one runs");
  const auto check = [&](const char* what, uint64_t limit, uint64_t got) {
    if (got <= limit) return;
    throw Error("kernel " + kernel + ": " + what + ": expected at most " + std::to_string(limit) +
                ", got " + std::to_string(got));
  };
  check("grid x", max_grid[0], grid.x);
  check("grid y", max_grid[1], grid.y);
  check("grid z", max_grid[2], grid.z);
  check("threads per block", max_threads, threads.count());
  check("dynamic shared bytes", max_dynamic_shared, dynamic_shared_bytes);
  if (grid.count() == 0 || threads.count() == 0) {
    throw Error("kernel " + kernel + ": expected at least one block and thread, got grid " +
                text(grid) + " and block " + text(threads));
  }

  std::vector<std::byte> storage(dynamic_shared_bytes + 1024);
  std::optional<SharedRegion> region;
  const auto start = reinterpret_cast<uintptr_t>(storage.data());
  m.dynamic_shared = storage.data() + (1024 - start % 1024) % 1024;
  if (dynamic_shared_bytes > 0) region.emplace(m.dynamic_shared, dynamic_shared_bytes);

  std::mt19937_64 random(m.seed);
  std::vector<uint64_t> order(grid.count());
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), random);
  Block block(kernel, grid, threads, random());
  gridDim = grid;
  blockDim = threads;
  struct Running {
    Machine& machine;
    ~Running() { machine.block = nullptr; }
  } running{m};
  m.block = &block;
  ++m.launch;
  for (uint64_t linear : order) {
    blockIdx = unravel(linear, grid);
    block.run(blockIdx, body);
  }
}

}  // namespace dsnet::emulator
