#include "tiled_attention.h"

#include "dispatch.h"

MW_KERNEL_TABLE(TiledAttentionKernels, tiled_attention_kernels)

namespace mw {

void tiled_attention(const TiledAttention& task) { tiled_attention_kernels_in_use().attend(task); }

}  // namespace mw
