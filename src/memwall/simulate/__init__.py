"""What something will cost before it runs: simulators on a virtual clock, and cost models of operations.

base: the seam (`Operation`, `CostModel`, the roofline). Serving on clusters: serving_model (blocks of cells), cluster
(devices and links), tables (measured times), plans (all ways to spread a model), blocks (a block's operations),
iterations (the engine's schedulers on a virtual clock), metrics, report, and apex, which searches. host measures this
machine's tables; parts and testbed carry plans out by two processes, to hold predictions against. Phases apart:
distserve over phase_instances and phase_latency; phase_fit for any model, replan for loads that shift, split_report.
Long contexts: context_model has the sizes of a model and the rates of a device, long_context_peak_analysis the costs at
its peak, context_methods what compression changes, context_sessions users who swap each other out,
context_calibration this machine's numbers, context_report.

Attention's traffic: attention_shape says what is computed, attention_io_complexity has bounds, exact counts and the
choice of a schedule, attention_schedules and attention_gradients carry them out on fast_memory, which counts, or on
memory_trace, whose lines caches serve; attention_levels asks tier by tier of a machine, attention_io_report draws
and tells. Kernels as data: einsum and einsum_cascade are extended Einsums and checked lists of them, einsum_text reads
them, einsum_passes finds how often a rank is gone over, einsum_work counts operations, einsum_run carries any cascade
out, attention_cascades has the known ones. fusemax prices them on an accelerator, with fusemax_energy and
fusemax_workloads; fusemax_report and einsum_report tell.

Address translation: access_traces are accesses of a core and files of them, access_kernels programs that are known to
miss TLBs; core_model has a core, its caches and memory, victima TLBs, walks and what spares them (in C++),
victima_reference and core_reference the same slowly, victima_report tells.

Hardware: hdl turns designs written in Amaranth into Verilog, runs them clock by clock and counts their cells;
xr_npe_hdl is XR-NPE's multiply-add unit, xr_npe_array the array of such units with its bytes, cycles and energy.
FPGA cards: dsp_packing is several narrow products in one multiplier, event_engine units that work side by side,
fpga_llm a language model on them, fpga_designs FlightLLM's and AccLLM's formats and engines.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memwall.simulate.apex import Case as Case
    from memwall.simulate.apex import search as search
    from memwall.simulate.apex import simulate as simulate
    from memwall.simulate.base import CostModel as CostModel
    from memwall.simulate.base import Device as Device
    from memwall.simulate.base import Operation as Operation
    from memwall.simulate.base import Roofline as Roofline
    from memwall.simulate.cluster import Cluster as Cluster
    from memwall.simulate.plans import ServingPlan as ServingPlan
    from memwall.simulate.plans import enumerate_plans as enumerate_plans
    from memwall.simulate.serving_model import Formats as Formats
    from memwall.simulate.serving_model import ServedModel as ServedModel
    from memwall.simulate.tables import read_tables as read_tables

_PLACES = {
    "Case": "memwall.simulate.apex",
    "search": "memwall.simulate.apex",
    "simulate": "memwall.simulate.apex",
    "CostModel": "memwall.simulate.base",
    "Device": "memwall.simulate.base",
    "Operation": "memwall.simulate.base",
    "Roofline": "memwall.simulate.base",
    "Cluster": "memwall.simulate.cluster",
    "ServingPlan": "memwall.simulate.plans",
    "enumerate_plans": "memwall.simulate.plans",
    "Formats": "memwall.simulate.serving_model",
    "ServedModel": "memwall.simulate.serving_model",
    "read_tables": "memwall.simulate.tables",
}


def __getattr__(name: str) -> Any:
    """Names of this package, brought in on demand: a plan asks for one formula, and a server's memory is counted."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
