"""Many requests at once give what each gives alone: mixed lengths, chunks, shared beginnings, setting aside."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memwall.engine import Sampling, Settings, load
from memwall.engine.base import Costs
from memwall.engine.executor import Entry
from memwall.engine.kv_pages import digest_page
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.switching import SwitchSettings
from memwall.errors import InputError
from memwall.kernels.attention import attend_paged, attend_paged_sequences
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
TEXT = TOKENIZER.encode(
    "The history of the city begins with a small harbour on the river, where ships from the north came to trade. "
    "In the spring the water rose and the people moved to the hills, and there they built the first walls of stone."
)
PROMPTS = [(0, *TEXT[start : start + length]) for start, length in ((0, 3), (5, 40), (2, 17), (0, 33), (9, 31), (1, 1))]
MADE = 24


def requests(**changes: object) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=MADE - number, ignore_eos=True), **changes)  # type: ignore[arg-type]
        for number, prompt in enumerate(PROMPTS)
    ]


def serving(**changes: object) -> Serving:
    settings = {"weights": "float32", "context_tokens": 128, "token_budget": 32, "threads": 1, **changes}
    return load_engine(DEMO_DIRECTORY, ServingSettings(**settings), tokenizer=TOKENIZER)  # type: ignore[arg-type]


def run(held: Serving, wanted: list[Request], *, num_pages: int | None = None) -> list[list[int]]:
    """Tokens of each request, all submitted at once."""
    if num_pages is not None:
        held.engine.wanted_pages = num_pages
    sequences = [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        held.engine.step()
    return [list(one.made) for one in sequences]


def alone(weights: str, kv: str = "float16") -> list[list[int]]:
    """What a session for one request makes of each."""
    settings = Settings(weights=weights, kv=kv, context_tokens=128, threads=1)
    session = load(DEMO_DIRECTORY, settings, tokenizer=TOKENIZER)
    made = []
    for request in requests():
        session.reset()
        list(session.generate(list(request.prompt), request.sampling))
        made.append(session.last.tokens)
    session.release()
    return made


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
def test_a_batch_makes_what_each_request_makes_alone(weights: str) -> None:
    held = serving(weights=weights)
    assert run(held, requests()) == alone(weights)
    held.release()


@pytest.mark.parametrize("swap", [0, 1 << 24])
def test_pages_of_int8_rows_hold_almost_twice_the_tokens(swap: int) -> None:
    held, plain = serving(kv="int8", swap_bytes=swap), serving()
    assert 1.8 * held.pool.page_bytes < plain.pool.page_bytes
    plain.release()
    assert run(held, requests()) == alone("float32", "int8")
    assert run(held, requests(), num_pages=9) == alone("float32", "int8")
    assert sum(held.engine.totals.preempted.values()) > 0
    held.release()
    with pytest.raises(InputError, match="unknown KV policy"):
        ServingSettings(kv="int9")


def test_pages_of_4_bit_blocks_hold_more_than_twice_the_tokens() -> None:
    told = {"weights": "int8", "swap_bytes": 1 << 24, "token_budget": 512, "keep_prefixes": False}
    held, plain = serving(kv="int4", **told), serving()
    assert 2.6 * held.pool.page_bytes / held.settings.page_tokens < plain.pool.page_bytes / plain.settings.page_tokens
    plain.release()
    assert run(held, requests()) == alone("int8", "int4")
    sampling = Sampling(max_new_tokens=75, ignore_eos=True)  # over two borders of pages
    wanted = [replace(one, prompt=(0, *TEXT[:10], *one.prompt), sampling=sampling) for one in requests()]
    made = run(held, wanted)
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    assert run(held, wanted, num_pages=8) == made
    assert held.engine.totals.preempted["swap"] > 0
    assert set(held.engine.totals.preempted) == {"swap"}
    held.release()
    with pytest.raises(InputError, match="page_tokens is 16; it must be 32"):
        ServingSettings(kv="int4", page_tokens=16)


@pytest.mark.parametrize("changes", [{}, {"swap_bytes": 0}, {"token_budget": 16}])
def test_4_bit_blocks_in_chunks_shared_and_computed_again(changes: dict[str, int]) -> None:
    """What is coded when depends on how a prompt was cut, so that answers may differ; all of them come."""
    held = serving(kv="int4", **changes)
    wanted = [replace(one, prompt=(0, *TEXT[:40], *one.prompt)) for one in requests()]
    first = run(held, wanted)
    assert run(held, wanted[:1]) == run(held, wanted[:1])  # from the same pages, in the same pieces
    assert held.engine.totals.prefix_hits >= 2 * 32
    again = run(held, wanted, num_pages=8)
    assert [len(made) for made in again] == [len(made) for made in first] == [MADE - n for n in range(len(PROMPTS))]
    agreed = sum(a == b for one, two in zip(first, again) for a, b in zip(one, two))
    assert agreed > 0.3 * sum(map(len, first))
    held.release()


@pytest.mark.parametrize(("swap", "by"), [(0, "recompute"), (1 << 24, "swap")])
def test_requests_that_were_set_aside_make_the_same(swap: int, by: str) -> None:
    held = serving(swap_bytes=swap)
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    assert run(held, requests(), num_pages=9) == alone("float32")
    assert held.engine.totals.preempted[by] > 0
    assert set(held.engine.totals.preempted) == {by}
    assert held.pool.peak_pages <= 9
    held.release()


@pytest.mark.parametrize(("call", "after"), [("pwrite", 0), ("pwrite", 1), ("preadv", 0)])
def test_a_disk_that_fails_costs_the_work_again_and_no_request(
    monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    working, calls = getattr(os, call), itertools.count()

    def failing(*arguments: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(working(*arguments))

    held = serving(swap_bytes=1 << 24, switch=SwitchSettings(merge=False))
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    monkeypatch.setattr(os, call, failing)
    assert run(held, requests(), num_pages=9) == alone("float32")
    assert next(calls) > after
    assert held.engine.totals.finished == {"length": len(PROMPTS)}
    assert held.engine.pages.available_pages == held.pool.limit_pages  # none is lost
    assert held.engine.swap is not None
    assert held.engine.swap.free_pages == held.engine.swap.capacity_pages
    held.release()


def test_shared_beginnings_are_computed_once_and_change_nothing() -> None:
    held = serving()
    first = run(held, requests())
    computed = held.engine.totals.computed_tokens
    assert run(held, requests()) == first
    again = held.engine.totals.computed_tokens - computed
    shared = sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)
    assert again == computed - shared
    assert held.engine.totals.prefix_hits >= shared
    held.release()


def test_a_salt_keeps_beginnings_apart() -> None:
    held = serving()
    run(held, requests(salt=b"one"))
    run(held, requests(salt=b"two"))
    assert held.engine.totals.prefix_hits == 0
    held.release()


def test_no_salt_is_the_digest_of_another_s_page() -> None:
    first, second = list(range(16)), list(range(16, 32))
    chained = digest_page(digest_page(b"", first), second)
    assert digest_page(b"", second, salt=digest_page(b"", first)) != chained
    assert digest_page(digest_page(b"", first, b"a"), second, b"a") != digest_page(
        digest_page(b"", first, b"a"), second
    )


def test_packed_weights_give_the_same_bits_in_any_batch() -> None:
    held = serving(weights="int4")
    decoder = held._loaded.decoder
    cache = held.engine.executor.cache  # type: ignore[attr-defined]
    one = held.engine.submit(Request(prompt=tuple(TEXT[:20]), sampling=Sampling(max_new_tokens=9, ignore_eos=True)))
    held.engine.step()
    other = held.engine.submit(Request(prompt=tuple(TEXT[30:50]), sampling=Sampling(max_new_tokens=9, ignore_eos=True)))
    held.engine.step()
    rows = []
    for batch in ([Entry(one, 19, 1, True)], [Entry(other, 19, 1, True), Entry(one, 19, 1, True)]):
        positions = cache.begin(batch)
        tokens = np.array([entry.sequence.tokens[entry.first] for entry in batch], np.int64)
        rows.append(decoder.batch(tokens, positions, cache)[-1].copy())
    assert np.array_equal(rows[0], rows[1])
    held.release()


def test_sequences_attended_together_get_what_each_gets_alone() -> None:
    draw = np.random.default_rng(3)
    k, v = (draw.standard_normal((64 * 16, 2, 24)).astype(np.float16) for _ in range(2))
    lengths = np.array([1, 16, 17, 250, 1000], np.int64)
    tables = np.zeros((5, 63), np.int32)
    for row, length in enumerate(lengths):
        tables[row, : -(-length // 16)] = draw.permutation(64)[: -(-length // 16)]
    q = draw.standard_normal((5, 6, 24)).astype(np.float32)
    for window in (None, 40):
        together, each = np.empty_like(q), np.empty_like(q)
        options = {"page_tokens": 16, "scale": 0.2, "window": window}
        attend_paged_sequences(q, k, v, tables, lengths, out=together, **options)
        for row, length in enumerate(lengths):
            attend_paged(
                q[row : row + 1], k, v, tables[row], length=int(length), first_position=int(length) - 1,
                out=each[row : row + 1], **options,
            )  # fmt: skip
        assert np.array_equal(together, each)


def test_drawn_tokens_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> Request:
        return Request(prompt=PROMPTS[1], sampling=Sampling(max_new_tokens=12, temperature=1.0, seed=seed))

    held = serving(weights="int8")
    first = run(held, [drawn(1), drawn(2), drawn(1)])
    assert first[0] == first[2] != first[1]
    assert run(held, [drawn(2)])[0] == first[1]
    held.release()


def test_logprobs_are_those_of_the_softmax() -> None:
    held = serving()
    sequence = held.engine.submit(Request(prompt=PROMPTS[1], sampling=Sampling(max_new_tokens=1), logprobs=4096))
    found = None
    while held.engine.busy:
        for event in held.engine.step():
            found = event.logprobs or found
    assert found is not None
    top = dict(found.top)
    assert sum(np.exp(list(top.values()))) == pytest.approx(1.0, abs=1e-4)
    assert found.top[0] == (sequence.made[0], pytest.approx(found.own))
    assert list(top.values()) == sorted(top.values(), reverse=True)
    held.release()


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    held = serving(context_tokens=32)
    with pytest.raises(InputError, match="shorten it to 31"):
        held.engine.submit(Request(prompt=tuple(range(3, 35))))
    held.release()
