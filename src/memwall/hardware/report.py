"""What a probe found: typed figures, plain data for JSON, rows for a table, and the machine they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memwall.errors import InputError
from memwall.hardware.machine import Compute, Link, Machine, Tier
from memwall.hardware.system import Cache, System
from memwall.hardware.units import (
    KIB,
    Bytes,
    BytesPerSecond,
    FlopPerSecond,
    Seconds,
    format_bytes,
    format_flop_rate,
    format_rate,
    format_seconds,
)

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Memory bandwidth. `kind` is read, write or copy (bytes read plus bytes written)."""

    kind: str
    threads: int
    best_bytes_per_s: float
    median_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of one dependent load within a working set of `nbytes`."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Operations per second on registers; a multiply and an add count as two."""

    dtype: str
    threads: int
    best_flop_per_s: float
    median_flop_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRead:
    """Reads of one size with `depth` of them in flight."""

    block_bytes: int
    depth: int
    random: bool
    bytes_per_s: float
    reads_per_s: float
    median_latency_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk under one directory. `direct` says whether the page cache was kept out."""

    directory: str
    file_system: str
    direct: bool
    capacity_bytes: int
    file_bytes: int
    write_bytes_per_s: float
    reads: tuple[DiskRead, ...]

    def read_bytes_per_s(self, block_bytes: int, depth: int = 1, *, random: bool = True) -> float | None:
        """The measured rate at these settings, or None when they were not measured."""
        for read in self.reads:
            if (read.block_bytes, read.depth, read.random) == (block_bytes, depth, random):
                return read.bytes_per_s
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One line of a table: everything is text."""

    group: str
    setting: str
    figure: str
    typical: str
    """The median, where the figure is the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Figures of this machine. Best and median stand side by side: they part when something else was running."""

    memwall_version: str
    measured_at: str
    quick: bool
    instruction_set: str
    system: System
    bandwidths: tuple[Bandwidth, ...]
    latencies: tuple[Latency, ...]
    arithmetic: tuple[Arithmetic, ...]
    disk: Disk | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    """Named rates that other rooms measured on this machine and keep with the report (see `store_rates`)."""

    def bytes_per_s(self, kind: str = "read", threads: int | None = None) -> float:
        """Best memory bandwidth with that many threads; None means the most measured with any number."""
        found = [row.best_bytes_per_s for row in self.bandwidths if row.kind == kind and threads in (None, row.threads)]
        if not found:
            known = sorted({(row.kind, row.threads) for row in self.bandwidths})
            raise InputError(f"no {kind} bandwidth for {threads} threads was measured; there are {known}")
        return max(found)

    def flop_per_s(self, dtype: str, threads: int | None = None) -> float | None:
        """Best rate for a number type, or None when this processor has no instruction for it."""
        found = [
            row.best_flop_per_s for row in self.arithmetic if row.dtype == dtype and threads in (None, row.threads)
        ]
        return max(found, default=None)

    def to_machine(self, name: str = "this-machine") -> Machine:
        """The machine these figures describe: tier `ram`, tier `disk` where one was measured, compute unit `cpu`."""
        reference = f"measured by memwall probe on {self.measured_at}"
        tiers = [
            Tier(
                name="ram",
                capacity_bytes=Bytes(self.system.memory_bytes),
                read_bytes_per_s=BytesPerSecond(self.bytes_per_s("read")),
                write_bytes_per_s=BytesPerSecond(self.bytes_per_s("write")),
                latency_seconds=Seconds(max(row.seconds for row in self.latencies)) if self.latencies else None,
                reference=reference,
            )
        ]
        links = []
        if self.disk is not None:
            single = [row for row in self.disk.reads if row.depth == 1 and row.random]
            smallest = min(single, key=lambda row: row.block_bytes, default=None)
            fastest = max(row.bytes_per_s for row in self.disk.reads)
            tiers.append(
                Tier(
                    name="disk",
                    capacity_bytes=Bytes(self.disk.capacity_bytes),
                    read_bytes_per_s=BytesPerSecond(fastest),
                    write_bytes_per_s=BytesPerSecond(self.disk.write_bytes_per_s),
                    latency_seconds=Seconds(smallest.median_latency_seconds) if smallest else None,
                    reference=f"{reference} in {self.disk.directory}",
                )
            )
            links.append(Link(source="disk", target="ram", bytes_per_s=BytesPerSecond(fastest), reference=reference))
        dtypes = {row.dtype: FlopPerSecond(self.flop_per_s(row.dtype) or 0.0) for row in self.arithmetic}
        compute = [Compute(unit="cpu", tier="ram", flop_per_s=dtypes, reference=reference)] if dtypes else []
        return Machine(
            name=name,
            title=f"{self.system.processor}, {self.system.num_processors} processors",
            kind="measured",
            tiers=tuple(tiers),
            links=tuple(links),
            compute=tuple(compute),
            notes=" ".join(self.notes),
        )

    def rows(self) -> list[ProbeRow]:
        """Every figure as a line of text, in groups."""
        rows = [
            ProbeRow(
                group="memory",
                setting=f"{row.kind}, {_plural(row.threads, 'thread')}",
                figure=format_rate(row.best_bytes_per_s),
                typical=format_rate(row.median_bytes_per_s),
            )
            for row in self.bandwidths
        ]
        for latency in self.latencies:
            setting = f"one load within {format_bytes(latency.nbytes)}"
            rows.append(ProbeRow(group="latency", setting=setting, figure=format_seconds(latency.seconds), typical=""))
        for row in self.arithmetic:
            rows.append(
                ProbeRow(
                    group="arithmetic",
                    setting=f"{row.dtype}, {_plural(row.threads, 'thread')}",
                    figure=format_flop_rate(row.best_flop_per_s),
                    typical=format_flop_rate(row.median_flop_per_s),
                )
            )
        rows += [
            ProbeRow(group="kernels", setting=name.replace("/", ", "), figure=format_rate(rate), typical="")
            for name, rate in self.rates.items()
        ]
        return rows + self._disk_rows()

    def _disk_rows(self) -> list[ProbeRow]:
        if self.disk is None:
            return []
        rows = [
            ProbeRow(
                group="disk", setting="write in order", figure=format_rate(self.disk.write_bytes_per_s), typical=""
            )
        ]
        for read in self.disk.reads:
            order = "random" if read.random else "in order"
            rows.append(
                ProbeRow(
                    group="disk",
                    setting=f"read {order}, {read.block_bytes // KIB} KiB, {read.depth} in flight",
                    figure=format_rate(read.bytes_per_s),
                    typical=f"{format_seconds(read.median_latency_seconds)} each",
                )
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain data with units in the names; `from_json` undoes it."""
        data = asdict(replace(self, rates={}))
        data["rates"] = dict(self.rates)
        return {"format": FORMAT_VERSION, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeReport:
        """The report that `to_json` described; InputError when it is of another version or not one at all."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT_VERSION:
            raise InputError(f"not a probe report of format {FORMAT_VERSION}")
        try:
            row = {key: value for key, value in data.items() if key != "format"}
            system = dict(row["system"])
            system["caches"] = tuple(Cache(**cache) for cache in system["caches"])
            row["system"] = System(**system)
            row["bandwidths"] = tuple(Bandwidth(**item) for item in row["bandwidths"])
            row["latencies"] = tuple(Latency(**item) for item in row["latencies"])
            row["arithmetic"] = tuple(Arithmetic(**item) for item in row["arithmetic"])
            row["notes"] = tuple(row["notes"])
            if row["disk"] is not None:
                disk = dict(row["disk"])
                disk["reads"] = tuple(DiskRead(**item) for item in disk["reads"])
                row["disk"] = Disk(**disk)
            return cls(**row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a probe report: {error}") from None


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
