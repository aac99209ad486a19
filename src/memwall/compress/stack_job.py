"""One run that makes a stack: matrices taken apart layer by layer, blocks put in order, and written in that order.

The folder that comes out holds two files: the embedding, the head, the norms and every matrix' first block; and the
stack, all further blocks one after the other, most valuable first. The manifest's `info` says the order. While the run
is at work its folder also holds each layer's blocks in a part of their own, from which the order is measured and the
stack is copied; a run that was killed goes on after the last layer, and the last level of the order, that it finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from typing import Any

from memwall.compress import stack_order
from memwall.compress.base import MethodConfig, WeightMethod
from memwall.compress.bitstack import BitStack
from memwall.compress.calibration import LayerStream
from memwall.compress.job import Job
from memwall.compress.saved import Part as File
from memwall.compress.saved import WorkDirectory, check_disk, read_part
from memwall.compress.sizes import LEAST_SHARE
from memwall.errors import DoesNotFit, InputError
from memwall.formats import Packed, codec
from memwall.formats.base import tensor_name
from memwall.formats.bitstack import BitStackCodec
from memwall.formats.safetensors_file import SafetensorsWriter, build_header
from memwall.models.config import EMBEDDING, HEAD, TensorSpec
from memwall.models.stack_index import StackIndex

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class StackJob(Job):
    """See the module's text. The same seam as `Job`, for methods that stack blocks."""

    method: BitStack

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._check_size()

    def settings(self) -> dict[str, Any]:
        """All but the size: a run that is taken up for another one has its blocks and their order already."""
        return {name: value for name, value in super().settings().items() if name != "size"}

    def run(self, work: WorkDirectory) -> None:
        asked = None if self.size is None else self.size.nbytes
        finished = [part.file for part in work.parts] == list(FILES)
        if finished and work.notes.get("size") != asked:
            raise InputError(f"{work.path}: was about to be finished at another size; pass --force to start over")
        self.info["size"] = asked
        if not finished:
            self._take_apart(work)
            order = self._order(work)
            forms = self._forms(work)
            kept = self._kept(order, forms)
            self._write(work, forms, kept)
        stack = work.notes["stack"]
        self.info["stack"] = stack
        self.specs = {**self.specs, **StackIndex.from_info(stack).specs(len(stack["order"]))}

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _take_apart(self, work: WorkDirectory) -> None:
        """A part for the embedding, for each layer and for what comes after them."""
        if self.tokens is None:
            raise InputError("bitstack reads a calibration text: it scales by activations, and orders blocks")
        if self.method.scale:
            stream = LayerStream(self.config, self.checkpoint, self.tokens, self.arena, self.specs)
            self._transform(stream)
            stream.release()
        work.set_specs(self.specs)
        check_disk(work.path, 2 * self._remaining_bytes(len(work.parts)))
        done = 0
        for index, part in enumerate(self._parts):
            self.settle()
            if index >= len(work.parts):
                self._make_part(part, work, self._part_name(index), None, done)
            done += sum(tensor.size for tensor in part.matrices)
            self._progress("compress", done, self._num_weights)

    def _part_name(self, index: int) -> str:
        return f"part-{index + 1:05d}.safetensors"

    def _method_for(self, statistics: object) -> WeightMethod:
        return self.method

    def _compress(self, tensor: TensorSpec, statistics: object) -> Packed:
        """Without the share of outputs that is lost: with all blocks it is next to nothing."""
        weight = self.checkpoint.alone(tensor.name)
        charge = self.arena.charge("compress", self._form_bytes(tensor, self.method))
        try:
            return self.method.compress(weight, None, MethodConfig(spec=self.specs[tensor.name], tensor=tensor.name))
        finally:
            charge.release()

    def _forms(self, work: WorkDirectory) -> dict[str, Packed]:
        """All tensors as they were made, on the maps of their parts."""
        forms: dict[str, Packed] = {}
        for index in range(len(self._parts)):
            forms.update(read_part(work.path / self._part_name(index)))
        return forms

    # -- order ---------------------------------------------------------------------------------------------------------

    def _order(self, work: WorkDirectory) -> list[str]:
        """Names in the order of their next blocks."""
        known = work.notes.get("levels", [])
        levels: list[dict[str, float]] = [{n: nan if x is None else x for n, x in one.items()} for one in known]
        assert self.tokens is not None
        length = self.tokens.shape[1]
        tokens = self.tokens[: max(self.method.sort_tokens // length, 1)]
        names = [tensor.name for tensor in self.config.tensors() if self._is_stacked(tensor)]
        measured = min(self.method.sort_levels, self.method.blocks - 1)
        if len(levels) < measured:
            first = self._part_name(0)
            vectors = read_part(work.path / first)
            embedding = vectors[EMBEDDING]
            last = read_part(work.path / self._part_name(len(self._parts) - 1))
            head = embedding if self.config.tie_word_embeddings else last[HEAD]
            stream = LayerStream(self.config, self.checkpoint, tokens, self.arena, self.specs)
            order = stack_order.StackOrder(stream, lambda layer: self._layer_forms(work, layer), embedding, head)
            for level in range(len(levels) + 1, measured + 1):
                self.settle()
                levels.append(order.level(level))
                work.note("levels", [{n: x if isfinite(x) else None for n, x in one.items()} for one in levels])
                self._progress("sort", level, measured)
            stream.release()
        assert set(names) == set(levels[0] if levels else names)
        return stack_order.in_order(levels + levels[-1:] * (self.method.blocks - 1 - len(levels)))

    def _layer_forms(self, work: WorkDirectory, layer: int) -> dict[str, Packed]:
        index = next(i for i, part in enumerate(self._parts) if part.layer == layer)
        forms = read_part(work.path / self._part_name(index))
        stacked = {tensor.name for tensor in self._parts[index].tensors if self._is_stacked(tensor)}
        return {name: form for name, form in forms.items() if name in stacked}

    def _is_stacked(self, tensor: TensorSpec) -> bool:
        return isinstance(codec(self.specs[tensor.name]), BitStackCodec)

    def _check_size(self) -> None:
        """Before any work, for a size that nothing can have: DoesNotFit below the least, InputError above the most."""
        if self.size is None:
            return
        forms = {tensor: codec(self._stored_spec(tensor)) for part in self._parts for tensor in part.tensors}
        whole = {tensor: form.nbytes(tensor.shape) for tensor, form in forms.items()}
        first = {t: n // form.blocks if isinstance(form := forms[t], BitStackCodec) else n for t, n in whole.items()}
        least = sum(first.values())
        if self.size.nbytes < least:
            raise DoesNotFit(
                f"size {self.size}: the first blocks of all matrices and what stays floats take {least:,} bytes and "
                f"headers; try --size {least + least // 50}"
            )
        # what names and small files may add to all blocks is a little
        most = sum(whole.values()) + self.size.small_files_bytes(FILES, {}, self.settings())
        if most + 256 * self.method.blocks * len(forms) < LEAST_SHARE * self.size.nbytes:
            self.size.check(most, "all blocks")

    # -- files ---------------------------------------------------------------------------------------------------------

    def _kept(self, order: Sequence[str], forms: Mapping[str, Packed]) -> list[str]:
        """The order, or as much of it as the size that was asked for has room for."""
        if self.size is None:
            return list(order)
        sizes = {name: forms[name].buffers["block0"].nbytes for name in order}
        room = self.size.nbytes - self._folder_bytes(forms, [])
        if room < 0:
            least = self.size.nbytes - room
            raise DoesNotFit(
                f"size {self.size}: the first blocks of all matrices take {least:,} bytes; try --size {least}"
            )
        kept = stack_order.fitting(order, sizes, room)
        while kept and self._folder_bytes(forms, kept) > self.size.nbytes:  # what their names take in the headers
            room -= self._folder_bytes(forms, kept) - self.size.nbytes
            kept = stack_order.fitting(order, sizes, room)
        if len(kept) == len(order):
            self.size.check(self._folder_bytes(forms, kept), "all blocks")
        return kept

    def _folder_bytes(self, forms: Mapping[str, Packed], kept: Sequence[str]) -> int:
        assert self.size is not None
        base, stack, described = self._layout(forms, kept)
        heads = [len(build_header(base, _metadata(described))[0]), len(build_header(stack, {}, as_given=True)[0])]
        data = sum(forms[name].buffers[buffer].nbytes for name, buffer in self._places(forms, kept))
        info = {"bits_per_weight": 1 / 3, **self.settings(), "size": 1 << 60, "stack": self._stack_info(forms, kept)}
        packed = {
            name: Packed(spec=each["spec"], shape=tuple(each["shape"]), buffers={}) for name, each in described.items()
        }
        return self.size.small_files_bytes(FILES, packed, info) + sum(heads) + data

    def _places(self, forms: Mapping[str, Packed], kept: Sequence[str]) -> list[tuple[str, str]]:
        """(tensor, buffer) of the first file in turn, then of the second."""
        first = [(name, next(iter(form.buffers))) for name, form in forms.items()]
        return first + _numbered(kept)

    def _layout(self, forms: Mapping[str, Packed], kept: Sequence[str]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Tensors of both files, and what each tensor of the model then is."""
        counts = {name: 1 + kept.count(name) for name in set(kept)}
        described = {}
        for name, form in forms.items():
            spec = form.spec
            if isinstance(codec(spec), BitStackCodec):
                spec = replace(BitStackCodec.parse(spec), blocks=counts.get(name, 1)).spec
            described[name] = {"spec": spec, "shape": list(form.shape)}

        def entries(places: Sequence[tuple[str, str]]) -> list[tuple[str, Any, tuple[int, ...]]]:
            arrays = [(tensor_name(name, buffer), forms[name].buffers[buffer]) for name, buffer in places]
            return [(name, array.dtype, array.shape) for name, array in arrays]

        return entries(self._places(forms, [])), entries(_numbered(kept)), described

    def _stack_info(self, forms: Mapping[str, Packed], kept: Sequence[str]) -> dict[str, Any]:
        names = [name for name, form in forms.items() if isinstance(codec(form.spec), BitStackCodec)]
        places = {name: index for index, name in enumerate(names)}
        return {"tensors": names, "rank": self.method.rank, "order": [places[name] for name in kept]}

    def _write(self, work: WorkDirectory, forms: Mapping[str, Packed], kept: Sequence[str]) -> None:
        base, stack, described = self._layout(forms, kept)
        work.note("stack", self._stack_info(forms, kept))
        work.note("size", self.info["size"])
        first = self._places(forms, [])
        for file, specs, places, metadata in (
            (FILES[0], base, first, _metadata(described)),
            (FILES[1], stack, _numbered(kept), {"format": "memwall"}),
        ):
            if any(part.file == file for part in work.parts):
                continue
            with SafetensorsWriter(work.path / file, specs, metadata, as_given=file == FILES[1]) as writer:
                for name, buffer in places:
                    writer.write(tensor_name(name, buffer), forms[name].buffers[buffer])
            assert writer.sha256 is not None
            work.add(File(file=file, bytes=writer.nbytes, sha256=writer.sha256))
        work.keep(FILES)


def _numbered(kept: Sequence[str]) -> list[tuple[str, str]]:
    """Each name in turn with its next block."""
    counts: dict[str, int] = {}
    found = []
    for name in kept:
        counts[name] = counts.get(name, 0) + 1
        found.append((name, f"block{counts[name]}"))
    return found


def _metadata(described: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "memwall", "tensors": json.dumps(described, sort_keys=True)}
