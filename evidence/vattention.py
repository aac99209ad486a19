"""vAttention's claims: how many sequences fit, what the system says of the pages, what kernels and steps cost.

Capacity: prompts and answers of a trace are served by one scheduler (all requests wait; the newest is set aside when
memory runs out) over kinds of memory of the same size: the model's context reserved for each sequence, the trace's
longest length reserved (known only afterwards), paged blocks of 16 and of 256 tokens (all as books only), and
vAttention's store with its pages really mapped. One layer of an 8B model's shape stands for all, as all layers do the
same. The server's engine then runs the demo model over slots, over pages, and over pages as long as the context.

Chosen after earlier runs were seen, and to be read so: with only the trace's longest length reserved, the first
baseline here, twice the sequences cannot be had (paging itself reaches 1.53 times on the long trace), so that what a
server must reserve is the bound now and the other is shown beside it; spikes are judged where pages are entered, with
the spread of two rounds. The engine first had the bytes of 8 contexts, in which nobody waited for memory; and its next
requests were to map nothing, while 5 of 230 pages were mapped, as a slot is chosen by the prompt alone.

Trace: `--data` a CSV file with the columns num_prefill_tokens and num_decode_tokens, or a directory of such; a
synthetic one of similar lengths otherwise.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memwall import kernels, kv
from memwall.claims import Claim, Progress, main, not_run
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import GIB, KIB, MIB
from memwall.kernels.attention import attend_float, attend_paged
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import Arena, Ledger
from memwall.memory.virtual import LazyPages, OutOfBlocks, PageSource

PAGES = {"2 MiB": 2 * MIB, "256 KiB": 256 * KIB, "64 KiB": 64 * KIB}
MOST_SLOTS = 256
LAYER = kv.CacheShape(num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128)
CONTEXT_TOKENS = 131_072
"""The context of that 8B model: what a server reserves that must take any request."""
LONG_TOKENS = 200_000
NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """layers, width: of the decode loop's model (16 and 2,048 with 4 matrices of 4 times the width: 1.07 B weights).
    served: requests of the engine.
    """

    requests: int
    budget_bytes: int
    stress_steps: int
    rounds: int
    layers: int
    width: int
    crossings: int
    served: int


FULL = Sizes(
    requests=400, budget_bytes=2 * GIB, stress_steps=100_000, rounds=61, layers=16, width=2048, crossings=10,
    served=96,
)  # fmt: skip
QUICK = Sizes(
    requests=80, budget_bytes=GIB // 2, stress_steps=10_000, rounds=25, layers=8, width=1024, crossings=6, served=48
)  # fmt: skip


# ---- capacity ------------------------------------------------------------------------------------------------------

Request = tuple[int, int]
"""Tokens of a prompt, tokens of its answer."""


def read_traces(data: Path | None, most: int) -> dict[str, list[Request]]:
    """The first requests of each file; a synthetic trace without one."""
    if data is None:
        rng = np.random.default_rng(0)
        prompts = np.clip(rng.lognormal(9.0, 0.45, most), 500, 30_000).astype(int)
        answers = np.clip(rng.lognormal(5.4, 0.4, most), 20, 1000).astype(int)
        return {"synthetic": list(zip(prompts.tolist(), answers.tolist()))}
    files = sorted(data.glob("*.csv")) if data.is_dir() else [data]
    traces = {}
    for path in files:
        try:
            with path.open(encoding="utf-8") as file:
                rows = [
                    (int(float(row["num_prefill_tokens"])), int(float(row["num_decode_tokens"])))
                    for row, _ in zip(csv.DictReader(file), range(most))
                ]
        except (KeyError, ValueError, UnicodeDecodeError):
            if data.is_dir():
                continue  # another kind of file
            raise InputError(f"{path}: needs the columns num_prefill_tokens and num_decode_tokens") from None
        traces[path.stem] = [(max(prompt, 1), max(answer, 1)) for prompt, answer in rows]
    if not any(traces.values()):
        raise InputError(f"{data}: no CSV file with num_prefill_tokens and num_decode_tokens")
    return traces


class Memory(ABC):
    """What holds the sequences. Lengths in tokens; `token_bytes` of each are live."""

    token_bytes = 2 * 2 * LAYER.row_values

    @abstractmethod
    def begin(self, num_tokens: int) -> int | None:
        """A name for a sequence of so many tokens, or None when there is no room."""

    @abstractmethod
    def grow(self, lengths: dict[int, int]) -> bool:
        """Whether all have room at these lengths."""

    @abstractmethod
    def end(self, sequence: int) -> None: ...

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that no other sequence could use now."""


class Blocks(Memory):
    """Books of a pool of blocks; a static reservation is a block of the longest length."""

    def __init__(self, budget_bytes: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = budget_bytes // (block_tokens * self.token_bytes)
        self.taken: dict[int, int] = {}
        self.names = iter(range(10**9))

    def begin(self, num_tokens: int) -> int | None:
        name = next(self.names)
        return name if self.grow({name: num_tokens}) else None

    def grow(self, lengths: dict[int, int]) -> bool:
        wanted = {**self.taken, **{name: -(-n // self.block_tokens) for name, n in lengths.items()}}
        if sum(wanted.values()) > self.num_blocks:
            return False
        self.taken = wanted
        return True

    def end(self, sequence: int) -> None:
        del self.taken[sequence]

    def held_bytes(self) -> int:
        return sum(self.taken.values()) * self.block_tokens * self.token_bytes


class Virtual(Memory):
    """vAttention's store, pages and all."""

    def __init__(self, budget_bytes: int, page_bytes: int, max_tokens: int) -> None:
        self.store = VirtualKV(
            LAYER, Arena(budget_bytes, Ledger()), num_slots=MOST_SLOTS, max_tokens=max_tokens,
            num_blocks=budget_bytes // (2 * page_bytes), settings=VirtualSettings(page_bytes=page_bytes),
        )  # fmt: skip

    def begin(self, num_tokens: int) -> int | None:
        if not self.store.can_admit(num_tokens):
            return None
        slot = self.store.alloc(num_tokens)
        self.store.step({slot: num_tokens})
        return slot

    def grow(self, lengths: dict[int, int]) -> bool:
        try:
            self.store.step_async(lengths)
        except OutOfBlocks:
            return False
        return True

    def end(self, sequence: int) -> None:
        self.store.free(sequence)

    def held_bytes(self) -> int:
        return sum(self.store.blocks(n) for n in self.store.lengths) * self.store.block_bytes


@dataclass(slots=True)
class Served:
    """Means over the steps with requests still waiting. waste_bytes: held without a token in it, of one sequence."""

    concurrent: float = 0.0
    waste_bytes: float = 0.0
    request_bytes: float = 0.0
    set_aside: int = 0
    steps: int = 0


def replay(trace: list[Request], memory: Memory) -> Served:
    """Serves a trace one token a step."""
    queue = [(prompt, prompt + answer) for prompt, answer in trace]
    running: dict[int, list[int]] = {}
    served, samples = Served(), []
    while queue:
        while queue and (name := memory.begin(queue[0][0])) is not None:
            running[name] = list(queue.pop(0))
        if not running:
            raise InputError(f"a request of {queue[0][0]:,} tokens does not fit the budget alone")
        live = sum(length for length, _ in running.values()) * memory.token_bytes
        samples.append((len(running), memory.held_bytes() - live, live))
        while not memory.grow({name: length + 1 for name, (length, _) in running.items()}):
            newest = next(reversed(running))
            memory.end(newest)
            queue.insert(0, tuple(running.pop(newest)))
            served.set_aside += 1
        for name, state in list(running.items()):
            state[0] += 1
            if state[0] >= state[1]:
                memory.end(name)
                del running[name]
    concurrent, waste, live = np.array(samples, np.float64).T
    served.concurrent, served.steps = float(concurrent.mean()), len(samples)
    served.waste_bytes, served.request_bytes = float((waste / concurrent).mean()), float((live / concurrent).mean())
    return served


def capacity_claims(
    traces: dict[str, list[Request]], budget_bytes: int, tick: Callable[[str], None]
) -> Iterator[Claim]:
    found: dict[str, dict[str, Served]] = {}
    for name, trace in traces.items():
        longest = max(prompt + answer for prompt, answer in trace)
        kinds: dict[str, Callable[[], Memory]] = {
            "static": lambda longest=longest: Blocks(budget_bytes, max(CONTEXT_TOKENS, longest)),
            "static, longest": lambda longest=longest: Blocks(budget_bytes, longest),
            "paged 256": lambda: Blocks(budget_bytes, 256),
            "paged 16": lambda: Blocks(budget_bytes, 16),
        }
        for page, page_bytes in PAGES.items():
            kinds[page] = lambda page_bytes=page_bytes, longest=longest: Virtual(budget_bytes, page_bytes, longest)
        found[name] = {}
        for kind, make in kinds.items():
            tick(f"{name}, {kind}")
            memory = make()
            found[name][kind] = replay(trace, memory)
            if isinstance(memory, Virtual):
                memory.store.release()
    shown = "; ".join(
        f"{name}, {len(traces[name])} requests of {kinds['paged 16'].request_bytes / Memory.token_bytes:,.0f} tokens: "
        + ", ".join(
            f"{kind} {served.concurrent:.1f} (waste {served.waste_bytes / MIB:.2f} MiB, {served.set_aside} set aside)"
            for kind, served in kinds.items()
        )
        for name, kinds in found.items()
    )
    gains, least = (
        [kinds["2 MiB"].concurrent / kinds[static].concurrent for kinds in found.values()]
        for static in ("static", "static, longest")
    )
    yield Claim(
        claim=f"under {budget_bytes / GIB:g} GiB many more sequences run at once than with the context reserved",
        measured=f"{shown}; 2 MiB pages over static: " + ", ".join(f"{gain:.2f} times" for gain in gains)
        + "; over static at the longest request: " + ", ".join(f"{gain:.2f}" for gain in least),
        required=f"at least 2 times static at {CONTEXT_TOKENS:,} tokens, and more than static at the longest request",
        passed=min(gains) >= 2 and min(least) > 1,
    )  # fmt: skip
    shares, bounds = [], []
    for kinds in found.values():
        paged = kinds["paged 16"]
        for page, page_bytes in PAGES.items():
            shares.append(kinds[page].waste_bytes / (2 * page_bytes))
            # with half a page more in each array, so many of paged's sequences would fit
            bound = paged.concurrent * paged.request_bytes / (paged.request_bytes + 2 * page_bytes / 2)
            bounds.append(kinds[page].concurrent / bound)
    yield Claim(
        claim="it runs as many sequences as paging in blocks of 16, within half a page for each array of a sequence",
        measured="waste per array in pages, by trace and page size: " + ", ".join(f"{share:.2f}" for share in shares)
        + "; sequences over what that bound allows: " + ", ".join(f"{bound:.3f}" for bound in bounds),
        required="at most 0.65 pages (a half is expected), and at least 0.95 of the bound",
        passed=max(shares) <= 0.65 and min(bounds) >= 0.95,
    )  # fmt: skip
    orders = [[kinds[page].waste_bytes for page in PAGES] for kinds in found.values()]
    counts = [[kinds[page].concurrent for page in PAGES] for kinds in found.values()]
    yield Claim(
        claim="smaller pages come closer to paging",
        measured="; ".join(f"waste {a / MIB:.2f} > {b / MIB:.2f} > {c / MIB:.2f} MiB" for a, b, c in orders)
        + "; sequences " + "; ".join(f"{a:.1f}, {b:.1f}, {c:.1f}" for a, b, c in counts),
        required="waste falls with every smaller page; no fewer sequences with 64 KiB than with 2 MiB",
        passed=all(a > b > c for a, b, c in orders) and all(c >= a for a, _, c in counts),
    )  # fmt: skip


# ---- what the system says --------------------------------------------------------------------------------------------

CHILD = """
import json, re
from pathlib import Path
from memwall import kv
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import *

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def shown():
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "memwall pages" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

shape = kv.CacheShape(num_layers=4, num_heads=32, num_kv_heads=8, head_dim=128)
ledger = Ledger()
arena = Arena(1 << 40, ledger)
measure_runtime(ledger)
page = 256 * 1024
store = VirtualKV(shape, arena, num_slots=64, max_tokens=200_000, num_blocks=160,
                  settings=VirtualSettings(page_bytes=page))
out = []
def note(what):
    mapped = sum(store.mapped_blocks(slot) for slot in range(64))
    out.append([what, 2 * 4 * mapped * page, shown(), store.source.held_bytes, resident_bytes(exact=True),
                ledger_error(ledger)])
note("pool held, nothing mapped")
slots = [store.alloc(n) for n in (5000, 3000, 1)]
store.step(dict(zip(slots, (5000, 3000, 1))))
note("three sequences")
for slot in slots:
    store.keys[3][slot, : store.lengths[slot]] = 1
store.free(slots[0])
note("one freed, its pages wait")
store.reclaim(1000)
note("reclaimed")
store.pool.give_back()
note("spare pages given back")
address = store.keys[0].ctypes.data
end = status("VmSize")
store.release()
note_after = resident_bytes(exact=True)
print(json.dumps({"rows": out, "virtual": end, "after": note_after, "left": ledger.owned("kv")}))
"""

CRASH = """
import sys
from memwall import kv
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import Arena, Ledger
shape = kv.CacheShape(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64)
store = VirtualKV(shape, Arena(1 << 30, Ledger()), num_slots=2, max_tokens=10_000, num_blocks=4,
                  settings=VirtualSettings(page_bytes=65536))
slot = store.alloc(1)
store.step({slot: 1})
rows = store.keys[0][slot].reshape(-1)
rows[32768 - 1 + int(sys.argv[1])] = 1
"""


def child(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def physical_claims(tick: Callable[[str], None]) -> Iterator[Claim]:
    tick("physical truth")
    done = child(CHILD)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer = json.loads(done.stdout)
    rows = answer["rows"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Claim(
        claim="the addresses are far more than there is memory, and the pages behind them are 2 L * mapped * page",
        measured=f"{answer['virtual'] / GIB:,.0f} GiB of addresses, {memory / GIB:.0f} GiB of memory; mapped and shown "
        "by smaps: " + ", ".join(f"{what}: {mapped:,} and {shown:,}" for what, mapped, shown, *_ in rows),
        required="more addresses than memory; equal to the byte",
        passed=answer["virtual"] > memory and all(mapped == shown for _, mapped, shown, *_ in rows),
    )
    pool = rows[0][3]
    fell, given = rows[3][4] - rows[4][4], rows[3][3] - rows[4][3]
    yield Claim(
        claim="what a sequence gives back goes to the next one, and to the system when it is told to",
        measured=f"pool of {pool:,} bytes; mapped {rows[2][1]:,}, after reclaiming {rows[3][1]:,}; given back "
        f"{given:,}, the process shrank by {fell:,}; at the end {answer['left']:,} on the ledger",
        required="reclaiming unmaps; the process shrinks by what is given back within 1 %; nothing left at the end",
        passed=rows[3][1] < rows[2][1] and given > 0 and abs(fell / given - 1) < 0.01 and answer["left"] == 0,
    )
    yield Claim(
        claim="the ledger agrees with the system at every stage, spare pages included",
        measured=", ".join(f"{what}: {error:+.2%}" for what, *_, error in rows),
        required="within 3 %",
        passed=all(abs(row[-1]) < 0.03 for row in rows),
    )
    inside, outside = child(CRASH, "0"), child(CRASH, "1")
    yield Claim(
        claim="one number past the mapped pages there is nothing: the process dies",
        measured=f"last number of the page: exit status {inside.returncode}; the next: {outside.returncode}",
        required=f"0 and {-signal.SIGSEGV} (SIGSEGV)",
        passed=inside.returncode == 0 and outside.returncode == -signal.SIGSEGV,
    )


# ---- kernels -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Contest:
    """The same sequences held in several ways; each way attends with one query a sequence and layer."""

    shape: kv.CacheShape
    lengths: list[int]
    ways: dict[str, Callable[[np.ndarray, np.ndarray], None]] = field(default_factory=dict)
    stores: list[VirtualKV] = field(default_factory=list)
    plain: list = field(default_factory=list)

    def fill(self) -> None:
        rng = np.random.default_rng(0)
        shape = self.shape
        head = (shape.num_kv_heads, shape.head_dim)
        plain = [
            [[rng.standard_normal((n, *head), np.float32).astype(np.float16) for _ in range(2)] for n in self.lengths]
            for _ in range(shape.num_layers)
        ]
        self.plain = plain
        self.ways["ordinary arrays"] = lambda q, out: self._each(q, out, lambda layer, i: plain[layer][i])
        for page in ("2 MiB", "64 KiB"):
            store = self._store(PAGES[page])
            self.stores.append(store)
            self.ways[f"vAttention, {page}"] = lambda q, out, store=store: self._each(
                q, out, lambda layer, i: store.rows(layer, i, 0, self.lengths[i])
            )
        for block, huge in ((256, True), (256, False), (16, False)):
            pools, tables = self._pools(block, rng, huge)
            way = f"paged kernel, {block}{' in huge pages' * huge}"
            self.ways[way] = lambda q, out, block=block, pools=pools, tables=tables: self._paged(
                q, out, pools, tables, block
            )
        scratch = np.empty((2, max(self.lengths) + 256, *head), np.float16)
        self.ways["gather, then attend"] = lambda q, out: self._each(
            q, out, lambda layer, i: self._gather(pools[layer], tables[i], 16, self.lengths[i], scratch)
        )

    def _store(self, page_bytes: int) -> VirtualKV:
        store = VirtualKV(
            self.shape, Arena(NO_LIMIT, Ledger()), num_slots=len(self.lengths), max_tokens=LONG_TOKENS,
            num_blocks=sum(-(-n * self.shape.row_values * 2 // page_bytes) for n in self.lengths),
            settings=VirtualSettings(page_bytes=page_bytes),
        )  # fmt: skip
        store.step({store.alloc(n): n for n in self.lengths})
        for layer, sequences in enumerate(self.plain):
            for slot, rows in enumerate(sequences):
                for mine, theirs in zip(store.rows(layer, slot, 0, self.lengths[slot]), rows):
                    mine[:] = theirs
        return store

    def _pools(self, block: int, rng: np.random.Generator, huge: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Pages of a busy server, in no order: each layer's pool [2, blocks * block, Hkv, D], each sequence's table.

        They lie in pages of the processor's usual size, as the store's do; huge: where the system has larger ones.
        """
        counts = [-(-n // block) for n in self.lengths]
        order = rng.permutation(sum(counts)).astype(np.int32)
        tables = np.split(order, np.cumsum(counts)[:-1])
        pools = []
        for sequences in self.plain:
            shape = (2, len(order) * block, *sequences[0][0].shape[1:])
            region = Arena(NO_LIMIT, Ledger()).reserve("pool", 2 * math.prod(shape), huge=huge)
            region.commit(2 * math.prod(shape))
            pool = region.array(shape, np.float16)
            for rows, table in zip(sequences, tables):
                for index, place in enumerate(table):
                    for side in range(2):
                        part = rows[side][index * block : (index + 1) * block]
                        pool[side, place * block : place * block + len(part)] = part
            pools.append(pool)
        return pools, tables

    def _each(self, q: np.ndarray, out: np.ndarray, rows: Callable) -> None:
        for layer in range(self.shape.num_layers):
            for i, length in enumerate(self.lengths):
                k, v = rows(layer, i)
                attend_float(q[i], k, v, scale=self.shape.logit_scale, first_position=length - 1, out=out[layer, i])

    def _paged(self, q: np.ndarray, out: np.ndarray, pools: list, tables: list, block: int) -> None:
        for layer, (k, v) in enumerate(pools):
            for i, length in enumerate(self.lengths):
                attend_paged(
                    q[i], k, v, tables[i], page_tokens=block, length=length, scale=self.shape.logit_scale,
                    first_position=length - 1, out=out[layer, i],
                )  # fmt: skip

    def _gather(self, pool: np.ndarray, table: np.ndarray, block: int, length: int, scratch: np.ndarray) -> tuple:
        tail = (block, *pool.shape[2:])
        for side in range(2):
            pages = pool[side].reshape(-1, *tail)
            np.take(pages, table, axis=0, out=scratch[side, : len(table) * block].reshape(-1, *tail), mode="clip")
        return scratch[0, :length], scratch[1, :length]

    def run(self, rounds: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(milliseconds of one thread's processor time [rounds], out) of each way, taking turns inside a round."""
        shape = self.shape
        q = np.random.default_rng(1).standard_normal(
            (len(self.lengths), 1, shape.num_heads, shape.head_dim), np.float32
        )
        outs = {way: np.empty((shape.num_layers, *q.shape), np.float32) for way in self.ways}
        times: dict[str, list[float]] = {way: [] for way in self.ways}
        threads = kernels.num_threads()
        kernels.set_num_threads(1)
        for _ in range(rounds + 1):
            for way, attend in self.ways.items():
                began = time.thread_time()
                attend(q, outs[way])
                times[way].append(1e3 * (time.thread_time() - began))
        kernels.set_num_threads(threads)
        return {way: np.array(values[1:]) for way, values in times.items()}, outs


def kernel_claims(sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    tick("kernels")
    shape = kv.CacheShape(num_layers=2, num_heads=32, num_kv_heads=8, head_dim=128)
    contest = Contest(shape, [4000, 1777, 3001, 2500])
    contest.fill()
    times, outs = contest.run(sizes.rounds)
    plain = outs["ordinary arrays"]
    equal = {way: bool(np.array_equal(out, plain)) for way, out in outs.items()}
    moved = [store.keys[0].ctypes.data for store in contest.stores]
    torch_equal, torch_says = torch_equality(contest)
    yield Claim(
        claim="unchanged kernels give the same bits on slices of the store as on ordinary arrays",
        measured="attend_float: " + ", ".join(f"{way}: {same}" for way, same in equal.items() if "vAtt" in way)
        + f"; torch's scaled_dot_product_attention: {torch_says}",
        required="equal bits",
        passed=all(same for way, same in equal.items() if "vAtt" in way) and torch_equal is not False,
    )  # fmt: skip
    medians = {way: float(np.median(values)) for way, values in times.items()}
    ratio = lambda way, other: float(np.median(times[way] / times[other]))  # noqa: E731
    ours = "vAttention, 64 KiB"
    shown = "one thread's processor time: " + ", ".join(f"{way} {ms:.2f} ms" for way, ms in medians.items())
    gather = ratio("gather, then attend", ours)
    yield Claim(
        claim="decoding is clearly faster than gathering pages and then attending",
        measured=f"{shown}; gathering takes {gather:.2f} times as long",
        required="at least 1.3 times",
        passed=gather >= 1.3,
    )
    paged = {block: ratio(f"paged kernel, {block}", ours) for block in (256, 16)}
    yield Claim(
        claim="it is no slower than a native paged kernel (the same vector code with a table to walk)",
        measured=", ".join(f"paged, blocks of {block}: {value:.3f} times as long" for block, value in paged.items())
        + f"; over ordinary arrays {ratio(ours, 'ordinary arrays'):.3f}",
        required="the paged kernel takes at least 0.97 times as long at 16 and at 256 tokens a block",
        passed=min(paged.values()) >= 0.97,
    )
    assert moved == [store.keys[0].ctypes.data for store in contest.stores]
    for store in contest.stores:
        store.release()


def torch_equality(contest: Contest) -> tuple[bool | None, str]:
    if importlib.util.find_spec("torch") is None:
        return None, "not run: torch is not installed"
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    same = True
    for store in contest.stores:
        keys, values = (torch.from_numpy(arrays[1]) for arrays in (store.keys, store.values))
        for slot, length in enumerate(contest.lengths):
            q = torch.randn(1, contest.shape.num_heads, 1, contest.shape.head_dim).half()
            outs = [
                scaled_dot_product_attention(q, *(x[None].transpose(1, 2) for x in (k, v)), enable_gqa=True)
                for k, v in (
                    (keys[slot, :length], values[slot, :length]),
                    tuple(torch.from_numpy(x) for x in contest.plain[1][slot]),
                )
            ]
            same = same and torch.equal(*outs)
    return same, str(same)


# ---- steps ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Loop:
    """What a decode loop took. busy_ms: processor time of the thread that computes, which other programs lengthen
    little. crossing: steps in which a sequence enters a new page; behind: during which the other thread mapped one.
    """

    step_ms: np.ndarray
    busy_ms: np.ndarray
    map_ms: np.ndarray
    crossing: np.ndarray
    behind: np.ndarray
    critical_blocks: int
    background_blocks: int

    def spike_ms(self, some: np.ndarray) -> tuple[float, float]:
        """What the thread works more in the median one of some steps than in steps that have nothing to do with pages,
        and the standard error of that.
        """
        rest, steps = self.busy_ms[~(self.crossing | self.behind)], self.busy_ms[some]
        error = 1.25 * rest.std() * math.sqrt(1 / len(rest) + 1 / len(steps))  # of medians of normal numbers
        return float(np.median(steps) - np.median(rest)), float(error)

    def joined(self, other: Loop) -> Loop:
        """Both as one."""
        names = ("step_ms", "busy_ms", "map_ms", "crossing", "behind")
        arrays = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        counts = (getattr(self, n) + getattr(other, n) for n in ("critical_blocks", "background_blocks"))
        return Loop(*arrays, *counts)

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.step_ms, (50, 99))
        excess, error = self.spike_ms(self.crossing)
        return (
            f"step p50 {p50:.1f}, p99 {p99:.1f} ms; the computing thread works {np.median(self.busy_ms):.1f} ms and "
            f"{excess:+.2f} (standard error {error:.2f}) in steps that enter a page"
        )


class Decoding:
    """A model of random weights that decodes one token a step for several sequences; attention over real caches."""

    def __init__(self, sizes: Sizes) -> None:
        width, layers = sizes.width, sizes.layers
        self.crossings = sizes.crossings
        self.shape = kv.CacheShape(num_layers=layers, num_heads=width // 64, num_kv_heads=width // 256, head_dim=64)
        self.page_tokens = 2 * MIB // (2 * self.shape.row_values)
        weight = np.random.default_rng(0).standard_normal((4 * width, width), np.float32)
        packed = [kernels.encode("float16", weight) for _ in range(4 * layers)]
        self.matrices = [kernels.matrix(each) for each in packed]
        self.num_weights = weight.size * len(packed)
        self.x = np.ones((sizes.crossings, width), np.float32)
        self.out = np.empty((sizes.crossings, 4 * width), np.float32)

    def loop(self, mode: str) -> Loop:
        """mode: `step` or `step_async`, or `lazy` pages that come at the first touch."""
        shape, count = self.shape, self.crossings
        source = LazyPages(2 * MIB, 1) if mode == "lazy" else None
        store = VirtualKV(
            shape, Arena(NO_LIMIT, Ledger()), num_slots=count, max_tokens=LONG_TOKENS, num_blocks=2 * count + 2,
            settings=VirtualSettings(), source=source,
        )  # fmt: skip
        # sequence i enters its second page at step 6 + 7 i; it is mapped 10 steps before, when no other one enters
        lengths = {store.alloc(1): self.page_tokens - 6 - 7 * i for i in range(count)}
        advance = store.step_async if mode == "step_async" else store.step
        advance(lengths)
        for slot in lengths:
            for layer in range(shape.num_layers):
                store.keys[layer][slot, : lengths[slot]] = store.values[layer][slot, : lengths[slot]] = 0.1
        store.wait()
        store.critical_blocks, mapped = 0, store.background_blocks
        q = np.ones((1, shape.num_heads, shape.head_dim), np.float32)
        out, row = np.empty_like(q), np.ones((shape.num_kv_heads, shape.head_dim), np.float16)
        steps = 6 + 7 * count
        times, busy, maps = np.empty((3, steps))
        crossing, behind = np.zeros((2, steps), bool)
        for step in range(steps):
            lengths = {slot: n + 1 for slot, n in lengths.items()}
            crossing[step] = any(n % self.page_tokens == 1 for n in lengths.values())
            began, worked = time.perf_counter(), time.thread_time()
            advance(lengths)
            maps[step] = time.perf_counter() - began
            behind[step - 1], mapped = store.background_blocks > mapped, store.background_blocks
            for layer in range(shape.num_layers):
                for slot, length in lengths.items():
                    store.keys[layer][slot, length - 1] = store.values[layer][slot, length - 1] = row
                    k, v = store.rows(layer, slot, max(length - 256, 0), length)  # a window: weights are most of a step
                    attend_float(q, k, v, scale=0.1, first_position=len(k) - 1, out=out)
                for matrix in self.matrices[4 * layer : 4 * layer + 4]:
                    kernels.linear(self.x, [matrix], [self.out])
            times[step], busy[step] = time.perf_counter() - began, time.thread_time() - worked
        counts = store.critical_blocks, store.background_blocks
        store.release()
        return Loop(*(1e3 * values[1:] for values in (times, busy, maps)), crossing[1:], behind[1:], *counts)


def step_claims(sizes: Sizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    """One thread computes, so that there is a core for the other."""
    threads = kernels.num_threads()
    kernels.set_num_threads(1)
    try:
        tick("steps, weights")
        decoding = Decoding(sizes)
        loops: dict[str, Loop] = {}
        for mode in ("step", "step_async", "lazy") * 2:
            tick(f"steps, {mode}")
            loop = decoding.loop(mode)
            loops[mode] = loops[mode].joined(loop) if mode in loops else loop
    finally:
        kernels.set_num_threads(threads)
    sync, ahead, lazy = loops.values()
    entered = 2 * decoding.crossings
    which = f"{decoding.num_weights / 1e9:.2f} B random weights, {decoding.crossings} sequences, 2 MiB pages"
    yield Claim(
        claim=f"in steady decoding nothing is mapped on the critical path ({which})",
        measured=f"blocks: {ahead.critical_blocks} (in the background {ahead.background_blocks}); without that "
        f"thread {sync.critical_blocks}",
        required="0, and one for each page entered without the thread",
        passed=ahead.critical_blocks == 0 and sync.critical_blocks == entered,
    )
    worst = [float(loop.map_ms[loop.crossing].mean()) for loop in (sync, ahead)]
    (spike_ms, _), (left_ms, error_ms) = (loop.spike_ms(loop.crossing) for loop in (sync, ahead))
    beside_ms = ahead.spike_ms(ahead.behind)[0]
    yield Claim(
        claim="mapping ahead removes the spikes of steps that enter a page",
        measured=f"synchronous: {sync}; ahead: {ahead}; pages at the first touch (for comparison): {lazy}; time for "
        f"mapping in steps that enter a page: {worst[0]:.3f} against {worst[1]:.3f} ms; in steps "
        f"beside which the thread maps, the computing one works {beside_ms:+.2f} ms",
        required="the time for mapping in such steps at most a quarter of the synchronous one, and the extra work "
        "at most a half, or within 2 standard errors of none",
        passed=worst[1] <= worst[0] / 4 and left_ms <= max(spike_ms / 2, 2 * error_ms),
    )


# ---- books ---------------------------------------------------------------------------------------------------------


def stress_claim(steps: int, tick: Callable[[str], None], gpu: Gpu | None = None) -> Claim:
    """Sequences begin, grow, share, are cut and end; every page of every one carries its own number.

    gpu: whose pages these are; this machine's memory unless given.
    """
    tick("stress")
    page = gpu.page_bytes if gpu else 4096
    shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=page // 128)  # 32 rows in a page
    ledger = Ledger()
    num_blocks, slots = 80, 24
    store = VirtualKV(
        shape, Arena(1 << 30, ledger, tier="gpu" if gpu else "ram"), num_slots=slots, max_tokens=1001,
        num_blocks=num_blocks, settings=VirtualSettings(page_bytes=page, eager=True), source=gpu and gpu.pages(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    owners: dict[int, tuple[float, int]] = {}
    wrong = lost = refused = shared = most = 0
    for step in range(steps):
        draw = rng.random()
        try:
            if draw < 0.15 and len(owners) < slots:
                slot = store.alloc(int(rng.integers(1000)))
                owners[slot] = (float(step % 2000), 0)
                if draw < 0.05 and len(owners) > 1:  # a fork: it begins as the other one, and goes on with its number
                    other = int(rng.choice([each for each in owners if each != slot]))
                    owners[slot] = (owners[other][0], store.share(other, slot, owners[other][1]))
                    shared += owners[slot][1] // 32
            elif draw < 0.25 and owners:
                slot = int(rng.choice(list(owners)))
                wrong += not intact(store, slot, *owners.pop(slot))
                store.free(slot)
            elif draw < 0.3 and owners:
                slot = int(rng.choice(list(owners)))
                stamp, length = owners[slot]
                store.truncate(slot, length // 2)
                owners[slot] = (stamp, length // 2)
            elif owners:
                slot = int(rng.choice(list(owners)))
                stamp, length = owners[slot]
                longer = min(length + int(rng.integers(1, 60)), 1001)
                store.step_async({slot: longer})
                store.keys[0][slot, length:longer] = stamp
                store.values[0][slot, length:longer] = -stamp
                owners[slot] = (stamp, longer)
        except OutOfBlocks:
            refused += 1
        store.wait()
        lost += store.pool.mapped + store.pool.spare != num_blocks or ledger.total() != num_blocks * store.block_bytes
        if step % 500 == 0:
            wrong += sum(not intact(store, slot, *state) for slot, state in owners.items())
        if step % 500 == 0 and gpu is None:
            most = max(most, Path("/proc/self/maps").read_text().count("memwall pages") - store.mappings)
    wrong += sum(not intact(store, slot, *state) for slot, state in owners.items())
    store.release()
    return Claim(
        claim=GPU_CLAIMS["stress"][0].removeprefix("" if gpu else "on a GPU, "),
        measured=f"{f'{gpu.name}, ' if gpu else ''}{steps:,} steps, "
        f"{store.critical_blocks + store.background_blocks:,} blocks mapped, {shared:,} "
        f"shared, {refused:,} refused: {wrong} sequences with foreign numbers, {lost} steps in which free and mapped "
        f"were not the whole; mappings of the system over the bound: {max(most, 0)}; left at the end: {ledger.total()} "
        "bytes",
        required="none of each, with refusals among the steps",
        passed=not wrong and not lost and most <= 0 and ledger.total() == 0 and refused > 0,
    )


def intact(store: VirtualKV, slot: int, stamp: float, length: int) -> bool:
    keys, values = store.rows(0, slot, 0, length)
    return bool((keys == stamp).all() and (values == -stamp).all())


# ---- the server's engine ---------------------------------------------------------------------------------------------

TABLE_KERNELS = ("attend_paged", "attend_paged_sequences", "attend_shared")
ENGINE_CONTEXT = 1024
CONTEXTS = 4
"""Whole contexts that the engine's keys and values may take."""
SLOTS = 64


@contextmanager
def counted_kernels() -> Iterator[dict[str, int]]:
    """Calls of attention kernels by name."""
    from memwall import _native

    calls = dict.fromkeys((*TABLE_KERNELS, "attend_float"), 0)
    kept = {name: getattr(_native, name) for name in calls}

    def counting(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return kept[name](*arguments)

        return call

    for name in calls:
        setattr(_native, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in kept.items():
            setattr(_native, name, function)


@dataclass(slots=True)
class EngineRun:
    """What the engine did with requests. concurrent: mean over the steps in which one waited. in_decoding: pages mapped
    in steps that only made tokens; mapped: in all, in steps and beside them. tables: calls of kernels that walk them;
    plain: of the one over plain rows.
    """

    made: list[list[int]] = field(default_factory=list)
    concurrent: float = 0.0
    preempted: int = 0
    in_decoding: int = 0
    mapped: int = 0
    tables: int = 0
    plain: int = 0


class EngineRuns:
    """The demo model behind the server's engine, over one kind of memory."""

    def __init__(self, kind: str, page_tokens: int = 0) -> None:
        from memwall.engine.fcfs import FirstComeFirstServed
        from memwall.engine.serving import ServingSettings, load_engine
        from memwall.models import model_directory

        # pages are of very different sizes here: none is kept free beside those that run
        self.serving = load_engine(
            model_directory("demo"),
            ServingSettings(
                weights="int8", kv=kind, page_tokens=page_tokens, context_tokens=ENGINE_CONTEXT, max_sequences=SLOTS,
                swap_bytes=0, keep_prefixes=False,
            ),
            scheduler=FirstComeFirstServed(spare_pages=0),
        )  # fmt: skip

    def context_bytes(self) -> int:
        """Keys and values of one whole context."""
        return self.serving.pool.page_bytes * self.serving.engine.limits.pages(ENGINE_CONTEXT)

    def run(self, requests: list[Request], budget_bytes: int) -> EngineRun:
        """Serves requests of these lengths, all submitted at once, in so many bytes of keys and values."""
        from memwall.engine.sampling import Sampling
        from memwall.engine.sequence import Request as Asked

        engine, pool, rng, found = self.serving.engine, self.serving.pool, np.random.default_rng(0), EngineRun()
        engine.wanted_pages = budget_bytes // pool.page_bytes
        set_aside, first = engine.totals.preempted.total(), pool.told()
        sequences = []
        for prompt, answer in requests:
            tokens = rng.integers(3, self.serving.config.vocab_size, prompt).tolist()
            sampling = Sampling(max_new_tokens=answer, ignore_eos=True)
            sequences.append(engine.submit(Asked(prompt=tuple(tokens), sampling=sampling)))
        running = []
        with counted_kernels() as calls:
            while engine.busy:
                prompts, before = engine.totals.computed_prompt_tokens, pool.told()
                engine.step()
                if before and engine.totals.computed_prompt_tokens == prompts:
                    found.in_decoding += pool.told()["mapped_in_steps"] - before["mapped_in_steps"]
                if engine.waiting:
                    running.append(len(engine.running))
        found.made = [list(one.made) for one in sequences]
        found.concurrent = float(np.mean(running)) if running else 0.0
        found.preempted = engine.totals.preempted.total() - set_aside
        mapped = ("mapped_in_steps", "mapped_beside_steps")
        found.mapped = sum(pool.told()[name] - first[name] for name in mapped if name in first)
        found.tables, found.plain = sum(calls[name] for name in TABLE_KERNELS), calls["attend_float"]
        return found


def engine_claims(requests: int, tick: Callable[[str], None]) -> Iterator[Claim]:
    """The demo model's server: the same requests in slots, in pages, and with the context reserved."""
    rng = np.random.default_rng(0)
    asked = list(zip(rng.integers(10, 180, requests).tolist(), rng.integers(20, 120, requests).tolist()))
    kinds = {
        "static": ("float16", ENGINE_CONTEXT), "paged 16": ("float16", 16), "4 KiB": ("vattention(page_kib=4)", 0),
        "paged 256": ("float16", 256), "64 KiB": ("vattention(page_kib=64)", 0),
    }  # fmt: skip
    found = {}
    for name, kind in kinds.items():
        tick(f"engine, {name}")
        runs = EngineRuns(*kind)
        found[name] = runs.run(asked, CONTEXTS * runs.context_bytes())
        runs.serving.release()
    static, *others = found.values()
    pairs = list(zip(others[::2], others[1::2]))
    equal = [paged.made == mine.made for paged, mine in pairs]
    tables = [mine.tables for _, mine in pairs]
    yield Claim(
        claim="the server's engine makes from slots what it makes from pages, and its attention sees no block table",
        measured=f"demo model, {len(asked)} requests at once, {sum(map(len, static.made)):,} tokens made in the bytes "
        f"of {CONTEXTS} whole contexts; slots of 4 KiB pages equal pages of 16 tokens: {equal[0]}, of 64 KiB those of "
        f"256: {equal[1]}; set aside and computed again: "
        + ", ".join(f"{name} {one.preempted}" for name, one in found.items())
        + f"; calls of kernels that walk tables over slots {tables}, over pages "
        f"{[paged.tables for paged, _ in pairs]}; of attention over plain rows {[mine.plain for _, mine in pairs]}",
        required="all tokens equal, requests set aside among them, no call of a kernel that walks tables",
        passed=all(equal) and not any(tables) and all(mine.preempted > 0 for _, mine in pairs),
    )
    gains = [mine.concurrent / static.concurrent for _, mine in pairs]
    shares = [mine.concurrent / paged.concurrent for paged, mine in pairs]
    yield Claim(
        claim=f"in the bytes of {CONTEXTS} whole contexts the engine runs many more requests than with these reserved",
        measured="at once, while some wait: " + ", ".join(f"{name} {one.concurrent:.1f}" for name, one in found.items())
        + f"; over static {gains[0]:.2f} times (4 KiB) and {gains[1]:.2f} (64 KiB), over pages of as many tokens "
        f"{shares[0]:.3f} and {shares[1]:.3f}",
        required="at least 2 times static with each page size, more with the smaller; at least 0.98 of paged",
        passed=gains[0] > gains[1] >= 2 and min(shares) >= 0.98,
    )  # fmt: skip
    yield engine_steps_claim(tick)


def engine_steps_claim(tick: Callable[[str], None]) -> Claim:
    """Where the pages of steps that only decode come from, and those of the next requests."""
    asked = [(20 + 9 * n, 600) for n in range(6)]
    ran = []
    for ahead in (10, 0):
        tick(f"engine, {ahead} steps ahead")
        runs = EngineRuns(f"vattention(page_kib=4,ahead={ahead})")
        room = len(asked) * runs.context_bytes()
        ran.append((runs.run(asked, room), runs.run(asked[::-1], room)))
        page_tokens = runs.serving.settings.page_tokens
        runs.serving.release()
    (ahead, again), (sync, _) = ran
    # the last token made is not computed
    entered = sum((prompt + answer - 2) // page_tokens - (prompt - 1) // page_tokens for prompt, answer in asked)
    return Claim(
        claim="while the engine decodes nothing is mapped in a step, and the next requests find most pages of the last",
        measured=f"{len(asked)} requests for 600 tokens, pages of {page_tokens}: decoding enters {entered}, of which "
        f"{ahead.in_decoding} are mapped in steps, and without the thread {sync.in_decoding}; mapped in all "
        f"{ahead.mapped}, and {again.mapped} for the next requests, of the same lengths in another order",
        required="0 in steps with the thread, each page entered without it, the same tokens; a tenth for the next ones",
        passed=ahead.in_decoding == 0
        and sync.in_decoding == entered
        and ahead.made == sync.made
        and again.mapped <= ahead.mapped / 10,
    )


def policy_claim(tick: Callable[[str], None]) -> Claim:
    """The demo model through `--kv vattention` and `--kv float16`."""
    tick("policy")
    from memwall.engine.sampling import Sampling
    from memwall.engine.session import Settings, load
    from memwall.models import model_directory

    said, held = {}, {}
    for policy in ("float16", "vattention"):
        session = load(model_directory("demo"), Settings(weights="float16", kv=policy, context_tokens=1024))
        list(session.generate(list(range(100, 400)), Sampling(max_new_tokens=200, temperature=0.0, ignore_eos=True)))
        said[policy] = session.last.tokens
        held[policy] = {row.owner: row.nbytes for row in session.ledger.rows() if row.owner.startswith("kv/")}
        if policy == "vattention":
            predicted = kv.predict(policy, session.cache.shape, session.cache.length, 0, 1024)
        session.cache.release()
    return Claim(
        claim="as a cache policy it says what the float16 cache says, in the bytes that were predicted",
        measured=f"{len(said['vattention'])} tokens, equal: {said['vattention'] == said['float16']}; "
        f"{held['vattention']} against {held['float16']}, predicted {predicted}",
        required="equal tokens and bytes",
        passed=said["vattention"] == said["float16"] and held["vattention"] == predicted,
    )


# ---- a GPU -----------------------------------------------------------------------------------------------------------

GPU_CLAIMS = {
    "bytes": (
        "on a GPU, the driver has given away what the pages of the store take, far fewer bytes than it has addresses, "
        "and gets them back",
        "more addresses than memory; given away and given back within 1 % of 2 L * blocks * page; mapping takes "
        "nothing more; the ledger equal to the pages",
    ),
    "equal": (
        "on a GPU, fused attention on slices of the store equals ordinary tensors, with 2 MiB pages of the driver",
        "equal bits, contiguous slices, arrays that stay where they are",
    ),
    "steps": (
        "on a GPU, tokens per second are the same with and without steps that enter a page",
        "within 2 %; nothing mapped on the critical path, and one block for each page entered without the thread",
    ),
    "stress": (
        "on a GPU, sequences keep apart and no page is lost while they come, grow, are cut and go",
        "none of each, with refusals among the steps",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Where the GPU's part runs. device: torch's name of it. pages: a new source of pages; free_bytes: of its memory;
    total_bytes: all of it. wait: until all that is queued is done.
    """

    name: str
    device: str
    page_bytes: int
    pages: Callable[[], PageSource]
    free_bytes: Callable[[], int]
    total_bytes: int
    wait: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSizes:
    """blocks: of the pool whose bytes are asked of the driver. layers, width: of the decode loop's model. slots: of the
    store of which the addresses are counted."""

    blocks: int = 64
    slots: int = 256
    layers: int = 16
    width: int = 2048
    crossings: int = 10
    stress_steps: int = 5000


def here() -> Gpu | str:
    """This machine's GPU, or what is missing."""
    try:
        import torch
    except ImportError:
        return "GPU"
    if not torch.cuda.is_available():
        return "GPU"
    if importlib.util.find_spec("cuda") is None:
        return "the package cuda-bindings: pip install 'memwall[cuda]'"
    from memwall.memory.virtual_cuda import CudaPages

    return Gpu(
        name=torch.cuda.get_device_name(), device="cuda", page_bytes=2 * MIB, pages=lambda: CudaPages(2 * MIB),
        free_bytes=lambda: torch.cuda.mem_get_info()[0], total_bytes=torch.cuda.mem_get_info()[1],
        wait=torch.cuda.synchronize,
    )  # fmt: skip


def gpu_claims(gpu: Gpu | str, sizes: GpuSizes, tick: Callable[[str], None]) -> Iterator[Claim]:
    """The store's CUDA form where there is a GPU, else what could not be judged."""
    if isinstance(gpu, str):
        for claim, required in GPU_CLAIMS.values():
            yield not_run(claim, required, needs=gpu)
        return
    import torch

    with torch.inference_mode():
        tick("GPU, bytes")
        yield gpu_bytes_claim(gpu, sizes)
        tick("GPU, attention")
        yield gpu_equality_claim(gpu)
        tick("GPU, steps")
        yield gpu_steps_claim(gpu, sizes)
        yield stress_claim(sizes.stress_steps, tick, gpu)


def gpu_store(gpu: Gpu, shape: kv.CacheShape, ledger: Ledger, slots: int, max_tokens: int, blocks: int) -> VirtualKV:
    return VirtualKV(
        shape, Arena(NO_LIMIT, ledger, tier="gpu"), num_slots=slots, max_tokens=max_tokens, num_blocks=blocks,
        settings=VirtualSettings(page_bytes=gpu.page_bytes), source=gpu.pages(),
    )  # fmt: skip


def gpu_bytes_claim(gpu: Gpu, sizes: GpuSizes) -> Claim:
    """What the driver says is free, as a pool is filled, mapped, given back in part and released."""
    shape, ledger = kv.CacheShape(num_layers=8, num_heads=32, num_kv_heads=8, head_dim=128), Ledger()
    gpu.pages().close()  # the driver's own memory is taken when it is first asked
    gpu.wait()
    free = [gpu.free_bytes()]
    store = gpu_store(gpu, shape, ledger, sizes.slots, LONG_TOKENS, sizes.blocks)
    reserved = 2 * shape.num_layers * sizes.slots * LONG_TOKENS * store.row_bytes
    free.append(gpu.free_bytes())
    held = [ledger.total("gpu")]
    slot = store.alloc(1)
    store.step({slot: sizes.blocks // 2 * (gpu.page_bytes // store.row_bytes)})
    free.append(gpu.free_bytes())
    store.pool.give_back()
    free.append(gpu.free_bytes())
    held.append(ledger.total("gpu"))
    store.release()
    del store
    free.append(gpu.free_bytes())
    pool = sizes.blocks * 2 * shape.num_layers * gpu.page_bytes
    taken, mapping, back, whole = free[0] - free[1], free[1] - free[2], free[3] - free[2], free[4] - free[1]
    claim, required = GPU_CLAIMS["bytes"]
    near = lambda found, wanted: abs(found - wanted) <= pool / 100  # noqa: E731
    return Claim(
        claim=claim,
        measured=f"{gpu.name}: {reserved / GIB:,.0f} GiB of addresses, {gpu.total_bytes / GIB:,.0f} GiB of memory; a "
        f"pool of {pool:,} bytes takes {taken:,}, mapping half of it {mapping:,}; spare half back {back:,}, all "
        f"{whole:,}; on the ledger {held[0]:,}, then {held[1]:,}",
        required=required,
        passed=reserved > gpu.total_bytes and near(taken, pool) and near(mapping, 0) and near(back, pool / 2)
        and near(whole, pool) and held == [pool, pool // 2],
    )  # fmt: skip


def gpu_equality_claim(gpu: Gpu) -> Claim:
    """scaled_dot_product_attention as it is, on rows that grew page by page."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape, lengths = kv.CacheShape(num_layers=2, num_heads=32, num_kv_heads=8, head_dim=128), [2500, 1777, 3001]
    rows = gpu.page_bytes // (2 * shape.row_values)
    blocks = sum(-(-n // rows) for n in lengths) + len(lengths)
    store = gpu_store(gpu, shape, Ledger(), len(lengths), LONG_TOKENS, blocks)
    torch.manual_seed(0)
    head = (shape.num_kv_heads, shape.head_dim)
    plain = [[torch.randn(2, n, *head).half().to(gpu.device) for n in lengths] for _ in range(shape.num_layers)]
    places = [array.data_ptr() for array in (*store.keys, *store.values)]
    slots = [store.alloc(1) for _ in lengths]
    for begin in range(0, max(lengths), 500):
        step = {slot: min(begin + 500, n) for slot, n in zip(slots, lengths)}
        store.step_async(step)
        for layer in range(shape.num_layers):
            for slot, whole in zip(slots, plain[layer]):
                part = slice(begin, step[slot])
                store.keys[layer][slot, part], store.values[layer][slot, part] = whole[0, part], whole[1, part]
    store.wait()
    equal = tidy = True
    for layer in range(shape.num_layers):
        for slot, whole in zip(slots, plain[layer]):
            mine = store.rows(layer, slot, 0, store.lengths[slot])
            tidy &= all(part.is_contiguous() for part in mine)
            q = torch.randn(1, shape.num_heads, 1, shape.head_dim).half().to(gpu.device)
            ours, theirs = (
                scaled_dot_product_attention(q, *(x.transpose(0, 1)[None] for x in pair), enable_gqa=True)
                for pair in (mine, tuple(whole))
            )
            equal &= bool(torch.equal(ours, theirs))
    stayed = places == [array.data_ptr() for array in (*store.keys, *store.values)]
    gpu.wait()
    store.release()
    claim, required = GPU_CLAIMS["equal"]
    return Claim(
        claim=claim,
        measured=f"{gpu.name}, {len(lengths)} sequences, {blocks} blocks of {gpu.page_bytes / MIB:g} MiB pages: equal "
        f"bits {equal}, contiguous {tidy}, in place {stayed}",
        required=required,
        passed=equal and tidy and stayed,
    )


class GpuDecoding:
    """The decode loop of `Decoding` on a GPU: random weights, fused attention over all tokens of every sequence."""

    def __init__(self, gpu: Gpu, sizes: GpuSizes) -> None:
        import torch

        self.gpu, self.crossings, width = gpu, sizes.crossings, sizes.width
        self.shape = kv.CacheShape(
            num_layers=sizes.layers, num_heads=width // 64, num_kv_heads=width // 256, head_dim=64
        )  # fmt: skip
        self.page_tokens = gpu.page_bytes // (2 * self.shape.row_values)
        torch.manual_seed(0)
        self.weights = [torch.randn(width, 4 * width).half().to(gpu.device) for _ in range(4 * sizes.layers)]
        self.x = torch.ones(sizes.crossings, width).half().to(gpu.device)

    def loop(self, *, ahead: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, VirtualKV]:
        """(milliseconds of each step, of which mapping, whether it enters a page, the store, released)."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        shape, count = self.shape, self.crossings
        store = gpu_store(self.gpu, shape, Ledger(), count, LONG_TOKENS, 2 * count + 2)
        lengths = {store.alloc(1): self.page_tokens - 6 - 7 * i for i in range(count)}  # as in `Decoding.loop`
        advance = store.step_async if ahead else store.step
        advance(lengths)
        for slot, length in lengths.items():
            for layer in range(shape.num_layers):
                store.keys[layer][slot, :length] = store.values[layer][slot, :length] = 0.1
        store.wait()
        store.critical_blocks = 0
        q = torch.ones(1, shape.num_heads, 1, shape.head_dim).half().to(self.gpu.device)
        times, maps = np.empty((2, 6 + 7 * count))
        crossing = np.zeros(len(times), bool)
        for step in range(len(times)):
            lengths = {slot: n + 1 for slot, n in lengths.items()}
            crossing[step] = any(n % self.page_tokens == 1 for n in lengths.values())
            self.gpu.wait()
            began = time.perf_counter()
            advance(lengths)
            maps[step] = time.perf_counter() - began
            for layer in range(shape.num_layers):
                for slot, length in lengths.items():
                    store.keys[layer][slot, length - 1] = store.values[layer][slot, length - 1] = 0.1
                    k, v = (rows.transpose(0, 1)[None] for rows in store.rows(layer, slot, 0, length))
                    scaled_dot_product_attention(q, k, v, enable_gqa=True)
                for matrix in self.weights[4 * layer : 4 * layer + 4]:
                    torch.mm(self.x, matrix)
            self.gpu.wait()
            times[step] = time.perf_counter() - began
        store.release()
        return 1e3 * times[1:], 1e3 * maps[1:], crossing[1:], store


def gpu_steps_claim(gpu: Gpu, sizes: GpuSizes) -> Claim:
    """Steps that enter a page against the others, with pages mapped beside the steps and in them; what calls cost."""
    decoding = GpuDecoding(gpu, sizes)
    decoding.loop(ahead=True)  # what first calls of kernels cost is not measured
    shown, ratios, blocks = [], {}, {}
    for name, ahead in (("ahead", True), ("synchronous", False)):
        times, maps, crossing, store = decoding.loop(ahead=ahead)
        ratios[name] = float(np.median(times[~crossing]) / np.median(times[crossing]))
        blocks[name] = store.critical_blocks
        shown.append(
            f"{name}: {np.median(times[~crossing]):.2f} ms a step, {np.median(times[crossing]):.2f} where a page is "
            f"entered ({ratios[name]:.3f} of the rate), of which mapping {np.median(maps[crossing]):.3f}, "
            f"{blocks[name]} blocks mapped in a step"
        )
    weights = sum(matrix.numel() for matrix in decoding.weights)
    claim, required = GPU_CLAIMS["steps"]
    return Claim(
        claim=claim,
        measured=f"{gpu.name}, {weights / 1e9:.2f} B random weights, {sizes.crossings} sequences: {'; '.join(shown)}; "
        f"the driver takes for a page {call_costs(gpu)}",
        required=required,
        passed=abs(1 - ratios["ahead"]) <= 0.02 and blocks == {"ahead": 0, "synchronous": sizes.crossings},
    )


def call_costs(gpu: Gpu, count: int = 64) -> str:
    """Microseconds that a page takes to make, map with access, unmap and give back."""
    source, costs = gpu.pages(), {}
    target = source.reserve(count * gpu.page_bytes)
    calls: dict[str, Callable[[int], None]] = {
        "to make": lambda page: source.touch(page, 1),
        "to map": lambda page: source.map(target, page * gpu.page_bytes, page, 1),
        "to unmap": lambda page: source.unmap(target, page * gpu.page_bytes, 1),
        "to give back": lambda page: source.discard(page, 1),
    }
    for name, call in calls.items():
        took = []
        for page in range(count):
            began = time.perf_counter()
            call(page)
            took.append(time.perf_counter() - began)
        costs[name] = 1e6 * float(np.median(took))
    source.close()
    return ", ".join(f"{cost:.0f} us {name}" for name, cost in costs.items())


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer requests, steps and weights."""
    if not sys.platform.startswith("linux"):
        raise InputError("this experiment maps pages with memfd and needs Linux")
    sizes = QUICK if quick else FULL
    traces = read_traces(data, sizes.requests)
    gpu = here()
    steps, done = 7 * len(traces) + (18 if isinstance(gpu, str) else 22), 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    try:
        capacity = list(capacity_claims(traces, sizes.budget_bytes, tick))
    except DoesNotFit as refused:
        raise InputError(f"the trace does not fit {sizes.budget_bytes / GIB:g} GiB: {refused}") from refused
    return [
        *capacity,
        *physical_claims(tick),
        *kernel_claims(sizes, tick),
        *step_claims(sizes, tick),
        stress_claim(sizes.stress_steps, tick),
        policy_claim(tick),
        *engine_claims(sizes.served, tick),
        *gpu_claims(gpu, GpuSizes(), tick),
    ]


if __name__ == "__main__":
    sys.exit(main("vattention", sys.modules[__name__]))
