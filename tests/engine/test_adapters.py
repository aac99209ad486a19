"""Many adapters over one base: logits of merged weights, pages of one pool, reading ahead, and nothing lost."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memwall import kernels
from memwall.engine import Sampling
from memwall.engine.adapters import Adapters
from memwall.engine.base import Limits
from memwall.engine.executor import Entry
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kv_pages import KVPages
from memwall.engine.sequence import Request
from memwall.engine.serving import LoraSettings, Serving, ServingSettings, load_engine
from memwall.engine.simulated import simulated_engine
from memwall.errors import DoesNotFit, InputError
from memwall.formats import codec
from memwall.kernels.lora import TARGETS, linear_products
from memwall.memory import Arena, Ledger, OutOfPages, PagePool
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.checkpoint import Checkpoint
from memwall.models.lora import LoraWeights, tensor_name
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Weights
from tests.models.loras import make_lora

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
TEXT = TOKENIZER.encode(
    "The history of the city begins with a small harbour on the river, where ships from the north came to trade. "
    "In the spring the water rose and the people moved to the hills, and there they built the first walls of stone."
)
RANKS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    for rank in RANKS:
        make_lora(
            where / f"r{rank}", CONFIG, rank=rank, seed=rank, lora_alpha=2 * rank, targets=TARGETS[: 7 - rank % 3]
        )
    return where


def start(folder: Path | None = None, **changes: object) -> Serving:
    settings = {
        "weights": "float32", "context_tokens": 128, "token_budget": 32, "threads": 1, "lora": LoraSettings(),
        **changes,
    }  # fmt: skip
    held = load_engine(DEMO_DIRECTORY, ServingSettings(**settings), tokenizer=TOKENIZER)  # type: ignore[arg-type]
    for path in sorted(folder.iterdir()) if folder is not None else ():
        held.add_adapter(path.name, held.read_adapter(path))
    return held


def run(held: Serving, wanted: list[Request]) -> list[list[int]]:
    sequences = [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        held.engine.step()
    return [list(one.made) for one in sequences]


def requests(adapters: tuple[str | None, ...], made: int = 12) -> list[Request]:
    return [
        Request(
            prompt=(0, *TEXT[number : number + 3 + 9 * number]), adapter=adapter,
            sampling=Sampling(max_new_tokens=made, ignore_eos=True),
        )
        for number, adapter in enumerate(adapters)
    ]  # fmt: skip


def merged(weights: Weights, lora: LoraWeights) -> Weights:
    """W + scale * B A for every product."""
    held = Weights(matrices=dict(weights.matrices), vectors=weights.vectors, specs=weights.specs)
    with Checkpoint(DEMO_DIRECTORY, CONFIG) as checkpoint:
        for layer in range(CONFIG.num_layers):
            for target in TARGETS:
                factors = lora.factors(layer, target)
                if factors is not None:
                    name = tensor_name(layer, target, "A").removeprefix("base_model.model.").replace("lora_A.", "")
                    whole = checkpoint.tensor(name).astype(np.float32) + lora.scale * (factors[1] @ factors[0])
                    held.replace(name, codec("float32").encode(whole.astype(np.float32)))
    return held


def logits_of(held: Serving, adapters: tuple[str | None, ...], *, singles: bool) -> np.ndarray:
    """The last token's logits of each request, all in one batch; singles: computed from one row each."""
    executor, engine = held.engine.executor, held.engine
    sequences = [engine.submit(request) for request in requests(adapters)]
    while any(len(one.tokens) == one.num_prompt for one in sequences):
        engine.step()
    batch = [Entry(one, one.num_prompt - (1 if singles else 3), 1 if singles else 3, True) for one in sequences]
    batch.sort(key=lambda entry: entry.sequence.request.adapter or "")
    positions = executor.cache.begin(batch)  # type: ignore[attr-defined]
    executor.assign(batch)  # type: ignore[attr-defined]
    tokens = [t for e in batch for t in e.sequence.tokens[e.first : e.first + e.count]]
    hidden = executor.decoder.batch(np.array(tokens), positions, executor.cache)  # type: ignore[attr-defined]
    rows = np.cumsum([entry.count for entry in batch]) - 1
    logits = executor.decoder.logits(np.ascontiguousarray(hidden[rows])).copy()  # type: ignore[attr-defined]
    for one in sequences:
        engine.cancel(one.id)
    return logits[np.argsort([entry.sequence.id for entry in batch])]


@pytest.mark.parametrize("singles", [True, False])
def test_a_mixed_batch_gives_the_logits_of_merged_weights(folder: Path, singles: bool) -> None:
    names: tuple[str | None, ...] = ("r8", None, "r64", "r16", "r32", "r8", None)
    # in float16 a key a rounding error away may fall to the next number, which is more than 1e-4 away
    held = start(folder, max_sequences=8, kv="float32")
    together = logits_of(held, names, singles=singles)
    decoder = held.engine.executor.decoder  # type: ignore[attr-defined]
    plain = decoder.weights
    for name in (None, "r8", "r16", "r32", "r64"):
        alone = start(max_sequences=8, kv="float32")
        if name is not None:
            swap = alone.engine.executor.decoder  # type: ignore[attr-defined]
            swap.weights = merged(plain, LoraWeights.read(folder / name, CONFIG))
        found = logits_of(alone, (None,) * len(names), singles=singles)
        for row, other in enumerate(names):
            if other == name:
                assert np.abs(found[row] - together[row]).max() < 1e-4
        alone.release()
    held.release()


def test_adapters_lie_in_pages_of_coded_rows_too(folder: Path) -> None:
    names: tuple[str | None, ...] = ("r8", None, "r64", "r16", "r32")
    found = []
    for kv in ("float32", "int8", "int4"):
        held = start(folder, max_sequences=8, kv=kv)
        found.append(logits_of(held, names, singles=False))
        held.release()
    for other, share in zip(found[1:], (0.02, 0.15)):
        assert np.abs(found[0] - other).max() < share * np.abs(found[0]).max()


@pytest.mark.parametrize(("weights", "kv"), [("float32", "float16"), ("int4", "float16"), ("int4", "int8")])
def test_a_batch_makes_what_each_request_makes_alone(folder: Path, weights: str, kv: str) -> None:
    names: tuple[str | None, ...] = ("r8", None, "r64", "r16", "r32", "r8")
    held = start(folder, weights=weights, kv=kv, max_sequences=4, keep_prefixes=False)
    together = run(held, requests(names))
    assert [run(held, [one])[0] for one in requests(names)] == together
    assert len({tuple(made) for made in run(held, [requests((name,))[0] for name in names[:5]])}) == 5
    held.release()


def test_base_products_are_called_once_a_layer_whatever_the_adapters(folder: Path) -> None:
    counted = []
    for names in ((None,) * 4, ("r8",) * 4, ("r8", "r16", "r32", "r64")):
        held = start(folder)
        for one in requests(names):
            held.engine.submit(one)
        while any(one.first_token is None for one in held.engine.running.values()) or held.engine.waiting:
            held.engine.step()
        before, multiplies = linear_products(), held.engine.executor.lora.multiplies  # type: ignore[attr-defined]
        held.engine.step()
        counted.append(linear_products() - before)
        done = held.engine.executor.lora.multiplies - multiplies  # type: ignore[attr-defined]
        known = [LoraWeights.read(folder / name, CONFIG) for name in names if name is not None]
        assert done == CONFIG.num_layers * sum(r * (i + o) for one in known for r, i, o in one.shapes.values())
        held.release()
    assert counted == [7 * CONFIG.num_layers + 1] * 3


def test_beginnings_are_shared_within_an_adapter_only(folder: Path) -> None:
    held = start(folder)
    prompt = (0, *TEXT[:40])
    for name, hits in (("r8", 0), (None, 0), ("r16", 0), ("r8", 32), (None, 64)):
        run(held, [Request(prompt=prompt, adapter=name, sampling=Sampling(max_new_tokens=1))])
        assert held.engine.totals.prefix_hits == hits
    adapters = held.engine.adapters
    assert adapters is not None
    adapters.remove("r8")
    held.add_adapter("r8", held.read_adapter(folder / "r16"))  # another adapter under the name of the first
    run(held, [Request(prompt=prompt, adapter="r8", sampling=Sampling(max_new_tokens=1))])
    assert held.engine.totals.prefix_hits == 64
    held.release()


def test_pages_are_on_the_ledger_and_come_back(folder: Path) -> None:
    held = start(folder, keep_prefixes=False)
    adapters = held.engine.adapters
    assert adapters is not None
    assert held.pool.usage() == {}
    run(held, requests(("r8", "r64")))
    sizes = [adapters.describe(name).num_pages for name in ("r8", "r64")]  # type: ignore[union-attr]
    assert held.pool.usage() == {"adapters": sum(sizes)}
    assert held.ledger.owned("adapters/pages") == sum(sizes) * held.pool.page_bytes
    assert held.ledger.owned("kv/pages") + held.ledger.owned("adapters/pages") == held.pool.committed_bytes
    assert adapters.idle_pages == sum(sizes)
    assert held.engine.pages.available_pages == held.pool.limit_pages
    assert adapters.offload() == sum(sizes)
    assert held.pool.usage() == {}
    assert held.ledger.owned("adapters/pages") == 0
    held.release()


def test_a_moving_budget_moves_adapters_too(folder: Path) -> None:
    names: tuple[str | None, ...] = ("r8", None, "r64", "r16")
    held = start(folder, keep_prefixes=False)
    wanted = run(held, requests(names))
    for one in requests(names):
        held.engine.submit(one)
    many = held.pool.limit_pages
    made: dict[int, list[int]] = {}
    for step in range(400):
        if not held.engine.busy:
            break
        held.engine.wanted_pages = many if step % 3 else 60 + step % 5
        for event in held.engine.step():
            if event.token is not None:
                made.setdefault(event.id, []).append(event.token)
    assert [made[key] for key in sorted(made)] == wanted
    assert held.engine.totals.finished["length"] == 8
    held.release()


def test_first_come_first_served_runs_adapters_too(folder: Path) -> None:
    names: tuple[str | None, ...] = ("r8", None, "r64", "r16", "r32", "r8")
    held = start(folder, keep_prefixes=False)
    wanted = run(held, requests(names))
    held.engine.scheduler = FirstComeFirstServed()
    held.engine.wanted_pages = 70  # the largest adapter takes 60 of them
    assert run(held, requests(names)) == wanted
    held.release()


def test_an_adapter_that_leaves_no_room_is_refused(folder: Path) -> None:
    held = start(folder)
    held.budget_bytes, held.engine.wanted_pages = 1 << 40, 70
    wide = held.read_adapter(make_lora(folder.parent / f"{folder.name}-wide", CONFIG, rank=64, targets=TARGETS))
    with pytest.raises(DoesNotFit, match=r"'wide' takes .* pages and one request of the whole context 8"):
        held.add_adapter("wide", wide)
    assert held.engine.adapters is not None
    assert held.engine.adapters.names == ["r16", "r32", "r64", "r8"]
    held.release()
    small = start(lora=LoraSettings(most_rank=16))
    with pytest.raises(InputError, match="start with --max-lora-rank 64"):
        small.read_adapter(folder / "r64")
    small.release()


def test_a_file_that_is_gone_ends_its_requests_alone(folder: Path, tmp_path: Path) -> None:
    held = start(folder)
    gone = make_lora(tmp_path / "gone", CONFIG, rank=4)
    held.add_adapter("gone", held.read_adapter(gone))
    (gone / "adapter_model.safetensors").unlink()
    run(held, requests(("gone", "r8")))
    assert held.engine.totals.finished == {"error": 1, "length": 1}
    assert held.engine.pages.available_pages == held.pool.limit_pages
    held.release()


def test_an_adapter_comes_where_the_budget_is_full(folder: Path) -> None:
    held = start()
    held.budget_bytes = 1 << 40
    held.arena.set_cap(held.arena.used_bytes)
    key = held.add_adapter("late", held.read_adapter(folder / "r8"))
    assert held.ledger.owned("adapters/known") > 0
    assert held.engine.adapters is not None
    held.engine.adapters.remove(key)
    assert held.ledger.owned("adapters/known") == 0
    held.release()


def test_unloading_lets_requests_go_on(folder: Path) -> None:
    held = start(folder)
    adapters = held.engine.adapters
    assert adapters is not None
    wanted = run(held, requests(("r8",)))
    one = held.engine.submit(requests(("r8",))[0])
    held.engine.step()
    adapters.remove("r8")
    assert "r8" not in adapters.names
    while held.engine.busy:
        held.engine.step()
    assert list(one.made) == wanted[0]
    assert adapters.used_pages == 0
    with pytest.raises(InputError, match="'r8' is not here"):
        held.engine.submit(requests(("r8",))[0])
    with pytest.raises(InputError, match="no adapter is called"):
        adapters.remove("r8")
    held.release()


def test_reading_ahead_spares_the_wait(folder: Path) -> None:
    held = start(folder, max_sequences=1, token_budget=16)
    names = ("r8", "r16", "r32", "r8")
    run(held, requests(names))
    counts = held.engine.adapters.counts  # type: ignore[union-attr]
    assert counts.stalls >= 1  # the first had nobody to read it ahead
    assert counts.prefetched == 2
    assert counts.prefetch_hits + counts.stalls == 3
    assert counts.hits >= counts.prefetch_hits
    held.release()


# ---- the pool alone ------------------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> Adapters:
    pages = KVPages(PagePool("kv/pages", page_bytes=1, most_pages=64), 16)
    return Adapters(pages)


def test_any_free_pages_will_do_after_random_churn(counted: Adapters) -> None:
    draw, pool = random.Random(5), counted.pages.pool
    keys = [counted.add_counted(f"a{i}", draw.randrange(1, 12)) for i in range(40)]
    held: list[str] = []
    texts: list[list[int]] = []
    for _ in range(5000):
        action = draw.randrange(5)
        if action == 0:
            key = draw.choice(keys)
            size = counted.view(key).pages
            room = counted.pages.available_pages + (
                size if not counted._known[key].users and counted.view(key).resident else 0
            )
            free = size <= room or counted.view(key).resident
            if free:
                before = counted.used_pages
                there = counted.view(key).resident
                evictions = counted.counts.evictions
                counted.acquire(key)
                held.append(key)
                if not there and counted.counts.evictions == evictions:
                    assert counted.used_pages == before + size
            else:
                with pytest.raises(OutOfPages):
                    counted.acquire(key)
        elif action == 1 and held:
            counted.release(held.pop(draw.randrange(len(held))))
        elif action == 2 and counted.pages.available_pages:
            texts.append(counted.pages.take(draw.randrange(1, min(counted.pages.available_pages, 6) + 1)))
        elif action == 3 and texts:
            counted.pages.release(texts.pop(draw.randrange(len(texts))))
        elif action == 4:
            counted.prefetch(draw.sample(keys, 3))
        used = sum(map(len, texts)) + counted.used_pages
        assert pool.used_pages == used
        assert counted.idle_pages == sum(one.num_pages for one in counted._idle.values())
        assert counted.pages.available_pages == pool.limit_pages - used + counted.idle_pages
    for key in held:
        counted.release(key)
    counted.offload()
    for pages in texts:
        counted.pages.release(pages)
    assert pool.used_pages == 0


def test_what_is_expected_is_given_up_last(counted: Adapters) -> None:
    keys = [counted.add_counted(name, 20) for name in "abc"]
    for key in keys:
        counted.acquire(key)
        counted.release(key)
    counted.prefetch([keys[0]])
    counted.pages.take(20)
    assert [counted.view(key).resident for key in keys] == [True, False, True]
    counted.pages.take(20)
    assert [counted.view(key).resident for key in keys] == [True, False, False]
    counted.prefetch([keys[0], keys[1]])  # no page is left that is not expected: nothing is read
    assert [counted.view(key).resident for key in keys] == [True, False, False]
    counted.pages.take(20)
    assert not counted.view(keys[0]).resident


def test_copies_run_beside_the_engine(tmp_path: Path) -> None:
    """A copy that hangs holds up who needs it, and nobody else."""
    from memwall.engine.batch import lora_room, page_bytes
    from memwall.engine.loading import cache_shape

    shape = cache_shape(CONFIG)
    arena = Arena(1 << 28, Ledger())
    pool = PagePool("kv/pages", page_bytes=page_bytes(shape, 16), most_pages=100, arena=arena)
    adapters = Adapters(KVPages(pool, 16), lora_room(shape, 16), arena=arena)
    weights = LoraWeights.read(make_lora(tmp_path, CONFIG), CONFIG)
    key = adapters.add("one", weights)
    go, seen = threading.Event(), []
    fetch = LoraWeights.fetch

    def slow(self: LoraWeights, *arguments: object) -> int:
        seen.append(threading.current_thread().name)
        go.wait(10)
        return fetch(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraWeights, "fetch", slow)
        adapters.prefetch([key])
        adapters.pages.take(30)
        go.set()
        adapters.acquire(key)
    assert seen[0].startswith("memwall adapters")
    assert adapters.counts.loaded_bytes == weights.nbytes
    adapters.release(key)
    adapters.stop()
    pool.release()
    assert arena.used_bytes == 0
    assert kernels.num_threads() >= 1


def test_a_shared_prefix_serves_one_adapter_only_and_a_refused_member_holds_nothing() -> None:
    engine = simulated_engine(FirstComeFirstServed(), num_pages=64, context_tokens=256, limits=Limits())
    adapters = engine.adapters = Adapters(engine.pages)
    key = adapters.add_counted("a", 2)
    prefix = engine.submit(Request(prompt=tuple(range(40)), members=1))
    member = Request(prompt=tuple(range(50)), adapter=key, prefix=prefix.id, base=40)
    with pytest.raises(InputError, match="another adapter"):
        engine.submit(member)
    adapters.remove("a")
    with pytest.raises(InputError, match="is not here"):  # forgotten at once: the refused request does not keep it
        engine.submit(replace(member, prefix=None, base=0))
