"""What `memwall probe` measures for plans beside the bare machine: the kernels with the usual weight formats.

A plan takes the same figures (`plan.profile`), and measures what is missing of them itself: so after a probe it has
less to wait for.
"""

from __future__ import annotations

from collections.abc import Callable

from memwall.models.precision import LADDER
from memwall.plan.profile import COLUMNS, load_profile

FORMATS = (*LADDER, "float16", "bfloat16")

Progress = Callable[[int, int, str], None]


def measure_usual(*, threads: int, progress: Progress | None = None) -> dict[str, float]:
    """Measure and keep, anew, for `threads` threads; give named rates for a report.

    `products/FORMAT/N threads` is bytes of weights per second of one token, from memory (the largest working set);
    progress(done, total, what).
    """
    profile, rates = load_profile(threads=threads), {}
    profile.figures = {}
    plural = "thread" if threads == 1 else "threads"
    for done, spec in enumerate(FORMATS):
        if progress is not None:
            progress(done, len(FORMATS) + 1, f"products of {spec}")
        by_working_set = profile.matvec_bytes_per_s(spec, COLUMNS[-1])
        profile.prefill_macs_per_s(spec)
        profile.save()  # format by format: what an interrupt ends is kept as far as it came
        assert by_working_set is not None
        rates[f"products/{spec}/{threads} {plural}"] = by_working_set[-1]
    if progress is not None:
        progress(len(FORMATS), len(FORMATS) + 1, "overheads")
    profile.overhead_seconds()
    profile.save()
    return rates
