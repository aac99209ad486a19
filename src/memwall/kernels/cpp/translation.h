// Address translation of one core over a trace: TLBs, page-walk caches, walks through the caches, and what may spare walks: blocks of
// the second-level cache that hold translations (Victima), a software TLB in memory (POM-TLB), larger TLBs. Native, or in a virtual
// machine, where each step of a walk is itself translated.
//
// Keys: page number, bit 40 process, bit 56 size (0: 4 KiB, 1: 2 MiB), bit 60 kind (1: TLB block, 2: nested TLB block).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory_levels.h"

namespace mw {

struct TranslationSettings {
  std::int64_t width, window, outstanding_misses, walkers;
  LevelShape data, code, second, third;
  std::int64_t memory_cycles, memory_line_cycles;
  LevelShape data_tlb, code_tlb, second_tlb, third_tlb, nested_tlb;  // sets 0: there is none
  std::array<LevelShape, 3> walk_caches;                             // of entries at level 2, 3, 4 of a page table
  std::int64_t software_sets, software_ways;                         // of a POM-TLB; 0: none
  std::int64_t virtualised, large_per_mille, scattered, seed;
  std::int64_t victima, on_walk, on_eviction, predictor, aware;
  std::int64_t frequency_low, frequency_high, cost_low, cost_high, frequency_most, cost_most;
  std::int64_t bypass_misses, pressure_misses, window_instructions;
};

// A field's name, as Python gives it, and where it is.
std::vector<std::pair<std::string, std::int64_t*>> named_fields(TranslationSettings& settings);

// Why a walk, or a read of memory, happened.
enum class Cause { demand, background };

struct TranslationCounters {
  std::int64_t accesses = 0, fetches = 0, first_tlb_misses = 0, second_tlb_misses = 0, third_tlb_hits = 0;
  std::int64_t walks = 0, walks_to_memory = 0, walk_cycles = 0, walk_steps = 0, aborted_walks = 0, background_walks = 0;
  std::int64_t second_tlb_miss_cycles = 0, software_hits = 0, software_misses = 0;
  std::int64_t block_hits = 0, block_inserts = 0, block_drops = 0, eviction_covered = 0, refused = 0;
  std::int64_t nested_misses = 0, nested_block_hits = 0, host_walks = 0, host_background_walks = 0;
  std::int64_t memory_reads_data = 0, memory_reads_walk = 0, memory_reads_background = 0, memory_reads_software = 0;
  std::int64_t first_misses_data = 0, second_misses_data = 0, third_misses_data = 0;
  std::int64_t reach_bytes_sum = 0, samples = 0, bypass_samples = 0, pressure_samples = 0, invalidated = 0;
};

struct PageEntry {
  std::uint32_t frame = 0, walk_cycles = 0;
  std::uint16_t walks = 0, walks_to_memory = 0;
  std::uint8_t frequency = 0, cost = 0;  // the counters in the entry's spare bits
  bool mapped = false;
};

// Where frames come from: tables, small and large pages lie apart, each in the order in which it is asked for (or scattered).
class Frames {
 public:
  explicit Frames(bool scattered) : scattered_(scattered) {}
  std::uint32_t table();
  std::uint32_t page();
  std::uint32_t large();

 private:
  bool scattered_;
  std::uint32_t tables_ = 0, pages_ = 0, larges_ = 0;
};

// A radix tree of four levels, 512 entries a table.
class PageTable {
 public:
  struct Table {
    std::uint32_t frame = 0;
    std::vector<std::int32_t> below;  // 1 + number of the table below an entry; 0: none
    std::vector<PageEntry> pages;     // leaves: of all of level 1, of large pages at level 2
  };
  struct Path {
    std::array<Table*, 5> tables{};  // by level, 4 at the root
    PageEntry* entry = nullptr;
    int leaf = 0;  // level of the leaf, 1 or 2; 0: not mapped
  };

  PageTable(Frames& frames, std::int64_t large_per_mille, std::uint64_t seed);
  bool is_large(std::uint64_t page) const;  // whether the 2 MiB region around it is mapped as one
  Path path(std::uint64_t page);
  Path ensure(std::uint64_t page);  // mapped if it was not
  void move(PageEntry& entry, int leaf);
  // Frame of a small page, inside a large one too; the page must be mapped.
  static std::uint32_t frame_of(const Path& path, std::uint64_t page);
  template <class Do>
  void each_walked(Do&& what) const {
    for (const auto& table : tables_)
      for (const PageEntry& entry : table->pages)
        if (entry.walks) what(entry);
  }

 private:
  std::int32_t make(int level);

  Frames& frames_;
  std::int64_t large_per_mille_;
  std::uint64_t seed_;
  std::vector<std::unique_ptr<Table>> tables_;
};

struct TraceView {
  const std::uint64_t* addresses;
  const std::uint8_t *kinds, *gaps, *depends, *processes;
  std::int64_t count;
  std::uint32_t *translation_cycles, *data_cycles;  // per access, or null
};

enum TraceKind : std::uint8_t { kRead, kWrite, kFetch, kInvalidate, kFlushProcess, kFlushHost, kNumKinds };

class TranslationMachine : TranslationWatch {
 public:
  explicit TranslationMachine(const TranslationSettings& settings);
  void map(std::uint8_t process, std::uint64_t first_page, std::uint64_t pages);
  void run(const TraceView& trace);
  std::vector<std::pair<std::string, std::int64_t>> counters() const;
  // Counters of every page that was walked, the host's among them not: frequency, cost, walks, walks to memory, cycles.
  std::vector<std::array<std::int64_t, 5>> walked_pages() const;

 private:
  struct Walked {
    std::int64_t cycles = 0;
    std::uint64_t leaf_line = 0;
    bool memory = false;
    PageTable::Path path;
  };
  struct Nested {
    std::int64_t cycles = 0;
    std::uint32_t frame = 0;
    bool memory = false;
  };
  struct Resolved {  // a page's translation as a TLB holds it
    std::uint32_t frame = 0;
    std::uint64_t number = 0;  // of the page, of its size
    int size = 0;
  };
  using WalkCaches = std::array<Cache, 3>;

  std::pair<std::uint64_t, std::int64_t> translate(std::uint8_t process, std::uint64_t address, std::int64_t when, bool code);
  std::int64_t miss(std::uint8_t process, std::uint64_t page, std::int64_t when);
  bool software_lookup(std::uint8_t process, std::uint64_t page, std::int64_t when, std::int64_t& cycles);
  void software_fill(std::uint8_t process, const Resolved& page, std::int64_t when);
  std::int64_t block_with(std::uint64_t kind, std::uint8_t process, std::uint64_t number, int size);
  bool probe(std::uint64_t kind, std::uint8_t process, std::uint64_t page);
  Walked full_walk(std::uint8_t process, std::uint64_t page, std::int64_t when, Cause cause);
  Walked walk(PageTable& table, WalkCaches& caches, std::uint8_t process, std::uint64_t page, std::int64_t when, Cause cause, bool guest);
  Nested nested(std::uint64_t page, std::int64_t when, Cause cause);
  void nested_fill(std::uint64_t page, std::int64_t when);
  void fill(Cache& tlb, std::uint8_t process, const Resolved& page, std::int64_t when);
  void victim_of_second(const Evicted& out, std::int64_t when);
  void insert_block(std::uint64_t leaf_line, std::uint64_t kind, std::uint8_t process, std::uint64_t number, int size, std::uint32_t mask,
                    std::int64_t when);
  void park(std::uint8_t process, std::uint64_t page, const Walked& walked, std::int64_t when);
  std::uint32_t present(const PageTable::Path& path, std::uint64_t page) const;
  std::uint32_t guest_present(std::uint8_t process, std::uint64_t page, const Resolved& resolved);
  bool deserves(const PageEntry& entry);
  Resolved resolve(std::uint8_t process, std::uint64_t page);
  PageTable& table_of(std::uint8_t process);
  void invalidate(std::uint8_t process, std::uint64_t page);
  template <class Which>
  void flush(Which&& which);
  void forget_walks();
  void account();
  void read_memory(Cause cause, int level);
  void dropped(const Evicted& block) override;

  TranslationSettings settings_;
  Levels levels_;
  Core core_;
  Calendar walkers_;
  Cache data_tlb_, code_tlb_, second_tlb_, third_tlb_, nested_tlb_, software_tlb_;
  WalkCaches walk_caches_, host_caches_;
  Frames frames_, guest_frames_;
  std::array<std::unique_ptr<PageTable>, 256> processes_;
  PageTable host_;
  TranslationCounters counters_;
  bool bypass_ = false, pressure_ = false;
  std::array<std::int64_t, 2> live_pages_{};  // that blocks of translations cover now, by size
  std::int64_t next_window_, window_tlb_misses_ = 0, window_data_misses_ = 0;
};

}  // namespace mw
