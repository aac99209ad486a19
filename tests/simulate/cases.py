"""Models, clusters and loads that tests of this room share."""

from __future__ import annotations

from memwall.engine.arrivals import Load
from memwall.hardware import load_machine
from memwall.simulate.cluster import Cluster
from memwall.simulate.serving_model import Attention, Experts, FeedForward, Formats, ServedModel


def dense(blocks: int = 8, hidden: int = 512, heads: int = 8, kv_heads: int = 4, filters: int = 1536) -> ServedModel:
    attention = Attention(hidden=hidden, heads=heads, kv_heads=kv_heads, head_size=hidden // heads)
    return ServedModel(
        name="dense", hidden=hidden, vocabulary=1000, blocks=blocks,
        cells=(attention, FeedForward(hidden=hidden, filters=filters)),
    )  # fmt: skip


def sparse(blocks: int = 8, experts: int = 8, chosen: int = 2) -> ServedModel:
    return ServedModel(
        name="sparse", hidden=512, vocabulary=1000, blocks=blocks,
        cells=(
            Attention(hidden=512, heads=8, kv_heads=4, head_size=64),
            Experts(hidden=512, filters=768, experts=experts, chosen=chosen),
        ),
    )  # fmt: skip


def llama_70b(formats: Formats | None = None) -> ServedModel:
    return ServedModel(
        name="Llama3-70B", hidden=8192, vocabulary=128256, blocks=80, formats=formats or Formats(),
        cells=(
            Attention(hidden=8192, heads=64, kv_heads=8, head_size=128),
            FeedForward(hidden=8192, filters=28672),
        ),
    )  # fmt: skip


def h100(per_node: int = 8, nodes: int = 1) -> Cluster:
    return Cluster.of(load_machine("h100-sxm"), nodes=nodes, per_node=per_node, network_bytes_per_s=5e10)


def at_once(count: int, prompt: int = 100, output: int = 10) -> tuple[Load, ...]:
    return tuple(Load(at=0.0, prompt_tokens=prompt + i % 7, output_tokens=output + i % 3) for i in range(count))
