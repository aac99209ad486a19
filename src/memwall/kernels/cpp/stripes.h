// Products dealt to threads in stripes: see stripes.cpp.
#pragma once

#include "linear.h"

namespace mw {

// Whether a product of so many strips of rows leaves threads waiting that stripes would keep busy.
bool wants_stripes(std::int64_t strips, std::int64_t tokens, int threads);

// The product, in a parallel region of its own. `panels` and `parts` have kWorkerScratchBytes and kStripeScratchBytes per thread.
void run_in_stripes(const LinearKernels& kernels, const Matrix& m, const Input& input, const Output& out, char* panels, float* parts);

}  // namespace mw
