#include "path_tree.h"

#include <algorithm>
#include <cstring>

namespace mw {
namespace {

std::uint32_t word(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

PathTree::PathTree(const PathShape& shape, std::uint8_t* stash, std::size_t stash_blocks, std::int64_t* count)
    : shape_(shape), stash_(stash), room_(stash_blocks), count_(count) {}

bool PathTree::add(const std::uint8_t* bytes) {
  if (static_cast<std::size_t>(*count_) == room_) return false;
  std::memcpy(block(static_cast<std::size_t>((*count_)++)), bytes, shape_.block_bytes());
  return true;
}

void PathTree::remove(std::size_t place) {
  const auto last = static_cast<std::size_t>(--*count_);
  if (place != last) std::memcpy(block(place), block(last), shape_.block_bytes());
}

bool PathTree::give(std::uint32_t id, std::uint32_t leaf, const std::uint8_t* payload) {
  std::vector<std::uint8_t> bytes(shape_.block_bytes());
  std::memcpy(bytes.data(), &id, 4), std::memcpy(bytes.data() + 4, &leaf, 4);
  std::memcpy(bytes.data() + 8, payload, shape_.payload_bytes);
  return add(bytes.data());
}

bool PathTree::access(std::uint8_t* path, std::uint32_t leaf, std::uint32_t id, std::uint32_t new_leaf, Fate fate, std::uint8_t* payload,
                      bool& overflow) {
  overflow = false;
  const std::size_t blocks = (shape_.depth + 1) * static_cast<std::size_t>(shape_.bucket_blocks);
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::uint8_t* bytes = path + i * shape_.block_bytes();
    if (word(bytes) != kNoBlock && !add(bytes)) {
      overflow = true;
      return false;
    }
  }
  std::size_t at = 0;
  const auto count = static_cast<std::size_t>(*count_);
  while (at < count && word(block(at)) != id) ++at;
  const bool found = at < count && id != kNoBlock;
  if (found) {
    std::uint8_t* bytes = block(at);
    std::memcpy(bytes + 4, &new_leaf, 4);
    if (fate == Fate::kWrite)
      std::swap_ranges(bytes + 8, bytes + 8 + shape_.payload_bytes, payload);
    else
      std::memcpy(payload, bytes + 8, shape_.payload_bytes);
    if (fate == Fate::kTake) remove(at);
  } else if (fate == Fate::kWrite) {
    overflow = !give(id, new_leaf, payload);
    if (overflow) return false;
  }
  fill(path, leaf);
  return found;
}

// From the leaf up, every bucket takes blocks whose own paths lead through it; those that can lie deepest first.
void PathTree::fill(std::uint8_t* path, std::uint32_t leaf) {
  const auto count = static_cast<std::size_t>(*count_);
  std::vector<std::vector<std::size_t>> reach(shape_.depth + 1);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t differs = word(block(i) + 4) ^ leaf, common = shape_.depth;
    for (; differs; differs >>= 1) --common;
    reach[common].push_back(i);
  }
  std::vector<std::uint8_t> gone(count, 0);
  std::vector<std::size_t> waiting;
  std::memset(path, 0xff, (shape_.depth + 1) * shape_.bucket_bytes());
  for (std::uint32_t level = shape_.depth + 1; level-- > 0;) {
    waiting.insert(waiting.end(), reach[level].begin(), reach[level].end());
    for (std::uint32_t slot = 0; slot < shape_.bucket_blocks && !waiting.empty(); ++slot) {
      std::memcpy(path + level * shape_.bucket_bytes() + slot * shape_.block_bytes(), block(waiting.back()), shape_.block_bytes());
      gone[waiting.back()] = 1;
      waiting.pop_back();
    }
  }
  for (std::size_t i = count; i-- > 0;)
    if (gone[i]) remove(i);
}

}  // namespace mw
