// See oblivious.h. Where an item is follows from its bin: in a frame of the bin's list, or else on the bin's page. So a merge of pending
// items into a page changes no entry of the position map.
#include "oblivious.h"

#include <algorithm>
#include <cstring>

namespace mw {
namespace {

constexpr std::uint32_t kSecondBit = 0x80000000u;
constexpr int kMostMoves = 500;

std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

std::uint32_t scaled(std::uint64_t word, std::uint32_t bound) {  // the upper half of the word decides
  return static_cast<std::uint32_t>(((word >> 32) * bound) >> 32);
}

std::uint32_t bin_of(const MapEntry& e) { return e.first & kSecondBit ? e.second : e.first; }

template <class T>
T read(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
void write(std::uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace

void draw_pair(const std::uint64_t* words, std::uint32_t bins, std::uint32_t pair[2]) {
  pair[0] = scaled(words[0], bins);
  pair[1] = scaled(words[1], bins - 1);
  pair[1] += pair[1] >= pair[0];
}

ObliviousCore::ObliviousCore(const MapShape& shape, const MapArrays& arrays, std::uint64_t hash_seed)
    : shape_(shape), a_(arrays), seed_(hash_seed) {}

// ---- position map ------------------------------------------------------------------------------------------------------------------

void ObliviousCore::buckets_of(std::uint32_t key, std::uint32_t out[2]) const {
  const std::uint64_t h = mixed(seed_ ^ mixed(key ^ (seed_ << 7)));
  out[0] = scaled(h, shape_.buckets);
  out[1] = scaled(h << 32, shape_.buckets);
}

MapEntry* ObliviousCore::find(std::uint32_t key) const {
  std::uint32_t buckets[2];
  buckets_of(key, buckets);
  for (const std::uint32_t bucket : buckets) {
    MapEntry* entries = a_.table + static_cast<std::size_t>(bucket) * kBucketSlots;
    for (int i = 0; i < kBucketSlots; ++i)
      if (entries[i].key == key && entries[i].first != kNone) return entries + i;
  }
  return nullptr;
}

// Into the emptier of two buckets; where both are full an entry makes room by going to its other one.
bool ObliviousCore::insert(const MapEntry& wanted) {
  MapEntry entry = wanted;
  std::uint64_t lot = mixed(seed_ ^ entry.key ^ entry.second);
  for (int move = 0; move < kMostMoves; ++move) {
    std::uint32_t buckets[2];
    buckets_of(entry.key, buckets);
    MapEntry* best = nullptr;
    int most_free = 0;
    for (const std::uint32_t bucket : buckets) {
      MapEntry *entries = a_.table + static_cast<std::size_t>(bucket) * kBucketSlots, *open = nullptr;
      int num_free = 0;
      for (int i = 0; i < kBucketSlots; ++i)
        if (entries[i].first == kNone) open = entries + i, ++num_free;
      if (num_free > most_free) most_free = num_free, best = open;
    }
    if (best) {
      *best = entry;
      return true;
    }
    lot = mixed(lot);
    std::swap(entry, a_.table[static_cast<std::size_t>(buckets[lot & 1]) * kBucketSlots + (lot >> 1) % kBucketSlots]);
  }
  return false;
}

std::uint32_t ObliviousCore::where(std::uint32_t key) const {
  const MapEntry* entry = find(key);
  return entry ? bin_of(*entry) : kNone;
}

// ---- loads and frames --------------------------------------------------------------------------------------------------------------

std::uint32_t ObliviousCore::choose(const std::uint32_t pair[2], bool& second) const {
  second = a_.loads[pair[1]] < a_.loads[pair[0]];
  return pair[second];
}

void ObliviousCore::count_up(std::uint32_t bin) {
  const int load = ++a_.loads[bin];
  a_.counts[kMaxLoad] = std::max<std::int64_t>(a_.counts[kMaxLoad], load);
}

void ObliviousCore::count_down(std::uint32_t bin) { --a_.loads[bin]; }

std::uint32_t ObliviousCore::new_frame() {
  if (a_.counts[kFreeFrames] == 0) return kNone;
  const auto frame = static_cast<std::uint32_t>(a_.counts[kFreeHead]);
  a_.counts[kFreeHead] = a_.frame_next[frame];
  --a_.counts[kFreeFrames];
  const std::int64_t used = shape_.frames - a_.counts[kFreeFrames];
  a_.counts[kMaxFrames] = std::max(a_.counts[kMaxFrames], used);
  return frame;
}

void ObliviousCore::free_frame(std::uint32_t frame) {  // at the end of the list: frames are used in turn
  a_.frame_next[frame] = kNone;
  if (a_.counts[kFreeFrames] == 0)
    a_.counts[kFreeHead] = frame;
  else
    a_.frame_next[a_.counts[kFreeTail]] = frame;
  a_.counts[kFreeTail] = frame;
  ++a_.counts[kFreeFrames];
}

void ObliviousCore::keep(std::uint32_t frame, std::uint32_t key, std::uint32_t bin, const std::uint8_t* value) {
  a_.frame_keys[frame] = key;
  std::memcpy(a_.frame_values + static_cast<std::size_t>(frame) * shape_.value_bytes, value, shape_.value_bytes);
  a_.frame_next[frame] = a_.heads[bin];
  a_.heads[bin] = frame;
  const MapCount what = bin < shape_.private_bins ? kPrivateItems : kPending, most = bin < shape_.private_bins ? kMaxPrivate : kMaxPending;
  a_.counts[most] = std::max(a_.counts[most], ++a_.counts[what]);
}

// ---- a batch -----------------------------------------------------------------------------------------------------------------------

std::int32_t ObliviousCore::page_slot(std::uint32_t page, std::uint32_t* pages) {
  const std::size_t mask = seen_pages_.size() - 1;
  std::size_t at = mixed(page) & mask;
  while (seen_pages_[at] != 0 && seen_pages_[at] != page + 1) at = (at + 1) & mask;
  if (seen_pages_[at] == 0) {
    seen_pages_[at] = page + 1;
    seen_places_[at] = static_cast<std::int32_t>(num_pages_);
    pages[num_pages_++] = page;
  }
  return seen_places_[at];
}

std::size_t ObliviousCore::plan(const std::uint8_t* ops, const std::uint32_t* keys, const std::uint64_t* words, std::size_t count,
                                std::uint32_t* pages, std::uint8_t* statuses, MapFailure& failure) {
  std::size_t room = 16;
  while (room < 4 * count) room *= 2;
  seen_pages_.assign(room, 0), seen_places_.assign(room, 0), planned_.assign(count, Planned{});
  num_pages_ = 0, failure = MapFailure::kNothing;
  for (std::size_t i = 0; i < count; ++i) {
    Planned& planned = planned_[i];
    MapEntry* entry = find(keys[i]);
    std::uint32_t old[2], fresh[2];
    if (entry)
      old[0] = entry->first & ~kSecondBit, old[1] = entry->second;
    else
      draw_pair(words + 4 * i, shape_.bins, old);
    for (int j = 0; j < 2; ++j)
      planned.pages[j] = old[j] < shape_.private_bins ? -1 : page_slot(old[j] - shape_.private_bins, pages);
    draw_pair(words + 4 * i + 2, shape_.bins, fresh);
    bool second;
    const std::uint32_t to = choose(fresh, second);
    planned.from = entry ? bin_of(*entry) : kNone;
    statuses[i] = entry ? kFound : kAbsent;
    bool stays = entry ? ops[i] != kDelete : ops[i] == kPut;
    if (stays && !entry && a_.counts[kItems] == shape_.capacity) stays = false, statuses[i] = kFull;
    planned.to = stays ? to : kNone;
    if (entry) count_down(planned.from);
    if (stays) {
      count_up(to);
      if (to >= shape_.private_bins && a_.loads[to] > shape_.page_slots) failure = MapFailure::kPage;
      const MapEntry now{keys[i], fresh[0] | (second ? kSecondBit : 0), fresh[1]};
      if (entry)
        *entry = now;
      else if (!insert(now))
        failure = MapFailure::kTable;
      a_.counts[kItems] += !entry;
    } else if (entry) {
      entry->first = kNone;
      --a_.counts[kItems];
    }
    if (failure != MapFailure::kNothing) return 0;
  }
  plan_pages_.assign(pages, pages + num_pages_);
  return num_pages_;
}

// Takes the item out of its frame, or off its page. false: it is in neither.
bool ObliviousCore::take(std::uint32_t key, std::uint32_t bin, const Planned& planned, std::uint8_t* pages, std::uint8_t* value) {
  for (std::uint32_t* link = a_.heads + bin; *link != kNone; link = a_.frame_next + *link) {
    const std::uint32_t frame = *link;
    if (a_.frame_keys[frame] != key) continue;
    std::memcpy(value, a_.frame_values + static_cast<std::size_t>(frame) * shape_.value_bytes, shape_.value_bytes);
    *link = a_.frame_next[frame];
    --a_.counts[bin < shape_.private_bins ? kPrivateItems : kPending];
    free_frame(frame);
    return true;
  }
  if (bin < shape_.private_bins) return false;
  for (const std::int32_t place : planned.pages) {
    if (place < 0 || plan_pages_[static_cast<std::size_t>(place)] != bin - shape_.private_bins) continue;
    std::uint8_t* page = pages + static_cast<std::size_t>(place) * shape_.page_bytes();
    const auto used = read<std::uint32_t>(page);
    for (std::uint32_t slot = 0; slot < shape_.page_slots; ++slot) {
      std::uint8_t* tuple = page + 4 + slot * shape_.tuple_bytes();
      if (!(used >> slot & 1) || read<std::uint32_t>(tuple) != key) continue;
      std::memcpy(value, tuple + 4, shape_.value_bytes);
      write(page, used & ~(1u << slot));
      std::memset(tuple, 0, shape_.tuple_bytes());  // a dummy
      return true;
    }
  }
  return false;
}

// All pending items of a page into its free slots.
void ObliviousCore::merge(std::uint32_t page, std::uint8_t* bytes) {
  std::uint32_t& head = a_.heads[shape_.private_bins + page];
  auto used = read<std::uint32_t>(bytes);
  std::uint32_t slot = 0;
  while (head != kNone) {
    const std::uint32_t frame = head;
    while (used >> slot & 1) ++slot;  // there is one: loads count pending items
    std::uint8_t* tuple = bytes + 4 + slot * shape_.tuple_bytes();
    write(tuple, a_.frame_keys[frame]);
    std::memcpy(tuple + 4, a_.frame_values + static_cast<std::size_t>(frame) * shape_.value_bytes, shape_.value_bytes);
    used |= 1u << slot;
    head = a_.frame_next[frame];
    free_frame(frame);
    --a_.counts[kPending];
  }
  write(bytes, used);
}

MapFailure ObliviousCore::apply(const std::uint8_t* ops, const std::uint32_t* keys, std::size_t count, std::uint8_t* pages,
                                std::uint8_t* values) {
  std::vector<std::uint8_t> before(shape_.value_bytes + 1);
  for (std::size_t i = 0; i < count; ++i) {
    const Planned& planned = planned_[i];
    std::uint8_t* value = values + i * shape_.value_bytes;
    std::fill(before.begin(), before.end(), std::uint8_t{0});
    if (planned.from != kNone && !take(keys[i], planned.from, planned, pages, before.data())) return MapFailure::kLost;
    if (planned.to != kNone) {
      const std::uint32_t frame = new_frame();
      if (frame == kNone) return MapFailure::kFrames;
      keep(frame, keys[i], planned.to, ops[i] == kPut ? value : before.data());
    }
    std::memcpy(value, before.data(), shape_.value_bytes);
    for (const std::int32_t place : planned.pages)
      if (place >= 0) merge(plan_pages_[static_cast<std::size_t>(place)], pages + static_cast<std::size_t>(place) * shape_.page_bytes());
    a_.counts[kSumPending] += a_.counts[kPending];
    ++a_.counts[kAccesses];
  }
  return MapFailure::kNothing;
}

// ---- all at once -------------------------------------------------------------------------------------------------------------------

MapFailure ObliviousCore::place(const std::uint32_t* keys, const std::uint8_t* values, const std::uint64_t* words, std::size_t count,
                                std::uint32_t* bins) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t pair[2];
    draw_pair(words + 2 * i, shape_.bins, pair);
    bool second;
    const std::uint32_t to = bins[i] = choose(pair, second);
    count_up(to);
    if (to >= shape_.private_bins && a_.loads[to] > shape_.page_slots) return MapFailure::kPage;
    if (!insert({keys[i], pair[0] | (second ? kSecondBit : 0), pair[1]})) return MapFailure::kTable;
    ++a_.counts[kItems];
    if (to < shape_.private_bins) {
      const std::uint32_t frame = new_frame();
      if (frame == kNone) return MapFailure::kFrames;
      keep(frame, keys[i], to, values + i * shape_.value_bytes);
    }
  }
  return MapFailure::kNothing;
}

std::size_t ObliviousCore::private_items(std::uint32_t* keys, std::uint8_t* values) const {
  std::size_t found = 0;
  for (std::uint32_t bin = 0; bin < shape_.bins; ++bin)
    for (std::uint32_t frame = a_.heads[bin]; frame != kNone; frame = a_.frame_next[frame], ++found) {
      keys[found] = a_.frame_keys[frame];
      std::memcpy(values + found * shape_.value_bytes, a_.frame_values + static_cast<std::size_t>(frame) * shape_.value_bytes, shape_.value_bytes);
    }
  return found;
}

// ---- counts alone ------------------------------------------------------------------------------------------------------------------

BinCounts simulate_bins(std::uint32_t items, std::uint32_t bins, std::uint32_t private_bins, std::int64_t accesses, std::uint64_t seed,
                        KeyOrder order, const std::uint32_t* keys, const std::uint64_t* words) {
  std::vector<MapEntry> entries(items);
  std::vector<std::uint8_t> loads(bins, 0), pending(bins, 0);
  std::uint64_t state = mixed(seed), drawn[4];
  const auto draw = [&](int n) {
    for (int i = 0; i < n; ++i) drawn[i] = words ? *words++ : mixed(state += 0x9e3779b97f4a7c15ull);
  };
  std::int64_t held = 0, waiting = 0, sum_waiting = 0, sum_held = 0, counted = 0;
  BinCounts out{};
  const auto put = [&](MapEntry& entry, const std::uint64_t* lots) {
    std::uint32_t pair[2];
    draw_pair(lots, bins, pair);
    const bool second = loads[pair[1]] < loads[pair[0]];
    entry = {0, pair[0] | (second ? kSecondBit : 0), pair[1]};
    return pair[second];
  };
  const auto up = [&](std::uint32_t bin) {
    const std::int64_t load = ++loads[bin];
    out.max_load = std::max(out.max_load, load);
    if (bin >= private_bins) out.max_page_load = std::max(out.max_page_load, load);
    held += bin < private_bins;
    out.max_private = std::max(out.max_private, held);
  };
  for (std::uint32_t i = 0; i < items; ++i) {
    draw(2);
    up(put(entries[i], drawn));
  }
  out.max_frames = held;
  for (std::int64_t t = 0; t < accesses; ++t) {
    const std::uint32_t key = keys                          ? keys[t]
                              : order == KeyOrder::kUniform ? scaled(mixed(seed ^ static_cast<std::uint64_t>(t) * 0xd1342543de82ef95ull), items)
                              : order == KeyOrder::kSequential ? static_cast<std::uint32_t>(t % items)
                                                               : 0;
    draw(4);
    MapEntry& entry = entries[key];
    const std::uint32_t old[2] = {entry.first & ~kSecondBit, entry.second}, from = bin_of(entry);
    const std::uint32_t to = put(entry, drawn + 2);
    --loads[from];
    held -= from < private_bins;
    up(to);
    if (to >= private_bins) {
      ++pending[to];
      out.max_pending = std::max(out.max_pending, ++waiting);
    }
    out.max_frames = std::max(out.max_frames, held + waiting);
    for (const std::uint32_t bin : old)
      if (bin >= private_bins) waiting -= pending[bin], pending[bin] = 0;
    if (2 * t >= accesses) sum_waiting += waiting, sum_held += held, ++counted;
  }
  out.mean_pending = counted ? static_cast<double>(sum_waiting) / static_cast<double>(counted) : 0;
  out.mean_private = counted ? static_cast<double>(sum_held) / static_cast<double>(counted) : 0;
  return out;
}

}  // namespace mw
