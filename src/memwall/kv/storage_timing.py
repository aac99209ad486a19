"""How long in-storage attention takes on drives and GPUs that are not here: queues of pages, buses, engines and links.

A drive is simulated page by page: each die reads into its register and keeps it until the channel's bus has taken it,
each channel filters what it carries, two engines attend (one to channel pages, one to token pages), writes of full
groups take the bus among the reads. Of a layer's many tasks, one per sequence and key-value head, as many are
simulated as reach a steady rate; the rest go on at it. GPU stages are rooflines. What crosses a link waits for it.

Units: bytes, seconds, tokens. Figures marked *paper* come from summaries of the published version, *model* ones are
chosen here: the paper does not say them, and results that hang on them must be given with them.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from memwall.hardware.units import GB

HALF_BYTES = 2
SIMULATED_TASKS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveModel:
    """A drive that attends. dies: of a channel; planes: pages that a die reads at once."""

    channels: int = 8  # paper
    bus_bytes_per_s: float = 1.4 * GB  # paper, of each channel
    link_bytes_per_s: float = 7 * GB  # paper, PCIe 4.0 x4
    filter_bytes_per_s: float = 1.85 * GB  # paper, of each channel
    engine_flop_per_s: float = 12.7 * GB  # paper, of each of the two kernels
    page_bytes: int = 4096  # paper
    dies: int = 16  # model
    planes: int = 4  # model
    read_seconds: float = 50e-6  # model: of datasheets
    program_seconds: float = 600e-6  # model
    suspend_seconds: float = 20e-6  # model: what a read waits for a die that programs
    select_seconds: float = 5e-6  # model: softmax and argtop-k of a task, pipelined
    in_flight: int = 4  # model: tasks whose channel pages are read before the first one's token pages

    @property
    def flash_bytes_per_s(self) -> float:
        return self.channels * self.bus_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """The accelerator that keeps weights and does all but decode attention."""

    flop_per_s: float = 155_000 * GB  # model: nominal 16-bit rate of an A6000
    bytes_per_s: float = 768 * GB  # model: nominal
    share: float = 0.5  # model: of both rates that is reached
    link_bytes_per_s: float = 32 * GB  # paper, PCIe 4.0 x16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model and its batch: by default OPT-13B with 1,024 tokens in and out."""

    layers: int = 40
    heads: int = 40
    head_dim: int = 128
    weight_bytes: int = 26 * GB
    batch: int = 64
    input_tokens: int = 1024
    output_tokens: int = 1024

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def mean_tokens(self) -> int:
        """Tokens that a decode step attends to, on average."""
        return self.input_tokens + self.output_tokens // 2

    def kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of one layer and the whole batch."""
        return self.batch * num_tokens * 2 * self.hidden * HALF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a task reads, as shares of its pages: channel pages of those of its keys, token pages of all."""

    token_share: float = 1.0
    channel_share: float = 0.0

    @property
    def share(self) -> float:
        """Of the bytes that dense attention reads: keys are half of them."""
        return self.token_share + self.channel_share / 2


DENSE = Reading()


@dataclass(slots=True)
class Flash:
    """Queues of one drive. Times are absolute; requests are served in the order in which they come."""

    drive: DriveModel
    bus_busy: float = 0.0
    written: int = 0
    _die: list[list[float]] = field(default_factory=list)
    _bus: list[float] = field(default_factory=list)
    _filter: list[float] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        self._die = [[0.0] * self.drive.dies for _ in range(self.drive.channels)]
        self._bus, self._filter = [0.0] * self.drive.channels, [0.0] * self.drive.channels

    def read(self, num_pages: int, ready: float) -> float:
        """When the last of so many pages, asked for at `ready`, has been filtered."""
        drive, queues = self.drive, self._queues(num_pages)
        waiting: list[tuple[float, int, int]] = []
        for channel, die in queues:
            heapq.heappush(waiting, (max(self._die[channel][die], ready) + drive.read_seconds, channel, die))
        done = ready
        while waiting:
            loaded, channel, die = heapq.heappop(waiting)
            nbytes = queues[channel, die].popleft() * drive.page_bytes
            taken = self._take_bus(channel, loaded, nbytes)
            # its register is free again only now
            self._die[channel][die] = taken
            if queues[channel, die]:
                heapq.heappush(waiting, (taken + drive.read_seconds, channel, die))
            passed = max(self._filter[channel], taken) + nbytes / drive.filter_bytes_per_s
            self._filter[channel] = passed
            done = max(done, passed)
        return done

    def write(self, num_pages: int, ready: float) -> None:
        """So many pages go out to dies, which set programming aside when a read comes."""
        for (channel, die), parts in self._queues(num_pages).items():
            for pages in parts:
                sent = self._take_bus(channel, ready, pages * self.drive.page_bytes)
                self._die[channel][die] = max(self._die[channel][die], sent) + self.drive.suspend_seconds
                self.written += pages

    def _queues(self, num_pages: int) -> dict[tuple[int, int], deque[int]]:
        """Pages dealt to channels and dies in turn, as many at once as a die reads or programs."""
        drive = self.drive
        queues: dict[tuple[int, int], deque[int]] = {}
        for number in range(0, num_pages, drive.planes):
            self._turn += 1
            place = self._turn % drive.channels, self._turn // drive.channels % drive.dies
            queues.setdefault(place, deque()).append(min(drive.planes, num_pages - number))
        return queues

    def _take_bus(self, channel: int, ready: float, nbytes: int) -> float:
        seconds = nbytes / self.drive.bus_bytes_per_s
        self._bus[channel] = max(self._bus[channel], ready) + seconds
        self.bus_busy += seconds
        return self._bus[channel]


def task_seconds(drive: DriveModel, job: Job, reading: Reading, num_tokens: int) -> float:
    """Seconds of a task in the steady state: one key-value head of one sequence, over so many tokens."""
    row = job.head_dim * HALF_BYTES
    pages_of = lambda share: max(round(share * num_tokens * row / drive.page_bytes), 0)  # noqa: E731
    channel_pages, token_pages = pages_of(reading.channel_share), pages_of(2 * reading.token_share)
    # two operations for each number of a key, and of a value; an engine sees what its pages hold
    work = [
        2 * pages * drive.page_bytes / HALF_BYTES / drive.engine_flop_per_s for pages in (channel_pages, token_pages)
    ]
    flash, engines, ends = Flash(drive), [0.0, 0.0], []
    new_pages, owed = 3 * row / drive.page_bytes, 0.0  # a token's share of the pages written: keys twice, values once
    chosen: deque[float] = deque()
    for number in range(SIMULATED_TASKS + drive.in_flight):
        if number < SIMULATED_TASKS:
            ready = 0.0
            if channel_pages:
                engines[0] = max(engines[0], flash.read(channel_pages, 0.0)) + work[0]
                ready = engines[0] + drive.select_seconds
            chosen.append(ready)
        if number >= drive.in_flight:
            engines[1] = max(engines[1], flash.read(token_pages, chosen.popleft())) + work[1] / 2
            ends.append(engines[1])
            owed += new_pages
            if owed >= 1:
                flash.write(int(owed), 0.0)
                owed -= int(owed)
    first, last = len(ends) // 3, len(ends) - 1 - drive.in_flight  # neither the start nor the end, which has less to do
    return (ends[last] - ends[first]) / (last - first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a decode step, by what takes them."""

    gpu_seconds: float
    link_seconds: float
    attention_seconds: float
    overlapped: bool = False
    """Whether the GPU works while keys and values come: then the longer of both counts."""

    @property
    def seconds(self) -> float:
        if self.overlapped:
            return max(self.gpu_seconds, self.link_seconds) + self.attention_seconds
        return self.gpu_seconds + self.link_seconds + self.attention_seconds


def gpu_seconds(gpu: GpuModel, job: Job, tokens: int) -> float:
    """All matrices, for so many tokens of the batch together."""
    flop = 2 * job.weight_bytes / HALF_BYTES * tokens
    return max(job.weight_bytes / gpu.bytes_per_s, flop / gpu.flop_per_s) / gpu.share


def in_storage_step(drive: DriveModel, gpu: GpuModel, job: Job, reading: Reading = DENSE, drives: int = 1) -> Step:
    """q, k, v go down, outputs come up; heads are split over the drives, which all hang on the GPU's own link."""
    crossing = job.batch * 4 * job.hidden * HALF_BYTES
    link = max(crossing / drives / drive.link_bytes_per_s, crossing / gpu.link_bytes_per_s)
    tasks = -(-job.batch * job.heads // drives)
    attention = tasks * task_seconds(drive, job, reading, job.mean_tokens)
    return Step(
        gpu_seconds=gpu_seconds(gpu, job, job.batch),
        link_seconds=job.layers * link,
        attention_seconds=job.layers * attention,
    )


def fetching_step(bytes_per_s: float, gpu: GpuModel, job: Job, reading: Reading = DENSE, drives: int = 1) -> Step:
    """Keys and values come over a link (or a host's file system) of that rate, as the GPU works: FlexGen's way."""
    moved = job.layers * job.kv_bytes(job.mean_tokens) * reading.share
    rate = min(bytes_per_s * drives, gpu.link_bytes_per_s)
    attend = job.layers * job.kv_bytes(job.mean_tokens) * reading.share / (gpu.bytes_per_s * gpu.share)
    return Step(
        gpu_seconds=gpu_seconds(gpu, job, job.batch) + attend, link_seconds=moved / rate, attention_seconds=0.0,
        overlapped=True,
    )  # fmt: skip


def prefill_seconds(drive: DriveModel, gpu: GpuModel, job: Job, drives: int = 1, *, overlap: bool = True) -> float:
    """The prompts of the batch; a layer's keys and values are shipped while the next one computes."""
    tokens = job.batch * job.input_tokens
    attention = 2 * 2 * tokens * job.input_tokens * job.hidden / 2 / gpu.flop_per_s / gpu.share
    compute = gpu_seconds(gpu, job, tokens) / job.layers + attention
    shipped = job.kv_bytes(job.input_tokens)
    pages = 1.5 * shipped / drive.page_bytes  # keys twice
    programs = pages * drive.program_seconds / (drives * drive.channels * drive.dies * drive.planes)
    ship = max(shipped / (drives * drive.link_bytes_per_s), shipped / gpu.link_bytes_per_s, programs)
    if not overlap:
        return job.layers * (compute + ship)
    sent = computed = 0.0
    for _ in range(job.layers):
        computed += compute
        sent = max(sent, computed) + ship
    return sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Wear:
    """What a finished batch has done to the flash. amplification: bytes written for each byte of keys and values."""

    written_bytes: int
    erased_blocks: int
    amplification: float
    program_erase_cycles: float


def wear(drive: DriveModel, job: Job, capacity_bytes: int, *, group: int, span: int, block_bytes: int) -> Wear:
    """Full groups of keys and values are written, full spans of keys once more; blocks are erased whole."""
    tokens = job.input_tokens + job.output_tokens
    row = job.batch * job.layers * job.hidden * HALF_BYTES
    written = row * (2 * (tokens // group * group) + tokens // span * span)
    blocks = -(-written // block_bytes)
    return Wear(
        written_bytes=written,
        erased_blocks=blocks,
        amplification=written / (job.layers * job.kv_bytes(tokens)),
        program_erase_cycles=blocks * block_bytes / capacity_bytes,
    )
