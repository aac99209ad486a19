// Shared by the files of the tree of tenants, and by nothing else.
#pragma once

#include <cstdint>

namespace mw {

void tenant_distances(const float* query, const float* const* rows, std::int64_t count, std::int64_t cols, float* out);

}  // namespace mw
