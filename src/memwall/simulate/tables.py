"""Measured times of operations, read from CSV tables and interpolated.

Formats as in apex_plus, columns by name, times in microseconds, energies (where a table has them) in microjoules:

- gemm.csv: gpu, dtype, m, k, n, time(us)[, energy(uJ)]: weight rows, columns, tokens;
- attention.csv: gpu, dtype, head_size, heads, kv_heads, batch, queries, seq_len, time(us): queries of each sequence,
  keys that its last one sees;
- all_reduce.csv, all_gather.csv, reduce_scatter.csv, alltoall.csv, sendrecv.csv: gpu, num_nodes, num_gpus_per_node,
  dtype, size(kb), time(us): bytes of the whole tensor, KiB;
- pass.csv: gpu, name, rows, time(us): what is no product, by the rows that go through.

Interpolation as APEX does it (Lin 2024, arXiv 2411.17651, section 4): n is rounded up to 128, or to 64 where it is no
more, unless the table knows smaller n, and is linear between neighbours then; (m, k) in one direction linear, in both
by r = sqrt(r1 * r2) between the nearest row below in both and the nearest above in both; keys of attention are rounded
up to 16. Collectives are linear in size and grow in proportion beyond the largest.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memwall.errors import InputError
from memwall.hardware.units import KIB
from memwall.simulate.base import COLLECTIVES, Cost, Device, Operation
from memwall.simulate.cluster import LINK_LOAD

US = 1e-6
LARGEST_FILE_BYTES = 64 << 20
MOST_ROWS = 2_000_000
DTYPES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp8": "float8", "float8": "float8"}
COMPUTE_LOAD = 0.85
"""Load of a device during a measured operation whose energy the table does not tell (model)."""
Curve = tuple[list[float], list[float]]


def rounded_tokens(tokens: float, smallest: float) -> float:
    """The n that a table is looked up with."""
    if smallest < 64:
        return tokens
    return 64.0 if tokens <= 64 else math.ceil(tokens / 128) * 128.0


def along(curve: Curve, x: float) -> float:
    """Linear between neighbours, constant below the first; beyond the last in whole multiples of it and a rest."""
    xs, ys = curve
    if x <= xs[0]:
        return ys[0]
    if x > xs[-1]:
        times, rest = divmod(x, xs[-1])
        return times * ys[-1] + (along(curve, rest) if rest else 0.0)
    at = bisect_left(xs, x)
    if xs[at] == x:
        return ys[at]
    share = (x - xs[at - 1]) / (xs[at] - xs[at - 1])
    return ys[at - 1] + share * (ys[at] - ys[at - 1])


def grow(curve: Curve, x: float) -> float:
    """As `along`, but in proportion beyond the last."""
    xs, ys = curve
    return ys[-1] * x / xs[-1] if x > xs[-1] else along(curve, x)


@dataclass(slots=True)
class GemmTable:
    """Times of products of one device and number type, by (m, k) and n."""

    curves: dict[tuple[float, float], Curve] = field(default_factory=dict)

    def seconds(self, m: float, k: float, n: float) -> float | None:
        """None where nothing brackets (m, k)."""
        return self._exact(m, k, n) if (m, k) in self.curves else self._between(m, k, n)

    def _exact(self, m: float, k: float, n: float) -> float:
        curve = self.curves[m, k]
        return along(curve, rounded_tokens(n, curve[0][0]))

    def _between(self, m: float, k: float, n: float) -> float | None:
        line = self._on_line([(p[0], p) for p in self.curves if p[1] == k], m, n)
        if line is None:
            line = self._on_line([(p[1], p) for p in self.curves if p[0] == m], k, n)
        if line is not None:
            return line
        below = [p for p in self.curves if p[0] < m and p[1] < k]
        above = [p for p in self.curves if p[0] > m and p[1] > k]
        if not below or not above:
            return None
        low, high = max(below, key=lambda p: p[0] * p[1]), min(above, key=lambda p: p[0] * p[1])
        share = math.sqrt((m - low[0]) / (high[0] - low[0]) * (k - low[1]) / (high[1] - low[1]))
        first, last = self._exact(*low, n), self._exact(*high, n)
        return first + share * (last - first)

    def _on_line(self, points: Sequence[tuple[float, tuple[float, float]]], x: float, n: float) -> float | None:
        ordered = sorted(points)
        places = [place for place, _ in ordered]
        at = bisect_left(places, x)
        if at in (0, len(places)):
            return None
        share = (x - places[at - 1]) / (places[at] - places[at - 1])
        first, last = self._exact(*ordered[at - 1][1], n), self._exact(*ordered[at][1], n)
        return first + share * (last - first)


@dataclass(slots=True)
class AttentionTable:
    """Times of attention of one head shape: by sequences that decode and their keys, and by a prompt's queries and
    keys.
    """

    decode: dict[float, Curve] = field(default_factory=dict)
    prompt: dict[float, Curve] = field(default_factory=dict)

    def seconds(self, batch: float, queries: float, keys: float) -> float | None:
        """Of `batch` sequences alike."""
        if queries <= 1:
            return _surface(self.decode, batch, keys)
        one = _surface(self.prompt, queries, keys)
        return None if one is None else batch * one


def _surface(curves: Mapping[float, Curve], x: float, y: float) -> float | None:
    """Linear in both directions, in proportion beyond the last."""
    if not curves:
        return None
    xs = sorted(curves)
    at = min(bisect_right(xs, x), len(xs) - 1)
    low = xs[max(at - 1, 0)] if x < xs[-1] else xs[-1]
    if x >= xs[-1] or low == xs[at] or x <= xs[0]:
        place = xs[-1] if x >= xs[-1] else xs[0]
        return grow(curves[place], y) * max(x / place, 1.0)
    first, last = grow(curves[low], y), grow(curves[xs[at]], y)
    return first + (x - low) / (xs[at] - low) * (last - first)


@dataclass(slots=True)
class Tables:
    """All tables of one device. Energy where no table tells it: see `Device.joules`."""

    device: Device
    gemm: dict[str, GemmTable] = field(default_factory=dict)
    gemm_joules: dict[str, GemmTable] = field(default_factory=dict)
    attention: dict[tuple[str, float, float, float], AttentionTable] = field(default_factory=dict)
    collectives: dict[tuple[str, str, int, int], Curve] = field(default_factory=dict)
    passes: dict[str, Curve] = field(default_factory=dict)

    def cost(self, operation: Operation) -> Cost | None:
        """See `CostModel`."""
        if operation.kind in COLLECTIVES:
            return self._collective(operation)
        seconds, joules = None, None
        if operation.kind == "gemm" and operation.dtype in self.gemm:
            seconds = self.gemm[operation.dtype].seconds(*operation.shape)
            if operation.dtype in self.gemm_joules:
                joules = self.gemm_joules[operation.dtype].seconds(*operation.shape)
        elif operation.kind == "attention":
            seconds = self._attention(operation)
        elif operation.kind == "pass" and operation.name in self.passes:
            seconds = along(self.passes[operation.name], operation.shape[0])
        if seconds is None:
            return None
        seconds *= operation.repeat
        told = self.device.joules(seconds, COMPUTE_LOAD) if joules is None else joules * operation.repeat
        return Cost(seconds, told)

    def _attention(self, operation: Operation) -> float | None:
        head_size, heads, kv_heads, batch, queries, keys = operation.shape
        keys = math.ceil(keys / 16) * 16.0
        table = self.attention.get((operation.dtype, head_size, heads, kv_heads))
        if table is not None:
            return table.seconds(batch, queries, keys)
        if operation.dtype == "float8":  # the paper's rule where float8 was not profiled
            table = self.attention.get(("float16", head_size, heads, kv_heads))
            half = None if table is None else table.seconds(batch, queries, keys)
            return None if half is None else half / 1.5
        return None

    def _collective(self, operation: Operation) -> Cost | None:
        nodes, per_node = (int(n) for n in operation.shape)
        if nodes * per_node <= 1:
            return Cost(0.0, 0.0)
        # a message is bytes whatever is in it: float8 finds float16's rows at the size it has
        curve = self.collectives.get((operation.kind, "float16", nodes, per_node))
        if curve is None:
            return None
        seconds = grow(curve, operation.link_bytes / KIB) * operation.repeat
        return Cost(seconds, self.device.joules(seconds, LINK_LOAD))


def read_tables(folder: Path, device: Device, gpu: str | None = None) -> Tables:
    """All tables of a folder; gpu: rows of this device alone, where a file holds several.

    InputError for a folder without any, a missing column, or a figure that is none.
    """
    tables, found = Tables(device), False
    collected: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    for name in ("gemm", "attention", "pass", *COLLECTIVES):
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        found = True
        for row in _rows(path):
            if gpu is None or row.text("gpu") == gpu:
                _sort_in(name, row, collected)
    if not found:
        raise InputError(
            f"{folder}: no table here; it should hold gemm.csv, attention.csv or {', '.join(COLLECTIVES)} as .csv"
        )
    for key, points in collected.items():
        _put(tables, key, _curve(points))
    return tables


@dataclass(frozen=True, slots=True)
class _Row:
    path: Path
    number: int
    values: Mapping[str, str]

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if value is None:
            raise InputError(f"{self.path}: row {self.number}: no column {name!r}; it has {', '.join(self.values)}")
        return value.strip()

    def number_of(self, name: str) -> float:
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise InputError(f"{self.path}: row {self.number}: {name} is {text[:40]!r}, no figure of zero or more")
        return value


def _rows(path: Path) -> Iterator[_Row]:
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes is too large for a table")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                if number > MOST_ROWS:
                    raise InputError(f"{path}: more than {MOST_ROWS:,} rows")
                yield _Row(path, number, {str(k).strip().lower(): v or "" for k, v in row.items() if k is not None})
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table: {error}") from None


def _sort_in(name: str, row: _Row, collected: dict[tuple[object, ...], list[tuple[float, float]]]) -> None:
    """A row's point under the curve it belongs to."""
    seconds = row.number_of("time(us)") * US
    if name == "pass":
        collected["pass", row.text("name")].append((row.number_of("rows"), seconds))
        return
    dtype = DTYPES.get(row.text("dtype"), row.text("dtype"))
    if name == "gemm":
        place = (row.number_of("m"), row.number_of("k"))
        collected["gemm", dtype, *place].append((row.number_of("n"), seconds))
        if row.values.get("energy(uj)"):
            collected["joules", dtype, *place].append((row.number_of("n"), row.number_of("energy(uj)") * US))
    elif name == "attention":
        heads = [row.number_of(each) for each in ("head_size", "heads", "kv_heads")]
        batch, queries = row.number_of("batch"), row.number_of("queries")
        side = ("decode", batch) if queries <= 1 else ("prompt", queries)
        scale = 1.0 if queries <= 1 else 1 / max(batch, 1.0)
        collected["attention", dtype, *heads, *side].append((row.number_of("seq_len"), seconds * scale))
    else:
        group = (int(row.number_of("num_nodes")), int(row.number_of("num_gpus_per_node")))
        collected["collective", name, dtype, *group].append((row.number_of("size(kb)"), seconds))


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Ordered by place; of several times at one place the mean."""
    by_place: dict[float, list[float]] = defaultdict(list)
    for x, y in points:
        by_place[x].append(y)
    xs = sorted(by_place)
    return xs, [sum(by_place[x]) / len(by_place[x]) for x in xs]


def _put(tables: Tables, key: tuple[object, ...], curve: Curve) -> None:
    match key:
        case ("gemm", str(dtype), float(m), float(k)):
            tables.gemm.setdefault(dtype, GemmTable()).curves[m, k] = curve
        case ("joules", str(dtype), float(m), float(k)):
            tables.gemm_joules.setdefault(dtype, GemmTable()).curves[m, k] = curve
        case ("attention", str(dtype), float(size), float(heads), float(kv), side, float(place)):
            table = tables.attention.setdefault((dtype, size, heads, kv), AttentionTable())
            (table.decode if side == "decode" else table.prompt)[place] = curve
        case ("collective", str(kind), str(dtype), int(nodes), int(per_node)):
            tables.collectives[kind, dtype, nodes, per_node] = curve
        case ("pass", str(name)):
            tables.passes[name] = curve
