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

// The same with stages − 1 tiles under way, and one barrier per tile; before it each thread calls
// land(i, stage), when its own copies have landed.
template <int stages, typename Copy, typename Land, typename Body>
DSNET_DEVICE void for_each_tile_ahead(
    int count, const Copy& copy, const Land& land, const Body& body) {
  static_assert(stages > 2, "the tile before the one at work is overwritten");
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) {
    if (i < count) copy(i, i);
    commit_copies();
  }
  for (int i = 0; i < count; ++i) {
    wait_copies<stages - 2>();
    land(i, i % stages);
    __syncthreads();
    const int next = i + stages - 1;
    if (next < count) copy(next, next % stages);
    // Also where it is empty: the wait counts groups.
    commit_copies();
    body(i, i % stages);
  }
  __syncthreads();
}

template <int stages, typename Copy, typename Body>
DSNET_DEVICE void for_each_tile_ahead(int count, const Copy& copy, const Body& body) {
  for_each_tile_ahead<stages>(count, copy, [](int, int) {}, body);
}

}  // namespace dsnet::cuda
