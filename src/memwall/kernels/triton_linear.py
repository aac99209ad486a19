"""GPU products on packed weights, in Triton: the same tiles that the CPU kernels read, so one saved file serves both.

Source: own layout (docs/file-format.md). Idea: a lane vector is 16 rows x 4 columns of bytes, so a 32-bit word is one
row's four columns and loads are coalesced; a b-bit code is the sum of its bit planes times powers of two, and a product
is linear, so each plane is multiplied by itself and no code is ever put together. Decoding (few tokens) runs `_matvec`,
which reads every packed byte once; prompts run `_matmul`, which unpacks a block of codes to the input's dtype for the
tensor cores.

Shapes: x [T, cols] float16, bfloat16 or float32 on the GPU; out [T, rows] of the same dtype; sums are float32.
Cost: rows x cols x bits / 8 bytes read for each token block. Holds when: bits 2-8, groups of 32, 64 or 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec

ROW_TILE = 16
# up to this many tokens the product is bound by reading weights, and the kernel without tensor cores reads them best
MATVEC_TOKENS = 4


@triton.jit  # the arguments are pointers and sizes that Triton types itself
def _matvec(  # type: ignore[no-untyped-def]
    codes, scales, mins, x, out, num_rows, num_cols, num_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row tile x one token, STEP groups at once. codes: int32 words [tiles, groups, GROUP/32, BITS, 16]."""
    tile, token = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, 16)
    units: tl.constexpr = GROUP // 32
    zero: tl.constexpr = 0.0 if HAS_MINS else float(1 << (BITS - 1))
    total = tl.zeros([16], tl.float32)
    for first in range(0, num_groups, STEP):
        plane_start = 0
        for log_width in tl.static_range(3, -1, -1):  # planes of 8, 4, 2, 1 bits: the binary digits of BITS
            width: tl.constexpr = 1 << log_width
            if BITS & width:
                blocks: tl.constexpr = 8 // width
                vector = tl.arange(0, STEP * units * width)
                group = first + vector // (units * width)
                unit = (vector // width) % units
                place = vector % width
                live = group < num_groups
                word = (((tile * num_groups + group) * units + unit) * BITS + plane_start + place) * 16
                words = tl.load(codes + word[:, None] + rows[None, :], mask=live[:, None], other=0)
                dot = tl.zeros([STEP * units * width, 16], tl.float32)
                x_sum = tl.zeros([STEP * units * width], tl.float32)
                for block in tl.static_range(blocks):
                    for column in tl.static_range(4):
                        piece = (words >> (8 * column + width * block)) & ((1 << width) - 1)
                        col = group * GROUP + unit * 32 + (place * blocks + block) * 4 + column
                        value = tl.load(x + token * num_cols + col, mask=live & (col < num_cols), other=0.0).to(
                            tl.float32
                        )
                        dot += piece.to(tl.float32) * value[:, None]
                        x_sum += value
                at = (tile * num_groups + group)[:, None] * 16 + rows[None, :]
                scale = tl.load(scales + at, mask=live[:, None], other=0.0).to(tl.float32)
                part = scale * dot * (1 << plane_start)
                if plane_start == 0:  # the offset of the codes, once
                    if HAS_MINS:
                        part += tl.load(mins + at, mask=live[:, None], other=0.0).to(tl.float32) * x_sum[:, None]
                    else:
                        part -= scale * zero * x_sum[:, None]
                total += tl.sum(part, axis=0)
                plane_start += width
    row = tile * 16 + rows
    tl.store(out + token * num_rows + row, total.to(out.dtype.element_ty), mask=row < num_rows)


@triton.jit
def _matmul(  # type: ignore[no-untyped-def]
    codes, scales, mins, x, out, num_tokens, num_rows, num_cols, num_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TILES row tiles x TOKENS tokens. codes: bytes of the same layout."""
    row = tl.program_id(0) * TILES * 16 + tl.arange(0, TILES * 16)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, GROUP)
    tile, lane = row // 16, row % 16
    num_tiles = tl.cdiv(num_rows, 16)
    total = tl.zeros([TOKENS, TILES * 16], tl.float32)
    for group in range(num_groups):
        cell = tile * num_groups + group
        start = cell[None, :] * (GROUP * BITS * 2) + (column // 32)[:, None] * (BITS * 64) + lane[None, :] * 4
        start += (column % 4)[:, None]
        block = (column % 32) // 4
        code = tl.zeros([GROUP, TILES * 16], tl.int32)
        plane_start = 0
        for log_width in tl.static_range(3, -1, -1):
            width: tl.constexpr = 1 << log_width
            if BITS & width:
                blocks: tl.constexpr = 8 // width
                offset = (plane_start + block // blocks) * 64
                byte = tl.load(codes + start + offset[:, None], mask=(tile < num_tiles)[None, :], other=0).to(tl.int32)
                code |= ((byte >> ((block % blocks) * width)[:, None]) & ((1 << width) - 1)) << plane_start
                plane_start += width
        scale = tl.load(scales + cell * 16 + lane, mask=tile < num_tiles, other=0.0).to(tl.float32)
        if HAS_MINS:
            low = tl.load(mins + cell * 16 + lane, mask=tile < num_tiles, other=0.0).to(tl.float32)
        else:
            low = -scale * (1 << (BITS - 1))
        weight = code.to(tl.float32) * scale[None, :] + low[None, :]
        col = group * GROUP + column
        value = tl.load(
            x + token[:, None] * num_cols + col[None, :],
            mask=(token < num_tokens)[:, None] & (col < num_cols)[None, :],
            other=0.0,
        )
        # full float32 for float32 inputs: TF32 would lose what an exact reference needs
        total += tl.dot(value, weight.to(value.dtype), input_precision="ieee")
    mask = (token < num_tokens)[:, None] & (row < num_rows)[None, :]
    tl.store(out + token[:, None] * num_rows + row[None, :], total.to(out.dtype.element_ty), mask=mask)


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight [rows, cols] stays packed on the GPU (or on a CPU, in Triton's interpreter)."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None, device: str | torch.device = "cuda") -> None:
        super().__init__()
        settings = codec(packed.spec)
        if not isinstance(settings, IntegerCodec) or settings.layout != "tiles":
            raise ValueError(f"{packed.spec} has no GPU product; integer tiles of 2 to 8 bits have")
        self.bits, self.group = settings.bits, settings.group
        self.num_rows, self.num_cols = packed.shape
        for name in ("codes", "scales", "mins"):
            held = packed.buffers.get(name)
            self.register_buffer(name, None if held is None else torch.from_numpy(held).to(device))
        self.register_buffer("bias", None if bias is None else bias.to(device))
        self.num_groups = int(self.codes.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., cols] -> [..., rows], in x's dtype."""
        flat = x.reshape(-1, self.num_cols).contiguous()
        out = torch.empty(len(flat), self.num_rows, dtype=x.dtype, device=x.device)
        settings: dict[str, Any] = {"BITS": self.bits, "GROUP": self.group, "HAS_MINS": self.mins is not None}
        mins = (
            self.mins if self.mins is not None else self.scales
        )  # never read without HAS_MINS; a kernel needs a pointer
        tiles = triton.cdiv(self.num_rows, ROW_TILE)
        if len(flat) <= MATVEC_TOKENS:
            words = self.codes.view(-1).view(torch.int32)
            _matvec[(tiles, len(flat))](
                words, self.scales, mins, flat, out, self.num_rows, self.num_cols, self.num_groups,
                STEP=max(1, 256 // self.group), **settings,
            )  # fmt: skip
        else:
            tokens = 16 if len(flat) <= 16 else 64
            _matmul[(triton.cdiv(tiles, 4), triton.cdiv(len(flat), tokens))](
                self.codes, self.scales, mins, flat, out, len(flat), self.num_rows, self.num_cols, self.num_groups,
                TILES=4, TOKENS=tokens, **settings,
            )  # fmt: skip
        out = out.reshape(*x.shape[:-1], self.num_rows)
        return out if self.bias is None else out + self.bias.to(x.dtype)
