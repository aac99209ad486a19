"""A saved cache behind a link: what `memwall stream` serves, brought into an engine's cache by the controller."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from memwall.errors import InputError
from memwall.kv.cachegen import Shape, scratch_bytes
from memwall.kv.cachegen_file import DECODING, CacheGenFile
from memwall.kv.link import ChunkLink, LinkBroken
from memwall.kv.policy import parse
from memwall.kv.saved import SourceChecks
from memwall.kv.streaming import QUEUED_CHUNKS, Receiver, Request, StreamingController
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memwall.kv.base import CacheModel, KVCache
    from memwall.models.decoder import Decoder

MEASURED_TOKENS = 32
"""Recomputed to see how long that takes: few, since the user waits; as many at once cost no more each."""
_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")


class RemoteCache(SourceChecks):
    """The counterpart of `SavedCache` at the other end of a link; `request` tells afterwards how it came."""

    policy = None

    def __init__(self, url: str, slo_seconds: float) -> None:
        match = _ADDRESS.fullmatch(url)
        if match is None or not 0 < int(match[2]) < 65536:
            raise InputError(f"{url}: write tcp://HOST:PORT, as `memwall stream FILE` prints it")
        if not slo_seconds > 0:
            raise InputError(f"a deadline of {slo_seconds} s: must be more than zero")
        self.path = url
        self.slo_seconds = slo_seconds
        self.request: Request | None = None
        self._link = ChunkLink((match[1].strip("[]"), int(match[2])))
        try:
            self.index = self._link.index()
        except LinkBroken as error:
            raise InputError(f"{url}: cannot be reached: {error}") from error
        self.model, self.weights = self.index.model, self.index.weights
        self.weights_sha256 = self.index.weights_sha256
        self._controller = StreamingController()  # stays, since it learns what the link does
        self._prompt: Sequence[int] = ()

    @property
    def longest_append(self) -> int:
        """The most tokens that loading hands to a cache at once."""
        return max(self.index.chunk_tokens)

    def shared_tokens(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt's beginning that come from here: whole chunks of its text, not its last token."""
        self._prompt = prompt
        whole = sum(self.index.chunk_tokens[: self.index.num_matching(prompt)])
        return min(whole, len(prompt) - 1)

    def check_policy(self, policy: str) -> None:
        """InputError unless a cache of this policy can take rows."""
        self.check_rows(policy)

    def verify(self) -> None:
        """Nothing: each chunk is checked as it arrives."""

    def fill(self, cache: KVCache, keep: int, model: CacheModel, decoder: Decoder) -> int:
        """Fetches the first `keep` tokens; gives how many the cache took."""
        codec = CacheGenFile(parse(self.index.codec), model)
        profile = codec.profile()
        largest = max(size for sizes in self.index.sizes.values() for size in sizes)
        tables = sum(array.nbytes for array in profile.values()) if profile is not None else 0
        held = tables + (QUEUED_CHUNKS + 2) * largest + scratch_bytes(Shape.of(model.config), self.longest_append)
        charge = cache.arena.charge(DECODING, round_up(held))
        receiver = Receiver(
            cache, decoder, model.config, model=model.fingerprint, profile=profile, form=codec.settings.form
        )
        try:
            receiver.measure(keep, min(self.longest_append, MEASURED_TOKENS))
            self.request = Request(
                link=self._link,
                index=self.index,
                receiver=receiver,
                slo_seconds=self.slo_seconds,
                num_chunks=self._chunks_of(keep),
                most_tokens=keep,
                tokens=self._prompt,
            )
            self._controller.run([self.request])
        except BaseException:
            cache.truncate(0)
            raise
        finally:
            charge.release()
        return cache.length

    def _chunks_of(self, num_tokens: int) -> int:
        held = 0
        for number, tokens in enumerate(self.index.chunk_tokens):
            if held >= num_tokens:
                return number
            held += tokens
        return len(self.index.chunk_tokens)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
