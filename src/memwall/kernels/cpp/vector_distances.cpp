// Chooses the distance kernels of the instruction set in use.
#include "vector_distances.h"

#include "dispatch.h"

MW_KERNEL_TABLE(DistanceKernels, vector_distance_kernels)

namespace mw {

const DistanceKernels& distance_kernels() { return vector_distance_kernels_in_use(); }

}  // namespace mw
