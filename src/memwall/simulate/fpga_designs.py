"""FPGA accelerators for language models as data: how they store weights, keys and values, and what their engines do.

Two designs on one card: FlightLLM, and AccLLM's formats and engine. What is published is marked `paper`, what the
FlightLLM artifact's profiler has `artifact`, and what is ours `assumption`; both designs have the same memory, clock
and multipliers, so that formats and engine make all of the difference.

Units: bits, multiply-adds a cycle, cycles, watts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memwall.errors import InputError
from memwall.models.config import ModelConfig
from memwall.simulate.dsp_packing import Packing, best_packing

CLOCK_HZ = 225e6  # paper, of both
CORES = 3
"""Die regions of a U280, one core each."""
CORES_SHARE = 0.8
"""Of several cores' sum that is reached, in loads as in products (artifact: all times of one core over 4 * 0.8)."""
CORE_CHANNELS, CHANNELS = 8, 32
"""Memory channels that feed a core's weight buffer (artifact), and those of the card."""
CONTIGUOUS, CROSSING = 0.70, 0.35
"""Of a channel's bandwidth that accesses within it and across channels get (artifact)."""
CORE_MULTIPLIERS = 2048  # artifact: a core makes 2 x 16 x 128 products of 8 x 8 bits a cycle, two a slice
CORE_LANES = 16
"""Elements that a core's special unit takes in a cycle (artifact)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder; the default is LLaMA-2-7B, which both papers report."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    feed_forward: int = 11008
    vocabulary: int = 32000

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """Of a model's configuration."""
        if not config.gated:
            raise InputError(
                f"the accelerator is made for feed-forwards with a gate, and this is a {config.family} model"
            )
        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            feed_forward=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices [outputs, inputs], as they are worked: projections of one input together."""
        kv = self.kv_heads * self.head_dim
        query = self.heads * self.head_dim
        return {
            "qkv": (query + 2 * kv, self.hidden),
            "output": (self.hidden, query),
            "gate_up": (2 * self.feed_forward, self.hidden),
            "down": (self.hidden, self.feed_forward),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        return sum(rows * cols for rows, cols in self.matrices.values())

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """One accelerator.

    weight_bits: stored per weight of the dense matrix, scales and indices included. density: part of the multiply-adds
    that is done. kv_bits: per cached number, scales included. sinks, window: tokens of lambda-shaped attention; window
    None attends to all. mv, mm, kv_macs: multiply-adds a cycle of all cores for one token, for many, and for attention.
    weight_share, kv_share: of the memory's bandwidth that reads of weights and of keys and values get. prefill_share:
    of the attention blocks of a prompt that are worked where all tokens are seen. flush_share: of the multipliers' time
    that goes into splitting packed sums.
    """

    name: str
    weight_bits: float
    density: float
    kv_bits: float
    mv_macs: float
    mm_macs: float
    kv_macs: float
    head_bits: float = 8.0
    sinks: int = 0
    window: int | None = None
    weight_share: float = CONTIGUOUS
    kv_share: float = CONTIGUOUS
    prefill_share: float = 1.0
    flush_share: float = 0.0
    watts: float = 45.0
    cores: int = CORES
    clock_hz: float = CLOCK_HZ
    buffer_bytes: int = 2 << 20
    buffers: int = 2

    def __post_init__(self) -> None:
        for name in ("weight_bits", "density", "kv_bits", "mv_macs", "mm_macs", "kv_macs", "weight_share", "kv_share"):
            if not getattr(self, name) > 0:
                raise InputError(f"design {self.name}: {name.replace('_', ' ')} must be positive")
        if self.buffers < 1 or self.buffer_bytes < self.buffers:
            raise InputError(f"design {self.name}: {self.buffers} buffers of {self.buffer_bytes} bytes together")
        if self.window is not None and self.window < 1:
            raise InputError(f"design {self.name}: a window of {self.window} tokens; must be at least 1")

    def seen(self, context: int) -> int:
        """Tokens that one token attends to, itself among them."""
        return context if self.window is None else min(context, self.sinks + self.window)

    def pairs(self, tokens: int) -> int:
        """Pairs of query and key of a prompt: a triangle, or a band and a column."""
        full = tokens * (tokens + 1) // 2
        if self.window is None:
            return round(full * self.prefill_share)
        most = self.sinks + self.window
        return full if tokens <= most else most * (most + 1) // 2 + (tokens - most) * most

    def weight_bytes(self, shape: ModelShape) -> int:
        """Resident bytes of the weights; the head beside them, the embedding in slow memory."""
        head = shape.vocabulary * shape.hidden
        return round((shape.layers * shape.layer_weights * self.weight_bits + head * self.head_bits) / 8)

    def cache_bytes(self, shape: ModelShape, context: int) -> int:
        """Bytes of keys and values of one sequence."""
        return round(shape.layers * shape.kv_numbers * self.seen(context) * self.kv_bits / 8)


def flightllm(cores: int = CORES, *, weight_bits: float = 3.4) -> Design:
    """FlightLLM on a card with so many cores.

    weight_bits: 2 to 8 bits, 3.5 on average, some projections pruned (paper); what AccLLM's comparison implies is
    3.2 to 3.5. The artifact's profiler loads 4.
    """
    reach = CORES_SHARE * min(cores * CORE_CHANNELS / CHANNELS, 1.0)
    return Design(
        name="FlightLLM",
        weight_bits=weight_bits,
        density=0.95,  # artifact: projections of queries and keys at 0.7, the others dense
        kv_bits=8.0,  # activations are INT8
        mv_macs=1024.0 * cores * CORES_SHARE,  # artifact: 64 x 16 x 1 a core
        mm_macs=4096.0 * cores * CORES_SHARE,  # artifact: 2 x 16 x 128
        kv_macs=1024.0 * cores * CORES_SHARE,
        weight_share=CONTIGUOUS * reach,
        kv_share=CROSSING * reach,
        prefill_share=0.23,  # artifact: blocks of its attention masks
        watts=45.0,  # paper, in AccLLM's comparison
        cores=cores,
    )


FLIGHTLLM = flightllm()


TOKENS_PACKING = Packing(code_bits=8, lanes=2, spacing=18, signed=True, activation_low=0, activation_high=3)
"""Two activations that meet one 2-bit weight, whose zero point is taken off outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """AccLLM's parameters that are not published, and their defaults here (assumption).

    shared_places: whether rows whose weights are packed together keep the same two of every four. Only then do they
    meet the same activations; where each row has places of its own, a token's products of weights go one to a
    multiplier, and a prompt's are packed by two tokens that share a weight.
    """

    sinks: int = 4
    window: int = 1024
    group: int = 64
    kv_group: int = 64
    flush_cycles: int = 1
    multipliers: int = CORES * CORE_MULTIPLIERS
    weight_packing: Packing | None = None
    shared_places: bool = False

    def packings(self) -> dict[str, Packing]:
        """Of 2-bit weights, 4-bit keys and values, and 8-bit numbers; those with the highest rate unless given.
        `tokens`: two tokens' 8-bit activations, signed, beside each other, times a 2-bit weight.
        """
        return {
            "2x8": self.weight_packing or best_packing(2, flush_cycles=self.flush_cycles),
            "tokens": TOKENS_PACKING,
            "4x8": best_packing(4, flush_cycles=self.flush_cycles),
            "8x8": best_packing(8, signed=True, flush_cycles=self.flush_cycles),
        }

    def design(self) -> Design:
        """W2A8KV4 with 2:4 pruning on an engine that packs by width and uses every multiplier in both modes."""
        found, usable = self.packings(), self.multipliers * CORES_SHARE  # the cores' sum as in FlightLLM
        rate = {name: packing.rate(self.flush_cycles) * usable for name, packing in found.items()}
        weights, many = (found["2x8"],) * 2 if self.shared_places else (None, found["tokens"])
        return Design(
            name="AccLLM",
            # two of four kept: 2 bits of code and 2 of place each; 16 bits of scale and 2 of zero point a group
            weight_bits=0.5 * (2 + 2) + 0.5 * (16 + 2) / self.group,
            density=0.5,
            kv_bits=4 + 32 / self.kv_group,
            mv_macs=usable if weights is None else rate["2x8"],
            mm_macs=many.rate(self.flush_cycles) * usable,
            kv_macs=rate["4x8"],
            sinks=self.sinks,
            window=self.window,
            flush_share=self.flush_cycles / (many.limit + self.flush_cycles),
            watts=33.0,  # paper
        )


def ladder(recipe: Recipe) -> list[tuple[str, Design]]:
    """From FlightLLM to AccLLM, one difference after another."""
    target = recipe.design()
    steps = (
        ("weights: 2:4 and 2 bits, bytes", {"weight_bits": target.weight_bits}),
        ("half the products: 2:4 selector", {"density": target.density}),
        ("every multiplier busy for one token", {"mv_macs": FLIGHTLLM.mm_macs, "kv_macs": FLIGHTLLM.mm_macs}),
        ("packing by width", {"mv_macs": target.mv_macs, "mm_macs": target.mm_macs, "kv_macs": target.kv_macs}),
        ("keys and values in 4 bits", {"kv_bits": target.kv_bits}),
        ("lambda-shaped attention", {"sinks": target.sinks, "window": target.window}),
        ("cache in contiguous runs", {"kv_share": CONTIGUOUS * CORES_SHARE * CORES * CORE_CHANNELS / CHANNELS}),
        ("all memory channels busy", {"weight_share": target.weight_share, "kv_share": target.kv_share}),
    )
    found, now = [("FlightLLM", FLIGHTLLM)], FLIGHTLLM
    for name, change in steps:
        now = replace(now, **change)
        found.append((name, now))
    return found
