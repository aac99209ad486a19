"""The way between two processes that hold halves of a model: shared memory, a socket as its bell, and a link's time.

What one shows is in the other's memory at once; the bell says when a link of the given delay and rate would have
brought it, and the reader sleeps until then. So a slow network costs time and no processor, as a real one would. It is
emulated, and says so.
"""

from __future__ import annotations

import mmap
import socket
import struct
import time
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError

RANKS = 2
_BELL = struct.Struct("<d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An emulated network. delay_seconds: of each message; bytes_per_s: of one direction, None for no limit."""

    delay_seconds: float = 0.0
    bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.delay_seconds < 0 or (self.bytes_per_s is not None and self.bytes_per_s <= 0):
            raise InputError(f"a link of {self.delay_seconds} s and {self.bytes_per_s} bytes/s: neither may be below 0")

    def seconds(self, nbytes: int) -> float:
        """Of one message by itself."""
        return self.delay_seconds + (nbytes / self.bytes_per_s if self.bytes_per_s else 0.0)


class SharedWire:
    """One end. Both call `exchange` in the same order with arrays as large; each call is a turn."""

    def __init__(self, rank: int, room: mmap.mmap, bell: socket.socket, link: Link) -> None:
        self.rank, self.link = rank, link
        self._bell = bell
        # two areas of each, used in turn: the other is done with one when it rings for the next
        self._areas = np.frombuffer(room, np.float32).reshape(RANKS, 2, -1)
        self._turn = 0
        self._free = 0.0
        self.waited_seconds = 0.0

    def exchange(self, x: np.ndarray) -> np.ndarray:
        """See `nano_batches.Wire`. ConnectionError when the other is gone."""
        side, self._turn = self._turn % 2, self._turn + 1
        if x.size > self._areas.shape[2]:
            raise ValueError(f"{x.size} numbers for a wire of {self._areas.shape[2]}")
        self._areas[self.rank, side, : x.size] = x.ravel()
        began = time.monotonic()
        leaves = max(began, self._free)
        self._free = leaves + (x.nbytes / self.link.bytes_per_s if self.link.bytes_per_s else 0.0)
        self._bell.sendall(_BELL.pack(leaves + self.link.seconds(x.nbytes)))
        told = b""
        while len(told) < _BELL.size:
            part = self._bell.recv(_BELL.size - len(told))
            if not part:
                raise ConnectionError("the process with the other half of the model is gone")
            told += part
        time.sleep(max(_BELL.unpack(told)[0] - time.monotonic(), 0.0))
        self.waited_seconds += time.monotonic() - began
        return self._areas[1 - self.rank, side, : x.size].reshape(x.shape)

    def close(self) -> None:
        """The other end's next call fails."""
        self._bell.close()


def wire_pair(most_values: int, link: Link) -> tuple[SharedWire, SharedWire]:
    """Both ends; fork after this, and close in each process the end that is the other's."""
    room = mmap.mmap(-1, RANKS * 2 * most_values * np.dtype(np.float32).itemsize)
    bells = socket.socketpair()
    first, second = (SharedWire(rank, room, bell, link) for rank, bell in enumerate(bells))
    return first, second
