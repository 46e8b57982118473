// Which form of co-attention has fewer products.
#pragma once

#include <cstdint>

namespace dsnet {

// Whether to fold the local projections into matrices of the global tokens: per local token that is
// h·M·Cl products in place of dim·(Cl + M), for each use of a projection.
inline bool absorbs(
    int64_t local_tokens, int64_t global_tokens, int64_t local_width, int64_t num_heads) {
  return global_tokens * ((num_heads - 1) * local_tokens + local_width) <
         local_width * local_tokens;
}

}  // namespace dsnet
