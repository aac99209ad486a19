"""Commands to an oblivious map and its replies, through rings in memory of a host that only forwards bytes.

A client and the map share a key; from it and a random salt of each end, which they tell each other when they meet,
comes one key for each direction of this connection. A command is (operation, key, value), a
reply (status, value): each has one length, whatever it asks and whatever was found, and is sealed under its place in
the order, so that one that was changed, left out, repeated or put elsewhere ends the connection. The map takes what
lies in the ring as one batch. See `bolt` for what the host sees of the pages then.

Units and shapes: a command takes 5 + V + 16 bytes, a reply 1 + V + 16, V being the bytes of a value.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.retrieve.bolt import ABSENT, DELETE, FOUND, FULL, GET, NONE, ObliviousMap
from memwall.retrieve.untrusted import KEY_BYTES, TAG_BYTES, Tampered, aes_gcm

STATUSES = {ABSENT: "absent", FOUND: "found", FULL: "full"}
SALT_BYTES = 16
REFUSED = 3
"""Status of a command that is none."""


def derived_key(key: bytes, purpose: str, salt: bytes = b"") -> bytes:
    """32 bytes for one purpose, from which neither the key nor another purpose's follows."""
    if len(key) != KEY_BYTES:
        raise InputError(f"a key of {len(key)} bytes; it has {KEY_BYTES}")
    aes_gcm(key)  # says what to install
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt or None, info=purpose.encode()).derive(key)


class Ring:
    """Slots of one length between a writer and a reader, on the host; `moved` counts what it forwards."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        if num_slots < 1:
            raise InputError(f"a ring of {num_slots} slots: one at least")
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self.data = bytearray(num_slots * slot_bytes)
        self.written = self.taken = 0

    def __len__(self) -> int:
        return self.written - self.taken

    def push(self, packet: bytes) -> bool:
        """False where the ring is full."""
        size = self.slot_bytes
        if len(packet) != size:
            raise InputError(f"a packet of {len(packet)} bytes; this ring's have {size}")
        if self.written - self.taken == self.num_slots:
            return False
        at = self.written % self.num_slots * size
        self.data[at : at + size] = packet
        self.written += 1
        return True

    def pop(self) -> bytes | None:
        """None where it is empty."""
        if self.written == self.taken:
            return None
        at = self.taken % self.num_slots * self.slot_bytes
        self.taken += 1
        return bytes(self.data[at : at + self.slot_bytes])

    @property
    def moved_bytes(self) -> int:
        """Forwarded so far."""
        return self.written * self.slot_bytes


class _Direction:
    """Packets one way, sealed under their place."""

    def __init__(self, key: bytes, purpose: str, salt: bytes) -> None:
        cipher = aes_gcm(derived_key(key, f"memwall map {purpose}", salt))
        from cryptography.exceptions import InvalidTag

        self._encrypt, self._decrypt, self._invalid = cipher.encrypt, cipher.decrypt, InvalidTag
        self._place = 0

    def seal(self, plain: bytes) -> bytes:
        self._place += 1
        sealed: bytes = self._encrypt(self._place.to_bytes(12, "little"), plain, None)
        return sealed

    def open(self, packet: bytes) -> bytes:
        self._place += 1
        try:
            plain: bytes = self._decrypt(self._place.to_bytes(12, "little"), packet, None)
            return plain
        except self._invalid:
            raise Tampered(
                f"packet {self._place} is not the one that was sent in this place, or the key is another one"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """status: absent, found, full or refused. value: what the key had before, None where it had nothing."""

    status: str
    value: bytes | None


def rings(value_bytes: int, num_slots: int = 1024) -> tuple[Ring, Ring]:
    """(commands, replies) for values of that length."""
    return Ring(num_slots, 5 + value_bytes + TAG_BYTES), Ring(num_slots, 1 + value_bytes + TAG_BYTES)


class _End:
    """One end of a connection: `salt` goes to the other one, and its salt to `meet`, before the first packet."""

    def __init__(self, key: bytes) -> None:
        derived_key(key, "check")
        self._key, self.salt = key, secrets.token_bytes(SALT_BYTES)
        self._directions: dict[str, _Direction] = {}

    def _meet(self, salts: bytes) -> None:
        if self._directions or len(salts) != 2 * SALT_BYTES:
            raise InputError(f"ends meet once, and a salt has {SALT_BYTES} bytes")
        self._directions = {what: _Direction(self._key, what, salts) for what in ("commands", "replies")}

    def _way(self, what: str) -> _Direction:
        if not self._directions:
            raise InputError("a client and a map's end meet first: give meet() the other one's salt")
        return self._directions[what]


class Client(_End):
    """Seals commands and opens replies, in order."""

    def __init__(self, key: bytes, value_bytes: int) -> None:
        super().__init__(key)
        self.value_bytes = value_bytes

    def meet(self, salt: bytes) -> None:
        """salt: the device's. Neither end can be made to use this connection's keys again."""
        self._meet(self.salt + salt)

    def command(self, op: int, key: int, value: bytes | None = None) -> bytes:
        """A packet. value: of PUT, exactly `value_bytes`."""
        if not 0 <= key <= NONE:
            raise InputError(f"key {key}: from 0 to {NONE:,}")
        value = bytes(self.value_bytes) if value is None else value
        if len(value) != self.value_bytes:
            raise InputError(f"a value of {len(value)} bytes; this map's have {self.value_bytes}")
        return self._way("commands").seal(bytes([op]) + key.to_bytes(4, "little") + value)

    def reply(self, packet: bytes) -> Reply:
        plain = self._way("replies").open(packet)
        status = STATUSES.get(plain[0], "refused")
        return Reply(status=status, value=plain[1:] if plain[0] == FOUND else None)


class Device(_End):
    """The map's end: takes what lies in the ring of commands, carries it out, and answers."""

    def __init__(self, served: ObliviousMap, key: bytes) -> None:
        super().__init__(key)
        self.served = served

    def meet(self, salt: bytes) -> None:
        """salt: the client's."""
        self._meet(salt + self.salt)

    def serve(self, commands: Ring, replies: Ring, most: int = 1024) -> int:
        """One batch of at most so many commands, and no more than replies have room; returns how many it was."""
        incoming, outgoing = self._way("commands"), self._way("replies")
        room = min(most, replies.num_slots - len(replies), len(commands))
        packets = [commands.pop() or b"" for _ in range(room)]
        if not packets:
            return 0
        size = 5 + self.served.settings.value_bytes
        plain = b"".join([incoming.open(packet) for packet in packets])
        rows = np.frombuffer(plain, np.uint8).reshape(len(packets), size)
        asked = rows[:, 0]
        # a command that is none costs what others cost
        ops = np.where(asked <= DELETE, asked, GET)
        keys = np.ascontiguousarray(rows[:, 1:5]).view(np.uint32)[:, 0]
        found = self.served.access(ops, keys, np.ascontiguousarray(rows[:, 5:]))
        statuses = np.where(asked <= DELETE, found.statuses, REFUSED).astype(np.uint8)
        size = 1 + self.served.settings.value_bytes
        told = np.concatenate([statuses[:, None], found.values], axis=1).tobytes()
        for at in range(0, len(told), size):
            replies.push(outgoing.seal(told[at : at + size]))
        return len(packets)


def connected(served: ObliviousMap, key: bytes) -> tuple[Client, Device]:
    """Both ends, where one process has them."""
    client, device = Client(key, served.settings.value_bytes), Device(served, key)
    client.meet(device.salt)
    device.meet(client.salt)
    return client, device
