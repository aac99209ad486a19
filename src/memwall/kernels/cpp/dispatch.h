// One table of function pointers per instruction set; `active()` gives the one in use.
//
// A kernel family NAME adds a struct of function pointers here (declared in NAME.h), fills it in NAME.isa.cpp (compiled once per
// instruction set, inside namespace mw::MW_ISA) and reads it through its own table, indexed by active_isa().
#pragma once

namespace mw {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };
constexpr int kNumIsas = 3;

// Best instruction set that both this build and this processor have.
Isa best_isa();
// The one in use: best_isa() unless force_isa was called (tests and benchmarks compare paths with it).
Isa active_isa();
// Throws std::invalid_argument when this processor or this build lacks it.
void force_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace mw
