"""Operations of one block of a planned model for one iteration's batch, and the collectives between its cells.

`BatchShape` is what an iteration computes, summed over its requests. A step's time on a stage is that of one block
times the stage's blocks; the first stage has the embedding besides, the last one the head.

Source: APEX (Lin 2024, arXiv 2411.17651), sections 3 and 4: operators of cells, and the operators that change how an
activation lies between cells of different replica counts. Device 0 holds the most tasks, so its time is the cell's.

Differs from the paper's code: a decoding request attends to its cached length (the code takes length 1); a batch of few
tokens meets only some experts; embedding, head and the passes between products are counted; after a gated network the
sum over devices is enough, as in serving engines (the code gathers once more).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from memwall.engine.executor import Entry
from memwall.simulate.base import Operation, Priced
from memwall.simulate.cluster import Cluster
from memwall.simulate.plans import CellPlan, ServingPlan
from memwall.simulate.serving_model import Attention, Cell, Experts, FeedForward, ServedModel

FLOAT32_BYTES = 4
PASSES_OF_BLOCK = 6.0
"""Times that a block reads or writes its hidden state besides the products: two norms, two sums (model)."""


@dataclass(slots=True)
class BatchShape:
    """What one scheduler's iteration computes. prompts: requests with more than one token; prompt_keys: keys that each
    of their queries sees, summed; last_keys: keys of their last queries, summed; cached: keys of those that decode.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    prompt_keys: float = 0.0
    last_keys: int = 0
    decodes: int = 0
    cached: int = 0
    sampled: int = 0

    @staticmethod
    def of(batch: Sequence[Entry]) -> BatchShape:
        """Of the entries that an engine hands to its executor."""
        shape = BatchShape()
        for entry in batch:
            shape.sampled += entry.sample
            if entry.count == 1:
                shape.decodes += 1
                shape.cached += entry.first + 1
            else:
                shape.prompts += 1
                shape.prompt_tokens += entry.count
                shape.prompt_keys += entry.count * (entry.first + (entry.count + 1) / 2)
                shape.last_keys += entry.first + entry.count
        return shape

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.prompt_tokens + self.decodes


@dataclass(slots=True)
class StageTimes:
    """Seconds of each stage, and of sending to the next one; joules of all devices of the replica; seconds of one
    device by operator, over all stages.
    """

    stages: list[float]
    send: float
    joules: float
    by_operator: dict[str, float]
    flop: float
    tier_bytes: float


@dataclass(slots=True)
class StepTimer:
    """Times iterations of one plan."""

    model: ServedModel
    plan: ServingPlan
    cluster: Cluster
    price: Priced
    _ends: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = self.cluster.group(self.plan.stage_devices)

    def step(self, batches: Sequence[BatchShape]) -> StageTimes:
        """Of one iteration; batches: one for each attention replica."""
        plan, model = self.plan, self.model
        found: dict[str, float] = defaultdict(float)
        joules = flop = moved = 0.0

        def add(operations: Iterator[Operation], times: float) -> float:
            nonlocal joules, flop, moved
            seconds = 0.0
            for one in operations:
                cost = self.price.cost(one)
                seconds += cost.seconds
                found[one.name] += cost.seconds * times
                joules += cost.joules * times * plan.stage_devices
                flop += one.flop * times * plan.stage_devices
                moved += one.tier_bytes * times * plan.stage_devices
            return seconds

        block = add(self.block(batches), model.blocks)
        stages = [block * (model.blocks // plan.stages)] * plan.stages
        stages[0] += add(self.embedding(batches), 1)
        stages[-1] += add(self.head(batches), 1)
        send = 0.0
        if plan.stages > 1:
            send = add(self.send(batches), plan.stages - 1)
        return StageTimes(stages, send, joules, dict(found), flop, moved)

    def block(self, batches: Sequence[BatchShape]) -> Iterator[Operation]:
        """Of one block, on the fullest device, in order."""
        model, plan = self.model, self.plan
        tokens = sum(one.tokens for one in batches)
        largest = max(one.tokens for one in batches)
        for index, (cell, how) in enumerate(zip(model.cells, plan.cells)):
            if isinstance(cell, Attention):
                yield from self.attention(cell, how, batches)
            elif isinstance(cell, Experts):
                yield from self.experts(cell, how, -(-tokens // how.replicas))
            else:
                # one scheduler's batch stays whole where cell and attention are replicated alike
                share = largest if how.replicas == len(batches) else -(-tokens // how.replicas)
                yield from self.feed_forward(cell, how, share)
            following = (index + 1) % len(model.cells)
            yield from self.reshard((cell, how), (model.cells[following], plan.cells[following]), tokens)
        values = PASSES_OF_BLOCK * largest * model.hidden
        nbytes = values * model.formats.activation_bytes
        yield Operation(
            name="passes", kind="pass", dtype="float32", shape=(float(largest),), flop=values, tier_bytes=nbytes
        )

    def attention(self, cell: Attention, how: CellPlan, batches: Sequence[BatchShape]) -> Iterator[Operation]:
        """Products and attention of the replica that takes longest."""
        share, formats = cell.share(how.devices), self.model.formats
        rows = (share.heads + 2 * share.kv_heads) * cell.head_size
        largest = max(one.tokens for one in batches)
        yield self.gemm("qkv", rows, cell.hidden, largest)
        slowest = max(batches, key=lambda one: (one.cached + one.prompt_keys, one.tokens))
        per_key = 2 * share.kv_heads * cell.head_size * formats.kv_bytes
        shape = (float(cell.head_size), float(share.heads), float(share.kv_heads))
        if slowest.prompts:
            queries, keys = slowest.prompt_tokens / slowest.prompts, slowest.last_keys / slowest.prompts
            moved = slowest.last_keys * per_key
            moved += 2 * slowest.prompt_tokens * share.heads * cell.head_size * formats.activation_bytes
            yield Operation(
                name="prompt attention", kind="attention", dtype=formats.attention,
                shape=(*shape, float(slowest.prompts), queries, keys),
                flop=4.0 * slowest.prompt_keys * share.heads * cell.head_size, tier_bytes=moved,
            )  # fmt: skip
        if slowest.decodes:
            yield Operation(
                name="decode attention", kind="attention", dtype=formats.attention,
                shape=(*shape, float(slowest.decodes), 1.0, slowest.cached / slowest.decodes),
                flop=4.0 * slowest.cached * share.heads * cell.head_size, tier_bytes=slowest.cached * per_key,
            )  # fmt: skip
        yield self.gemm("out", cell.hidden, share.heads * cell.head_size, largest)

    def feed_forward(self, cell: FeedForward, how: CellPlan, tokens: float) -> Iterator[Operation]:
        """Products of one replica."""
        filters = -(-cell.filters // how.devices)
        # gate and up read the same input and go as one product
        yield self.gemm("up", (cell.matrices - 1) * filters, cell.hidden, tokens)
        yield self.gemm("down", cell.hidden, filters, tokens)

    def experts(self, cell: Experts, how: CellPlan, tokens: float) -> Iterator[Operation]:
        """Products of the experts that the tokens meet, on one device."""
        whole = how.template == "expert"
        held = -(-cell.experts // how.devices) if whole else cell.experts
        filters = cell.filters if whole else -(-cell.filters // how.devices)
        yield self.gemm("router", cell.experts, cell.hidden, tokens)
        active = cell.active(tokens, held)
        each = max(tokens * cell.chosen * held / cell.experts / active, 1.0) if active else 1.0
        yield self.gemm("expert up", (cell.matrices - 1) * filters, cell.hidden, each, active)
        yield self.gemm("expert down", cell.hidden, filters, each, active)

    def embedding(self, batches: Sequence[BatchShape]) -> Iterator[Operation]:
        """Looking rows up."""
        tokens = sum(one.tokens for one in batches)
        nbytes = tokens * self.model.hidden * (self.model.formats.weight_bytes + self.model.formats.activation_bytes)
        yield Operation(name="embedding", kind="pass", dtype="float32", shape=(float(tokens),), tier_bytes=nbytes)

    def head(self, batches: Sequence[BatchShape]) -> Iterator[Operation]:
        """Logits of the tokens that are sampled, split over the stage's devices."""
        rows = -(-self.model.vocabulary // self.plan.stage_devices)
        sampled = sum(one.sampled for one in batches)
        if sampled:
            yield self.gemm("head", rows, self.model.hidden, sampled)
            logits = sampled * rows * FLOAT32_BYTES
            if self.plan.stage_devices > 1:  # whoever samples needs all parts
                yield Operation(
                    name="logits", kind="all_gather", dtype="float32", shape=tuple(map(float, self._ends)),
                    link_bytes=logits * self.plan.stage_devices,
                )  # fmt: skip
            yield Operation(name="sample", kind="pass", dtype="float32", shape=(float(sampled),), tier_bytes=logits)
        # what the loop around the model takes, where a profile tells it: it goes by requests more than by tokens
        requests = max(one.prompts + one.decodes for one in batches)
        yield Operation(name="step", kind="pass", dtype="float32", shape=(float(requests),))

    def send(self, batches: Sequence[BatchShape]) -> Iterator[Operation]:
        """Hidden states to the next stage: each attention replica's devices send their own requests' rows."""
        tokens = max(one.tokens for one in batches)
        nodes = 2 if self.plan.stage_devices >= self.cluster.per_node and self.cluster.nodes > 1 else 1
        yield self.message("send", "sendrecv", (nodes, 1 if nodes > 1 else 2), tokens)

    def reshard(
        self, before: tuple[Cell, CellPlan], after: tuple[Cell, CellPlan], tokens: float
    ) -> Iterator[Operation]:
        """What makes an activation that lies as one cell leaves it lie as the next one wants it.

        n devices hold partial sums of one replica's rows (or, whole experts to a device, of the rows of their tokens).
        """
        (cell, how), (_, to) = before, after
        n, rows = how.devices, tokens / how.replicas
        if how.template == "expert" and n > 1 and isinstance(cell, Experts):
            # tokens come back from the devices of their experts; then every device of the next cell needs its rows
            size = min(cell.chosen, n)
            yield self.message("dispatch", "alltoall", self.cluster.group(n), rows / n * size)
            gathered = n * how.replicas // to.replicas
            if gathered > 1:
                yield self.message("gather", "all_gather", self.cluster.group(gathered), tokens / to.replicas)
            return
        if to.template == "expert" and to.devices > 1 and isinstance(after[0], Experts):
            if n > 1:
                yield self.message("reduce", "reduce_scatter", self.cluster.group(n), rows)
            size = min(after[0].chosen, to.devices)
            each = tokens / to.replicas / to.devices
            yield self.message("dispatch", "alltoall", self.cluster.group(to.devices), each * size)
            return
        if how.replicas == to.replicas:
            if n > 1:
                yield self.message("reduce", "all_reduce", self.cluster.group(n), rows)
            return
        if n > 1:
            yield self.message("reduce", "reduce_scatter", self.cluster.group(n), rows)
        if to.devices > 1:
            yield self.message("gather", "all_gather", self.cluster.group(to.devices), tokens / to.replicas)

    def message(self, name: str, kind: Any, group: tuple[int, int], rows: float) -> Operation:
        """A collective over rows of the hidden state."""
        nbytes = rows * self.model.hidden * self.model.formats.activation_bytes
        return Operation(
            name=name, kind=kind, dtype="float16", shape=(float(group[0]), float(group[1])), link_bytes=nbytes
        )

    def gemm(self, name: str, m: float, k: float, n: float, repeat: float = 1.0) -> Operation:
        """A product of weights [m, k] with n tokens, `repeat` times over."""
        formats = self.model.formats
        nbytes = m * k * formats.weight_bytes + n * (m + k) * formats.activation_bytes
        return Operation(
            name=name, kind="gemm", dtype=formats.compute, shape=(float(m), float(k), float(n)),
            flop=2.0 * m * k * n * repeat, tier_bytes=nbytes * repeat, repeat=repeat,
        )  # fmt: skip
