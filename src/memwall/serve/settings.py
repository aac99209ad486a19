"""How the server behaves: where it listens, and the most that one client may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memwall.engine.sequence import Pooling
from memwall.errors import InputError
from memwall.hardware.units import KIB, MIB

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """name: what the model is called. api_key: once set, every route asks for it, or for one of api_keys, by the names
    of their owners; key_file: where these are read from again on SIGHUP. access_log: answers are told on standard
    error. most_*: what one request may ask for; queue: requests that may wait beside those that run; connections: open
    sockets; seconds_per_request: wall time; drain_seconds: how long running requests may go on after the server was
    asked to end. lora_folder: where adapters may be loaded from by request. pooling: how a text becomes one vector.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict)
    key_file: Path | None = None
    access_log: bool = False
    most_body_bytes: int = MIB
    most_choices: int = 16
    most_prompts: int = 64
    most_logprobs: int = 20
    most_stops: int = 16
    most_stop_characters: int = 256
    queue: int = 128
    connections: int = 256
    seconds_per_request: float = 600.0
    drain_seconds: float = 30.0
    lora_folder: Path | None = None
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("the model's name is empty")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port is {self.port}; it must be 0 (any free one) to 65535")
        for key in (*([] if self.api_key is None else [self.api_key]), *self.api_keys.values()):
            if not key or not key.isascii() or not key.isprintable():
                raise InputError("the API key is empty or has characters that no header can carry")
        for name in ("most_body_bytes", "most_choices", "most_prompts", "queue", "connections", "seconds_per_request"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above zero")

    @property
    def guarded(self) -> bool:
        """Whether a key is asked for."""
        return self.api_key is not None or bool(self.api_keys)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def read_keys(path: Path) -> dict[str, str]:
    """Keys by the names of their owners: a line `KEY`, or `NAME KEY`, each; # begins a comment."""
    try:
        if path.stat().st_size > MIB:
            raise InputError(f"{path}: larger than 1 MiB, which no list of keys is")
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        name = parts[0] if len(parts) == 2 else f"line-{number}"
        if len(parts) > 2 or name in found or not name.isprintable():
            raise InputError(f"{path}, line {number}: write a key, or a name of its own and a key")
        found[name] = parts[-1]
    if not found:
        raise InputError(f"{path}: has no key; write one a line")
    return found


def body_bytes(context_tokens: int) -> int:
    """The largest body for a context: 32 bytes a token is more than texts take, and encoding costs memory by length."""
    return min(max(context_tokens * 32, 64 * KIB), 4 * MIB)
