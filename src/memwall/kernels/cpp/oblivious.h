// The private half of an oblivious map: which two bins an item was promised to, which of them has it, and the items that are not on a
// host page. Nothing here touches the host; pages come in and go out as plain bytes, encrypted elsewhere.
//
// All arrays belong to the caller, who counts, saves and restores them. Bins below `private_bins` are private; bin b from there on is
// host page b - private_bins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mw {

constexpr std::uint32_t kNone = 0xffffffffu;
constexpr int kBucketSlots = 4;

struct MapEntry {             // 12 bytes; first == kNone: free
  std::uint32_t key;
  std::uint32_t first;        // a bin; the highest bit says that the item is in the second one
  std::uint32_t second;
};

struct MapShape {
  std::uint32_t capacity, bins, private_bins, page_slots, value_bytes, buckets, frames;
  std::size_t tuple_bytes() const { return 4 + static_cast<std::size_t>(value_bytes); }
  std::size_t page_bytes() const { return 4 + page_slots * tuple_bytes(); }  // which slots hold items, then (key, value) each
};

// Places in the array of counts.
enum MapCount { kItems, kPrivateItems, kPending, kFreeFrames, kFreeHead, kFreeTail, kMaxLoad, kMaxPrivate, kMaxPending, kMaxFrames,
                kSumPending, kAccesses, kNumMapCounts };

struct MapArrays {
  MapEntry* table;             // [buckets][4]
  std::uint32_t* heads;        // [bins]: the first frame of a private bin, or of a page's pending items
  std::uint8_t* loads;         // [bins]
  std::uint32_t* frame_keys;   // [frames]
  std::uint32_t* frame_next;   // [frames]: the next frame of the same bin, or of the free list
  std::uint8_t* frame_values;  // [frames][value_bytes]
  std::int64_t* counts;        // [kNumMapCounts]
};

enum MapOp : std::uint8_t { kGet, kPut, kDelete };
enum MapStatus : std::uint8_t { kAbsent, kFound, kFull };
enum class MapFailure { kNothing, kPage, kFrames, kTable, kLost };

// Two words to two different bins, every ordered pair alike (but for 2^-32 of bias).
void draw_pair(const std::uint64_t* words, std::uint32_t bins, std::uint32_t pair[2]);

class ObliviousCore {
 public:
  ObliviousCore(const MapShape& shape, const MapArrays& arrays, std::uint64_t hash_seed);

  // What a batch will do, before any page is read: which pages it touches (each once, in the order of first touch), and the new pair of
  // every item. words: four a command. Returns the number of pages; `failure` says whether a page would overflow.
  std::size_t plan(const std::uint8_t* ops, const std::uint32_t* keys, const std::uint64_t* words, std::size_t count, std::uint32_t* pages,
                   std::uint8_t* statuses, MapFailure& failure);
  // Carries the planned batch out, command by command, on the plain bytes of those pages. values [count][value_bytes]: what puts bring;
  // becomes what was there before, zeros where there was nothing.
  MapFailure apply(const std::uint8_t* ops, const std::uint32_t* keys, std::size_t count, std::uint8_t* pages, std::uint8_t* values);

  // First placement of items into an empty map; bins[i] is where item i went. Values of private items are taken at once.
  MapFailure place(const std::uint32_t* keys, const std::uint8_t* values, const std::uint64_t* words, std::size_t count, std::uint32_t* bins);
  // Items in frames. Returns how many.
  std::size_t private_items(std::uint32_t* keys, std::uint8_t* values) const;
  std::uint32_t where(std::uint32_t key) const;  // the bin of a key, or kNone

 private:
  struct Planned {
    std::uint32_t from, to;
    std::int32_t pages[2];
  };
  MapEntry* find(std::uint32_t key) const;
  bool insert(const MapEntry& entry);
  void buckets_of(std::uint32_t key, std::uint32_t out[2]) const;
  std::uint32_t choose(const std::uint32_t pair[2], bool& second) const;
  void count_up(std::uint32_t bin);
  void count_down(std::uint32_t bin);
  std::int32_t page_slot(std::uint32_t page, std::uint32_t* pages);
  bool take(std::uint32_t key, std::uint32_t bin, const Planned& planned, std::uint8_t* pages, std::uint8_t* value);
  std::uint32_t new_frame();
  void free_frame(std::uint32_t frame);
  void keep(std::uint32_t frame, std::uint32_t key, std::uint32_t bin, const std::uint8_t* value);
  void merge(std::uint32_t page, std::uint8_t* bytes);

  MapShape shape_;
  MapArrays a_;
  std::uint64_t seed_;
  std::vector<Planned> planned_;
  std::vector<std::uint32_t> seen_pages_;      // open addressing: page + 1
  std::vector<std::int32_t> seen_places_;
  std::vector<std::uint32_t> plan_pages_;
  std::size_t num_pages_ = 0;
};

struct BinCounts {
  std::int64_t max_load, max_page_load, max_private, max_pending, max_frames;
  double mean_pending, mean_private;
};
enum class KeyOrder { kUniform, kSequential, kOneKey };

// Only the counts of the same process, for long runs: items 0 to `items` - 1 are all there. Means are over the second half.
// words: for tests, instead of drawn ones (four an access, after two an item).
BinCounts simulate_bins(std::uint32_t items, std::uint32_t bins, std::uint32_t private_bins, std::int64_t accesses, std::uint64_t seed,
                        KeyOrder order, const std::uint32_t* keys, const std::uint64_t* words);

}  // namespace mw
