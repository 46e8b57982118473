// Memory that kernels may touch: which bytes exist, which hold a value, and who touched them last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dsnet::emulator {

enum class Space { global, shared };

// Unwritten memory is NaN in every floating-point type.
inline constexpr int poison = 0xff;

// Global memory with a name. Nothing is registered within `guard` bytes of either end, so that an
// access just past it is in no buffer.
class Buffer {
 public:
  static constexpr size_t guard = 4096;
  static constexpr uint64_t nobody = 0, host = 1;
  Buffer(std::string name, size_t bytes, bool writable);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  // Gives bytes [offset, offset + bytes) a value, as a copy from the host would.
  void write(size_t offset, const void* source, size_t bytes);

  const std::string& name() const { return name_; }
  std::byte* data() const { return data_; }
  size_t size() const { return writers_.size(); }
  bool writable() const { return writable_; }
  void set_writable(bool writable) { writable_ = writable; }
  // The launch that wrote a byte; `nobody`, or `host`.
  uint64_t writer(size_t offset) const { return writers_[offset]; }
  void set_writer(size_t offset, uint64_t launch) { writers_[offset] = launch; }

  // The buffer that holds `p`, or null.
  static Buffer* find(const void* p);

 private:
  std::string name_;
  std::vector<std::byte> storage_;
  std::byte* data_;
  std::vector<uint64_t> writers_;
  bool writable_;
};

// When a thread touched a byte: its place in the block, the barriers of the block and the warp
// barriers of its lane until then.
struct Stamp {
  uint16_t thread;
  uint32_t block_barriers;
  uint32_t warp_barriers;
  bool operator==(const Stamp&) const = default;
};

// Shared memory of one kernel: a static array, or the dynamic memory of a launch.
class SharedRegion {
 public:
  enum class State : uint8_t { unwritten, in_flight, written };
  struct Byte {
    State state = State::unwritten;
    bool was_read = false;
    Stamp writer{};
    Stamp reader{};
  };

  // Static arrays live as long as the program; `data` has room for `bytes`.
  SharedRegion(std::byte* data, size_t bytes);
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;
  ~SharedRegion();

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_.size(); }
  Byte& byte(size_t offset) { return bytes_[offset]; }

  // The region that holds `p`, poisoned if this is its first use in block `block`; or null.
  static SharedRegion* find(const void* p, uint64_t block);

 private:
  std::byte* data_;
  std::vector<Byte> bytes_;
  uint64_t block_ = 0;
};

// What a thread is about to do; each throws Error if it may not.
void check_load(Space space, const void* p, size_t bytes, size_t alignment);
void check_store(Space space, const void* p, size_t bytes, size_t alignment);
// A store that lands later: until then the bytes hold no value.
void check_store_in_flight(const void* shared, size_t bytes);
void land(const void* shared, size_t bytes);

}  // namespace dsnet::emulator
