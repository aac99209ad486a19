"""Prometheus metrics: names end as vLLM's do, under the prefix `memwall:`; `vllm:` aliases for autoscalers on request.

Beyond those: resident bytes by owner and tier, the budget, and how far the plan of memory is from what the system sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from memwall.memory import ledger_error, peak_resident_bytes, resident_bytes
from memwall.serve.memory_map import phases

if TYPE_CHECKING:
    from memwall.engine.switching import SwitchCounts
    from memwall.serve.service import Service

FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PREFIX = "memwall:"


class Latencies:
    """Histograms of what clients wait for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens of a request.", BETWEEN)
        self.request = histogram("e2e_request_latency_seconds", "From arrival to the last token.", WHOLE)


class EngineMetrics:
    """Reads the engine's counts when it is asked. The thread goes on meanwhile: figures may be a step apart."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        """The protocol of prometheus_client."""
        service = self.service
        serving, engine, totals = service.serving, service.serving.engine, service.serving.engine.totals
        pool, model = serving.pool, service.settings.name

        def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
            family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([model], value)
            return family

        def counter(name: str, text: str, value: float) -> CounterMetricFamily:
            family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([model], value)
            return family

        places = Counter(one.status for one in engine.everyone())
        yield gauge("num_requests_running", "Requests that compute.", places["running"])
        yield gauge("num_requests_waiting", "Requests that wait for room.", places["waiting"])
        yield gauge("num_requests_swapped", "Requests set aside on disk.", places["swapped"] + places["arriving"])
        busy = pool.used_pages - engine.pages.idle_pages
        yield gauge("kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", busy / max(pool.limit_pages, 1))
        yield counter("prompt_tokens", "Tokens of prompts that came.", totals.prompt_tokens)
        yield counter("generation_tokens", "Tokens made.", totals.made_tokens)
        yield counter("computed_tokens", "Tokens computed, again or for the first time.", totals.computed_tokens)
        yield counter("iterations", "Steps of the engine.", totals.steps)
        yield counter("prefix_cache_queries", "Tokens looked for among kept beginnings.", totals.prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found there.", totals.prefix_hits)
        yield counter("num_preemptions", "Requests set aside.", sum(totals.preempted.values()))
        yield counter("client_cancellations", "Requests whose client went away.", service.cancelled_by_clients)
        yield from _switches(engine.switch.counts, counter)
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Requests that ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in sorted(dict(totals.finished).items()):
            finished.add_metric([model, reason], count)
        yield finished
        if serving.adapters is not None:
            counts = serving.adapters.counts
            yield gauge("lora_adapters_known", "Adapters that requests may name.", len(serving.adapters.names))
            yield counter("lora_adapter_hits", "Requests whose adapter was in memory.", counts.hits)
            yield counter("lora_adapter_prefetch_hits", "Those because it was read ahead.", counts.prefetch_hits)
            yield counter("lora_adapter_stalls", "Steps that waited for an adapter.", counts.stalls)
            yield counter("lora_adapter_stall_seconds", "Seconds they waited.", counts.stall_seconds)
            yield counter("lora_adapter_loads", "Adapters read.", counts.loads)
        if (told := phases(service)) is not None:
            shares = GaugeMetricFamily(PREFIX + "phase_share_percent", "Of the compute.", labels=["phase"])
            for name in ("prefill", "decode"):
                shares.add_metric([name], told[f"{name}_percent"])
            yield shares
            yield counter("phase_switches", "Changes of shares.", told["switches"])
            yield counter("phase_workers_lost", "Workers that were replaced.", told["lost"])
            if (apart := told["apart"]) is not None:
                used = (apart["used_pages"] - apart["kept_pages"]) / apart["limit_pages"]
                yield gauge("prefill_cache_usage_perc", "Share of the prefill process's pages in use, 0 to 1.", used)
                yield gauge("prompts_offered", "Prompts that are done and not yet handed over.", apart["offered"])
                yield counter("prompts_handed_over", "Prompts handed over.", apart["moved"]["requests"])
                yield counter("hand_over_bytes", "Bytes of keys and values copied for it.", apart["moved"]["nbytes"])
                yield counter("hand_over_seconds", "Seconds of these copies.", apart["moved"]["seconds"])
        yield from self._memory()

    def _memory(self) -> Iterator[Any]:
        serving = self.service.serving
        rows = GaugeMetricFamily(PREFIX + "memory_bytes", "Bytes on the ledger.", labels=["tier", "owner"])
        for row in serving.ledger.rows():
            rows.add_metric([row.tier, row.owner], row.nbytes)
        yield rows
        pages = GaugeMetricFamily(PREFIX + "pool_pages", "Pages in use by tenant.", labels=["tenant"])
        for tenant, count in sorted(serving.pool.usage().items()):
            pages.add_metric([tenant], count)
        yield pages
        if kind := serving.pool.counts.removesuffix("s"):
            told = GaugeMetricFamily(PREFIX + kind + "_pool", f"{kind.title()}s and what they hold.", labels=["what"])
            for name, count in serving.pool.told().items():
                told.add_metric([name], count)
            yield told
        budget = GaugeMetricFamily(PREFIX + "memory_budget_bytes", "The budget.", labels=["tier"])
        if serving.budget_bytes is not None:
            budget.add_metric(["ram"], serving.budget_bytes)
        yield budget
        yield GaugeMetricFamily(
            PREFIX + "resident_memory_bytes", "Resident set of the process.", value=resident_bytes()
        )
        peak = peak_resident_bytes()
        yield GaugeMetricFamily(PREFIX + "resident_memory_peak_bytes", "Its peak.", value=peak)
        error = ledger_error(serving.ledger)
        text = "Ledger against resident set: (ledger - resident) / resident."
        yield GaugeMetricFamily(PREFIX + "memory_plan_error_ratio", text, value=error)
        info = InfoMetricFamily(PREFIX + "cache_config", "How keys and values are kept.")
        pool, limits = serving.pool, serving.engine.limits
        facts = {"block_size": limits.page_tokens, "page_bytes": pool.page_bytes, "num_gpu_blocks": pool.limit_pages}
        info.add_metric([], {name: str(value) for name, value in facts.items()})
        yield info


def _switches(counts: SwitchCounts, counter: Callable[[str, str, float], CounterMetricFamily]) -> Iterator[Any]:
    """Context switches: what was moved, in how many copies, and what it held up."""
    yield counter("swap_out_bytes", "Bytes copied out.", counts.out_bytes)
    yield counter("swap_in_bytes", "Bytes copied back.", counts.in_bytes)
    yield counter("swap_copies", "Copies either way.", counts.out_copies + counts.in_copies)
    yield counter("swap_reused_bytes", "Bytes not copied out again.", counts.clean_bytes)
    yield counter("swap_stall_seconds", "Seconds that steps waited for copies.", counts.stall_seconds)
    yield counter("swap_conflicts", "Times that pages were wanted while being copied out.", counts.conflicts)
    yield counter("swap_overlapped", "Requests brought back beside steps.", counts.overlapped)
    yield counter("swap_waited", "Requests brought back while a step waited.", counts.waited)
    yield counter("swap_steps_during", "Steps that began while a copy was under way.", counts.steps_during)
    yield counter("swap_requests", "Requests whose pages went out.", counts.switched)
    yield counter("swap_page_runs", "Contiguous stretches of pages that these had.", counts.runs)
    yield counter("swap_overwritten_pages", "Pages whose copy gave way to others'.", counts.contaminated_pages)


def exposition(service: Service, *, alias: bool = False) -> bytes:
    """The text that Prometheus reads. alias: the same once more under `vllm:`, for the names that vLLM has too."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineMetrics(service))
    text = generate_latest(registry) + generate_latest(service.latencies.registry)
    return text + text.replace(PREFIX.encode(), b"vllm:") if alias else text
