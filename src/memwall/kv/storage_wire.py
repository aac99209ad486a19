"""What host and storage process say to each other: fixed headers, then plain bytes. Numbers are little-endian.

A request is a header and a payload; so is a reply. Rows, queries and outputs travel as float16; the peak and sum of a
partial attention, where they are asked for, as float32.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple


class Op(IntEnum):
    """What a request asks for."""

    BEGIN = 1
    """A sequence of this number."""
    PLAN = 2
    """Blocks that it would hold with `number` tokens."""
    RESERVE = 3
    """Room for `number` tokens; the reply's value: blocks held."""
    APPEND = 4
    """`number` rows of keys, then of values."""
    ATTEND = 5
    """`number` queries from `first` on; with NEW_ROW the keys and values of one token before it, to be taken in."""
    ROWS = 6
    """`number` tokens' keys and values from `first` on."""
    TRUNCATE = 7
    """To `number` tokens; the reply's value: blocks held."""
    FORK = 8
    """A sequence numbered `number` that is equal."""
    RECLAIM = 9
    """The sequence is over: its blocks are erased."""
    REPORT = 10
    """Counters and memory, as JSON."""


class Flag(IntFlag):
    STATS = 1
    SPARSE = 2
    NEW_ROW = 4


class Status(IntEnum):
    OK = 0
    DOES_NOT_FIT = 1
    FAILED = 2


_REQUEST = struct.Struct("<BBHIIqQQ")
_REPLY = struct.Struct("<BxxxIQd")
REQUEST_BYTES, REPLY_BYTES = _REQUEST.size, _REPLY.size


class Request(NamedTuple):
    """limit: bytes of memory that the process may hold from now on."""

    op: int
    flags: int
    layer: int
    sequence: int
    number: int
    first: int
    limit: int
    payload_bytes: int

    def pack(self) -> bytes:
        return _REQUEST.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Request:
        return cls(*_REQUEST.unpack(data))


class Reply(NamedTuple):
    """ready: when the answer was there, on the clock that both processes see (`perf_counter`)."""

    status: int
    value: int
    payload_bytes: int
    ready: float

    def pack(self) -> bytes:
        return _REPLY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Reply:
        return cls(*_REPLY.unpack(data))


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fills the whole view; EOFError when the other end is gone."""
    done = 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError(f"the connection ended after {done:,} of {len(view):,} bytes")
        done += count
