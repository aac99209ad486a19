// Declares each instruction set's table; included by the code that picks one and by the code that fills one.
#pragma once

#include "attention.h"

namespace mw {
namespace portable {
const AttentionKernels& attention_table();
}
#if defined(MW_X86) || defined(__x86_64__)
namespace avx2 {
const AttentionKernels& attention_table();
}
namespace avx512 {
const AttentionKernels& attention_table();
}
#endif
}  // namespace mw
