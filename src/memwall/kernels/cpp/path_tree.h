// One access of Path ORAM on plain bytes: a path of the tree goes into the stash, a block is read or written there, and the path is
// filled again from its leaf up. A block is (id, leaf, payload); id kNoBlock is a dummy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mw {

constexpr std::uint32_t kNoBlock = 0xffffffffu;

struct PathShape {
  std::uint32_t depth, bucket_blocks, payload_bytes;  // depth: levels below the root; a path has depth + 1 buckets
  std::size_t block_bytes() const { return 8 + static_cast<std::size_t>(payload_bytes); }
  std::size_t bucket_bytes() const { return bucket_blocks * block_bytes(); }
};

class PathTree {
 public:
  PathTree(const PathShape& shape, std::uint8_t* stash, std::size_t stash_blocks, std::int64_t* count);

  // path [depth + 1][bucket]: from the root to `leaf`; changed in place. payload: becomes that of block `id` where there is one. What
  // happens to the block: see Fate. Returns whether it was there; `overflow` when the stash is too small.
  enum class Fate { kKeep, kWrite, kTake };
  bool access(std::uint8_t* path, std::uint32_t leaf, std::uint32_t id, std::uint32_t new_leaf, Fate fate, std::uint8_t* payload, bool& overflow);
  // A block that was taken comes back into the stash.
  bool give(std::uint32_t id, std::uint32_t leaf, const std::uint8_t* payload);

 private:
  bool add(const std::uint8_t* block);
  std::uint8_t* block(std::size_t place) { return stash_ + place * shape_.block_bytes(); }
  void remove(std::size_t place);
  void fill(std::uint8_t* path, std::uint32_t leaf);

  PathShape shape_;
  std::uint8_t* stash_;
  std::size_t room_;
  std::int64_t* count_;
};

}  // namespace mw
