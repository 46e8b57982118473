#include "emulator/memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "emulator/block.h"

namespace dsnet::emulator {
namespace {

std::vector<Buffer*>& buffers() {
  static std::vector<Buffer*> all;
  return all;
}

std::vector<SharedRegion*>& regions() {
  static std::vector<SharedRegion*> all;
  return all;
}

template <typename Owner>
bool holds(const Owner& owner, const void* p) {
  const auto* byte = static_cast<const std::byte*>(p);
  return byte >= owner.data() && byte < owner.data() + owner.size();
}

// Accesses cluster: what held the last one is tried first.
template <typename Owner>
Owner* find_in(std::vector<Owner*>& all, const void* p) {
  for (size_t i = 0; i < all.size(); ++i) {
    if (!holds(*all[i], p)) continue;
    std::swap(all[i], all.front());
    return all.front();
  }
  return nullptr;
}

struct Access {
  const char* verb;
  Space space;
  const void* p;
  size_t bytes;

  std::string text() const {
    std::ostringstream out;
    out << verb << " of " << bytes << " bytes in " << (space == Space::global ? "global" : "shared")
        << " memory";
    return out.str();
  }
};

void check_alignment(const Access& access, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(access.p) % alignment == 0) return;
  std::ostringstream out;
  out << "misaligned " << access.text() << ": expected a multiple of " << alignment << ", got "
      << reinterpret_cast<uintptr_t>(access.p) % alignment << " bytes past one";
  fail(out.str());
}

size_t offset_in(
    const std::byte* begin, size_t size, const std::string& owner, const Access& access) {
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(access.p) - begin);
  if (offset + access.bytes <= size) return offset;
  std::ostringstream out;
  out << "out-of-bounds " << access.text() << ": bytes " << offset << " to "
      << offset + access.bytes << " of " << owner << ", which has " << size;
  fail(out.str());
}

Buffer& buffer_of(const Access& access) {
  Buffer* buffer = Buffer::find(access.p);
  if (buffer) return *buffer;
  std::ostringstream out;
  out << "out-of-bounds " << access.text() << ": no buffer at this address";
  const Buffer* nearest = nullptr;
  int64_t distance = static_cast<int64_t>(Buffer::guard);
  for (const Buffer* other : buffers()) {
    const int64_t before = other->data() - static_cast<const std::byte*>(access.p);
    const int64_t after = -before - static_cast<int64_t>(other->size());
    if (std::max(before, after) >= distance) continue;
    distance = std::max(before, after);
    nearest = other;
  }
  if (nearest) {
    out << "; offset " << static_cast<const std::byte*>(access.p) - nearest->data() << " from "
        << nearest->name() << ", which has " << nearest->size();
  }
  fail(out.str());
}

SharedRegion& region_of(const Access& access) {
  SharedRegion* region = SharedRegion::find(access.p, current_block().id());
  if (!region) fail("out-of-bounds " + access.text() + ": no shared array at this address");
  return *region;
}

size_t offset_in(const Buffer& buffer, const Access& access) {
  return offset_in(buffer.data(), buffer.size(), buffer.name(), access);
}

size_t offset_in(const SharedRegion& region, const Access& access) {
  return offset_in(region.data(), region.size(), "a shared array", access);
}

[[noreturn]] void fail_race(
    const Access& access, size_t offset, const char* other_verb, const Stamp& other) {
  std::ostringstream out;
  out << "race: " << access.text() << " at byte " << offset << " of its array, which "
      << thread_text(other.thread) << " " << other_verb << " with no barrier between them";
  fail(out.str());
}

// Whether what left a stamp happened before the running thread's next access. Neighbouring bytes
// mostly have one stamp: what was found before the running thread is remembered.
class Order {
 public:
  bool holds(const Stamp& earlier) {
    if (is_known_ && earlier == known_) return true;
    if (!block_.ordered(earlier)) return false;
    known_ = earlier;
    return is_known_ = true;
  }

 private:
  const Block& block_ = current_block();
  bool is_known_ = false;
  Stamp known_{};
};

void check_ordered_store(SharedRegion& region, size_t offset, const Access& access) {
  Order readers, writers;
  for (size_t i = offset; i < offset + access.bytes; ++i) {
    const SharedRegion::Byte& byte = region.byte(i);
    if (byte.state == SharedRegion::State::in_flight) {
      fail(access.text() + ": an asynchronous copy to these bytes has not been waited for");
    }
    if (byte.was_read && !readers.holds(byte.reader)) {
      fail_race(access, i, "read", byte.reader);
    }
    if (byte.state == SharedRegion::State::written && !writers.holds(byte.writer)) {
      fail_race(access, i, "wrote", byte.writer);
    }
  }
}

}  // namespace

Buffer::Buffer(std::string name, size_t bytes, bool writable)
    : name_(std::move(name)),
      storage_(bytes + 2 * guard + 256, static_cast<std::byte>(poison)),
      writers_(bytes, nobody),
      writable_(writable) {
  const auto start = reinterpret_cast<uintptr_t>(storage_.data()) + guard;
  data_ = reinterpret_cast<std::byte*>((start + 255) / 256 * 256);
  buffers().push_back(this);
}

Buffer::~Buffer() { std::erase(buffers(), this); }

void Buffer::write(size_t offset, const void* source, size_t bytes) {
  std::memcpy(data_ + offset, source, bytes);
  std::fill_n(writers_.begin() + static_cast<std::ptrdiff_t>(offset), bytes, host);
}

Buffer* Buffer::find(const void* p) { return find_in(buffers(), p); }

SharedRegion::SharedRegion(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {
  regions().push_back(this);
}

SharedRegion::~SharedRegion() { std::erase(regions(), this); }

SharedRegion* SharedRegion::find(const void* p, uint64_t block) {
  SharedRegion* region = find_in(regions(), p);
  if (region && region->block_ != block) {
    region->block_ = block;
    std::memset(region->data_, poison, region->size());
    std::fill(region->bytes_.begin(), region->bytes_.end(), Byte{});
  }
  return region;
}

void check_load(Space space, const void* p, size_t bytes, size_t alignment) {
  const Access access{"load", space, p, bytes};
  check_alignment(access, alignment);
  if (space == Space::global) {
    const Buffer& buffer = buffer_of(access);
    const size_t offset = offset_in(buffer, access);
    for (size_t i = offset; i < offset + bytes; ++i) {
      const uint64_t writer = buffer.writer(i);
      if (writer == Buffer::nobody) {
        fail("unwritten " + access.text() + ": nobody wrote byte " + std::to_string(i) + " of " +
             buffer.name());
      }
      if (writer == current_launch()) {
        fail("unordered " + access.text() + ": this launch wrote byte " + std::to_string(i) +
             " of " + buffer.name());
      }
    }
    return;
  }
  SharedRegion& region = region_of(access);
  const size_t offset = offset_in(region, access);
  const Stamp stamp = current_block().stamp();
  Order writers;
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedRegion::Byte& byte = region.byte(i);
    if (byte.state == SharedRegion::State::in_flight) {
      fail(access.text() + ": the asynchronous copy to byte " + std::to_string(i) +
           " of its array has not been waited for");
    }
    if (byte.state == SharedRegion::State::unwritten) {
      fail("unwritten " + access.text() + ": nobody wrote byte " + std::to_string(i) +
           " of its array");
    }
    if (!writers.holds(byte.writer)) fail_race(access, i, "wrote", byte.writer);
    byte.was_read = true;
    byte.reader = stamp;
  }
}

void check_store(Space space, const void* p, size_t bytes, size_t alignment) {
  const Access access{"store", space, p, bytes};
  check_alignment(access, alignment);
  if (space == Space::global) {
    Buffer& buffer = buffer_of(access);
    const size_t offset = offset_in(buffer, access);
    if (!buffer.writable()) fail(access.text() + ": " + buffer.name() + " is read-only");
    for (size_t i = offset; i < offset + bytes; ++i) {
      if (buffer.writer(i) == current_launch()) {
        fail("second " + access.text() + ": this launch already wrote byte " + std::to_string(i) +
             " of " + buffer.name());
      }
      buffer.set_writer(i, current_launch());
    }
    return;
  }
  SharedRegion& region = region_of(access);
  const size_t offset = offset_in(region, access);
  check_ordered_store(region, offset, access);
  land(p, bytes);
}

void check_store_in_flight(const void* shared, size_t bytes) {
  const Access access{"asynchronous copy", Space::shared, shared, bytes};
  check_alignment(access, bytes);
  SharedRegion& region = region_of(access);
  const size_t offset = offset_in(region, access);
  check_ordered_store(region, offset, access);
  for (size_t i = offset; i < offset + bytes; ++i) {
    region.byte(i).state = SharedRegion::State::in_flight;
  }
}

void land(const void* shared, size_t bytes) {
  const Access access{"store", Space::shared, shared, bytes};
  SharedRegion& region = region_of(access);
  const size_t offset = offset_in(region, access);
  const Stamp stamp = current_block().stamp();
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedRegion::Byte& byte = region.byte(i);
    byte.state = SharedRegion::State::written;
    byte.was_read = false;
    byte.writer = stamp;
  }
}

}  // namespace dsnet::emulator
