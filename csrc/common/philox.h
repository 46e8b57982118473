// Philox4x32-10, a counter-based random number generator (Salmon et al., 2011), on CPU and GPU.
#pragma once

#include <cstdint>

#include "common/anywhere.h"

namespace dsnet {

struct PhiloxWords {
  uint32_t word[4];
};

// Dropout of attention weights: word key % 4 of philox(seed, (key / 4, query, head, batch)).
DSNET_ANYWHERE PhiloxWords philox(
    uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A weight whose word is below this is dropped.
DSNET_ANYWHERE uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled < 4294967295.0 ? static_cast<uint32_t>(scaled) : 0xffffffffu;
}

}  // namespace dsnet
