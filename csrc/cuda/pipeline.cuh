// A block's way over tiles: one is copied to shared memory while it works on another.
#pragma once

#include "cuda/ptx.cuh"

namespace dsnet::cuda {

// Calls body(i, stage) for `count` tiles, each after all of copy(i, stage) has landed; with two
// stages one tile is copied while the block works on another.
template <int stages, typename Copy, typename Body>
DSNET_DEVICE void for_each_tile(int count, const Copy& copy, const Body& body) {
  static_assert(stages == 1 || stages == 2, "one tile is under way at most");
  copy(0, 0);
  commit_copies();
  for (int i = 0; i < count; ++i) {
    const bool has_next = i + 1 < count;
    if (stages == 2 && has_next) {
      copy(i + 1, (i + 1) % stages);
      commit_copies();
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    body(i, i % stages);
    __syncthreads();
    if (stages == 1 && has_next) {
      copy(i + 1, 0);
      commit_copies();
    }
  }
}

}  // namespace dsnet::cuda
