"""Models as an accelerator sees them: attention of all heads, and the products around it, of one layer.

The published ones are BERT, TrXL, T5 and XLM with 64 sequences. Any model that memwall reads is one too: heads that
share keys are rows of one problem, a gated feed-forward has three products, and of experts each token passes a few. All
layers are taken as alike; windows and masks are left out: every query sees all keys.

Source: FuseMax, Nayak 2024, arXiv 2406.10491, section 6 (models; projections and feed-forward at full use of the matrix
array, cycles = multiply-adds / R^2).
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.errors import InputError
from memwall.models.config import ModelConfig
from memwall.simulate.attention_shape import MOST_TOKENS
from memwall.simulate.fusemax import Accelerator, Run, Shape, price

PUBLISHED_LENGTHS = tuple(1024 * 4**power for power in range(6))
PUBLISHED_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A product of every token, or of `times` as many, with one of `copies` matrices of inputs x outputs."""

    name: str
    inputs: int
    outputs: int
    times: int = 1
    copies: int = 1

    def macs(self, tokens: int) -> int:
        """Multiply-adds."""
        return tokens * self.times * self.inputs * self.outputs

    def values(self, tokens: int) -> int:
        """Values from and to DRAM: inputs, outputs and matrices once."""
        used = min(self.copies, tokens * self.times)
        return tokens * self.times * (self.inputs + self.outputs) + used * self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One layer of a model on `batch` sequences."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    products: tuple[Linear, ...]
    batch: int = PUBLISHED_BATCH

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MOST_TOKENS:
            raise InputError(f"batch {self.batch}: from 1 to {MOST_TOKENS:,}")

    def shape(self, tokens: int) -> Shape:
        """Attention of as many queries as keys."""
        if not 1 <= tokens <= MOST_TOKENS:
            raise InputError(f"tokens {tokens}: from 1 to {MOST_TOKENS:,}")
        return Shape(
            problems=self.batch * self.kv_heads, rows=tokens * (self.heads // self.kv_heads), keys=tokens,
            key_size=self.head_size, value_size=self.head_size,
        )  # fmt: skip

    @staticmethod
    def of(config: ModelConfig, name: str, batch: int = PUBLISHED_BATCH) -> Workload:
        """A layer of any model with attention; InputError for one without."""
        if config.ssm is not None:
            raise InputError(f"{name}: a {config.family} model has no attention; give one that has")
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, filters, experts = config.hidden_size, config.intermediate_size, config.num_experts
        forms = {"times": config.num_experts_per_token, "copies": experts} if experts else {}
        products = [
            Linear(name="q", inputs=hidden, outputs=query),
            Linear(name="k", inputs=hidden, outputs=key),
            Linear(name="v", inputs=hidden, outputs=key),
            Linear(name="out", inputs=query, outputs=hidden),
        ]
        if experts:
            products.append(Linear(name="router", inputs=hidden, outputs=experts))
        for part in ("gate", "up") if config.gated else ("up",):
            products.append(Linear(name=part, inputs=hidden, outputs=filters, **forms))
        products.append(Linear(name="down", inputs=filters, outputs=hidden, **forms))
        return Workload(name=name, heads=config.num_heads, kv_heads=config.num_kv_heads, head_size=config.head_dim,
                        products=tuple(products), batch=batch)  # fmt: skip


def _published(name: str, heads: int, head_size: int, hidden: int, filters: int) -> Workload:
    inner = heads * head_size
    return Workload(
        name=name, heads=heads, kv_heads=heads, head_size=head_size,
        products=(
            *(Linear(name=part, inputs=hidden, outputs=inner) for part in ("q", "k", "v")),
            Linear(name="out", inputs=inner, outputs=hidden), Linear(name="up", inputs=hidden, outputs=filters),
            Linear(name="down", inputs=filters, outputs=hidden),
        ),
    )  # fmt: skip


PUBLISHED: dict[str, Workload] = {
    each.name: each
    for each in (
        _published("BERT", 12, 64, 768, 3072),
        _published("TrXL", 16, 64, 1024, 4096),
        _published("T5", 8, 64, 512, 2048),
        _published("XLM", 16, 128, 2048, 8192),
    )
}


def product_cycles(workload: Workload, tokens: int, machine: Accelerator) -> int:
    """Cycles of the products around attention, each at full use of the matrix array."""
    return sum(-(-each.macs(workload.batch * tokens) // machine.array**2) for each in workload.products)


def product_seconds(workload: Workload, tokens: int, machine: Accelerator) -> float:
    """Their time: of each the longer of arithmetic and DRAM."""
    whole = workload.batch * tokens
    return sum(
        max(
            -(-each.macs(whole) // machine.array**2) / machine.clock_hz,
            machine.word_bytes * each.values(whole) / machine.dram_bytes_per_s,
        )
        for each in workload.products
    )


def layer_seconds(run: Run, workload: Workload, tokens: int) -> float:
    """Attention and the products around it."""
    return run.seconds + product_seconds(workload, tokens, run.machine)


def price_workload(design: str, workload: Workload, tokens: int, machine: Accelerator | None = None) -> Run:
    """Attention of a workload by a design."""
    return price(design, workload.shape(tokens), machine)
