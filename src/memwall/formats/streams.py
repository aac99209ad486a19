"""Codes of 1 to 32 bits as one stream of bits in 32-bit words, lowest bits first, each row padded to whole words."""

from __future__ import annotations

import numpy as np

WORD_BITS = 32


def stream_words(num_codes: int, bits: int) -> int:
    """Words of a row."""
    return -(-num_codes * bits // WORD_BITS)


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, n], each below 2^bits -> uint32 [rows, ceil(n * bits / 32)]: code i at bit i * bits of its row."""
    num_rows, num_codes = codes.shape
    # 32 codes fill `bits` whole words, whatever the width
    blocks = -(-num_codes // WORD_BITS)
    padded = np.zeros((num_rows, blocks, WORD_BITS), np.uint64)
    padded.reshape(num_rows, blocks * WORD_BITS)[:, :num_codes] = codes
    words = np.zeros((num_rows, blocks, bits + 1), np.uint64)
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        moved = padded[:, :, i] << np.uint64(shift)
        words[:, :, word] |= moved & np.uint64(0xFFFFFFFF)
        words[:, :, word + 1] |= moved >> np.uint64(WORD_BITS)
    whole = words[:, :, :bits].astype(np.uint32).reshape(num_rows, blocks * bits)
    return whole[:, : stream_words(num_codes, bits)]


def unpack_stream(words: np.ndarray, num_codes: int, bits: int) -> np.ndarray:
    """Inverse of `pack_stream`: uint32 [rows, num_codes]. words: uint32 [rows, at least those needed]."""
    num_rows = len(words)
    blocks = -(-num_codes // WORD_BITS)
    held = np.zeros((num_rows, blocks * bits), np.uint64)
    taken = min(words.shape[1], held.shape[1])
    held[:, :taken] = words[:, :taken]
    parts = np.zeros((num_rows, blocks, bits + 1), np.uint64)
    parts[:, :, :bits] = held.reshape(num_rows, blocks, bits)
    codes = np.empty((num_rows, blocks, WORD_BITS), np.uint32)
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        pair = parts[:, :, word] | parts[:, :, word + 1] << np.uint64(WORD_BITS)
        codes[:, :, i] = (pair >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    return codes.reshape(num_rows, blocks * WORD_BITS)[:, :num_codes]
