"""Requests with a cache each: the tokens of a session, memory taken before it is needed, policies that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall import kv
from memwall.engine import Sampling, Settings, load
from memwall.engine.base import Limits, RequestView, State
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kept_caches import OwnPages
from memwall.engine.loading import cache_shape
from memwall.engine.own_caches import Growth, OwnPool, Sizes, longest_chunk, make_own, settled_own
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware.units import MB
from memwall.kv import fitted
from memwall.kv.blocks import pieces
from memwall.kv.cskv import CskvCache, CskvSettings
from memwall.kv.decoding import Decoding, InnerDecoding, OneByOne, PartsDecoding
from memwall.kv.lambda_decoding import LambdaDecoding
from memwall.kv.latent_decoding import LatentDecoding
from memwall.kv.locret import LocretCache, heads_width
from memwall.kv.policy import parse
from memwall.memory import Arena, Budget, Ledger, resident_bytes
from memwall.models import DEMO_DIRECTORY
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Weights
from tests.kv.test_locret import random_heads

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
TEXT = TOKENIZER.encode(" ".join(f"Ship number {i} came to the harbour with {i * 7 % 50} men." for i in range(60)))
CONTEXT = 512
LENGTHS = (3, 61, 300, 17, 200, 64, 31, 1, 130)
SHAPE = kv.CacheShape(num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32)
POLICIES = (
    "bfloat16", "kivi(2bit)", "kv4(page=32)", "bfp(order=plain)", "snapkv(0.25)", "think(0.4)",
    "snapkv(0.25)+think(0.4)+kivi(2bit)", "snapkv(tokens=64)+int8", "lambda(sinks=4,window=128)",
    "lambda(window=200)+kivi(4bit)", "epicache(tokens=100,chunk=64)", "xquant(4bit)", "xquant(3bit,cl=1)",
    "locret(tokens=100,chunk=64)", "cskv(0.5,init=pca,train=0)",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What some policies fit, drawn at random: only that runs agree is looked at. In a folder of its own, as other
    tests count on that the demo model has none of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("fitted")))
        learn()
        yield


def learn() -> None:
    with Checkpoint(DEMO_DIRECTORY) as checkpoint:
        print_ = checkpoint.fingerprint()
    fitted.save(print_, LocretCache.fit_key(parse("locret")), random_heads(SHAPE, heads_width(SHAPE)))
    policy = parse("cskv(0.5,init=pca,train=0)")
    rng, arrays = np.random.default_rng(0), {}
    shape = kv.CacheShape(num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, hidden_size=256)
    for layer in range(shape.num_layers):
        for name, size in CskvSettings.from_policy(policy).factor_shapes(shape).items():
            arrays[f"{layer}.{name}"] = (rng.standard_normal(size) / size[1] ** 0.5).astype(np.float16)
    fitted.save(print_, CskvCache.fit_key(policy), arrays)


def requests(made: int = 24) -> list[Request]:
    return [
        Request(prompt=(0, *TEXT[at : at + n]), sampling=Sampling(max_new_tokens=made - at, ignore_eos=True))
        for at, n in enumerate(LENGTHS)
    ]


def serving(policy: str, folder: Path = DEMO_DIRECTORY, **changes: Any) -> Serving:
    settings: dict[str, Any] = {
        "weights": "int8", "context_tokens": CONTEXT, "token_budget": 64, "max_sequences": 8, "threads": 1,
        "kv": policy, "exact": True, "keep_prefixes": False, **changes,
    }  # fmt: skip
    budget = settings.pop("budget", None)
    return load_engine(folder, ServingSettings(**settings), budget=budget)


def caches_of(held: Serving) -> OwnPool:
    assert isinstance(held.pool, OwnPool)
    return held.pool


def run(held: Serving, wanted: list[Request]) -> list[list[int]]:
    sequences = [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        if held.budget_bytes is not None:
            held.govern()
        held.engine.step()
        check(held)
    return [list(one.made) for one in sequences]


def check(held: Serving) -> None:
    """Each cache is within what was taken for it, and all of them are what the arena has."""
    pool, running, pages = caches_of(held), held.engine.running, held.engine.pages
    assert isinstance(pages, OwnPages)
    assert set(pool.caches) == {number for number, one in running.items() if one.computed} | set(pages.kept)
    taken = {number: one.pages for number, one in running.items()} | {n: kept.pages for n, kept in pages.kept.items()}
    assert pool.used_pages == sum(map(len, taken.values())) <= pool.limit_pages
    for number, cache in pool.caches.items():
        assert cache.nbytes - pool.sizes.shared <= len(taken[number]) * pool.page_bytes
        assert cache.length == (running[number].computed if number in running else len(pages.kept[number].tokens))
    assert pool.committed_bytes <= pool.used_pages * pool.page_bytes


def alone(held: Serving, wanted: list[Request], folder: Path = DEMO_DIRECTORY) -> list[list[int]]:
    """Answers of a session with the server's settings, whose prompts come in the same chunks."""
    how = held.settings
    settings = Settings(
        weights=how.weights, context_tokens=CONTEXT, threads=1, kv=how.kv, exact=True,
        segment_tokens=longest_chunk(how),
    )  # fmt: skip
    session, found = load(folder, settings), []
    for request in wanted:
        session.reset()
        list(session.generate(list(request.prompt), request.sampling))
        found.append(list(session.last.tokens))
    session.release()
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_those_of_a_session_by_itself(policy: str) -> None:
    held = serving(policy)
    pool = caches_of(held)
    before = held.arena.used_bytes
    held.engine.wanted_pages = 4 * pool.limit_pages
    made = run(held, requests())
    assert held.arena.used_bytes == before, "caches of requests that are over are gone"
    assert not pool.used_pages
    assert made == alone(held, requests())
    held.release()
    paged = serving("float16")
    paged.release()
    assert held.arena.used_bytes == paged.arena.used_bytes, "the room to sample in, and nothing else"


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("bfloat16", PartsDecoding), ("kivi(2bit)", PartsDecoding), ("lambda(window=200)", LambdaDecoding),
     ("snapkv(0.25)", InnerDecoding), ("think(0.4)", InnerDecoding), ("xquant(4bit)", LatentDecoding),
     ("epicache(tokens=100,chunk=64)", OneByOne)],
)  # fmt: skip
def test_requests_that_decode_do_so_together(policy: str, kind: type[Decoding]) -> None:
    held = serving(policy)
    pool, seen = caches_of(held), set()
    held.engine.wanted_pages = 4 * pool.limit_pages
    sequences = [held.engine.submit(request) for request in requests()[:4]]
    while held.engine.busy:
        held.engine.step()
        if pool.together is not None:
            assert isinstance(pool.together, kind)
            seen.add(len(pool.together.caches))
    assert max(seen) > 1
    assert pool.together is None, "who is over is not held"
    assert all(one.num_made for one in sequences)
    held.release()


@pytest.mark.parametrize("policy", ["kivi(2bit)", "snapkv(0.25)", "lambda(sinks=4,window=128)"])
def test_one_at_a_time_in_room_for_one(policy: str) -> None:
    held = serving(policy)
    assert held.pool.limit_pages == held.settings.limits.pages(CONTEXT)
    held.engine.wanted_pages = held.pool.limit_pages
    assert run(held, requests(12)) == alone(held, requests(12))
    held.release()


def test_a_pruned_prompt_makes_room() -> None:
    """Once a prompt has been read, what reading it took is free: more requests run than whole prompts would let."""
    held = serving("snapkv(0.1,window=8)")
    held.engine.wanted_pages = held.pool.limit_pages
    wanted = [Request(prompt=tuple(TEXT[at : at + 230]), sampling=Sampling(max_new_tokens=40, ignore_eos=True))
              for at in range(6)]  # fmt: skip
    most, sequences = 0, [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        held.engine.step()
        check(held)
        most = max(most, len(held.engine.running))
    assert [one.num_made for one in sequences] == [40] * 6
    whole = Growth(caches_of(held).sizes, held.pool.page_bytes, 230)
    assert whole.pages(231) < whole.pages(230)
    assert most > held.pool.limit_pages // whole.pages(230)
    held.release()


def test_the_budget_moves_and_nobody_fails() -> None:
    held = serving("kivi(4bit)", headroom_bytes=MB, budget=Budget(tiers={"ram": resident_bytes(exact=True) + 60 * MB}))
    wanted = [Request(prompt=tuple(TEXT[at : at + 40]), sampling=Sampling(max_new_tokens=60, ignore_eos=True))
              for at in range(10)]  # fmt: skip
    sequences, step = [held.engine.submit(request) for request in wanted], 0
    while held.engine.busy:
        if step % 20 == 10:
            held.set_budget(held.least_budget_bytes() + (0 if step % 40 == 10 else 40) * MB)
        held.govern()
        held.engine.step()
        check(held)
        step += 1
    assert [one.finish for one in sequences] == ["length"] * 10
    assert held.engine.totals.preempted["recompute"] > 0, "the small budgets must have set somebody aside"
    held.release()


def test_requests_that_are_cancelled_leave_nothing() -> None:
    held = serving("snapkv(0.25)+kivi(2bit)")
    held.engine.wanted_pages = 4 * held.pool.limit_pages
    for request in requests():
        held.engine.submit(request)
    for _ in range(5):
        held.engine.step()
    assert held.pool.told()["caches"] > 0
    for one in held.engine.everyone():
        held.engine.cancel(one.id)
    assert held.pool.told() == {"caches": 0, "held_bytes": 0, "taken_bytes": 0}
    for request in requests():
        held.engine.submit(request)
    held.engine.step()
    held.engine.abandon()
    assert held.pool.told()["held_bytes"] == 0
    held.release()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv": "instinfer"}, "storage process"),
        ({"kv": "snapkv(0.5)+vattention"}, "in slots"),
        ({"kv": "kivi(2bit)", "shared_prefixes": True}, "fcfs"),
        ({"kv": "kivi(2bit)", "ahead": True}, "fcfs"),
        ({"kv": "kivi(1bit)"}, "bits"),
        ({"kv": "nothing"}, "unknown KV policy"),
        ({"kv": "kivi(2bit)+kv4"}, "name one"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        serving(changes.pop("kv"), **changes)


def test_a_context_that_does_not_fit_is_refused_and_an_open_one_is_halved() -> None:
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    model = kv.CacheModel(config=config, weights=Weights({}, {}, {}), directory=DEMO_DIRECTORY)
    arena = Arena(4 * MB, Ledger())
    common: dict[str, Any] = {"kv": "snapkv(0.5)", "token_budget": 64}

    def made(context: int | None) -> tuple[OwnPool, int]:
        settings = settled_own(ServingSettings(context_tokens=context, **common), config)
        return make_own(settings, cache_shape(config), model, arena, limited=True)

    with pytest.raises(BudgetExceeded):
        made(config.max_position)
    with pytest.raises(InputError, match="positions"):
        made(config.max_position + 1)
    pool, context = made(None)
    assert 256 <= context < config.max_position
    assert pool.limit_pages * pool.page_bytes <= 4 * MB
    pool.release()
    assert not arena.used_bytes


# ---- what a request takes ------------------------------------------------------------------------------------------


def sizes(policy: str, longest: int = 48) -> Sizes:
    return Sizes(policy, SHAPE, CONTEXT, 0, lambda prompt: pieces(prompt, longest))


@pytest.mark.parametrize("policy", ["kivi(2bit)", "snapkv(0.25)", "snapkv(0.25)+think(0.4)+kivi(2bit)", "kv4"])
@pytest.mark.parametrize("prompt", [1, 47, 49, 131, 257, CONTEXT - 1])
def test_growth_never_shrinks_beyond_the_prompt_and_fits_the_largest(policy: str, prompt: int) -> None:
    found = sizes(policy)
    page = -(-found.largest() // Limits().pages(CONTEXT))
    one = Growth(found, page, prompt)
    pages = [one.pages(n) for n in range(prompt + 1, CONTEXT + 1)]
    assert pages == sorted(pages)
    assert max(one.pages(1), one.pages(prompt), *pages) <= Limits().pages(CONTEXT)
    assert one.pages(1) == one.pages(prompt)
    computed = 0
    while computed < prompt:
        computed += one.chunk(computed)
    assert computed == prompt
    assert one.chunk(prompt) == one.chunk(prompt + 7) == 1


@pytest.mark.parametrize("context", [1200, 1999])
def test_groups_that_fill_slowly_are_in_the_largest_request(context: int) -> None:
    """A request may hold most long before its end: of 512 exact tokens nearly all, just before they are coded."""
    found = replace(sizes("kivi(bits=2,residual=512)"), context_tokens=context)
    page = -(-found.largest() // Limits().pages(context))
    one = Growth(found, page, 100)
    assert max(one.pages(n) for n in range(1, context + 1)) <= Limits().pages(context)


def test_a_scheduler_leaves_chunks_whole() -> None:
    """Where a step has no room for a chunk beside those that decode, the prompt waits for one that has."""
    growth = Growth(sizes("kivi(2bit)", longest=10), 1 << 16, 25)
    view = RequestView(id=1, arrival=0.0, prompt=25, known=25, most_tokens=40, computed=10, pages=9, growth=growth)
    other = [
        RequestView(id=2 + i, arrival=0.0, prompt=4, known=6, most_tokens=9, computed=5, pages=1) for i in range(7)
    ]
    for budget, expected in ((17, 10), (16, None)):
        state = State(
            running=(view, *other), free_pages=100, total_pages=200,
            limits=Limits(token_budget=budget, max_sequences=16),
        )  # fmt: skip
        step = FirstComeFirstServed().plan_step(state, 0.0)
        assert {work.id: work.tokens for work in step.work}.get(1) == expected
        assert sum(work.tokens for work in step.work) <= budget


def test_nothing_of_torch_is_needed(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, memwall.engine.own_caches; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
