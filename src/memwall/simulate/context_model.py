"""What the analysis of long contexts knows of a model and of a device: sizes, and rates at their peak.

Source: Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis (Fu 2024, arXiv
2405.08944), whose running example is `PUBLISHED_MODEL` on `PUBLISHED_PEAK`. The formulas are in
`long_context_peak_analysis`.
Units: bytes, FLOP/s, bytes per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from memwall.errors import InputError
from memwall.hardware import GB, GIB, Machine
from memwall.models.config import ModelConfig, check_attention
from memwall.simulate.base import Device
from memwall.simulate.serving_model import bits_of, number_type


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextModel:
    """What of a model the formulas need.

    parameters: N of the blocks; head_parameters: of the output head, which a prompt meets once. weight_bytes: W, all
    that is held; read_bytes: what a step reads of it (embeddings are looked up). kv_number_bytes: of each number of
    keys and values. attention_width: query heads x head size; hidden: width of the states that devices exchange.
    prefill_attention: layers and width to count a prompt's attention with, where not the model's own.
    """

    name: str
    parameters: float
    weight_bytes: float
    layers: int
    kv_heads: int
    head_dim: int
    attention_width: int
    hidden: int
    heads: int
    head_parameters: float = 0.0
    read_bytes: float | None = None
    kv_number_bytes: float = 2.0
    causal: bool = True
    windows: tuple[int | None, ...] = ()
    dtype: str = "bfloat16"
    experts: int = 0
    experts_per_token: int = 0
    expert_bytes: float = 0.0
    prefill_attention: tuple[int, int] | None = None

    @staticmethod
    def of(config: ModelConfig, name: str, *, weights: str = "bfloat16", causal: bool = True) -> ContextModel:
        """Of a Hugging Face model. weights: a format of `memwall.formats`; keys and values take two bytes a number.

        InputError for models without attention and for unknown formats.
        """
        check_attention(config)
        per_weight, tensors = bits_of(weights) / 8, config.tensors()
        sizes = {role: sum(one.size for one in tensors if one.role == role) for role in {one.role for one in tensors}}
        experts, embedding = sizes.get("expert", 0), sizes.get("embedding", 0)
        head = embedding if config.tie_word_embeddings else sizes.get("head", 0)
        looked_up = 0 if config.tie_word_embeddings else embedding
        active = experts * config.num_experts_per_token / config.num_experts if config.num_experts else 0
        held = sum(sizes.values()) * per_weight
        return ContextModel(
            name=name, parameters=sizes.get("linear", 0) + sizes.get("router", 0) + active, head_parameters=head,
            weight_bytes=held, read_bytes=held - looked_up * per_weight, layers=config.num_layers,
            kv_heads=config.num_kv_heads, head_dim=config.head_dim, attention_width=config.query_size,
            heads=config.num_heads, hidden=config.hidden_size, causal=causal, windows=config.sliding_windows,
            dtype=number_type(weights) if bits_of(weights) > 16 else "bfloat16", experts=config.num_experts,
            experts_per_token=config.num_experts_per_token, expert_bytes=experts * per_weight,
        )  # fmt: skip

    @property
    def layer_token_bytes(self) -> float:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_number_bytes

    @property
    def token_bytes(self) -> float:
        """k, bytes of one token's keys and values where no window is passed."""
        return self.layers * self.layer_token_bytes

    def kv_bytes(self, tokens: float) -> float:
        """KV(n); layers with a window hold no more than it."""
        return self.layer_token_bytes * sum(min(tokens, w or tokens) for w in self._windows())

    def pairs(self, tokens: float) -> float:
        """Pairs of query and key in a prompt, all layers together."""
        if not self.causal:
            return sum(tokens * min(tokens, w or tokens) for w in self._windows())
        seen = [(tokens, min(tokens, w or tokens)) for w in self._windows()]
        return sum(inside * inside / 2 + (whole - inside) * inside for whole, inside in seen)

    def step_read_bytes(self, batch: float) -> float:
        """Weight bytes that a step of `batch` tokens reads: of experts, those that it meets in the mean."""
        read = self.weight_bytes if self.read_bytes is None else self.read_bytes
        if not self.experts:
            return read
        return read - self.expert_bytes * (1 - self.experts_per_token / self.experts) ** max(batch, 1.0)

    def _windows(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The numbers of a device, or of `devices` that hold a model together. memory_bytes, flop_per_s and bytes_per_s are
    those of one. links: host links that carry a switch side by side. peer_bytes_per_s: between devices; None leaves
    their exchange out. shares: of arithmetic, memory and link that are reached.
    """

    name: str
    memory_bytes: float
    flop_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    devices: int = 1
    links: int = 1
    peer_bytes_per_s: float | None = None
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for what in ("memory_bytes", "flop_per_s", "bytes_per_s", "link_bytes_per_s", "devices", "links"):
            if not (0 < getattr(self, what) < math.inf):
                raise InputError(f"{self.name}: {what} is {getattr(self, what)}; it must be above zero and finite")
        if self.peer_bytes_per_s is not None and not self.peer_bytes_per_s > 0:
            raise InputError(f"{self.name}: a rate of {self.peer_bytes_per_s} between devices; it must be above zero")
        if len(self.shares) != 3 or not all(0 < share <= 1 for share in self.shares):
            raise InputError(f"{self.name}: shares of the peak are {self.shares}; three, each above 0 and at most 1")

    @staticmethod
    def of(machine: Machine, dtype: str, link_bytes_per_s: float | None = None) -> Peak:
        """A machine's first device, with the way to where keys and values go: `ram` for devices with memory of their
        own, else `disk`. InputError where there is none and no rate is given.
        """
        device = Device.of(machine)
        unit = next((one for one in machine.compute if one.unit == "gpu"), machine.compute[0])
        others = [name for name in ("ram", "ddr", "disk", "net") if name != unit.tier and machine.has_tier(name)]
        if link_bytes_per_s is None:
            if not others:
                raise InputError(f"{machine.name}: no second tier to switch users to; give --link, such as 20GB/s")
            out, back = machine.bytes_per_s(unit.tier, others[0]), machine.bytes_per_s(others[0], unit.tier)
            link_bytes_per_s = 2 / (1 / out + 1 / back)
        return Peak(
            name=machine.name, memory_bytes=device.capacity_bytes, flop_per_s=device.rate(dtype),
            bytes_per_s=device.bytes_per_s, link_bytes_per_s=link_bytes_per_s,
        )  # fmt: skip

    def times(self, devices: int, links: int = 1) -> Peak:
        """So many of them, tensor parallel: memory, its rate and arithmetic add up, the link only with `links`."""
        return replace(self, devices=devices, links=links)

    @property
    def memory(self) -> float:
        """Bytes of all devices."""
        return self.memory_bytes * self.devices

    @property
    def arithmetic(self) -> float:
        """FLOP/s reached by all devices."""
        return self.flop_per_s * self.devices * self.shares[0]

    @property
    def bandwidth(self) -> float:
        """Bytes per second of memory reached by all devices."""
        return self.bytes_per_s * self.devices * self.shares[1]

    @property
    def link(self) -> float:
        """Bytes per second to the host over all links."""
        return self.link_bytes_per_s * self.links * self.shares[2]

    def exchange_seconds(self, model: ContextModel, tokens: float) -> float:
        """Two sums a layer between devices, in rings, of 16-bit states; 0 where no rate between them is given."""
        if self.peer_bytes_per_s is None or self.devices == 1:
            return 0.0
        ring = 2 * (self.devices - 1) / self.devices
        return 2 * model.layers * ring * 2 * tokens * model.hidden / self.peer_bytes_per_s


PUBLISHED_MODEL = ContextModel(
    name="34b", parameters=34 * GB, weight_bytes=68 * GB, layers=60, kv_heads=8, head_dim=128, attention_width=7168,
    hidden=7168, heads=56,
)  # fmt: skip
"""The paper's running example, of the shape of Yi-34B-200K: 34 billion weights in 16 bits, grouped queries."""
PUBLISHED_ATTENTION = (48, 4096)
"""Layers and width of the attention that the paper's prefill times fit; the shape's own, 60 x 7168, is 2.19 times."""
PUBLISHED_PEAK = Peak(
    name="a100-published", memory_bytes=80 * GIB, flop_per_s=312_000 * GB, bytes_per_s=2_000 * GB,
    link_bytes_per_s=20 * GB,
)  # fmt: skip
"""The paper's A100-80GB: 312 TFLOP/s, 2 TB/s; 20 GB/s over PCIe 4 (recalled). The card's 80 GB are GiB: with 80 x 10^9
bytes not one user of 50K tokens would fit, and one is published."""
