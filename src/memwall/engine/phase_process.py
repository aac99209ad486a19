"""The processes behind two workers: one that holds the weights and never computes, and those that it forks.

The resident process is forked from the engine's once everything is loaded, while there is one thread; it lives as long
as the engine and forks a worker whenever it is asked to. So a worker sees the weights and the shared pages where they
lie, begins in milliseconds, and nothing is read or copied. What it writes itself (activations) becomes its own.

Messages are JSON behind their length (4 bytes); a worker ends when its socket is closed.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Batch
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.base import PHASES, Phase
from memwall.engine.batch import BatchCache, ModelExecutor
from memwall.engine.executor import Entry, Output
from memwall.engine.hand_over import HandOver, Pull
from memwall.engine.pacing import Board, Pacer
from memwall.engine.pooling import Pooler, part_of
from memwall.engine.ranked import layout_of
from memwall.engine.sampling import Sampler, Sampling, picks
from memwall.engine.sequence import Request, Sequence, TokenLogprobs
from memwall.engine.told_adapters import ToldAdapters
from memwall.engine.told_forms import ToldForms, bends_message, bent, made_before
from memwall.memory import PagePool

if TYPE_CHECKING:
    from memwall.engine.guide import Cursor, Guide

LENGTH = struct.Struct("<I")
MOST_ORDER_BYTES = 4096


def send(connection: socket.socket, message: Any) -> None:
    """One message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    connection.sendall(LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """One message; None where the other end is gone."""
    head = _read(connection, LENGTH.size)
    body = None if head is None else _read(connection, LENGTH.unpack(head)[0])
    return None if body is None else json.loads(body)


def _read(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            piece = connection.recv(count - len(parts))
        except ConnectionError:
            return None
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def entry_message(entry: Entry, draw: float | None, seen_before: int = 0) -> dict[str, Any]:
    """What a worker must know of an entry. Pages go by their numbers. seen_before: see `Pooler`."""
    one = entry.sequence
    told: dict[str, Any] = {
        "id": one.id,
        "first": entry.first,
        "pages": one.pages,
        "tokens": one.tokens[entry.first : entry.first + entry.count],
    }
    if one.request.adapter is not None:
        told["adapter"] = one.request.adapter
    if one.request.pooling is not None:
        told["pool"] = [one.request.pooling, seen_before]
    if entry.sample:
        asked = one.request.sampling
        told |= {"t": asked.temperature, "k": asked.top_k, "p": asked.top_p, "draw": draw, "lp": one.request.logprobs}
    return told | bends_message(entry)


class Worker:
    """A process that computes batches of one phase. pools: each phase's; the same one where they share it."""

    def __init__(
        self, connection: socket.socket, order: dict[str, Any], executor: ModelExecutor,
        pools: Mapping[Phase, PagePool], board: Board, forms: ToldForms | None = None,
    ) -> None:  # fmt: skip
        self.connection = connection
        whole = order["whole_threads"]
        self.pacer = Pacer(order["percent"], order["cores"], whole_threads=whole, board=board, phase=order["phase"])
        self.pools = pools
        cache = PacedCache(executor.cache, pools[order["phase"]], order["page_tokens"], self.pacer)
        self.executor = DrawingExecutor(executor, cache, forms)
        self.hand_over = HandOver(layout=layout_of(cache.shape, order["page_tokens"], cache.kv))

    def serve(self) -> None:
        """Answers until the other end is gone."""
        send(self.connection, {"ready": os.getpid()})
        while (job := receive(self.connection)) is not None:
            try:
                answer = self._run(job)
            except Exception as error:  # the engine hears of it and decides
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            finally:
                self.pacer.end()
            send(self.connection, answer)

    def _run(self, job: dict[str, Any]) -> dict[str, Any]:
        began, used = time.perf_counter(), time.process_time()
        for phase, nbytes in zip(PHASES, job["committed"], strict=True):
            self.pools[phase].follow(nbytes)
        if job["percent"] != self.pacer.percent:
            self.pacer.set(job["percent"])
        self.pacer.begin()
        pulls = [Pull(*told) for told in job["pulls"]]
        moved = self.hand_over.copy((self.pools["prefill"],), (self.pools["decode"],), pulls)
        pulled = time.perf_counter() - began
        if isinstance(self.executor.adapters, ToldAdapters):
            self.executor.adapters.tell(job["adapters"], job["rows"])
        outputs = self.executor.run_told(job["entries"])
        self.pacer.pace()
        return answer_message(outputs, began, used, (moved, pulled))


class PacedCache(BatchCache):
    """Rests between the parts of a layer, as far as the share asks for it."""

    def __init__(self, like: BatchCache, pool: PagePool, page_tokens: int, pacer: Pacer) -> None:
        super().__init__(like.shape, pool, page_tokens, like.kv)
        self.pacer = pacer

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """See `BatchCache`."""
        super().append(layer, k, v, positions)
        self.pacer.pace()

    def settle(self, layer: int) -> None:
        """See `BatchCache`."""
        super().settle(layer)
        self.pacer.pace()


class DrawingExecutor(ModelExecutor):
    """Draws with the random numbers that come with the job, so that it does not matter which worker draws."""

    def __init__(self, made: ModelExecutor, cache: BatchCache, forms: ToldForms | None = None) -> None:
        """forms: of answers; None where none are asked for."""
        self.forms = forms
        self.decoder, self.lora = made.decoder, made.lora
        self.adapters = None if made.lora is None else ToldAdapters(cache.pool, made.lora.room)
        self.cache = cache
        self._logit_rows, self._scratch = made._logit_rows, made._scratch
        self._pooler = PartPooler()

    def run_told(self, entries: Batch[dict[str, Any]]) -> list[Output | None]:
        """A batch by its messages."""
        return self.run([entry_of(told, self.forms) for told in entries]) if entries else []

    def _draw(self, sequence: Sequence, logits: np.ndarray) -> Output:
        token = self._picks(sequence)(logits)
        wanted = sequence.request.logprobs
        return Output(token, None if wanted is None else self._logprobs(logits, token, wanted))

    def _picks(self, sequence: Sequence) -> Callable[[np.ndarray], int]:
        draw = sequence.arrival  # of a sequence that is told to a worker: see `entry_of`
        return picks(Sampler(sequence.request.sampling, self._scratch), draw)

    def _cursor(self, sequence: Sequence, guide: Guide) -> Cursor:
        assert self.forms is not None
        return self.forms.cursor(sequence.id, guide)


class PartPooler(Pooler):
    """Sums are kept where no worker's loss can touch them: here only the part of the tokens at hand is made."""

    def take(self, entry: Entry, hidden: np.ndarray) -> np.ndarray | None:
        """See `Pooler`; what the engine's process adds."""
        if entry.sequence.request.pooling == "last" and not entry.sample:
            return None
        return part_of(entry, hidden, entry.sequence.cached)  # see `entry_of`


def entry_of(told: dict[str, Any], forms: ToldForms | None = None) -> Entry:
    """In a worker: what `entry_message` told."""
    first, tokens, sample = told["first"], told["tokens"], "t" in told
    sampling = Sampling(temperature=told["t"], top_k=told["k"], top_p=told["p"]) if sample else Sampling()
    pooling, seen_before = told.get("pool", (None, 0))
    guide, before = None, [0] * first
    if "bend" in told:  # what was made has a say
        sampling = bent(sampling, told)
        before[told["prompt"] :] = made_before(told)
    if "form" in told:
        assert forms is not None
        guide = forms.guide(told["form"])
    request = Request(
        prompt=(0,) * told.get("prompt", 1),
        sampling=sampling,
        logprobs=told.get("lp"),
        adapter=told.get("adapter"),
        pooling=pooling,
        guide=guide,
    )
    one = Sequence(id=told["id"], request=request, arrival=told.get("draw") or 0.0, eos=(), cached=seen_before)
    one.tokens, one.pages = before + tokens, told["pages"]
    one.holds_adapter = request.adapter is not None  # or the engine would not have told it
    return Entry(one, first, len(tokens), sample)


def answer_message(
    outputs: list[Output | None], began: float, cpu_began: float, pulled: tuple[int, float]
) -> dict[str, Any]:
    """A worker's answer, now that it is done. pulled: bytes and seconds of what it copied before."""
    return {
        "outputs": [None if out is None else [out.token, _logprobs(out), _vector(out)] for out in outputs],
        "span": [began, time.perf_counter()],
        "pulled": list(pulled),
        "cpu": time.process_time() - cpu_began,
    }


def outputs_of(answer: dict[str, Any]) -> list[Output | None]:
    """In the engine: what `answer_message` told."""
    return [
        None if found is None else Output(found[0], _told_logprobs(found[1]), _told_vector(found[2]))
        for found in answer["outputs"]
    ]


def _told_logprobs(told: Any) -> TokenLogprobs | None:
    return None if told is None else TokenLogprobs(own=told[0], top=tuple((int(i), float(p)) for i, p in told[1]))


def _told_vector(told: str | None) -> np.ndarray | None:
    return None if told is None else np.frombuffer(base64.b64decode(told), "<f8")


def _vector(output: Output) -> str | None:
    return None if output.vector is None else base64.b64encode(output.vector.astype("<f8").tobytes()).decode()


def _logprobs(output: Output) -> Any:
    found = output.logprobs
    return None if found is None else [found.own, [list(pair) for pair in found.top]]


def fork_resident(make: Callable[[socket.socket, dict[str, Any]], Worker]) -> tuple[int, socket.socket]:
    """Forks the resident process; its number, and the socket that asks it for workers. make: a worker, in a process of
    its own, that serves a socket by an order.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    number = os.fork()
    if number:
        theirs.close()
        return number, ours
    _forever(lambda: _resident(theirs, make), theirs.fileno())
    raise AssertionError


def _resident(orders: socket.socket, make: Callable[[socket.socket, dict[str, Any]], Worker]) -> None:
    gc.freeze()  # a collection would write to every object, and so copy their pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        body, files, _, _ = socket.recv_fds(orders, MOST_ORDER_BYTES, 1)
        if not body:
            return
        if os.fork() == 0:
            worker = partial(_work, files[0], json.loads(body), make)
            _forever(worker, files[0])
        os.close(files[0])


def _work(file: int, order: dict[str, Any], make: Callable[[socket.socket, dict[str, Any]], Worker]) -> None:
    make(socket.socket(fileno=file), order).serve()


def order_worker(orders: socket.socket, order: dict[str, Any]) -> socket.socket:
    """Asks for a worker; the socket to it. Its first message says that it is ready."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(orders, [json.dumps(order).encode()], [theirs.fileno()])
    return ours


def _forever(work: Callable[[], None], keep: int) -> None:
    """Does a forked process's work and ends it; nothing of the parent's is run or closed twice."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # they are for the engine's process; sockets tell when to end
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.closerange(3, keep)
        os.closerange(keep + 1, 1 << 20)
        work()
        status = 0
    except ConnectionError:
        status = 0  # nobody waits any more
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
