// What attention.isa.cpp, kivi.isa.cpp, kivi_integer.isa.cpp and bfp.isa.cpp need of each other, inside one instruction set.
#pragma once

#include "attention.h"

namespace mw::MW_ISA {

// scores[head * kStep + token - begin] = q . k for coded tokens [begin, end), both multiples of the group
void kivi_scores(const Attention& a, const float* q, std::int64_t begin, std::int64_t end, float* scores, float* scratch);
// out[head][channel] += sum of p[head * kStep + token - begin] * v over coded tokens [begin, end), begin a multiple of 32
void kivi_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch);
std::size_t kivi_scratch(const Attention& a);  // floats
// the same where the form asks for integers
void kivi_integer_scores(const Attention& a, const float* q, std::int64_t begin, std::int64_t end, float* scores, float* scratch);
void kivi_integer_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch);
std::size_t kivi_integer_scratch(const Attention& a);
// float form of a few coded tokens of one kv head: tile[(token - begin) * ld + channel]
void kivi_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
void kivi_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
void kivi_encode_key_block(const Rows& rows, const KiviForm& form, int kv_heads, int key_dim, std::uint8_t* block);
void kivi_encode_value_rows(const Rows& rows, const KiviForm& form, int kv_heads, int head_dim, int slot, int count,
                            std::uint8_t* block);

// brings the scaled queries [num_heads][padded_key] into blocks, which bfp_scores reads
void bfp_prepare(const Attention& a, const float* q, float* to);
std::size_t bfp_prepared(const Attention& a);  // floats
// the same as for KIVI; begin a multiple of kStep, any end
void bfp_scores(const Attention& a, const float* prepared, std::int64_t begin, std::int64_t end, float* scores);
void bfp_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch);
std::size_t bfp_scratch(const Attention& a);  // floats
void bfp_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
void bfp_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
void bfp_encode_keys(const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, int slot, int count, std::uint8_t* to);
void bfp_encode_values(const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, int slot, int count, std::uint8_t* to);

}  // namespace mw::MW_ISA
