"""The order of a BitStack model's blocks, as its manifest tells it: what each first part of the stack consists of.

    "info": {"stack": {"tensors": ["model.layers.0.self_attn.q_proj.weight", ...], "rank": 16, "order": [3, 0, ...]}}

Every matrix has its first block whatever the size; each number of `order` names the matrix (by its place in `tensors`)
whose next block comes then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memwall.errors import InputError
from memwall.formats.bitstack import MOST_BLOCKS, MOST_RANK, BitStackCodec

if TYPE_CHECKING:
    from memwall.models.checkpoint import Checkpoint

CHOICE = "stack-"
"""Begins the choice of weights that takes a number of blocks: `stack-120`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackIndex:
    """tensors: the matrices; order: their places in it, block by block; rank: of all blocks."""

    tensors: tuple[str, ...]
    order: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StackIndex | None:
        """The index of a folder; None where it holds no stack. InputError where index and tensors differ."""
        manifest = checkpoint.manifest
        if manifest is None or "stack" not in manifest.info:
            return None
        index = cls.from_info(manifest.info["stack"], str(checkpoint.directory))
        for name, spec in index.specs(len(index.order)).items():
            entry = manifest.tensors.get(name)
            if entry is None or entry.spec != spec:
                raise InputError(
                    f"{checkpoint.directory}: the order of its stack and its tensors differ at {name[:80]!r}"
                )
        return index

    @classmethod
    def from_info(cls, info: Any, source: str = "stack") -> StackIndex:
        """From the manifest's JSON, checked."""
        fields = info if isinstance(info, Mapping) else {}
        tensors, order, rank = fields.get("tensors"), fields.get("order"), fields.get("rank")
        good = isinstance(tensors, list) and all(isinstance(name, str) for name in tensors)
        good = good and len(set(tensors or ())) == len(tensors or ())
        good = (
            good and isinstance(order, list) and all(type(at) is int and 0 <= at < len(tensors or ()) for at in order)
        )
        if not (good and type(rank) is int and 1 <= rank <= MOST_RANK):
            raise InputError(f"{source}: the order of the stack is damaged; compress the model again")
        found = cls(tensors=tuple(tensors or ()), order=tuple(order or ()), rank=rank)
        if any(found.order.count(at) >= MOST_BLOCKS for at in set(found.order)):
            raise InputError(f"{source}: the order of the stack has more than {MOST_BLOCKS} blocks of one matrix")
        return found

    @property
    def num_blocks(self) -> int:
        """Blocks beside the first of each matrix."""
        return len(self.order)

    def counts(self, num_blocks: int) -> dict[str, int]:
        """Blocks of each matrix, its first included, once so many of the stack are there."""
        counts = [1] * len(self.tensors)
        for at in self.order[:num_blocks]:
            counts[at] += 1
        return dict(zip(self.tensors, counts, strict=True))

    def specs(self, num_blocks: int) -> dict[str, str]:
        """Codec spec of each matrix then."""
        counts = self.counts(num_blocks)
        return {name: BitStackCodec(rank=self.rank, blocks=count).spec for name, count in counts.items()}

    def chosen(self, choice: str) -> int:
        """Number of blocks of a choice such as `stack-120`."""
        digits = choice.removeprefix(CHOICE)
        if not digits.isdecimal() or int(digits) > self.num_blocks:
            raise InputError(f"weights {choice!r}: this stack has 0 to {self.num_blocks} blocks, such as stack-0")
        return int(digits)

    def length(self, specs: Mapping[str, str]) -> int:
        """How many blocks of the stack the specs of all matrices amount to; InputError where they are no first part."""
        num_blocks = sum(BitStackCodec.parse(specs[name]).blocks - 1 for name in self.tensors)
        if any(specs[name] != spec for name, spec in self.specs(num_blocks).items()):
            raise InputError("these numbers of blocks are no first part of the stack")
        return num_blocks
