#include "translation.h"

#include <algorithm>
#include <stdexcept>

namespace mw {

namespace {

constexpr std::uint64_t kBlock = 1, kNestedBlock = 2;
constexpr std::uint32_t kSmallBase = 1u << 23, kLargeBase = 1u << 25, kSoftwareBase = 1u << 22;
constexpr std::int64_t kWalkerSlot = 16;
constexpr int kEntryLines = 4;  // entries of a POM-TLB in a line: 16 bytes each

constexpr std::uint64_t key_of(std::uint64_t number, std::uint64_t process, int size, std::uint64_t kind = 0) {
  return number | process << 40 | static_cast<std::uint64_t>(size) << 56 | kind << 60;
}
constexpr std::uint64_t number_of(std::uint64_t key) { return key & ((std::uint64_t{1} << 40) - 1); }
constexpr std::uint8_t process_of(std::uint64_t key) { return static_cast<std::uint8_t>(key >> 40); }
constexpr int size_of(std::uint64_t key) { return static_cast<int>(key >> 56 & 1); }
constexpr std::uint64_t kind_of(std::uint64_t key) { return key >> 60; }
// of a page of 4 KiB, the number of the page of that size around it
constexpr std::uint64_t sized(std::uint64_t page, int size) { return size ? page >> 9 : page; }

int bits_of(std::uint32_t mask) {
  int count = 0;
  for (; mask; mask &= mask - 1) ++count;
  return count;
}

std::uint64_t mixed(std::uint64_t x) {  // splitmix64's finish
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

Cache tlb(const LevelShape& shape) { return Cache(shape.sets, shape.ways, Replacement::lru); }

std::array<Cache, 3> walk_caches(const TranslationSettings& s) {
  return {tlb(s.walk_caches[0]), tlb(s.walk_caches[1]), tlb(s.walk_caches[2])};
}

LevelsShape levels_of(const TranslationSettings& s) {
  return {s.data, s.code, s.second, s.third, s.memory_cycles, s.memory_line_cycles, s.outstanding_misses};
}

}  // namespace

std::vector<std::pair<std::string, std::int64_t*>> named_fields(TranslationSettings& s) {
  std::vector<std::pair<std::string, std::int64_t*>> fields = {
      {"width", &s.width}, {"window", &s.window}, {"outstanding_misses", &s.outstanding_misses}, {"walkers", &s.walkers},
      {"memory_cycles", &s.memory_cycles}, {"memory_line_cycles", &s.memory_line_cycles}, {"software_sets", &s.software_sets},
      {"software_ways", &s.software_ways}, {"virtualised", &s.virtualised}, {"large_per_mille", &s.large_per_mille},
      {"scattered", &s.scattered}, {"seed", &s.seed}, {"victima", &s.victima}, {"on_walk", &s.on_walk}, {"on_eviction", &s.on_eviction},
      {"predictor", &s.predictor}, {"aware", &s.aware}, {"frequency_low", &s.frequency_low}, {"frequency_high", &s.frequency_high},
      {"cost_low", &s.cost_low}, {"cost_high", &s.cost_high}, {"frequency_most", &s.frequency_most}, {"cost_most", &s.cost_most},
      {"bypass_misses", &s.bypass_misses}, {"pressure_misses", &s.pressure_misses}, {"window_instructions", &s.window_instructions}};
  const std::pair<const char*, LevelShape*> shapes[] = {
      {"data", &s.data}, {"code", &s.code}, {"second", &s.second}, {"third", &s.third}, {"data_tlb", &s.data_tlb}, {"code_tlb", &s.code_tlb},
      {"second_tlb", &s.second_tlb}, {"third_tlb", &s.third_tlb}, {"nested_tlb", &s.nested_tlb}, {"walk_cache_2", &s.walk_caches[0]},
      {"walk_cache_3", &s.walk_caches[1]}, {"walk_cache_4", &s.walk_caches[2]}};
  for (const auto& [name, shape] : shapes) {
    fields.emplace_back(std::string(name) + "_sets", &shape->sets);
    fields.emplace_back(std::string(name) + "_ways", &shape->ways);
    fields.emplace_back(std::string(name) + "_cycles", &shape->cycles);
  }
  return fields;
}

// ---- page tables -----------------------------------------------------------------------------------------------------------------

std::uint32_t Frames::table() {
  if (tables_ == kSoftwareBase) throw std::length_error("page tables take more than 16 GiB");
  return tables_++;
}

std::uint32_t Frames::page() {
  constexpr std::uint32_t kMost = 1u << 24;
  if (pages_ == kMost) throw std::length_error("a trace may touch 64 GiB in small pages");
  const std::uint32_t number = pages_++;
  return kSmallBase + (scattered_ ? number * 0x9E3779B1u & (kMost - 1) : number);
}

std::uint32_t Frames::large() {
  if (larges_ == 1u << 22) throw std::length_error("a trace may touch 8 TiB in large pages");
  return kLargeBase + 512 * larges_++;
}

PageTable::PageTable(Frames& frames, std::int64_t large_per_mille, std::uint64_t seed)
    : frames_(frames), large_per_mille_(large_per_mille), seed_(seed) {
  make(4);
}

bool PageTable::is_large(std::uint64_t page) const {
  return static_cast<std::int64_t>(mixed(seed_ ^ page >> 9) % 1000) < large_per_mille_;
}

std::int32_t PageTable::make(int level) {
  auto table = std::make_unique<Table>();
  table->frame = frames_.table();
  if (level == 1) table->pages.resize(512);
  else table->below.resize(512);
  tables_.push_back(std::move(table));
  return static_cast<std::int32_t>(tables_.size());
}

PageTable::Path PageTable::path(std::uint64_t page) {
  Path found;
  std::int32_t next = 1;
  for (int level = 4; level >= 1; --level) {
    Table* table = found.tables[static_cast<std::size_t>(level)] = tables_[static_cast<std::size_t>(next - 1)].get();
    const std::size_t index = page >> 9 * (level - 1) & 511;
    if (level <= 2 && !table->pages.empty() && table->pages[index].mapped) {
      found.entry = &table->pages[index], found.leaf = level;
      return found;
    }
    if (level == 1 || !(next = table->below[index])) return found;
  }
  return found;
}

PageTable::Path PageTable::ensure(std::uint64_t page) {
  Path found = path(page);
  if (found.leaf) return found;
  const int leaf = is_large(page) ? 2 : 1;
  std::int32_t next = 1;
  for (int level = 4; level > leaf; --level) {
    const std::size_t index = page >> 9 * (level - 1) & 511;
    std::int32_t below = tables_[static_cast<std::size_t>(next - 1)]->below[index];
    if (!below) {
      below = make(level - 1);  // moves the vector of tables, not the tables
      tables_[static_cast<std::size_t>(next - 1)]->below[index] = below;
    }
    next = below;
  }
  Table& table = *tables_[static_cast<std::size_t>(next - 1)];
  if (table.pages.empty()) table.pages.resize(512);
  PageEntry& entry = table.pages[page >> 9 * (leaf - 1) & 511];
  entry.mapped = true;
  move(entry, leaf);
  return path(page);
}

void PageTable::move(PageEntry& entry, int leaf) { entry.frame = leaf == 2 ? frames_.large() : frames_.page(); }

std::uint32_t PageTable::frame_of(const Path& path, std::uint64_t page) {
  return path.entry->frame + (path.leaf == 2 ? static_cast<std::uint32_t>(page & 511) : 0);
}

// ---- the machine -----------------------------------------------------------------------------------------------------------------

TranslationMachine::TranslationMachine(const TranslationSettings& s)
    : settings_(s), levels_(levels_of(s)), core_(s.width, s.window), walkers_(kWalkerSlot, s.walkers), data_tlb_(tlb(s.data_tlb)),
      code_tlb_(tlb(s.code_tlb)), second_tlb_(tlb(s.second_tlb)), third_tlb_(tlb(s.third_tlb)), nested_tlb_(tlb(s.nested_tlb)),
      software_tlb_(s.software_sets, s.software_ways, Replacement::lru), walk_caches_(walk_caches(s)), host_caches_(walk_caches(s)),
      frames_(s.scattered != 0), guest_frames_(s.scattered != 0),
      host_(frames_, s.large_per_mille, mixed(static_cast<std::uint64_t>(s.seed) + 1000)), next_window_(s.window_instructions) {
  levels_.watch(this);
}

PageTable& TranslationMachine::table_of(std::uint8_t process) {
  auto& table = processes_[process];
  if (!table)
    table = std::make_unique<PageTable>(settings_.virtualised ? guest_frames_ : frames_, settings_.large_per_mille,
                                        mixed(static_cast<std::uint64_t>(settings_.seed) + process));
  return *table;
}

void TranslationMachine::map(std::uint8_t process, std::uint64_t first_page, std::uint64_t pages) {
  for (std::uint64_t page = first_page; page < first_page + pages; ++page) resolve(process, page);
}

TranslationMachine::Resolved TranslationMachine::resolve(std::uint8_t process, std::uint64_t page) {
  PageTable& table = table_of(process);
  const PageTable::Path path = table.ensure(page);
  int size = path.leaf - 1;
  std::uint32_t frame = PageTable::frame_of(path, page);
  if (settings_.virtualised) {
    const PageTable::Path host = host_.ensure(frame);
    size = std::min(size, host.leaf - 1);
    frame = PageTable::frame_of(host, frame);
  }
  if (size) frame -= static_cast<std::uint32_t>(page & 511);  // large pages begin at multiples of 512 frames, in both spaces
  return {frame, sized(page, size), size};
}

void TranslationMachine::run(const TraceView& trace) {
  for (std::int64_t i = 0; i < trace.count; ++i) {
    const std::uint64_t address = trace.addresses[i];
    const std::uint8_t process = trace.processes[i];
    const auto kind = static_cast<TraceKind>(trace.kinds[i]);
    std::int64_t translation = 0, data = 0;
    if (kind == kRead || kind == kWrite) {
      ++counters_.accesses;
      const std::int64_t issued = core_.issue(trace.gaps[i], trace.depends[i]);
      const auto [line, cycles] = translate(process, address, issued, false);
      const Reply reply = levels_.access(From::data, line, kind == kWrite, issued + cycles);
      translation = cycles, data = reply.cycles;
      counters_.first_misses_data += reply.level > 1, counters_.third_misses_data += reply.level > 3;
      counters_.memory_reads_data += reply.level > 3;
      if (reply.level > 2) ++counters_.second_misses_data, ++window_data_misses_;
      core_.finish(trace.gaps[i], issued, translation, data, kind == kWrite);
      account();
    } else if (kind == kFetch) {
      ++counters_.fetches;
      const std::int64_t issued = core_.now();
      const auto [line, cycles] = translate(process, address, issued, true);
      const Reply reply = levels_.access(From::code, line, false, issued + cycles);
      translation = cycles, data = reply.cycles;
      counters_.memory_reads_data += reply.level > 3;
      core_.finish_fetch(issued, translation, reply.level > 1 ? reply.cycles - settings_.code.cycles : 0);
    } else if (kind == kInvalidate) {
      invalidate(process, address >> 12);
    } else if (kind == kFlushProcess) {
      flush([=](std::uint64_t key) { return kind_of(key) != kNestedBlock && process_of(key) == process; });
    } else {
      flush([](std::uint64_t) { return true; });
      for (std::size_t slot = 0; slot < nested_tlb_.size(); ++slot) nested_tlb_.clear(static_cast<std::int64_t>(slot));
    }
    if (trace.translation_cycles) {
      trace.translation_cycles[i] = static_cast<std::uint32_t>(translation);
      trace.data_cycles[i] = static_cast<std::uint32_t>(data);
    }
  }
}

void TranslationMachine::account() {
  if (core_.instructions < next_window_) return;
  const std::int64_t since = core_.instructions - next_window_ + settings_.window_instructions;
  bypass_ = window_data_misses_ * 1000 > settings_.bypass_misses * since;
  pressure_ = window_tlb_misses_ * 1000 > settings_.pressure_misses * since;
  levels_.favour_translations(settings_.aware && pressure_);
  counters_.bypass_samples += bypass_, counters_.pressure_samples += pressure_, ++counters_.samples;
  counters_.reach_bytes_sum += (live_pages_[0] << 12) + (live_pages_[1] << 21);
  window_data_misses_ = window_tlb_misses_ = 0;
  next_window_ = core_.instructions + settings_.window_instructions;
}

std::pair<std::uint64_t, std::int64_t> TranslationMachine::translate(std::uint8_t process, std::uint64_t address, std::int64_t when, bool code) {
  const std::uint64_t page = address >> 12;
  const auto line_in = [&](std::uint32_t frame, int size) {
    const std::uint64_t small = frame + (size ? page & 511 : 0);
    return small << 6 | (address >> 6 & 63);
  };
  Cache& first = code ? code_tlb_ : data_tlb_;
  Cache* const tlbs[] = {&first, &second_tlb_, &third_tlb_};
  std::int64_t cycles = 0;
  for (int level = 0; level < 3; ++level) {
    Cache& one = *tlbs[level];
    if (!one.exists()) continue;
    if (level) cycles += (level == 1 ? settings_.second_tlb : settings_.third_tlb).cycles;
    for (int size = 0; size < 2; ++size) {
      const std::uint64_t number = sized(page, size), key = key_of(number, process, size);
      const std::int64_t slot = one.find(one.set_of(number), key);
      if (slot < 0) continue;
      one.touch(slot);
      const std::uint32_t frame = one.payload(slot);
      counters_.third_tlb_hits += level == 2;
      if (level == 2) counters_.second_tlb_miss_cycles += settings_.third_tlb.cycles;
      for (int above = level - 1; above >= 0; --above) fill(*tlbs[above], process, {frame, number, size}, when + cycles);
      return {line_in(frame, size), cycles};
    }
    if (level == 0) ++counters_.first_tlb_misses;
    if (level == 1) ++counters_.second_tlb_misses, ++window_tlb_misses_;
  }
  const std::int64_t spent = third_tlb_.exists() ? settings_.third_tlb.cycles : 0;
  const std::int64_t more = miss(process, page, when + cycles);
  counters_.second_tlb_miss_cycles += spent + more;
  cycles += more;
  const Resolved found = resolve(process, page);
  for (int level = 2; level >= 0; --level)
    if (tlbs[level]->exists()) fill(*tlbs[level], process, found, when + cycles);
  return {line_in(found.frame, found.size), cycles};
}

void TranslationMachine::fill(Cache& into, std::uint8_t process, const Resolved& page, std::int64_t when) {
  const std::uint64_t set = into.set_of(page.number), key = key_of(page.number, process, page.size);
  const std::int64_t slot = into.find(set, key);
  if (slot >= 0) {
    into.touch(slot);
    return;
  }
  const Evicted out = into.insert(set, key, 0, page.frame);
  if (&into == &second_tlb_ && out.any() && settings_.victima) victim_of_second(out, when);
}

// What a miss of all TLBs takes, until the translation is known.
std::int64_t TranslationMachine::miss(std::uint8_t process, std::uint64_t page, std::int64_t when) {
  resolve(process, page);  // a page that nobody touched before is mapped now; faults are not timed
  std::int64_t cycles = 0;
  if (software_tlb_.exists() && software_lookup(process, page, when, cycles)) return cycles;
  if (settings_.victima && probe(kBlock, process, page)) {
    ++counters_.block_hits, ++counters_.aborted_walks;
    return settings_.second.cycles;
  }
  const std::int64_t start = walkers_.first_free(when + cycles);
  const Walked walked = full_walk(process, page, start, Cause::demand);
  walkers_.take(start, start + walked.cycles);
  cycles = start - when + walked.cycles;
  ++counters_.walks, counters_.walks_to_memory += walked.memory, counters_.walk_cycles += walked.cycles;
  PageEntry& entry = *walked.path.entry;
  entry.frequency = static_cast<std::uint8_t>(std::min<std::int64_t>(entry.frequency + 1, settings_.frequency_most));
  entry.walks = static_cast<std::uint16_t>(std::min(entry.walks + 1, 65535));
  entry.walk_cycles = static_cast<std::uint32_t>(std::min<std::int64_t>(entry.walk_cycles + walked.cycles, 0xFFFFFFFF));
  if (walked.memory) {
    entry.cost = static_cast<std::uint8_t>(std::min<std::int64_t>(entry.cost + 1, settings_.cost_most));
    entry.walks_to_memory = static_cast<std::uint16_t>(std::min(entry.walks_to_memory + 1, 65535));
  }
  if (settings_.victima && settings_.on_walk && deserves(entry)) park(process, page, walked, when + cycles);
  if (software_tlb_.exists()) software_fill(process, resolve(process, page), when + cycles);
  return cycles;
}

bool TranslationMachine::deserves(const PageEntry& entry) {
  if (!settings_.predictor || bypass_) return true;
  const bool costly = entry.frequency >= settings_.frequency_low && entry.frequency <= settings_.frequency_high &&
                      entry.cost >= settings_.cost_low && entry.cost <= settings_.cost_high;
  counters_.refused += !costly;
  return costly;
}

// ---- walks -----------------------------------------------------------------------------------------------------------------------

void TranslationMachine::read_memory(Cause cause, int level) {
  if (level > 3) ++(cause == Cause::demand ? counters_.memory_reads_walk : counters_.memory_reads_background);
}

TranslationMachine::Walked TranslationMachine::walk(PageTable& table, WalkCaches& caches, std::uint8_t process, std::uint64_t page,
                                                    std::int64_t when, Cause cause, bool guest) {
  Walked out;
  out.path = table.path(page);
  out.cycles = settings_.walk_caches[0].cycles;
  int level = 4;
  for (int cached = out.path.leaf + 1; cached <= 4; ++cached) {  // the deepest entry that is held spares all above it
    Cache& one = caches[static_cast<std::size_t>(cached - 2)];
    const std::uint64_t number = page >> 9 * (cached - 1);
    const std::int64_t slot = one.find(one.set_of(number), key_of(number, process, 0));
    if (slot < 0) continue;
    one.touch(slot);
    level = cached - 1;
    break;
  }
  for (; level >= out.path.leaf; --level) {
    std::uint64_t frame = out.path.tables[static_cast<std::size_t>(level)]->frame;
    if (guest) {
      const Nested there = nested(frame, when + out.cycles, cause);
      out.cycles += there.cycles, out.memory |= there.memory;
      frame = there.frame;
    }
    out.leaf_line = frame << 6 | (page >> 9 * (level - 1) & 511) >> 3;
    const Reply reply = levels_.access(From::second, out.leaf_line, false, when + out.cycles);
    out.cycles += reply.cycles, out.memory |= reply.level > 3;
    ++counters_.walk_steps;
    read_memory(cause, reply.level);
    if (level > out.path.leaf) {
      Cache& one = caches[static_cast<std::size_t>(level - 2)];
      const std::uint64_t number = page >> 9 * (level - 1);
      one.insert(one.set_of(number), key_of(number, process, 0), 0, 0);
    }
  }
  return out;
}

// From a process's page to the frame in memory: one walk, or, in a virtual machine, a walk of translated steps and the last translation.
TranslationMachine::Walked TranslationMachine::full_walk(std::uint8_t process, std::uint64_t page, std::int64_t when, Cause cause) {
  PageTable& table = table_of(process);
  Walked out = walk(table, walk_caches_, process, page, when, cause, settings_.virtualised != 0);
  if (settings_.virtualised) {
    const Nested last = nested(PageTable::frame_of(out.path, page), when + out.cycles, cause);
    out.cycles += last.cycles, out.memory |= last.memory;
  }
  return out;
}

TranslationMachine::Nested TranslationMachine::nested(std::uint64_t page, std::int64_t when, Cause cause) {
  const PageTable::Path path = host_.ensure(page);
  const std::uint32_t frame = PageTable::frame_of(path, page);
  Nested out{settings_.nested_tlb.cycles, frame, false};
  const int size = path.leaf - 1;
  const std::uint64_t number = sized(page, size);
  const std::int64_t slot = nested_tlb_.find(nested_tlb_.set_of(number), key_of(number, 0, size));
  if (slot >= 0) {
    nested_tlb_.touch(slot);
    return out;
  }
  counters_.nested_misses += cause == Cause::demand;
  if (settings_.victima && probe(kNestedBlock, 0, page)) {
    ++counters_.nested_block_hits;
    out.cycles += settings_.second.cycles;
  } else {
    const Walked walked = walk(host_, host_caches_, 0, page, when + out.cycles, cause, false);
    out.cycles += walked.cycles, out.memory = walked.memory;
    PageEntry& entry = *walked.path.entry;
    if (cause == Cause::demand) {
      ++counters_.host_walks;
      entry.frequency = static_cast<std::uint8_t>(std::min<std::int64_t>(entry.frequency + 1, settings_.frequency_most));
      entry.cost = static_cast<std::uint8_t>(std::min<std::int64_t>(entry.cost + walked.memory, settings_.cost_most));
    }
    if (settings_.victima && settings_.on_walk && deserves(entry))
      insert_block(walked.leaf_line, kNestedBlock, 0, number, size, present(walked.path, page), when + out.cycles);
  }
  nested_fill(page, when + out.cycles);
  return out;
}

void TranslationMachine::nested_fill(std::uint64_t page, std::int64_t when) {
  const PageTable::Path path = host_.path(page);
  const int size = path.leaf - 1;
  const std::uint64_t number = sized(page, size);
  const Evicted out = nested_tlb_.insert(nested_tlb_.set_of(number), key_of(number, 0, size), 0, 0);
  if (!out.any() || !settings_.victima || !settings_.on_eviction) return;
  const std::uint64_t victim = size_of(out.key) ? number_of(out.key) << 9 : number_of(out.key);
  if (block_with(kNestedBlock, 0, number_of(out.key), size_of(out.key)) >= 0) {
    ++counters_.eviction_covered;
    return;
  }
  if (!deserves(*host_.path(victim).entry)) return;
  ++counters_.host_background_walks;
  const Walked walked = walk(host_, host_caches_, 0, victim, when, Cause::background, false);
  insert_block(walked.leaf_line, kNestedBlock, 0, number_of(out.key), size_of(out.key), present(walked.path, victim), when);
}

// ---- blocks of translations ------------------------------------------------------------------------------------------------------

// Place of the block of the second level that has the page's translation, or -1.
std::int64_t TranslationMachine::block_with(std::uint64_t kind, std::uint8_t process, std::uint64_t number, int size) {
  Cache& second = levels_.second();
  const std::uint64_t block = number >> 3;
  const std::int64_t slot = second.find(second.set_of(block), key_of(block, process, size, kind));
  return slot >= 0 && (second.payload(slot) >> (number & 7) & 1) ? slot : -1;
}

// Whether a block has the translation of a page, small or large; if so it counts as used.
bool TranslationMachine::probe(std::uint64_t kind, std::uint8_t process, std::uint64_t page) {
  for (int size = 0; size < 2; ++size) {
    const std::int64_t slot = block_with(kind, process, sized(page, size), size);
    if (slot < 0) continue;
    levels_.second().touch(slot, settings_.aware && pressure_);
    return true;
  }
  return false;
}

// Entries of the leaf's line that are translations of the leaf's size.
std::uint32_t TranslationMachine::present(const PageTable::Path& path, std::uint64_t page) const {
  const auto& pages = path.tables[static_cast<std::size_t>(path.leaf)]->pages;
  const std::size_t first = (page >> 9 * (path.leaf - 1) & 511) & ~std::size_t{7};
  std::uint32_t mask = 0;
  for (std::size_t j = 0; j < 8; ++j) mask |= static_cast<std::uint32_t>(pages[first + j].mapped) << j;
  return mask;
}

// In a virtual machine: entries whose frames are known from the two leaf lines that the walk has just read.
std::uint32_t TranslationMachine::guest_present(std::uint8_t process, std::uint64_t page, const Resolved& resolved) {
  PageTable& table = table_of(process);
  const PageTable::Path path = table.path(page);
  const std::uint64_t guest = PageTable::frame_of(path, page);
  const int host_size = host_.path(guest).leaf - 1;
  std::uint32_t mask = 0;
  for (std::uint64_t j = 0; j < 8; ++j) {
    const std::uint64_t number = (resolved.number & ~std::uint64_t{7}) + j, first = resolved.size ? number << 9 : number;
    const PageTable::Path other = table.path(first);
    if (other.leaf != path.leaf) continue;
    const std::uint64_t frame = PageTable::frame_of(other, first);
    const PageTable::Path host = host_.path(frame);
    if (host.leaf - 1 != host_size) continue;
    const bool same_line = sized(frame, host_size) >> 3 == sized(guest, host_size) >> 3, same_page = host_size && frame >> 9 == guest >> 9;
    if (resolved.size || !host_size ? same_line : same_page) mask |= 1u << j;
  }
  return mask;
}

void TranslationMachine::insert_block(std::uint64_t leaf_line, std::uint64_t kind, std::uint8_t process, std::uint64_t number, int size,
                                      std::uint32_t mask, std::int64_t when) {
  Cache& second = levels_.second();
  const std::int64_t leaf = second.find(second.set_of(leaf_line), leaf_line);
  if (leaf >= 0 && !(second.flags(leaf) & kDirty)) second.clear(leaf);  // this is the line that turns into the block
  const std::uint64_t block = number >> 3, set = second.set_of(block), key = key_of(block, process, size, kind);
  const std::int64_t slot = second.find(set, key);
  std::uint32_t before = 0;
  if (slot >= 0) {
    before = second.payload(slot);
    second.payload(slot) |= mask;
    second.touch(slot, settings_.aware && pressure_);
  } else {
    ++counters_.block_inserts;
    levels_.put_translation(set, key, mask, when);
  }
  if (kind == kBlock) live_pages_[static_cast<std::size_t>(size)] += bits_of(mask & ~before);
}

// Turns the leaf's line of a walk into a block of translations.
void TranslationMachine::park(std::uint8_t process, std::uint64_t page, const Walked& walked, std::int64_t when) {
  if (!settings_.virtualised) {
    const int size = walked.path.leaf - 1;
    insert_block(walked.leaf_line, kBlock, process, sized(page, size), size, present(walked.path, page), when);
    return;
  }
  const Resolved found = resolve(process, page);
  // a large page of the guest over small ones: the line with the eight frames is the host's, which a nested block may have taken
  const bool own = walked.path.leaf - 1 == found.size;
  insert_block(own ? walked.leaf_line : kNoKey - 1, kBlock, process, found.number, found.size, guest_present(process, page, found), when);
}

void TranslationMachine::victim_of_second(const Evicted& out, std::int64_t when) {
  if (!settings_.on_eviction) return;
  const std::uint8_t process = process_of(out.key);
  const int size = size_of(out.key);
  const std::uint64_t page = size ? number_of(out.key) << 9 : number_of(out.key);
  if (block_with(kBlock, process, number_of(out.key), size) >= 0) {
    ++counters_.eviction_covered;
    return;
  }
  if (!deserves(*table_of(process).path(page).entry)) return;
  ++counters_.background_walks;
  park(process, page, full_walk(process, page, when, Cause::background), when);
}

void TranslationMachine::dropped(const Evicted& block) {
  ++counters_.block_drops;
  if (kind_of(block.key) == kBlock) live_pages_[static_cast<std::size_t>(size_of(block.key))] -= bits_of(block.payload);
}

// ---- a software TLB in memory ----------------------------------------------------------------------------------------------------

bool TranslationMachine::software_lookup(std::uint8_t process, std::uint64_t page, std::int64_t when, std::int64_t& cycles) {
  const auto line_of = [&](std::uint64_t slot) { return (std::uint64_t{kSoftwareBase} << 6) + slot / kEntryLines; };
  std::uint64_t place = software_tlb_.set_of(page) * software_tlb_.ways();
  bool found = false;
  for (int size = 0; size < 2 && !found; ++size) {
    const std::uint64_t number = sized(page, size);
    const std::int64_t slot = software_tlb_.find(software_tlb_.set_of(number), key_of(number, process, size));
    if (slot < 0) continue;
    software_tlb_.touch(slot);
    place = static_cast<std::uint64_t>(slot), found = true;
  }
  const Reply reply = levels_.access(From::second, line_of(place), false, when);
  counters_.memory_reads_software += reply.level > 3;
  ++(found ? counters_.software_hits : counters_.software_misses);
  cycles += reply.cycles;
  return found;
}

void TranslationMachine::software_fill(std::uint8_t process, const Resolved& page, std::int64_t when) {
  std::int64_t slot = 0;
  software_tlb_.insert(software_tlb_.set_of(page.number), key_of(page.number, process, page.size), 0, page.frame, &slot);
  const std::uint64_t line = (std::uint64_t{kSoftwareBase} << 6) + static_cast<std::uint64_t>(slot) / kEntryLines;
  counters_.memory_reads_software += levels_.access(From::second, line, true, when).level > 3;
}

// ---- maintenance -----------------------------------------------------------------------------------------------------------------

// The page moves to another frame, and every copy of its old translation goes.
void TranslationMachine::invalidate(std::uint8_t process, std::uint64_t page) {
  PageTable& table = table_of(process);
  const PageTable::Path path = table.path(page);
  if (!path.leaf) return;
  table.move(*path.entry, path.leaf);
  const int leaf = path.leaf - 1;
  flush([=](std::uint64_t key) {
    if (kind_of(key) == kNestedBlock || process_of(key) != process) return false;
    const std::uint64_t number = number_of(key);
    const int size = size_of(key);
    if (size > leaf) return false;
    const int pages = kind_of(key) == kBlock ? 3 : 0;  // eight pages a block
    if (leaf && !size) return number >> (9 - pages) == page >> 9;  // a guest's large page may be in many small entries
    return number == sized(page, size) >> pages;
  });
}

template <class Which>
void TranslationMachine::flush(Which&& which) {
  for (Cache* one : {&data_tlb_, &code_tlb_, &second_tlb_, &third_tlb_, &software_tlb_})
    for (std::size_t slot = 0; slot < one->size(); ++slot)
      if (const auto key = one->key(static_cast<std::int64_t>(slot)); key != kNoKey && which(key)) one->clear(static_cast<std::int64_t>(slot));
  Cache& second = levels_.second();
  for (std::size_t place = 0; place < second.size(); ++place) {
    const auto slot = static_cast<std::int64_t>(place);
    if (!(second.flags(slot) & kTranslation) || !which(second.key(slot))) continue;
    dropped({second.key(slot), second.payload(slot), kTranslation});
    ++counters_.invalidated;
    second.clear(slot);
  }
  forget_walks();
}

void TranslationMachine::forget_walks() {
  for (WalkCaches* caches : {&walk_caches_, &host_caches_})
    for (Cache& one : *caches)
      for (std::size_t slot = 0; slot < one.size(); ++slot) one.clear(static_cast<std::int64_t>(slot));
}

// ---- what is told ----------------------------------------------------------------------------------------------------------------

std::vector<std::pair<std::string, std::int64_t>> TranslationMachine::counters() const {
  const TranslationCounters& c = counters_;
  return {{"instructions", core_.instructions}, {"slots", core_.slots()}, {"data_stall_slots", core_.data_stall_slots},
          {"translation_stall_slots", core_.translation_stall_slots}, {"accesses", c.accesses}, {"fetches", c.fetches},
          {"first_tlb_misses", c.first_tlb_misses}, {"second_tlb_misses", c.second_tlb_misses}, {"third_tlb_hits", c.third_tlb_hits},
          {"walks", c.walks}, {"walks_to_memory", c.walks_to_memory}, {"walk_cycles", c.walk_cycles}, {"walk_steps", c.walk_steps},
          {"aborted_walks", c.aborted_walks}, {"background_walks", c.background_walks}, {"second_tlb_miss_cycles", c.second_tlb_miss_cycles},
          {"software_hits", c.software_hits}, {"software_misses", c.software_misses}, {"block_hits", c.block_hits},
          {"block_inserts", c.block_inserts}, {"block_drops", c.block_drops}, {"eviction_covered", c.eviction_covered}, {"refused", c.refused},
          {"nested_misses", c.nested_misses}, {"nested_block_hits", c.nested_block_hits}, {"host_walks", c.host_walks},
          {"host_background_walks", c.host_background_walks}, {"memory_reads", levels_.memory_reads}, {"memory_writes", levels_.memory_writes},
          {"memory_wait_cycles", levels_.memory_wait_cycles}, {"memory_reads_data", c.memory_reads_data},
          {"memory_reads_walk", c.memory_reads_walk}, {"memory_reads_background", c.memory_reads_background},
          {"memory_reads_software", c.memory_reads_software}, {"second_writebacks", levels_.second_writebacks},
          {"translation_writebacks", levels_.translation_writebacks}, {"first_misses_data", c.first_misses_data},
          {"second_misses_data", c.second_misses_data}, {"third_misses_data", c.third_misses_data}, {"reach_bytes_sum", c.reach_bytes_sum},
          {"samples", c.samples}, {"bypass_samples", c.bypass_samples}, {"pressure_samples", c.pressure_samples}, {"invalidated", c.invalidated}};
}

std::vector<std::array<std::int64_t, 5>> TranslationMachine::walked_pages() const {
  std::vector<std::array<std::int64_t, 5>> rows;
  for (const auto& table : processes_)
    if (table)
      table->each_walked([&](const PageEntry& e) { rows.push_back({e.frequency, e.cost, e.walks, e.walks_to_memory, e.walk_cycles}); });
  return rows;
}

}  // namespace mw
