"""NanoFlow's cost model: what each operation of an iteration takes of a node, which class bounds it, and the most
tokens a second that the node could make.

Source: NanoFlow, Zhu 2024, arXiv 2408.12757: costs of an iteration 3.2, optimal throughput 3.4 (equation 5), operation
table 3.5 (LLaMA-2-70B on eight A100).

Idea: with a batch as large as memory allows, all of it is read once per iteration (T_mem), every weight multiplies
every token of the dense batch (T_compute), and four activations per layer cross the links (T_net). Where T_R = T_mem /
T_compute is below 1, arithmetic is the limit, and the node's best is its rate divided by the operations of a token.

Units: FLOP, bytes, seconds, tokens, all of the whole node and of all layers unless said otherwise.

Differs from the paper: a collective moves (N - 1) / N of what the formula of T_net says, as the paper's own table has
it. The rate that products reach is 260 TFLOP/s of an A100's 312: that gives the published 1,857 tokens/s and the
published shares of five other models; the 280 that are told beside it would give 2,000.
Holds when: prompts are attended whole (the table's figures are without the causal mask).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memwall.engine.nano_schedule import NanoOperation, Resource
from memwall.errors import InputError
from memwall.hardware import Machine
from memwall.simulate.base import LAUNCH_SECONDS, Device
from memwall.simulate.cluster import Cluster
from memwall.simulate.serving_model import Attention, Experts, FeedForward, ServedModel

PROFILED_SHARE = 260 / 312
"""Of a device's peak, what large products reach (see above)."""
MEASURED_MS = {
    "kqv": 16.08, "o": 16.01, "up_gate": 69.92, "down": 34.96, "decode": 35.60, "prefill": 4.56, "network": 47.92,
}  # fmt: skip
ESTIMATED_MS = {
    "kqv": 11.01, "o": 8.81, "up_gate": 61.67, "down": 30.84, "decode": 28.89, "prefill": 0.37, "network": 31.33,
}  # fmt: skip
"""The paper's table of LLaMA-2-70B, dense batch 2,048, eight A100 (paper)."""
REACHED = {name: ESTIMATED_MS[name] / MEASURED_MS[name] for name in MEASURED_MS}
"""Share of the estimate's speed that each kernel reached there: what other models and machines are taken to reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Devices that serve one model together. Rates are of one device; capacity_bytes too."""

    name: str
    devices: int
    flop_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    capacity_bytes: int
    profiled_flop_per_s: float

    @staticmethod
    def of(machine: Machine, devices: int, *, dtype: str = "float16", profiled: float | None = None) -> Node:
        """From a machine's description. profiled: what products reach, in FLOP/s."""
        cluster = Cluster.of(machine, per_node=devices)
        device: Device = cluster.device
        peak = device.rate(dtype)
        if profiled is not None and not 0 < profiled <= peak:
            raise InputError(f"products of {profiled:.3g} FLOP/s on {machine.name}, whose peak is {peak:.3g}")
        return Node(
            name=machine.name,
            devices=devices,
            flop_per_s=peak,
            bytes_per_s=device.bytes_per_s,
            link_bytes_per_s=cluster.link_bytes_per_s or math.inf,
            capacity_bytes=device.capacity_bytes,
            profiled_flop_per_s=profiled or PROFILED_SHARE * peak,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A dense batch in the steady state. prompt, output: mean tokens of a request."""

    tokens: int
    prompt: float
    output: float

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.prompt <= 0 or self.output <= 0:
            raise InputError(
                f"a batch of {self.tokens} tokens, prompts of {self.prompt:g}, answers of {self.output:g}: all must be "
                "above 0"
            )

    @property
    def decode(self) -> float:
        """Tokens that decode: every prompt token that comes in brings output / prompt of them."""
        return self.tokens * self.output / (self.prompt + self.output)

    @property
    def prefill(self) -> float:
        """Tokens of prompts."""
        return self.tokens - self.decode

    @property
    def context(self) -> float:
        """Mean tokens that a decoding request attends to."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operation, all layers and devices. weight_bytes: the part of `nbytes` that is read anew for every part of a
    batch; tokens: that it covers.
    """

    name: str
    resource: Resource
    flop: float
    nbytes: float
    link_bytes: float
    weight_bytes: float
    tokens: float
    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    @property
    def estimate(self) -> float:
        """Seconds at the class' full rate."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)


def operation_table(model: ServedModel, node: Node, batch: Batch) -> list[Row]:
    """The rows kqv, o, up_gate, down, decode, prefill and, between devices, network."""
    attention, network = model.cells
    if not isinstance(attention, Attention) or isinstance(network, Attention):
        raise InputError(f"{model.name}: NanoFlow's pipeline is of attention and feed-forward; this model has others")
    hidden, heads = model.hidden, attention.heads * attention.head_size
    keys = attention.kv_heads * attention.head_size
    size, layers, tokens = model.formats.activation_bytes, model.blocks, batch.tokens

    def row(name: str, flop: float, nbytes: float, weights: float = 0.0, link: float = 0.0, of: float = tokens) -> Row:
        resource: Resource = "network" if link else "memory" if name == "decode" else "compute"
        return Row(
            name=name, resource=resource, flop=flop, nbytes=nbytes, link_bytes=link, weight_bytes=weights, tokens=of,
            compute_seconds=flop / (node.devices * node.flop_per_s),
            memory_seconds=nbytes / (node.devices * node.bytes_per_s),
            network_seconds=link / (node.devices * node.link_bytes_per_s),
        )  # fmt: skip

    def product(name: str, rows: float, cols: float, *, held: float = 1.0, used: float = 1.0) -> Row:
        """tokens x cols by a matrix of rows x cols; held: such matrices, used: of them by each token."""
        weights = held * rows * cols * model.formats.weight_bytes * layers
        moved = used * tokens * (rows + cols) * size * layers
        return row(name, 2 * tokens * used * rows * cols * layers, weights + moved, weights)

    held, used = (network.experts, network.chosen) if isinstance(network, Experts) else (1, 1)
    assert isinstance(network, Experts | FeedForward)
    io = 2 * heads * size * layers  # queries in, results out
    token_kv = 2 * keys * model.formats.kv_bytes * layers
    cached = batch.decode * batch.context
    whole_prompts = math.ceil(batch.prefill / batch.prompt) * batch.prompt  # a chunk reads all of each prompt it meets
    rows = [
        product("kqv", heads + 2 * keys, hidden),
        product("o", hidden, heads),
        product("up_gate", (network.matrices - 1) * network.filters, hidden, held=held, used=used),
        product("down", hidden, network.filters, held=held, used=used),
        row("decode", 4 * cached * heads * layers, cached * token_kv + batch.decode * (io + token_kv), of=batch.decode),
        row("prefill", 4 * batch.prefill * batch.prompt * heads * layers, batch.prefill * io + whole_prompts * token_kv,
            of=batch.prefill),
    ]  # fmt: skip
    if node.devices > 1:
        rows.append(row("network", 0.0, 0.0, link=4 * (node.devices - 1) * tokens * hidden * size * layers))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Which class limits an iteration. All in seconds; ratio: T_R = memory / compute."""

    memory: float
    compute: float
    network: float
    optimal_tokens_per_s: float

    @property
    def ratio(self) -> float:
        """T_R: below 1 arithmetic is the limit."""
        return self.memory / self.compute

    @property
    def limit(self) -> Resource:
        """The slowest class."""
        times: dict[Resource, float] = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(times, key=lambda name: times[name])


def bound_of(model: ServedModel, node: Node, tokens: int) -> Bound:
    """Of an iteration with all memory in use; optimal_tokens_per_s is of one device."""
    parameters = model.active_parameters
    transfers = 4 * node.devices * tokens * model.hidden * model.formats.activation_bytes * model.blocks
    return Bound(
        memory=node.capacity_bytes / node.bytes_per_s,
        compute=2 * tokens * parameters / (node.devices * node.flop_per_s),
        network=transfers / (node.devices * node.link_bytes_per_s) if node.devices > 1 else 0.0,
        optimal_tokens_per_s=optimal(node.profiled_flop_per_s, parameters),
    )


def optimal(flop_per_s: float, parameters: float) -> float:
    """Tokens a second of one device that does nothing but multiply (equation 5)."""
    return flop_per_s / (2 * parameters)


# ---- a layer, as the search takes it -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOperation:
    """An operation of one layer over tokens [first, end). A part of n tokens takes fixed + n * per_token seconds."""

    name: str
    resource: Resource
    first: int
    end: int
    fixed: float
    per_token: float
    parents: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    def seconds(self, tokens: int) -> float:
        """Alone on the device."""
        return self.fixed + tokens * self.per_token

    @property
    def whole(self) -> float:
        """Seconds of all its tokens at once."""
        return self.seconds(self.end - self.first)

    def part(self, first: int, end: int, index: int) -> NanoOperation:
        """One nano-operation of it."""
        return NanoOperation(name=self.name, resource=self.resource, first=first, end=end, index=index)


PLACEMENTS = ("gather", "reduce")
"""Equivalent collectives: gather the heads before and the columns after the output product, or sum its parts."""


def layer_of(
    model: ServedModel,
    node: Node,
    batch: Batch,
    placement: str = "gather",
    *,
    measured: Mapping[str, float] | None = None,
    quantum: int = 128,
) -> list[LayerOperation]:
    """The operations of a layer. measured: seconds of all layers by name where a profile has them; else the estimate
    at the share of its speed that such kernels reach. Each part costs a launch, or where its arithmetic does not hide
    that weights are read anew, their reading.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"placement {placement!r}: it is one of {', '.join(PLACEMENTS)}")
    rows = {row.name: row for row in operation_table(model, node, batch)}
    decode = min(max(round(batch.decode / quantum) * quantum, quantum), batch.tokens - 1)
    spans = {"decode": (0, decode), "prefill": (decode, batch.tokens)}
    last = ("reduce2",) if "network" in rows else ("down",)

    def make(name: str, row: Row, parents: tuple[str, ...] = (), share: float = 1.0) -> LayerOperation:
        first, end = spans.get(name, (0, batch.tokens))
        known = measured or {}
        seconds = known.get(row.name, row.estimate / REACHED[row.name]) * share / model.blocks
        reading = row.weight_bytes / (node.devices * node.bytes_per_s) / model.blocks / REACHED[row.name]
        # a part reads all weights again: hidden behind the arithmetic where half of the batch is enough for that
        hidden = seconds / 2 >= reading
        fixed = min(LAUNCH_SECONDS if hidden else max(reading, LAUNCH_SECONDS), 0.9 * seconds)
        return LayerOperation(
            name=name, resource=row.resource, first=first, end=end, fixed=fixed,
            per_token=(seconds - fixed) / (end - first), parents=parents, before=last if name == "kqv" else (),
        )  # fmt: skip

    attention = ("decode", "prefill")
    found = [make("kqv", rows["kqv"]), *(make(name, rows[name], ("kqv",)) for name in attention)]
    if "network" not in rows:
        chain = [("o", "o", 1.0), ("up_gate", "up_gate", 1.0), ("down", "down", 1.0)]
    elif placement == "gather":
        chain = [("gather1", "network", 0.25), ("o", "o", 1.0), ("gather2", "network", 0.25),
                 ("up_gate", "up_gate", 1.0), ("down", "down", 1.0), ("reduce2", "network", 0.5)]  # fmt: skip
    else:
        chain = [("o", "o", 1.0), ("reduce1", "network", 0.5), ("up_gate", "up_gate", 1.0), ("down", "down", 1.0),
                 ("reduce2", "network", 0.5)]  # fmt: skip
    parents: tuple[str, ...] = attention
    for name, row, share in chain:
        found.append(make(name, rows[row], parents, share))
        parents = (name,)
    return found
