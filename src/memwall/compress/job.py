"""One run over one model: what is measured, what is decided by it, and the order in which parts are made.

Layers are worked in order, and each is calibrated on what the layers before it, already compressed, hand on; so it also
makes up for some of their error. For a mean number of bits the model is first run once as it is, to measure what each
matrix loses at each width (`sensitivity`), and the widths are chosen for the least total (`allocate`). Embeddings are
rounded to nearest (every row is an input of its own: H = I) and, like the head, keep at least four bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice

from memwall import kernels
from memwall.compress import sensitivity, weight_method
from memwall.compress.allocate import Candidate
from memwall.compress.base import Statistics, Subject
from memwall.compress.calibration import (
    Collector,
    LayerStream,
    float_packed,
    shared_input,
)
from memwall.compress.job_plan import JobPlan, tensor_work_bytes
from memwall.compress.parts import Part
from memwall.compress.saved import WorkDirectory, check_disk, read_part
from memwall.compress.transforms import Transformed
from memwall.compress.tuned import tune_parts
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.floats import FloatCodec
from memwall.memory import Charge
from memwall.models.config import EMBEDDING, HEAD, TensorSpec
from memwall.models.precision import is_matrix


class Job(JobPlan):
    """Compress the model of `checkpoint` into a work directory."""

    def run(self, work: WorkDirectory) -> None:
        """Make every part that the work directory does not hold yet."""
        stream = None
        if self.tokens is not None:
            stream = LayerStream(self.config, self.checkpoint, self.tokens, self.arena, self.specs)
        if self.method.transforms and stream is not None:
            self._transform(stream)
        if self._chooses:
            self.specs = work.specs or self._chosen_specs() or self._measured_specs(stream)
        if self.tokens is not None:
            self.checkpoint = self.method.prepare(self._subject("train"), self.specs)
        work.set_specs(self.specs)
        check_disk(work.path, self._remaining_bytes(len(work.parts)))
        if not self.method.calibrates:
            stream = None
        done = 0
        for index, part in enumerate(self._parts):
            self.settle()
            name = self._part_name(index)
            if index >= len(work.parts):
                self._make_part(part, work, name, stream, done)
            done += sum(tensor.size for tensor in part.matrices)
            self._progress("compress", done, self._num_weights)
            if stream is not None:
                packed = read_part(work.path / name)
                self.specs.update({name: form.spec for name, form in packed.items()})
                self._hand_on(part, packed, stream)
        if self.method.trains and self.tokens is not None:
            tune_parts(work, self.method, self.checkpoint, self.tokens, lambda *at: self._progress("train", *at))

    def _transform(self, stream: LayerStream) -> None:
        """Change the model into an equal one that loses less; done again, alike, where a run is taken up."""

        def form_of(name: str) -> str:
            return self.specs.get(name, self._ladder[2])

        stream.embed()
        self.checkpoint = Transformed(self.checkpoint, self.method.transform(stream, form_of))
        stream.use(self.checkpoint)

    # -- bits --------------------------------------------------------------------------------------------------------

    def _subject(self, stage: str) -> Subject:
        assert self.tokens is not None
        return Subject(
            checkpoint=self.checkpoint,
            tokens=self.tokens,
            arena=self.arena,
            progress=lambda done, total: self._progress(stage, done, total),
        )

    def _chosen_specs(self) -> dict[str, str] | None:
        """The method's own choice, if it makes one."""
        forms = {tensor.name: self._rungs(tensor) for tensor in self._matrices}
        chosen = self.method.choose(self._subject("measure"), forms, self._allowed_bytes)
        return None if chosen is None else {**self._plain_specs(), **chosen}

    def _plain_specs(self) -> dict[str, str]:
        return {tensor.name: "float32" for part in self._parts for tensor in part.tensors}

    def _measured_specs(self, stream: LayerStream | None) -> dict[str, str]:
        """Run the float model once, measure what every matrix loses in every form, and choose."""
        assert stream is not None
        charge = self.arena.charge("compress", self._probe_bytes())
        tied = self.config.tie_word_embeddings
        embedding, head = (self._float(EMBEDDING if tied else name) for name in (EMBEDDING, HEAD))
        probe = sensitivity.Probe(stream, embedding, head)
        losses: dict[str, list[Candidate]] = {}
        done = 0
        stream.embed()
        for part in self._parts:
            self.settle()
            before = stream.hidden[0].copy()
            for tensors, statistics in self._statistics(part, stream, advance=True):
                forms = {tensor.name: self._probe_form(tensor) for tensor in tensors}
                if part.layer is not None:
                    nats = probe.layer_nats(part.layer, before, forms)
                elif EMBEDDING in forms:
                    nats = {EMBEDDING: probe.embedding_nats(forms[EMBEDDING], tied=tied)}
                else:
                    nats = {name: probe.head_nats(packed) for name, packed in forms.items()}
                for tensor in tensors:
                    known = statistics.get(shared_input(tensor.name))
                    losses[tensor.name] = self._candidates(tensor, known, forms[tensor.name], nats[tensor.name])
                    done += tensor.size
                    self._progress("measure", done, self._num_weights)
        charge.release()
        chosen = self._choose([losses[tensor.name] for tensor in self._matrices])
        specs = self._plain_specs()
        specs.update({tensor.name: form.spec for tensor, form in zip(self._matrices, chosen, strict=True)})
        return specs

    def _float(self, name: str) -> Packed:
        return float_packed(self.checkpoint, name)

    def _probe_form(self, tensor: TensorSpec) -> Packed:
        """The form whose effect is measured: few bits, so that it stands out, but not the crudest."""
        rungs = self._rungs(tensor)
        spec = rungs[0 if tensor.role in ("embedding", "head") else min(1, len(rungs) - 1)]
        with _named(tensor.name):
            return kernels.encode(spec, self.checkpoint.alone(tensor.name))

    def _candidates(
        self, tensor: TensorSpec, statistics: Statistics | None, probed: Packed, nats: float
    ) -> list[Candidate]:
        weight = self.checkpoint.alone(tensor.name)
        method, config = self._method_for(statistics), self._config(probed.spec)
        sampled = (min(len(weight), sensitivity.SAMPLE_ROWS), weight.shape[1])
        charge = self.arena.charge("compress", weight.nbytes + method.work_bytes(*sampled))
        try:
            nats *= sensitivity.gain(weight, statistics, method, config)
            return sensitivity.candidates(weight, statistics, self._rungs(tensor), probed.spec, nats)
        finally:
            charge.release()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _make_part(self, part: Part, work: WorkDirectory, file: str, stream: LayerStream | None, done: int) -> None:
        forms = {tensor.name: self._stored_spec(tensor) for tensor in part.tensors}
        made: Iterable[tuple[str, Packed]] = self._made(part, stream, done)
        charge = self.arena.charge("compress", 0)
        try:
            if any(codec(spec).method for spec in forms.values()):
                # how large such forms become shows when they are made, and a file says its tensors' sizes first
                made = list(self._held(made, charge))
                if stream is not None and part.layer is not None:
                    made = list(self.method.finish_layer(stream, part.layer, dict(made)).items())
                forms = {name: packed.spec for name, packed in made}
            shapes = {tensor.name: tensor.shape for tensor in part.tensors}
            with work.writer(file, {name: (spec, shapes[name]) for name, spec in forms.items()}) as writer:
                for name, packed in made:
                    writer.write(name, packed)
        finally:
            charge.release()

    def _made(self, part: Part, stream: LayerStream | None, done: int) -> Iterator[tuple[str, Packed]]:
        """The part's tensors as they are stored, one at a time."""
        for tensor in part.tensors:
            if not is_matrix(tensor):
                yield tensor.name, float_packed(self.checkpoint, tensor.name)
        for tensors, statistics in self._statistics(part, stream):
            with closing(self._at_once(tensors, statistics)) as made:
                for tensor, packed in zip(tensors, made, strict=True):
                    yield tensor.name, packed
                    done += tensor.size
                    self._progress("compress", done, self._num_weights)

    def _at_once(self, tensors: list[TensorSpec], statistics: dict[str, Statistics]) -> Generator[Packed, None, None]:
        """Their forms in turn, so many of them in work as are wanted and fit into memory."""
        known = [statistics.get(shared_input(tensor.name)) for tensor in tensors]
        most_bytes = max(
            (self._form_bytes(t, self._method_for(k)) for t, k in zip(tensors, known, strict=True)), default=1
        )
        jobs = min(self.tuning.jobs, len(tensors), self.arena.free_bytes // most_bytes)
        if jobs < 2:
            yield from map(self._compress, tensors, known)
            return
        with ThreadPoolExecutor(jobs) as pool:
            running: deque[Future[Packed]] = deque()
            waiting = iter(zip(tensors, known, strict=True))
            try:
                # never more results than workers: a form that is not yet written is memory too
                running.extend(pool.submit(self._compress, *each) for each in islice(waiting, jobs))
                while running:
                    packed = running.popleft().result()
                    running.extend(pool.submit(self._compress, *each) for each in islice(waiting, 1))
                    yield packed
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _held(made: Iterable[tuple[str, Packed]], charge: Charge) -> Iterator[tuple[str, Packed]]:
        held_bytes = 0
        for name, packed in made:
            charge.resize(held_bytes := held_bytes + packed.nbytes)
            yield name, packed

    def _compress(self, tensor: TensorSpec, statistics: Statistics | None) -> Packed:
        weight = self.checkpoint.alone(tensor.name)
        method, config = self._method_for(statistics), self._config(self.specs[tensor.name])
        if isinstance(codec(config.spec), FloatCodec):
            method = weight_method("rtn")  # nothing is lost, so there is nothing to make up for
        charge = self.arena.charge("compress", self._form_bytes(tensor, method))
        try:
            with _named(tensor.name):
                packed = method.compress(weight, statistics, replace(config, tensor=tensor.name))
            self.errors[tensor.name] = sensitivity.relative_error(weight, packed, statistics)
        finally:
            charge.release()
        return packed

    def _hand_on(self, part: Part, packed: dict[str, Packed], stream: LayerStream) -> None:
        """What the next part is calibrated on comes out of this one as it is stored."""
        if EMBEDDING in packed:
            stream.embed(packed[EMBEDDING])
        elif part.layer is not None:
            stream.take_vectors(packed)
            stream.advance(part.layer, packed)

    # -- statistics within the budget ----------------------------------------------------------------------------------

    def _statistics(
        self, part: Part, stream: LayerStream | None, *, advance: bool = False
    ) -> Iterator[tuple[list[TensorSpec], dict[str, Statistics]]]:
        """The part's matrices in runs whose statistics fit in memory together, each run with its statistics.

        advance: the last run also moves the stream through the part's layer, as it is.
        """
        if stream is None or not part.matrices or part.matrices[0].name == EMBEDDING:
            yield part.matrices, {}
        elif part.layer is None:
            with self._collected(stream.collect_final(HEAD)) as statistics:
                yield part.matrices, statistics
        else:
            runs = list(self._runs(part.matrices))
            for index, run in enumerate(runs):
                is_last = index == len(runs) - 1
                names = [tensor.name for tensor in run]
                with self._collected(stream.collect(part.layer, names, advance=advance and is_last)) as statistics:
                    yield run, statistics

    def _runs(self, matrices: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
        work_bytes = max(
            max(Collector.work_bytes(t.shape[1]), tensor_work_bytes(t, self.method.work_bytes(*t.shape)))
            for t in matrices
        )
        room = self.arena.free_bytes - work_bytes - self._source_bytes(matrices)
        run: list[TensorSpec] = []
        held: dict[str, int] = {}
        for tensor in sorted(matrices, key=lambda t: shared_input(t.name)):
            name, nbytes = shared_input(tensor.name), Collector.nbytes(tensor.shape[1])
            if run and name not in held and sum(held.values()) + nbytes > room:
                yield run
                run, held = [], {}
            held[name] = nbytes
            run.append(tensor)
        yield run

    @staticmethod
    @contextmanager
    def _collected(collector: Collector) -> Iterator[dict[str, Statistics]]:
        try:
            yield collector.finish()
        finally:
            collector.release()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors about values say whose values they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
