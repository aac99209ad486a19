"""What autograd keeps for the way back, kept once, by its distinct rows, shared among learners, and off the device.

Source: "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models" (Minsik Cho, 2023,
arXiv 2309.00964), section 2: marshaling (M), uniquification (U) and sharding (S), all as saved-tensor hooks.

Idea: torch asks a hook what to keep when an operation saves a tensor, and asks it for the tensor on the way back.

- M: a tensor that shares storage with one that is kept, at the same version, is a reference and the place in it (sizes,
  strides, offset stand for any chain of views). What shares none, but was copied or clamped from a kept one, is found
  over a few hops of its history, and those operations are done again.
- U: inside `SavedTensors.made_of(weights)` rows are equal where the 16-bit weights are; a table of one row each and an
  index of 16 bits a weight, which all tensors inside share, take the place of a row per weight. Each table is compared
  with the tensor before it takes its place, so nothing is ever lost; one that saves no bytes takes none.
- S: inside `made_of` tensors are the same on all learners of synchronous training. Each keeps its slice, and the way
  back gathers them (in the same order everywhere, as the graphs are the same); a checksum finds learners that differ.
- Tensors under `min_bytes` are left alone, parameters always; the others leave a device that is fuller than
  `offload_above`, for pinned memory of the host. Without an accelerator they are copied where they are.

A tensor changed in place afterwards has another version, so it is another tensor here; parameters changed before the
way back are refused, as torch does. What is kept dies with the graph: nothing is held from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memwall.compress.edkm_torch import HALF_TYPES, distinct
from memwall.compress.saved_views_torch import Place, Replay, history, memory_order
from memwall.errors import InputError

Gauge = Callable[[], float]
"""Share of the device's memory in use, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What is done (see the module). hops: of a tensor's history that are looked at. offload_above: share of the
    device's memory in use from which tensors leave it; 0: always, 1: never (and then they are left as they are).
    """

    marshal: bool = True
    unique: bool = True
    shard: bool = True
    min_bytes: int = 4096
    hops: int = 4
    offload_above: float = 0.0

    def __post_init__(self) -> None:
        if self.min_bytes < 0 or self.hops < 0 or not 0 <= self.offload_above <= 1:
            raise InputError(
                f"min_bytes {self.min_bytes}, hops {self.hops}, offload_above {self.offload_above:g}: the first two "
                "are at least 0, the last is a share between 0 and 1"
            )


@dataclass(slots=True)
class Traffic:
    """Bytes. offered: of all tensors saved, each by itself, parameters apart; distinct: of those that were no reference
    to another. kept: now, by this learner; left: now, of small tensors and those that stay on the device; peak: most of
    both. to_host, to_device: of what was kept, and of what was made of it; sent, received: to and from other learners.
    """

    offered: int = 0
    distinct: int = 0
    kept: int = 0
    left: int = 0
    peak: int = 0
    to_host: int = 0
    to_device: int = 0
    sent: int = 0
    received: int = 0

    def add(self, kind: str, nbytes: int) -> None:
        """Held from now on (or no longer, where negative); kind: `kept` or `left`."""
        setattr(self, kind, getattr(self, kind) + nbytes)
        self.peak = max(self.peak, self.kept + self.left)


class Learners(Protocol):
    """The processes that train together; rank of size."""

    rank: int
    size: int

    def gather(self, own: Tensor, everything: Tensor) -> Tensor:
        """Slices of all, uint8, one after the other. own: this learner's. everything: simulated learners take theirs
        from it; empty otherwise."""


class ProcessGroup:
    """Learners of torch.distributed, such as gloo over sockets."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)

    def gather(self, own: Tensor, everything: Tensor) -> Tensor:
        found = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(found, own, group=self._group)
        return torch.cat(found)


@dataclass(slots=True)
class Simulated:
    """One of `size` learners, the others only in the mind: what they would hold is held beside, and not counted."""

    size: int
    rank: int = 0

    def gather(self, own: Tensor, everything: Tensor) -> Tensor:
        return everything


class _Whole:
    """A tensor in memory order [n], kept as it is."""

    def __init__(self, values: Tensor, saver: SavedTensors) -> None:
        self.device = values.device
        self._held = saver.moved(values)
        self.nbytes = self._held.nbytes

    def get(self, saver: SavedTensors) -> Tensor:
        saver.traffic.to_device += self._held.nbytes
        return self._held.to(self.device, non_blocking=True)


class _Sliced:
    """A learner's share of a tensor [n]: as many bytes as any other's, the last padded."""

    def __init__(self, values: Tensor, saver: SavedTensors) -> None:
        assert saver.learners is not None
        learners = saver.learners
        self._shape, self._dtype, self.device = values.shape, values.dtype, values.device
        whole = values.reshape(-1).view(torch.uint8)
        self._length = len(whole)
        share = -(-self._length // learners.size)
        padded = torch.nn.functional.pad(whole, (0, share * learners.size - self._length))
        self._own = saver.moved(padded[learners.rank * share : (learners.rank + 1) * share])
        self._elsewhere = padded if isinstance(learners, Simulated) else padded[:0].clone()
        self._sum = _checksum(whole)
        self.nbytes = self._own.nbytes

    def get(self, saver: SavedTensors) -> Tensor:
        held = saver.gathered(self)
        if held is None:
            assert saver.learners is not None
            learners = saver.learners
            whole = learners.gather(self._own, self._elsewhere)[: self._length]
            saver.traffic.sent += self.nbytes * (learners.size - 1)
            saver.traffic.received += self.nbytes * (learners.size - 1)
            if _checksum(whole) != self._sum:
                raise RuntimeError(
                    "learners hold different tensors where they must be equal: are weights synchronised at each step?"
                )
            held = whole.view(self._dtype).view(self._shape).to(self.device)
            saver.traffic.to_device += held.nbytes
            saver.keep_gathered(self, held)
        return held


class _Rows:
    """A table of different rows, and the scope's index of the row of each weight."""

    def __init__(self, table: Tensor, index: _Whole | _Sliced, saver: SavedTensors) -> None:
        self._table, self._index = _Whole(table, saver), index
        self.nbytes = self._table.nbytes

    def get(self, saver: SavedTensors) -> Tensor:
        places = self._index.get(saver).to(torch.int32)
        return self._table.get(saver).index_select(0, places).reshape(-1)


class _Entry:
    """A kept tensor in memory order, and where it lay."""

    def __init__(self, stored: _Whole | _Sliced | _Rows, tensor: Tensor, place: Place, saver: SavedTensors) -> None:
        self.stored, self.place, self.dtype = stored, place, tensor.dtype
        # holds no bytes, but the address: no other storage gets it as long as this is looked up by it
        self.storage = StorageWeakRef(tensor.untyped_storage())
        saver.traffic.add("kept", stored.nbytes)
        weakref.finalize(self, saver.traffic.add, "kept", -stored.nbytes).atexit = False


class _Scope:
    """Weights whose equals have equal rows. Index and places of one of each are found when first needed."""

    def __init__(self, weights: Tensor) -> None:
        self.count = weights.numel()
        values, _, self.index = distinct(weights)
        self.firsts = torch.zeros(len(values), dtype=torch.int64, device=self.index.device)
        self.firsts[self.index] = torch.arange(self.count, device=self.index.device)
        self._stored: weakref.ref[Any] | None = None

    @property
    def index_is_kept(self) -> bool:
        return self._stored is not None and self._stored() is not None

    def stored(self, saver: SavedTensors) -> Any:
        """The index as it is kept, in 16 bits; the same as long as any table uses it."""
        held = self._stored() if self._stored is not None else None
        if held is None:
            held = saver.sliced_or_whole(self.index.to(torch.uint16))
            saver.traffic.add("kept", held.nbytes)
            weakref.finalize(held, saver.traffic.add, "kept", -held.nbytes).atexit = False
            self._stored = weakref.ref(held)
        return held


@dataclass(slots=True)
class _Reference:
    """What stands for a saved tensor in the graph: a kept one and how to get from there."""

    entry: _Entry
    place: Place
    replay: tuple[Replay, ...] = ()


@dataclass(frozen=True, slots=True)
class _Word:
    """What the operation that made a kept tensor is told. once: whether all that was kept of it was at one version."""

    entry: weakref.ref[_Entry]
    place: Place
    source: weakref.ref[Tensor]
    version: int
    once: bool

    def holds(self, saved: bool) -> bool:
        """Whether what was made of the tensor was made of what is kept. saved: by an operation that had it kept."""
        source = self.source()
        if source is not None and source._version == self.version:
            return True  # it never changed
        # else it may have changed before it was copied; but not if the copying operation had it kept at that moment
        return saved and self.once


@dataclass(slots=True, weakref_slot=True)
class _Left:
    """A tensor that stays as it is. version: which has to be the same on the way back."""

    tensor: Tensor
    version: int


class SavedTensors:
    """The hooks and what they keep. `with saved.hooks():` around forward; backward may come later.

    learners: that train in step; None: this one alone. gauge: how full the device is.
    """

    def __init__(
        self, saving: Saving | None = None, *, learners: Learners | None = None, gauge: Gauge | None = None
    ) -> None:
        self.saving = saving or Saving()
        self.learners = learners if self.saving.shard and learners is not None and learners.size > 1 else None
        self.traffic = Traffic()
        self._gauge = gauge or _device_share
        self._scope: _Scope | None = None
        self._entries: weakref.WeakValueDictionary[tuple[Any, ...], _Entry] = weakref.WeakValueDictionary()
        self._gathered: tuple[weakref.ref[_Sliced], Tensor] | None = None

    @contextmanager
    def hooks(self) -> Iterator[SavedTensors]:
        """While open, tensors that operations save are kept here."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield self

    @contextmanager
    def made_of(self, weights: Tensor) -> Iterator[None]:
        """What is saved inside is made of these weights alone, row by row, and they are the same on all learners."""
        if weights.dtype not in HALF_TYPES:
            raise InputError(
                f"weights of {weights.dtype}: rows are told apart by 16-bit values; give float16 or bfloat16 (what is "
                "rounded to them inside the scope is the same)"
            )
        before, self._scope = self._scope, _Scope(weights)
        try:
            yield
        finally:
            self._scope = before

    @property
    def num_kept(self) -> int:
        """Tensors that are kept now."""
        return len(self._entries)

    # -- keeping -----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> _Reference | _Left:
        if tensor.is_leaf and tensor.requires_grad:
            return _Left(tensor, tensor._version)  # a parameter: it is there anyway
        self.traffic.offered += tensor.nbytes
        values = tensor.detach()
        if tensor.nbytes < self.saving.min_bytes or not self._leaves():
            left = _Left(values, tensor._version)
            self.traffic.distinct += tensor.nbytes
            self.traffic.add("left", tensor.nbytes)
            weakref.finalize(left, self.traffic.add, "left", -tensor.nbytes).atexit = False
            return left
        place = Place.of(tensor)
        key: tuple[Any, ...] = (object(),)
        if self.saving.marshal:
            key = (tensor.untyped_storage()._cdata, tensor._version, tensor.dtype)
            known = self._entries.get(key)
            if known is not None and known.place.covers(place):
                self._sign(tensor, known)
                return _Reference(known, place)
            found = self._in_history(tensor)
            if found is not None:
                return found
        flat, place_kept = memory_order(values, place)
        entry = _Entry(self._stored(flat), tensor, place_kept, self)
        self.traffic.distinct += tensor.nbytes
        self._entries[key] = entry
        if self.saving.marshal:
            self._sign(tensor, entry)
        return _Reference(entry, place)

    def _stored(self, flat: Tensor) -> _Whole | _Sliced | _Rows:
        scope = self._scope
        if scope is not None and self.saving.unique and len(flat) and len(flat) % scope.count == 0:
            rows = flat.view(scope.count, -1)
            needed = len(scope.firsts) * rows[0].nbytes + (0 if scope.index_is_kept else 2 * scope.count)
            if needed < flat.nbytes:
                table = rows.index_select(0, scope.firsts)
                if _same_rows(rows, table, scope.index):
                    return _Rows(table, scope.stored(self), self)
        return self.sliced_or_whole(flat)

    def sliced_or_whole(self, values: Tensor) -> _Whole | _Sliced:
        """A tensor [n] kept by all learners together where they hold the same, else here."""
        if self.learners is not None and self._scope is not None and values.nbytes >= self.saving.min_bytes:
            return _Sliced(values, self)
        return _Whole(values, self)

    def _leaves(self) -> bool:
        """Whether the device is so full that tensors leave it."""
        return self.saving.offload_above < 1 and self._gauge() >= self.saving.offload_above

    def moved(self, values: Tensor) -> Tensor:
        """A copy off the device; in pinned memory where there is a device."""
        self.traffic.to_host += values.nbytes
        if values.device.type == "cpu":
            return values.clone()
        held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        held.copy_(values, non_blocking=True)
        return held

    # -- what is kept already ----------------------------------------------------------------------------------------

    def _sign(self, tensor: Tensor, entry: _Entry) -> None:
        """Leave word at the operation that made the tensor. It names the entry weakly: the graph holds it."""
        node = tensor.grad_fn
        if node is not None:
            words = _notes(node).setdefault(self._mark, {})
            before = words.get(tensor.output_nr)
            once = before is None or (before.once and before.version == tensor._version)
            words[tensor.output_nr] = _Word(
                weakref.ref(entry), Place.of(tensor), weakref.ref(tensor), tensor._version, once
            )

    @property
    def _mark(self) -> str:
        return f"memwall saved tensors {id(self)}"

    def _in_history(self, tensor: Tensor) -> _Reference | None:
        """A kept tensor that this one was made of by copies, views and clamps."""
        for origin in history(tensor, self.saving.hops):
            word = _notes(origin.node).get(self._mark, {}).get(origin.output)
            entry = None if word is None else word.entry()
            if entry is not None and word.holds(origin.saved):
                return _Reference(entry, word.place, origin.replay)
        return None

    # -- the way back ------------------------------------------------------------------------------------------------

    def _unpack(self, kept: _Reference | _Left) -> Tensor:
        if isinstance(kept, _Left):
            if kept.tensor._version != kept.version:
                raise RuntimeError(
                    f"a tensor of shape {list(kept.tensor.shape)} that the gradient needs was changed in place: "
                    f"it is at version {kept.tensor._version}, and {kept.version} was saved"
                )
            return kept.tensor
        entry = kept.entry
        values = kept.place.within(entry.stored.get(self), entry.place)
        for step in kept.replay:
            values = step(values)
        return values

    def gathered(self, sliced: _Sliced) -> Tensor | None:
        """The last tensor that learners gathered, where it is this one: its uses come one after the other."""
        if self._gathered is not None and self._gathered[0]() is sliced:
            return self._gathered[1]
        return None

    def keep_gathered(self, sliced: _Sliced, whole: Tensor) -> None:
        """Held until the slice dies or another is gathered."""

        def forget(reference: weakref.ref[_Sliced]) -> None:
            if self._gathered is not None and self._gathered[0] is reference:
                self._gathered = None

        self._gathered = (weakref.ref(sliced, forget), whole)


def _device_share() -> float:
    """Of the current accelerator; without one every tensor is taken as one that has to leave."""
    if not torch.cuda.is_available():
        return 1.0
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


def _same_rows(rows: Tensor, table: Tensor, index: Tensor, slab: int = 1 << 18) -> bool:
    """Whether the table's rows are, to the bit, those of all weights; looked at piece by piece."""
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(rows.element_size())
    if wide is None:
        return False
    bits, entries = rows.view(wide), table.view(wide)
    starts = range(0, len(rows), slab)
    return all(torch.equal(bits[at : at + slab], entries.index_select(0, index[at : at + slab])) for at in starts)


def _notes(node: Any) -> dict[Any, Any]:
    """What may be left with an operation of the graph; torch's own description of it is wrong."""
    found: dict[Any, Any] = node.metadata
    return found


def _checksum(whole: Tensor) -> int:
    return crc32(whole.cpu().numpy().data)
