"""Models whose latencies the DistServe paper (arXiv 2401.09670) measured on A100-80G, ready to be planned for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from memwall.simulate.distserve import Served
from memwall.simulate.phase_latency import OPT_13B, OPT_66B

FLOAT16_BYTES = 2
PUBLISHED: Mapping[str, Served] = MappingProxyType(
    {
        "opt-13b": Served(latencies=OPT_13B, layers=40, heads=40, kv_bytes_per_token=2 * 40 * 5120 * FLOAT16_BYTES),
        "opt-66b": Served(latencies=OPT_66B, layers=64, heads=72, kv_bytes_per_token=2 * 64 * 9216 * FLOAT16_BYTES),
    }
)
