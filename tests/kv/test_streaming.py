"""The controller: the rule, real transfers over loopback, and what happens when a stream breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memwall import engine
from memwall.engine import Settings
from memwall.errors import InputError
from memwall.formats.checked_json import Fields
from memwall.kv.cachegen_costs import LINK_ERROR, Costs, Pace
from memwall.kv.cachegen_file import codec_of
from memwall.kv.link import ChunkLink, ChunkServer, LinkBroken
from memwall.kv.saved import SavedCache
from memwall.kv.streaming import TEXT, Outlook, Receiver, Request, StreamingController, choose
from memwall.models import model_directory

NUM_TOKENS = 150


def outlook(**changes: object) -> Outlook:
    sizes = {1: 1_000_000, 2: 2_000_000, 3: 4_000_000}
    values = {"remaining_seconds": 1.0, "bytes_per_s": 3e6, "level_bytes": sizes, "text_seconds": 5.0}
    return Outlook(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, 2),
        ({"bytes_per_s": 5e6}, 3),
        ({"bytes_per_s": 1.5e6}, 1),
        ({"text_seconds": 0.9, "bytes_per_s": 5e6}, TEXT),  # text loses nothing: it comes first
        ({"text_seconds": 0.9, "busy_seconds": 0.2}, 2),  # the queue before the processor counts
        ({"bytes_per_s": 0.5e6}, 1),  # nothing arrives in time: the coarsest
        ({"bytes_per_s": 0.1e6}, TEXT),  # or text where it takes less
        ({"remaining_seconds": -1.0}, 1),
        ({"bytes_per_s": None}, 2),
        ({"bytes_per_s": None, "level_bytes": {1: 10, 3: 30}}, 3),
        ({"last_decode_seconds": 0.5}, 1),
        ({"decode_seconds": 0.9}, 2),  # goes on beside the transfer
        ({"decode_seconds": 0.9, "busy_seconds": 0.2}, 1),
        ({"busy_seconds": 1.2}, 1),
    ],
)
def test_the_rule(changes: dict[str, object], chosen: int) -> None:
    assert choose(outlook(**changes), 2) == chosen


def test_margins_decide_what_fits_and_not_what_is_quicker() -> None:
    """Text takes 0.9 s and level 1 0.8 if all goes as before; with margins neither is in time."""
    likely = outlook(text_seconds=0.9, bytes_per_s=1.25e6)
    careful = outlook(text_seconds=1.1, bytes_per_s=0.5e6)
    assert choose(likely, 2) == TEXT
    assert choose(careful, 2) == TEXT
    assert choose(careful, 2, likely) == 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SavedCache, list[int], np.ndarray]]:
    """A saved context of the demo model in 4 chunks, its tokens, and the logits of a full prefill with a question."""
    tokens = [0, *(3 + 7 * i % 4000 for i in range(NUM_TOKENS - 1))]
    session = load("float32")
    session.prefill(tokens)
    path = tmp_path_factory.mktemp("saved") / "c"
    session.save_cache(path, "cachegen(tables=chunk,chunk=40)")
    logits = session.prefill([5, 6, 7]).copy()
    with SavedCache(path) as saved:
        yield saved, tokens, logits


def load(policy: str) -> engine.Session:
    settings = Settings(weights="float16", kv=policy, context_tokens=200, segment_tokens=64)
    return engine.load(model_directory("demo"), settings)


def request(session: engine.Session, server: ChunkServer, **changes: object) -> Request:
    link = ChunkLink(server.address, timeout_seconds=20)
    assert session.model is not None
    profile = codec_of(server.saved, session.model).profile()
    receiver = Receiver(
        session.cache, session.decoder, session.config, model=session.model.fingerprint, profile=profile
    )
    receiver.measure(NUM_TOKENS, 32)
    assert session.cache.length == 0
    index = link.index()
    values = {"link": link, "index": index, "receiver": receiver, "slo_seconds": 60.0,
              "num_chunks": len(index.chunk_tokens)}  # fmt: skip
    return Request(**{**values, **changes})  # type: ignore[arg-type]


class Script(StreamingController):
    """Takes forms from a list instead of choosing."""

    def __init__(self, *forms: int) -> None:
        super().__init__()
        self.forms = forms

    def form(self, request: Request, chunk: int, others: object = ()) -> int:
        return self.forms[chunk]


def distance(session: engine.Session, logits: np.ndarray) -> float:
    mine = session.prefill([5, 6, 7])
    return float(np.abs(mine - logits).max())


@pytest.mark.parametrize("forms", [(0, 0, 0, 0), (3, 3, 3, 3), (0, 3, 0, 2), (3, 0, 0, 3), (1, 1, 1, 1)])
def test_any_mixture_gives_the_logits_of_a_full_prefill(
    file: tuple[SavedCache, list[int], np.ndarray], forms: tuple[int, ...]
) -> None:
    """Recomputed chunks see the earlier ones, whichever way these came."""
    saved, _, logits = file
    with ChunkServer(saved) as server:
        session = load("float32")
        one = request(session, server)
        Script(*forms).run([one])
        one.link.close()
        assert session.cache.length == NUM_TOKENS
        assert [sent.form for sent in one.sent] == list(forms)
        assert all(sent.nbytes > 0 and not sent.fallback for sent in one.sent)
        far = distance(session, logits)
    if set(forms) == {TEXT}:
        assert far < 1e-3
    else:
        assert far < 0.3 * np.ptp(logits) * (2 if 1 in forms else 1)


def test_a_beginning_ends_inside_a_chunk(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    saved, tokens, _ = file
    for forms in ((3, 3), (0, 0)):
        with ChunkServer(saved) as server:
            session = load("kivi(4bit)")
            one = request(session, server, num_chunks=2, most_tokens=57, tokens=tokens[:57])
            Script(*forms).run([one])
            assert session.cache.length == 57


class Failing(ChunkServer):
    """Breaks or damages what `fault` says of a request: the bytes after which the connection ends, or -1 to damage."""

    fault: Callable[[Fields], int | None] = staticmethod(lambda request: None)

    def send(self, connection: object, request: Fields, data: bytes) -> None:
        found = self.fault(request)
        if found is None:
            return super().send(connection, request, data)  # type: ignore[arg-type]
        if found < 0:
            broken = bytearray(data)
            broken[len(data) // 2] ^= 1
            return super().send(connection, request, bytes(broken))  # type: ignore[arg-type]
        connection.sendall(len(data).to_bytes(8, "big") + data[:found])  # type: ignore[attr-defined]
        raise OSError("broken")


@pytest.mark.parametrize("found", [0, 500, -1])
def test_a_broken_or_damaged_stream_comes_as_text(file: tuple[SavedCache, list[int], np.ndarray], found: int) -> None:
    saved, _, logits = file
    with Failing(saved) as server:
        session = load("float32")
        one = request(session, server)
        server.fault = lambda r: found if r.values.get("chunk") == 1 and "level" in r.values else None  # type: ignore[method-assign]
        Script(3, 3, 3, 3).run([one])
        assert [sent.form for sent in one.sent] == [3, TEXT, 3, 3]
        assert ("checksum" in one.sent[1].fallback) == (found < 0)
        assert one.sent[1].fallback
        assert session.cache.length == NUM_TOKENS
        assert distance(session, logits) < 0.3 * np.ptp(logits)


def test_a_link_that_is_gone_leaves_the_text_known_here(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    saved, tokens, logits = file
    for known in (tokens, None):
        server = Failing(saved)
        server.start()
        session = load("float32")
        one = request(session, server, tokens=known)
        one.link.timeout_seconds = 2

        def fault(asked: Fields, server: Failing = server) -> int | None:
            if asked.values.get("chunk") != 2:
                return None
            server.close()
            return 100

        server.fault = fault  # type: ignore[method-assign]
        if known is None:
            with pytest.raises(LinkBroken):
                Script(0, 0, 3, 3).run([one])
        else:
            Script(0, 0, 3, 3).run([one])
            assert [sent.form for sent in one.sent] == [0, 0, 0, 0]
            assert distance(session, logits) < 1e-3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cachegen")]


def test_forms_are_chosen_by_what_was_measured(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    """Plenty of time takes text; none takes bits; each chunk's estimate is what the chunk before it took."""
    saved, _, _ = file
    with ChunkServer(saved) as server:
        session = load("float16")
        ample = request(session, server)
        StreamingController().run([ample])
        assert [sent.form for sent in ample.sent] == [TEXT] * 4
        assert ample.in_time
        session.cache.truncate(0)
        late = request(session, server, slo_seconds=1e-6)
        late.receiver.costs.text = Pace(0.2, 0.1)
        controller = StreamingController(default_level=3)
        controller.run([late])
        assert late.sent[0].form == 3
        assert late.sent[0].estimate_bytes_per_s is None
        for before, after in zip(late.sent, late.sent[1:]):
            if before.nbytes >= 16 << 10:
                assert after.estimate_bytes_per_s == pytest.approx(before.nbytes / before.seconds)
        assert not late.in_time


def test_two_requests_go_through_in_rounds_and_count_each_other(
    file: tuple[SavedCache, list[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, _, logits = file
    seen: list[tuple[Outlook, int]] = []

    def spy(known: Outlook, default: int, likely: Outlook) -> int:
        seen.append((known, choose(known, default, likely)))
        return seen[-1][1]

    monkeypatch.setattr("memwall.kv.streaming.choose", spy)
    with ChunkServer(saved) as server:
        sessions = [load("float32"), load("float32")]
        both = [request(sessions[0], server), request(sessions[1], server, slo_seconds=1e-6, num_chunks=3)]
        both[1].receiver.costs.text = Pace(0.2, 0.1)
        StreamingController(prior_bytes_per_s=1e9).run(both)
        assert [len(one.sent) for one in both] == [4, 3]
        assert [session.cache.length for session in sessions] == [NUM_TOKENS, 120]
        assert distance(sessions[0], logits) < 1e-3
        sizes = both[0].index.sizes[3]
        # round 0: the first request has all of its own and all of the second's to come; the second's own first is sent
        assert seen[0][0].level_bytes[3] == sum(sizes) + sum(sizes[:3])
        assert seen[1][0].level_bytes[3] == sum(sizes[:3]) + sum(sizes[1:])
        assert seen[0][1] == TEXT


def test_the_official_code_s_rule_shares_the_time_evenly(
    file: tuple[SavedCache, list[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, _, _ = file
    seen: list[Outlook] = []
    monkeypatch.setattr("memwall.kv.streaming.choose", lambda known, default: seen.append(known) or 1)
    with ChunkServer(saved) as server:
        session = load("float16")
        one = request(session, server, slo_seconds=2.0)
        StreamingController(rule="even").run([one])
        assert [known.remaining_seconds for known in seen] == [0.5] * 4
        assert seen[0].level_bytes == {level: row[0] for level, row in one.index.sizes.items()}


def test_what_is_known_before_the_first_chunk_is_measured(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    """Recomputing and decoding were run, with and without a context, and the margin is what they differed by."""
    saved, _, _ = file
    with ChunkServer(saved) as server:
        costs = request(load("kivi(4bit)"), server).receiver.costs
        assert 0 < costs.decode_seconds(40) < costs.decode_seconds(40, careful=True)
        assert 0 < costs.text_seconds(0, 40) <= costs.text_seconds(100, 40) < costs.text_seconds(100, 40, careful=True)


def test_estimates_allow_for_earlier_errors(
    file: tuple[SavedCache, list[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides has margins on link and processor; what else it is handed has none."""
    saved, _, _ = file
    seen: list[tuple[Outlook, Outlook]] = []
    monkeypatch.setattr("memwall.kv.streaming.choose", lambda known, _, likely: seen.append((known, likely)) or 3)
    with ChunkServer(saved) as server:
        one = request(load("float16"), server)
        one.receiver.costs = Costs(growth=0.01, text=Pace(0.5, 100.0), decoding=Pace(0.25, 1000.0))
        controller = StreamingController(prior_bytes_per_s=1e6)
        controller.form(one, 1)
        careful, likely = seen[0]
        assert likely.bytes_per_s == 1e6
        assert careful.bytes_per_s == pytest.approx(1e6 / (1 + LINK_ERROR))
        tokens = NUM_TOKENS - 40
        assert likely.text_seconds == pytest.approx(tokens * (1 + 0.01 * (40 + tokens / 2)) / 100)
        assert careful.text_seconds == pytest.approx(1.5 * likely.text_seconds)
        assert careful.decode_seconds == pytest.approx(1.25 * tokens / 1000)
        assert careful.last_decode_seconds == pytest.approx(1.25 * 30 / 1000)


def test_errors_of_the_processor_end_the_run(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    saved, _, _ = file
    with ChunkServer(saved) as server:
        session = load("float16")
        one = request(session, server)

        def fails(*_: object) -> None:
            raise InputError("no")

        one.receiver.decode = fails  # type: ignore[method-assign]
        with pytest.raises(InputError, match="no"):
            Script(3, 3, 3, 3).run([one])


def test_a_saved_file_is_served_by_path(file: tuple[SavedCache, list[int], np.ndarray]) -> None:
    saved, _, _ = file
    assert Path(saved.path).is_file()
    with ChunkServer(saved) as server:
        assert server.address[0] == "127.0.0.1"
