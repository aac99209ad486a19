// Shares the records and the heads of latent.h among threads.
#include "latent.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(LatentKernels, latent_kernels)

namespace mw {
namespace {

constexpr std::int64_t kChunk = 1 << 14;  // numbers per chunk: some 10 us of work

std::size_t per_chunk(std::int64_t numbers) { return static_cast<std::size_t>(std::max<std::int64_t>(1, kChunk / (numbers + 1))); }

// Heads that a kernel works together: they read the same values.
std::int64_t heads_together(const LatentAttention& a) {
  const std::int64_t shared = a.value_heads == 1 ? a.heads : a.heads / a.kv_heads;
  return shared % 4 == 0 ? 4 : shared % 2 == 0 ? 2 : 1;
}

}  // namespace

void latent_encode(const LatentForm& form, const float* rows, std::int64_t count, std::uint8_t* records) {
  const auto kernel = latent_kernels_in_use().encode;
  const std::int64_t tokens = form.tokens(), size = form.record_bytes();
  parallel_for(static_cast<std::size_t>(count / tokens), per_chunk(tokens * form.width), [&](std::size_t begin, std::size_t end, int) {
    for (auto i = static_cast<std::int64_t>(begin); i < static_cast<std::int64_t>(end); ++i)
      kernel(form, rows + i * tokens * form.width, records + i * size);
  });
}

void latent_decode_here(const LatentForm& form, const std::uint8_t* records, std::int64_t first, std::int64_t count, float* rows) {
  const auto kernel = latent_kernels_in_use().decode;
  const std::int64_t tokens = form.tokens(), size = form.record_bytes(), last = first + count;
  for (std::int64_t at = first; at < last;) {
    const std::int64_t record = at / tokens, stop = std::min(last, (record + 1) * tokens);
    kernel(form, records + record * size, at - record * tokens, stop - record * tokens, rows + (at - first) * form.width);
    at = stop;
  }
}

void latent_decode(const LatentForm& form, const std::uint8_t* records, std::int64_t first, std::int64_t count, float* rows) {
  // the scales of a record are made ready once for all its rows, so a chunk is worth several of them
  const std::size_t several = form.along_tokens ? 32 : 8, grain = (per_chunk(form.width) + several - 1) / several * several;
  parallel_for(static_cast<std::size_t>(count), grain, [&](std::size_t begin, std::size_t end, int) {
    const auto from = static_cast<std::int64_t>(begin);
    latent_decode_here(form, records, first + from, static_cast<std::int64_t>(end) - from, rows + from * form.width);
  });
}

void latent_widen(const std::uint16_t* from, std::int64_t count, float* to) { latent_kernels_in_use().widen(from, count, to); }

void latent_attend(const LatentAttention& a) {
  const auto kernel = latent_kernels_in_use().attend;
  const std::int64_t count = heads_together(a), tiles = a.heads / count;
  const std::size_t grain = per_chunk(a.tokens * count * (a.dim + a.value_dim));
  parallel_for(static_cast<std::size_t>(a.queries * tiles), grain, [&](std::size_t begin, std::size_t end, int) {
    for (auto i = static_cast<std::int64_t>(begin); i < static_cast<std::int64_t>(end); ++i)
      kernel(a, i / tiles, i % tiles * count, static_cast<int>(count));
  });
}

void latent_attend_here(const LatentAttention& a) {
  const auto kernel = latent_kernels_in_use().attend;
  const std::int64_t count = heads_together(a);
  for (std::int64_t query = 0; query < a.queries; ++query)
    for (std::int64_t head = 0; head < a.heads; head += count) kernel(a, query, head, static_cast<int>(count));
}

}  // namespace mw
