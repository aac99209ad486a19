// Squared distances of a query from vectors that lie anywhere, in the form in which they are stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mw {

enum class Element : int { float32 = 0, float16 = 1, int8 = 2, uint8 = 3 };
constexpr int kNumElements = 4;
constexpr int kQueryPad = 16;  // queries are float32, with zeros up to a multiple of this

constexpr int element_bytes(Element element) { return element == Element::float32 ? 4 : element == Element::float16 ? 2 : 1; }

struct VectorRows {
  const std::uint8_t* base;
  std::int64_t stride;  // bytes from one vector to the next
  std::int64_t count;
  int size;  // numbers of a vector
  Element element;

  const std::uint8_t* row(std::int64_t at) const { return base + at * stride; }
  int padded() const { return (size + kQueryPad - 1) / kQueryPad * kQueryPad; }
};

struct DistanceKernels {
  // out[i]: of the vector ids[i], or of the vector i where ids is null
  void (*squared[kNumElements])(const VectorRows& rows, const float* query, const std::int32_t* ids, std::int64_t count, float* out);
  // a vector as a query: float32, padded with zeros
  void (*decode[kNumElements])(const VectorRows& rows, std::int64_t at, float* query);
};

const DistanceKernels& distance_kernels();

inline void squared_distances(const VectorRows& rows, const float* query, const std::int32_t* ids, std::int64_t count, float* out) {
  distance_kernels().squared[static_cast<int>(rows.element)](rows, query, ids, count, out);
}
inline void decode_vector(const VectorRows& rows, std::int64_t at, float* query) {
  distance_kernels().decode[static_cast<int>(rows.element)](rows, at, query);
}

// Ids that were seen, for some thousands of them: open addressing, emptied by a new stamp.
class SeenIds {
 public:
  void begin(std::size_t most) {
    std::size_t size = 64;
    while (size < 2 * most) size *= 2;
    if (size > ids_.size()) {
      ids_.assign(size, 0);
      stamps_.assign(size, 0);
      stamp_ = 0;
    }
    if (++stamp_ == 0) {
      stamps_.assign(stamps_.size(), 0);
      stamp_ = 1;
    }
    used_ = 0;
  }
  // Whether the id is new; it is seen from then on.
  bool add(std::int32_t id) {
    if (2 * ++used_ > ids_.size()) grow();
    const std::size_t at = place(id);
    if (stamps_[at] == stamp_) {
      --used_;
      return false;
    }
    stamps_[at] = stamp_;
    ids_[at] = id;
    return true;
  }

 private:
  std::size_t place(std::int32_t id) const {
    const std::size_t mask = ids_.size() - 1;
    std::size_t at = static_cast<std::size_t>((static_cast<std::uint64_t>(static_cast<std::uint32_t>(id)) * 0x9e3779b97f4a7c15u) >> 32) & mask;
    while (stamps_[at] == stamp_ && ids_[at] != id) at = (at + 1) & mask;
    return at;
  }
  void grow() {
    std::vector<std::int32_t> ids(2 * ids_.size());
    std::vector<std::uint32_t> stamps(ids.size(), 0);
    ids.swap(ids_);
    stamps.swap(stamps_);
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (stamps[i] == stamp_) {
        const std::size_t at = place(ids[i]);
        stamps_[at] = stamp_;
        ids_[at] = ids[i];
      }
  }

  std::vector<std::int32_t> ids_;
  std::vector<std::uint32_t> stamps_;
  std::uint32_t stamp_ = 0;
  std::size_t used_ = 0;
};

// Numbers that look random, the same on every machine.
class Draws {
 public:
  explicit Draws(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::int64_t below(std::int64_t bound) { return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(bound)); }

 private:
  std::uint64_t state_;
};

}  // namespace mw
