// Shares neurons among threads, then columns of what they add up to.
#include "neurons.h"

#include <algorithm>
#include <cstddef>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(NeuronKernels, neuron_kernels)

namespace mw {

void neurons(const NeuronTask& task) {
  const NeuronKernels& kernels = neuron_kernels_in_use();
  const std::size_t rows = static_cast<std::size_t>(std::max<std::int64_t>((std::int64_t{1} << 18) / task.row_bytes, 1));
  parallel_for(static_cast<std::size_t>(task.num_rows), rows, [&](std::size_t begin, std::size_t end, int) {
    kernels.activate(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
  // columns of a vector's whole number, so that a row's piece is read with whole loads; a piece for each thread
  const std::size_t piece = static_cast<std::size_t>((task.width + num_threads() - 1) / num_threads() + 63) / 64 * 64;
  parallel_for(static_cast<std::size_t>(task.width), piece, [&](std::size_t begin, std::size_t end, int) {
    kernels.add(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

}  // namespace mw
