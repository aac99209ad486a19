"""A language model on an FPGA accelerator, instruction by instruction: one token, a prompt, a request, long contexts.

Source: AccLLM (Liang 2025, arXiv 2505.03745), section on its simulator; FlightLLM (Zeng 2024, arXiv 2401.03868).
Idea: weights, keys and values stream from HBM in tiles while the engine works on the tile before (double buffering);
norms, rotations, softmax and gates run on a special unit between the products, and hide behind the next loads. In
decode the token's vectors stay on chip; a prompt's activations do not, where they are more than the buffer.
Units and shapes: seconds; tokens; bytes.
Differs from the papers: neither gives its tile sizes for this; a tile is a buffer of `Design.buffer_bytes / buffers`.
Cost: a few thousand instructions a token.
Holds when: one sequence at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memwall.errors import DoesNotFit
from memwall.hardware import Machine
from memwall.hardware.units import format_bytes
from memwall.simulate.event_engine import UNITS, Timeline
from memwall.simulate.fpga_designs import CORE_LANES, FLIGHTLLM, Design, ModelShape, Recipe, ladder

FILL_CYCLES = 32
"""Cycles before a tile's first sum is there (assumption)."""
ATTENTION_PARTS = 4
"""Groups of heads whose keys, softmax and values follow one another in a pipeline (assumption)."""
SLOW_OPERATIONS = 2
"""Norms and softmax take this many passes (artifact)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one forward pass took. shares: of the time that each unit works; weight_bytes, kv_bytes: read from HBM."""

    seconds: float
    shares: dict[str, float]
    weight_bytes: int
    kv_bytes: int
    instructions: int

    def bandwidth_share(self, bytes_per_s: float) -> float:
        """Of the memory's bandwidth that was used."""
        return (self.weight_bytes + self.kv_bytes) / self.seconds / bytes_per_s


class _Program:
    """Puts a pass together, tile by tile."""

    def __init__(self, design: Design, shape: ModelShape, memory: float, tokens: int, past: int) -> None:
        self.design, self.shape, self.memory, self.tokens, self.past = design, shape, memory, tokens, past
        self.timeline = Timeline()
        self.weight_bytes = self.kv_bytes = 0.0
        self._tiles: list[int] = []  # computes that free the buffers, in order
        self._last: int | None = None  # what the next operation's input waits for
        self.tile_bytes = design.buffer_bytes / design.buffers

    def special(self, elements: float, passes: int = 1) -> None:
        """Elements per token through the special unit."""
        cycles = passes * elements * self.tokens / (CORE_LANES * self.design.cores)
        self._then("special", cycles / self.design.clock_hz)

    def product(self, rows: int, cols: int, bits: float) -> None:
        """A matrix [rows, cols] with the pass's tokens."""
        d = self.design
        nbytes = rows * cols * bits / 8
        macs = rows * cols * self.tokens * (d.density if bits == d.weight_bits else 1.0)
        self.weight_bytes += nbytes
        self._stream(nbytes, d.weight_share, macs / (d.mv_macs if self.tokens == 1 else d.mm_macs))

    def attention(self) -> None:
        """Keys, softmax, values, a group of heads at a time; a prompt's own keys are on chip."""
        d, shape = self.design, self.shape
        if self.tokens == 1:
            pairs, read = float(d.seen(self.past + 1)), d.seen(self.past + 1) - 1
        else:
            pairs, read = float(d.pairs(self.tokens)), 0
        numbers = shape.kv_numbers / 2 * read * d.kv_bits / 8
        macs = pairs * shape.heads * shape.head_dim
        self.kv_bytes += 2 * numbers
        start = self._last
        ends = []
        for _ in range(ATTENTION_PARTS):  # groups do not wait for one another
            self._last = start
            self._stream(numbers / ATTENTION_PARTS, d.kv_share, macs / ATTENTION_PARTS / d.kv_macs)
            cycles = SLOW_OPERATIONS * pairs * shape.heads / ATTENTION_PARTS / (CORE_LANES * d.cores)
            self._then("special", cycles / d.clock_hz)
            self._stream(numbers / ATTENTION_PARTS, d.kv_share, macs / ATTENTION_PARTS / d.kv_macs)
            assert self._last is not None
            ends.append(self._last)
        self._last = max(ends, key=self.timeline.ends)

    def store(self, numbers: float, bits: float, share: float) -> None:
        """Leaves for HBM behind the scenes."""
        after = () if self._last is None else (self._last,)
        self.timeline.put("store", numbers * bits / 8 / (self.memory * share), after)

    def spill(self, width: int) -> None:
        """A prompt's activations leave and come back where they are more than the buffer."""
        if self.tokens > 1 and self.tokens * width > self.design.buffer_bytes:
            self.store(self.tokens * width, 8, self.design.weight_share)
            seconds = self.tokens * width / (self.memory * self.design.weight_share)
            self._last = self.timeline.put("load", seconds, () if self._last is None else (self._last,))

    def _stream(self, nbytes: float, share: float, cycles: float) -> None:
        """Tiles: each load waits for the compute that frees its buffer, each compute for its load."""
        count = max(round(nbytes / self.tile_bytes + 0.5), 1)
        seconds, compute = nbytes / count / (self.memory * share), cycles / count + FILL_CYCLES
        start = () if self._last is None else (self._last,)
        for _ in range(count):
            freed = (self._tiles[-self.design.buffers],) if len(self._tiles) >= self.design.buffers else ()
            load = self.timeline.put("load", seconds, freed)
            self._last = self.timeline.put("compute", compute / self.design.clock_hz, (load, *start))
            self._tiles.append(self._last)

    def _then(self, unit: str, seconds: float) -> None:
        self._last = self.timeline.put(unit, seconds, () if self._last is None else (self._last,))

    def result(self) -> Pass:
        return Pass(
            seconds=self.timeline.end,
            shares={unit: self.timeline.share(unit) for unit in UNITS},
            weight_bytes=round(self.weight_bytes),
            kv_bytes=round(self.kv_bytes),
            instructions=self.timeline.count,
        )


def run_pass(design: Design, shape: ModelShape, machine: Machine, *, tokens: int = 1, past: int = 0) -> Pass:
    """One forward pass: a token after `past` others, or a prompt of `tokens` in the design's attention."""
    memory = float(machine.tier("hbm").read_bytes_per_s)
    program = _Program(design, shape, memory, tokens, past)
    sizes = shape.matrices
    for _ in range(shape.layers):
        program.special(shape.hidden, SLOW_OPERATIONS)
        program.product(*sizes["qkv"], design.weight_bits)
        program.special((shape.heads + shape.kv_heads) * shape.head_dim)  # rotation
        program.store(shape.kv_numbers * tokens, design.kv_bits, design.kv_share)
        program.attention()
        program.product(*sizes["output"], design.weight_bits)
        program.special(shape.hidden)  # residual
        program.spill(shape.hidden)
        program.special(shape.hidden, SLOW_OPERATIONS)
        program.product(*sizes["gate_up"], design.weight_bits)
        program.special(2 * shape.feed_forward)  # SiLU and product
        program.spill(shape.feed_forward)
        program.product(*sizes["down"], design.weight_bits)
        program.special(shape.hidden)
        program.spill(shape.hidden)
    program.tokens = 1  # only the last token's logits
    program.special(shape.hidden, SLOW_OPERATIONS)
    program.product(shape.vocabulary, shape.hidden, design.head_bits)
    return program.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: a prompt and its answer."""

    prompt_seconds: float
    answer_seconds: float
    prompt_tokens: int
    output_tokens: int
    watts: float

    @property
    def decode_tokens_per_s(self) -> float:
        return self.output_tokens / self.answer_seconds

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens over the whole time."""
        return self.output_tokens / (self.prompt_seconds + self.answer_seconds)

    @property
    def tokens_per_joule(self) -> float:
        return self.decode_tokens_per_s / self.watts


def run_request(
    design: Design, shape: ModelShape, machine: Machine, prompt_tokens: int, output_tokens: int, *, samples: int = 5
) -> Request:
    """Prompt, then answer; a token's time is sampled at `samples` places, between which it is linear.

    DoesNotFit where weights and cache are more than the memory.
    """
    check_fits(design, shape, machine, prompt_tokens + output_tokens)
    prompt = run_pass(design, shape, machine, tokens=prompt_tokens).seconds
    last = max(output_tokens - 1, 1)
    places = sorted({round(last * each / max(samples - 1, 1)) for each in range(samples)})
    times = [run_pass(design, shape, machine, past=prompt_tokens + place).seconds for place in places]
    pairs = list(zip(places, times))
    area = sum((b - a) * (s + t) / 2 for (a, s), (b, t) in itertools.pairwise(pairs))
    return Request(
        prompt_seconds=prompt,
        answer_seconds=area / last * output_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        watts=design.watts,
    )


def check_fits(design: Design, shape: ModelShape, machine: Machine, context: int) -> None:
    """DoesNotFit where weights and cache are more than the memory."""
    capacity = machine.tier("hbm").capacity_bytes
    needed = design.weight_bytes(shape) + design.cache_bytes(shape, context)
    if needed > capacity:
        raise DoesNotFit(
            f"{design.name}: weights and the cache of {context:,} tokens need {format_bytes(needed)} of the "
            f"{format_bytes(int(capacity))} that {machine.name} has; shorten the context or narrow the cache"
        )


def compare(
    shape: ModelShape, machine: Machine, recipe: Recipe, *, prompt_tokens: int, output_tokens: int,
    contexts: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Both designs on one request, the steps between them, and speed over the context; plain data."""
    memory = float(machine.tier("hbm").read_bytes_per_s)
    designs = {"FlightLLM": FLIGHTLLM, "AccLLM": recipe.design()}
    rows: list[dict[str, Any]] = []
    middle = prompt_tokens + output_tokens // 2
    for design in designs.values():
        request = run_request(design, shape, machine, prompt_tokens, output_tokens)
        step = run_pass(design, shape, machine, past=middle)
        rows.append(
            {
                "design": design.name,
                "weight_bits": design.weight_bits,
                "decode_tokens_per_s": request.decode_tokens_per_s,
                "tokens_per_s": request.tokens_per_s,
                "prompt_seconds": request.prompt_seconds,
                "tokens_per_joule": request.tokens_per_joule,
                "weight_bytes": step.weight_bytes,
                "kv_bytes": step.kv_bytes,
                "bandwidth_share": step.bandwidth_share(memory),
                "shares": step.shares,
                "flush_share": design.flush_share,
            }
        )
    steps, before = [], 0.0
    for name, design in ladder(recipe):
        speed = run_request(design, shape, machine, prompt_tokens, output_tokens).decode_tokens_per_s
        steps.append({"step": name, "decode_tokens_per_s": speed, "times": speed / before if before else 1.0})
        before = speed
    curves = [
        {"context": context, **{name: _speed(design, shape, machine, context) for name, design in designs.items()}}
        for context in contexts
    ]
    packings = {
        name: {"lanes": packing.lanes, "spacing": packing.spacing, "flush_interval": packing.limit,
               "products_per_cycle": packing.rate(recipe.flush_cycles)}
        for name, packing in recipe.packings().items()
    }  # fmt: skip
    return {
        "machine": machine.name, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "designs": rows,
        "speed_up": rows[1]["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"], "steps": steps, "contexts": curves,
        "packings": packings,
    }  # fmt: skip


def _speed(design: Design, shape: ModelShape, machine: Machine, context: int) -> float | None:
    """Decode tokens a second at a context; None where it does not fit."""
    try:
        check_fits(design, shape, machine, context)
    except DoesNotFit:
        return None
    return 1 / run_pass(design, shape, machine, past=context - 1).seconds
