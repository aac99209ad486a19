// Caches, the way to memory and a core, as a simulator of traces sees them. Nothing here knows of address translation beyond this: a
// block of the second level may hold translations instead of data (kTranslation), and a replacement policy may favour such blocks.
//
// State changes in the order of the trace, times are told beside it: an access asks at a cycle of its own, and what is busy then
// (memory, miss registers) makes it wait. Cycles of accesses that overlap do not come in order, so resources keep calendars.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace mw {

// How much of a resource is taken, in slots of a few cycles. What lies further back than kSlots slots is forgotten.
class Calendar {
 public:
  static constexpr std::int64_t kSlots = 1 << 12;

  Calendar(std::int64_t slot_cycles, std::int64_t capacity) : cycles_(slot_cycles), capacity_(capacity), slots_(kSlots) {}

  // The first cycle, not before `when`, at which one more may begin.
  std::int64_t first_free(std::int64_t when) const {
    std::int64_t slot = when / cycles_;
    while (taken(slot) >= capacity_) ++slot;
    return std::max(when, slot * cycles_);
  }

  void take(std::int64_t from, std::int64_t until) {
    for (std::int64_t slot = from / cycles_; slot <= (std::max(until, from + 1) - 1) / cycles_; ++slot) {
      Slot& one = slots_[static_cast<std::size_t>(slot & (kSlots - 1))];
      if (one.number != slot) one = {slot, 0};
      ++one.taken;
    }
  }

 private:
  struct Slot {
    std::int64_t number = -1, taken = 0;
  };

  std::int64_t taken(std::int64_t slot) const {
    const Slot& one = slots_[static_cast<std::size_t>(slot & (kSlots - 1))];
    return one.number == slot ? one.taken : 0;
  }

  std::int64_t cycles_, capacity_;
  std::vector<Slot> slots_;
};

enum class Replacement { lru, srrip };
constexpr std::uint8_t kDirty = 1, kTranslation = 2;
constexpr std::uint64_t kNoKey = ~std::uint64_t{0};

struct Evicted {
  std::uint64_t key = kNoKey;
  std::uint32_t payload = 0;
  std::uint8_t flags = 0;
  bool any() const { return key != kNoKey; }
};

// A set-associative store of keys: a cache of lines, a TLB, a page-walk cache. SRRIP has 2 bits: 2 when a block comes in, one less
// with each hit, and the first block at 3 leaves. Favoured blocks come in at 0 and go back there when hit; if `favour` is on, a block
// of translations that would leave is put at 0 instead, once a search.
class Cache {
 public:
  Cache(std::int64_t sets, std::int64_t ways, Replacement replacement)
      : sets_(static_cast<std::uint64_t>(sets)), ways_(static_cast<std::size_t>(ways)), replacement_(replacement),
        keys_(sets_ * ways_, kNoKey), ranks_(sets_ * ways_, 0), payloads_(sets_ * ways_, 0), flags_(sets_ * ways_, 0) {}

  bool exists() const { return sets_ > 0; }
  std::size_t size() const { return keys_.size(); }
  std::size_t ways() const { return ways_; }
  std::uint64_t set_of(std::uint64_t number) const { return number & (sets_ - 1); }
  std::uint64_t key(std::int64_t slot) const { return keys_[static_cast<std::size_t>(slot)]; }
  std::uint32_t& payload(std::int64_t slot) { return payloads_[static_cast<std::size_t>(slot)]; }
  std::uint8_t& flags(std::int64_t slot) { return flags_[static_cast<std::size_t>(slot)]; }

  // Place of a key in the set, or -1.
  std::int64_t find(std::uint64_t set, std::uint64_t key) const {
    const std::size_t first = static_cast<std::size_t>(set) * ways_;
    for (std::size_t way = first; way < first + ways_; ++way)
      if (keys_[way] == key) return static_cast<std::int64_t>(way);
    return -1;
  }

  void touch(std::int64_t slot, bool favoured = false) {
    std::uint32_t& rank = ranks_[static_cast<std::size_t>(slot)];
    if (replacement_ == Replacement::lru) rank = ++clock_;
    else if (favoured) rank = 0;
    else if (rank > 0) --rank;
  }

  // Puts a key that is not there into the set; `slot` tells where it is.
  Evicted insert(std::uint64_t set, std::uint64_t key, std::uint8_t flags, std::uint32_t payload, std::int64_t* slot = nullptr,
                 bool favoured = false, bool favour = false) {
    const std::size_t way = victim(static_cast<std::size_t>(set) * ways_, favour);
    const Evicted out{keys_[way], payloads_[way], flags_[way]};
    keys_[way] = key, payloads_[way] = payload, flags_[way] = flags;
    ranks_[way] = replacement_ == Replacement::lru ? ++clock_ : favoured ? 0 : 2;
    if (slot) *slot = static_cast<std::int64_t>(way);
    return out;
  }

  void clear(std::int64_t slot) { keys_[static_cast<std::size_t>(slot)] = kNoKey, flags_[static_cast<std::size_t>(slot)] = 0; }

 private:
  std::size_t victim(std::size_t first, bool favour) {
    for (std::size_t way = first; way < first + ways_; ++way)
      if (keys_[way] == kNoKey) return way;
    if (replacement_ == Replacement::lru)
      return static_cast<std::size_t>(std::min_element(ranks_.begin() + static_cast<std::ptrdiff_t>(first),
                                                       ranks_.begin() + static_cast<std::ptrdiff_t>(first + ways_)) - ranks_.begin());
    std::size_t way = oldest(first);
    if (favour && (flags_[way] & kTranslation)) {
      ranks_[way] = 0;
      way = oldest(first);
    }
    return way;
  }

  std::size_t oldest(std::size_t first) {
    std::size_t best = first;
    for (std::size_t way = first + 1; way < first + ways_; ++way)
      if (ranks_[way] > ranks_[best]) best = way;
    const std::uint32_t missing = 3 - ranks_[best];
    if (missing)
      for (std::size_t way = first; way < first + ways_; ++way) ranks_[way] += missing;
    return best;
  }

  std::uint64_t sets_;
  std::size_t ways_;
  Replacement replacement_;
  std::uint32_t clock_ = 0;
  std::vector<std::uint64_t> keys_;
  std::vector<std::uint32_t> ranks_, payloads_;
  std::vector<std::uint8_t> flags_;
};

struct LevelShape {
  std::int64_t sets, ways, cycles;
};

struct LevelsShape {
  LevelShape data, code, second, third;
  std::int64_t memory_cycles, memory_line_cycles, outstanding_misses;
};

enum class From { data, code, second };  // where an access begins: a first-level cache, or the second level, as page walkers do

struct Reply {
  std::int64_t cycles;
  int level;  // that had the line: 1, 2, 3, or 4 for memory
};

// Who wants to know which blocks of translations left the second level.
struct TranslationWatch {
  virtual ~TranslationWatch() = default;
  virtual void dropped(const Evicted& block) = 0;
};

// Two first levels (LRU), a second and a third (SRRIP), and memory. Lines are filled on the way in, into every level; dirty ones are
// written to the next level when they leave, clean ones are dropped, and so are translations.
class Levels {
 public:
  explicit Levels(const LevelsShape& shape)
      : shape_(shape), data_(shape.data.sets, shape.data.ways, Replacement::lru), code_(shape.code.sets, shape.code.ways, Replacement::lru),
        second_(shape.second.sets, shape.second.ways, Replacement::srrip), third_(shape.third.sets, shape.third.ways, Replacement::srrip),
        channel_(shape.memory_line_cycles, 1), misses_(16, shape.outstanding_misses) {}

  Reply access(From from, std::uint64_t line, bool write, std::int64_t when) {
    Cache* first = from == From::data ? &data_ : from == From::code ? &code_ : nullptr;
    std::int64_t wait = 0;
    if (first) {
      const std::int64_t slot = first->find(first->set_of(line), line);
      if (slot >= 0) {
        first->touch(slot);
        if (write) first->flags(slot) |= kDirty;
        return {(from == From::data ? shape_.data : shape_.code).cycles, 1};
      }
      wait = misses_.first_free(when) - when;
    }
    Reply reply = below(line, !first && write, when + wait);
    reply.cycles += wait;
    if (!first) return reply;
    misses_.take(when + wait, when + reply.cycles);
    const Evicted out = first->insert(first->set_of(line), line, write ? kDirty : 0, 0);
    if (out.flags & kDirty) write_second(out.key, when);
    return reply;
  }

  Cache& second() { return second_; }
  void favour_translations(bool on) { favour_ = on; }
  void watch(TranslationWatch* who) { watch_ = who; }

  // A block of translations comes in, or is there and gets more of them.
  void put_translation(std::uint64_t set, std::uint64_t key, std::uint32_t payload, std::int64_t when) {
    const Evicted out = second_.insert(set, key, kTranslation, payload, nullptr, favour_, favour_);
    leave_second(out, when);
  }

  std::int64_t memory_reads = 0, memory_writes = 0, memory_wait_cycles = 0, second_writebacks = 0, translation_writebacks = 0;

 private:
  Reply below(std::uint64_t line, bool write, std::int64_t when) {
    const std::int64_t slot = second_.find(second_.set_of(line), line);
    if (slot >= 0) {
      second_.touch(slot);
      if (write) second_.flags(slot) |= kDirty;
      return {shape_.second.cycles, 2};
    }
    Reply reply{shape_.third.cycles, 3};
    const std::int64_t there = third_.find(third_.set_of(line), line);
    if (there >= 0) third_.touch(there);
    else {
      reply = {shape_.third.cycles + read_memory(when + shape_.third.cycles), 4};
      put_third(line, 0, when);
    }
    put_second(line, write ? kDirty : 0, when);
    return reply;
  }

  void put_second(std::uint64_t line, std::uint8_t flags, std::int64_t when) {
    leave_second(second_.insert(second_.set_of(line), line, flags, 0, nullptr, false, favour_), when);
  }

  void leave_second(const Evicted& out, std::int64_t when) {
    if (!out.any()) return;
    if (out.flags & kDirty) {
      ++(out.flags & kTranslation ? translation_writebacks : second_writebacks);
      const std::int64_t slot = third_.find(third_.set_of(out.key), out.key);
      if (slot >= 0) third_.flags(slot) |= kDirty;
      else put_third(out.key, kDirty, when);
    }
    if ((out.flags & kTranslation) && watch_) watch_->dropped(out);
  }

  void write_second(std::uint64_t line, std::int64_t when) {
    const std::int64_t slot = second_.find(second_.set_of(line), line);
    if (slot >= 0) second_.flags(slot) |= kDirty;
    else put_second(line, kDirty, when);
  }

  void put_third(std::uint64_t line, std::uint8_t flags, std::int64_t when) {
    const Evicted out = third_.insert(third_.set_of(line), line, flags, 0);
    if (!(out.flags & kDirty)) return;
    ++memory_writes;
    const std::int64_t start = channel_.first_free(when);
    channel_.take(start, start + 1);
  }

  std::int64_t read_memory(std::int64_t when) {
    ++memory_reads;
    const std::int64_t start = channel_.first_free(when);
    channel_.take(start, start + 1);
    memory_wait_cycles += start - when;
    return start - when + shape_.memory_cycles;
  }

  LevelsShape shape_;
  Cache data_, code_, second_, third_;
  Calendar channel_, misses_;
  bool favour_ = false;
  TranslationWatch* watch_ = nullptr;
};

// An out-of-order core as times of dispatch, completion and retirement: `width` instructions a cycle come in and leave in order, at
// most `window` are inside, an access begins when its address is known. What retirement waits for an access is its exposed stall.
// Times are in slots, width of them a cycle.
class Core {
 public:
  static constexpr std::int64_t kRecent = 256;  // accesses that are remembered, no fewer than the window holds

  Core(std::int64_t width, std::int64_t window) : width_(width), window_(window), recent_(kRecent) {}

  // Cycle at which an access with `gap` instructions before it may begin. depends: how many accesses ago its address was loaded.
  std::int64_t issue(std::int64_t gap, std::int64_t depends) {
    instructions += gap + 1;
    dispatched_ += gap + 1;
    const std::int64_t leaves = instructions - window_;
    while (tail_ + 1 < count_ && at(tail_ + 1).instruction <= leaves) ++tail_;
    if (count_ && at(tail_).instruction <= leaves) dispatched_ = std::max(dispatched_, at(tail_).retired + leaves - at(tail_).instruction);
    const std::int64_t ready = depends && depends <= count_ ? at(count_ - depends).completed : 0;
    return std::max(now(), ready);
  }

  // Cycle at which the code of the next instructions is asked for.
  std::int64_t now() const { return (dispatched_ + width_ - 1) / width_; }

  // translation, data: cycles that the access took. A write leaves as soon as its address is translated.
  void finish(std::int64_t gap, std::int64_t issued, std::int64_t translation, std::int64_t data, bool write) {
    if (write) data = 1;
    const std::int64_t completed = issued + translation + data;
    const std::int64_t ideal = retired_ + gap + 1;
    retired_ = std::max(ideal, completed * width_);
    expose(retired_ - ideal, translation, data);
    at(count_) = {instructions, retired_, completed};
    ++count_;
    if (count_ - tail_ >= kRecent) ++tail_;
  }

  // The same for code, which nothing overlaps but what is in the window already; data: cycles beyond a hit.
  void finish_fetch(std::int64_t issued, std::int64_t translation, std::int64_t data) {
    if (translation + data == 0) return;
    const std::int64_t completed = (issued + translation + data) * width_;
    dispatched_ = std::max(dispatched_, completed);
    const std::int64_t before = retired_;
    retired_ = std::max(retired_, completed);
    expose(retired_ - before, translation, data);
  }

  std::int64_t slots() const { return retired_; }

  std::int64_t instructions = 0, data_stall_slots = 0, translation_stall_slots = 0;

 private:
  struct Access {
    std::int64_t instruction = 0, retired = 0, completed = 0;
  };

  Access& at(std::int64_t number) { return recent_[static_cast<std::size_t>(number & (kRecent - 1))]; }

  void expose(std::int64_t stall, std::int64_t translation, std::int64_t data) {
    const std::int64_t part = stall * translation / (translation + data);
    translation_stall_slots += part;
    data_stall_slots += stall - part;
  }

  std::int64_t width_, window_, dispatched_ = 0, retired_ = 0, count_ = 0, tail_ = 0;
  std::vector<Access> recent_;
};

}  // namespace mw
