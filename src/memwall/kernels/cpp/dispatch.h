// Choice of instruction set at run time.
//
// A kernel family NAME declares a struct of function pointers in NAME.h, fills one in NAME.isa.cpp (compiled once per instruction
// set, inside namespace mw::MW_ISA) and reads the active one through MW_KERNEL_TABLE in its plain .cpp file.
#pragma once

namespace mw {

// amx: the kernels of avx512, some of which then have products done by the matrix unit.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int kNumIsas = 4;

// Best instruction set that both this build and this processor have.
Isa best_isa();
// The one in use: best_isa() unless force_isa was called (tests and benchmarks compare paths with it).
Isa active_isa();
// Throws std::invalid_argument when this processor or this build lacks it.
void force_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace mw

// At namespace scope of one plain .cpp file: declares the tables `variable` of every instruction set that is built, and a
// function variable_in_use() that gives the active one.
#if defined(MW_X86)
#define MW_KERNEL_TABLE(Type, variable)                                                                    \
  namespace mw::portable { extern const Type variable; }                                                   \
  namespace mw::avx2 { extern const Type variable; }                                                       \
  namespace mw::avx512 { extern const Type variable; }                                                     \
  namespace mw {                                                                                           \
  static const Type& variable##_in_use() {                                                                 \
    static const Type* const tables[] = {&portable::variable, &avx2::variable, &avx512::variable, &avx512::variable}; \
    static_assert(sizeof tables == kNumIsas * sizeof tables[0]);                                                       \
    return *tables[static_cast<int>(active_isa())];                                                        \
  }                                                                                                        \
  }
#else
#define MW_KERNEL_TABLE(Type, variable)                    \
  namespace mw::portable { extern const Type variable; }   \
  namespace mw {                                           \
  static const Type& variable##_in_use() { return portable::variable; } \
  }
#endif
