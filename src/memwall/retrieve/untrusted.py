"""The other side of an oblivious map: pages on a host that is not trusted, every access to them logged, and their seal.

What a host sees of a page is its number, its length and bytes that look random; `UntrustedStore` logs the first two
and counts, and nothing that is measured about visible traffic comes from anywhere else. `SealedPages` encrypts and
authenticates with AES-GCM (library `cryptography`, the extra `oblivious`). The nonce of a page is its number and the
count of writes under this key, which is kept in private memory: it never comes twice, an equal page never has equal
bytes twice, and a page that was changed, moved or put back from an earlier time is refused.

Units and shapes: pages [n] uint32 numbers; sealed uint8 [n, page_bytes]; plain uint8 [n, page_bytes - 16].

Cost: 8 private bytes a page (the count at its last write); 16 visible ones (the tag).
"""

from __future__ import annotations

import mmap
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError, MemwallError, MissingDependency

TAG_BYTES = 16
KEY_BYTES = 32
READ, WRITE = 0, 1

Entropy = Callable[[int], bytes]
"""So many random bytes. Anything but the system's is for experiments that must come out the same."""


class Tampered(MemwallError):
    """Bytes from the host are not those that were written last."""


def aes_gcm(key: bytes) -> Any:
    """AES-GCM under a key of 32 bytes; MissingDependency, with the line that installs it, where it is not there."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise MissingDependency("cryptography", "oblivious") from None
    return AESGCM(key)


@dataclass(slots=True)
class Trace:
    """What the host sees. `log` is None where only counts are kept."""

    page_bytes: int
    reads: int = 0
    writes: int = 0
    log: list[tuple[int, np.ndarray]] | None = field(default_factory=list)

    def add(self, op: int, pages: np.ndarray) -> None:
        if op == READ:
            self.reads += len(pages)
        else:
            self.writes += len(pages)
        if self.log is not None:
            self.log.append((op, np.array(pages, np.uint32)))

    @property
    def visible_bytes(self) -> int:
        """Moved in both directions."""
        return (self.reads + self.writes) * self.page_bytes

    def clear(self) -> None:
        self.reads = self.writes = 0
        if self.log is not None:
            self.log.clear()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(ops uint8 [n], pages uint32 [n]) in order; every entry is `page_bytes` long."""
        if not self.log:
            return np.zeros(0, np.uint8), np.zeros(0, np.uint32)
        ops = np.concatenate([np.full(len(pages), op, np.uint8) for op, pages in self.log])
        return ops, np.concatenate([pages for _, pages in self.log])


class UntrustedStore(ABC):
    """Pages of one length. Whoever uses it sees bytes only through `read` and `write`, which are logged."""

    def __init__(self, num_pages: int, page_bytes: int, *, logged: bool = False) -> None:
        """logged: keep every access, not only how many there were."""
        if not 0 <= num_pages < 1 << 32 or page_bytes < 1:
            raise InputError(f"{num_pages} pages of {page_bytes} bytes: fewer than 2^32, of one byte at least")
        self.num_pages, self.page_bytes = num_pages, page_bytes
        self.trace = Trace(page_bytes, log=[] if logged else None)

    def read(self, pages: np.ndarray) -> np.ndarray:
        """uint8 [n, page_bytes], a copy."""
        self.trace.add(READ, pages)
        return self._load(pages)

    def write(self, pages: np.ndarray, data: np.ndarray) -> None:
        """data uint8 [n, page_bytes]: whole pages only."""
        assert data.shape == (len(pages), self.page_bytes)
        self.trace.add(WRITE, pages)
        self._save(pages, data)

    @abstractmethod
    def _load(self, pages: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _save(self, pages: np.ndarray, data: np.ndarray) -> None: ...

    def close(self) -> None:  # noqa: B027
        """Lets go of what it holds."""


class HostMemory(UntrustedStore):
    """Pages in memory that others may watch."""

    def __init__(self, num_pages: int, page_bytes: int, *, logged: bool = False) -> None:
        super().__init__(num_pages, page_bytes, logged=logged)
        self.data = np.zeros((num_pages, page_bytes), np.uint8)

    def _load(self, pages: np.ndarray) -> np.ndarray:
        return self.data[pages]

    def _save(self, pages: np.ndarray, data: np.ndarray) -> None:
        self.data[pages] = data


class HostFile(UntrustedStore):
    """Pages in a file, mapped: page p begins at byte p * page_bytes."""

    def __init__(self, path: Path, num_pages: int, page_bytes: int, *, make: bool = True, logged: bool = False) -> None:
        """make: a new file; else one that is there, whose size must be right."""
        super().__init__(num_pages, page_bytes, logged=logged)
        self.path, size = path, num_pages * page_bytes
        self._descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if make else 0), 0o600)
        if make:
            os.truncate(self._descriptor, size)
        found = os.fstat(self._descriptor).st_size
        if found != size:
            os.close(self._descriptor)
            raise InputError(f"{path}: {found:,} bytes; {num_pages:,} pages of {page_bytes} bytes are {size:,}")
        self._map = mmap.mmap(self._descriptor, size) if size else None
        flat = np.zeros(0, np.uint8) if self._map is None else np.frombuffer(self._map, np.uint8)
        self.data = flat.reshape(num_pages, page_bytes)

    def _load(self, pages: np.ndarray) -> np.ndarray:
        return self.data[pages]

    def _save(self, pages: np.ndarray, data: np.ndarray) -> None:
        self.data[pages] = data

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        if self._map is not None:
            self._map.flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        self.data = np.zeros((0, self.page_bytes), np.uint8)
        if self._map is not None:
            self._map.close()
            self._map = None
            os.close(self._descriptor)


class SealedPages:
    """Pages of a store in plain bytes, for those who hold the key.

    versions [num_pages] uint64: the count under which a page was written last; private, and saved with the rest of the
    private state.
    """

    def __init__(self, store: UntrustedStore, key: bytes, versions: np.ndarray | None = None) -> None:
        self.store, self.key = store, key
        self.plain_bytes = store.page_bytes - TAG_BYTES
        self._cipher = aes_gcm(key)
        self.versions = np.zeros(store.num_pages, np.uint64) if versions is None else versions
        # another start each time, so that a state that was saved and taken up twice does not count the same twice
        self._count = secrets.randbits(62)

    def _nonces(self, pages: np.ndarray, versions: np.ndarray) -> list[bytes]:
        packed = np.empty((len(pages), 3), np.uint32)
        packed[:, 0] = pages
        packed[:, 1:] = versions.view(np.uint32).reshape(-1, 2)
        text = packed.tobytes()
        return [text[at : at + 12] for at in range(0, len(text), 12)]

    def read(self, pages: np.ndarray) -> np.ndarray:
        """uint8 [n, plain_bytes]; Tampered for bytes that are not those that were written last."""
        sealed, size = self.store.read(pages).tobytes(), self.store.page_bytes
        decrypt = self._cipher.decrypt
        nonces = self._nonces(pages, self.versions[pages])
        try:
            plain = [decrypt(nonce, sealed[at * size : at * size + size], None) for at, nonce in enumerate(nonces)]
        except Exception as error:
            from cryptography.exceptions import InvalidTag

            if isinstance(error, InvalidTag):
                raise Tampered(
                    f"a page among {len(pages)} from the host is not the one written last: it was changed, moved or "
                    "put back, or the key is another one"
                ) from None
            raise
        # a copy that may be written to
        return np.frombuffer(bytearray().join(plain), np.uint8).reshape(len(pages), self.plain_bytes)

    def write(self, pages: np.ndarray, plain: np.ndarray) -> None:
        """plain uint8 [n, plain_bytes], each page once."""
        versions = np.arange(self._count, self._count + len(pages), dtype=np.uint64)
        self._count += len(pages)
        data, size, encrypt = plain.tobytes(), self.plain_bytes, self._cipher.encrypt
        nonces = self._nonces(pages, versions)
        sealed = b"".join([encrypt(nonce, data[at * size : at * size + size], None) for at, nonce in enumerate(nonces)])
        self.store.write(pages, np.frombuffer(sealed, np.uint8).reshape(len(pages), self.store.page_bytes))
        self.versions[pages] = versions
