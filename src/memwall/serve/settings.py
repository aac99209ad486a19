"""How the server behaves: where it listens, and the most that one client may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memwall.engine.sequence import Pooling
from memwall.errors import InputError
from memwall.hardware.units import KIB, MIB

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """name: what the model is called. api_key: once set, every route asks for it. most_*: what one request may ask for;
    queue: requests that may wait beside those that run; connections: open sockets; seconds_per_request: wall time;
    drain_seconds: how long running requests may go on after the server was asked to end. lora_folder: where adapters
    may be loaded from by request. pooling: how a text becomes one vector.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
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
        if self.api_key is not None and (
            not self.api_key or not self.api_key.isascii() or not self.api_key.isprintable()
        ):
            raise InputError("the API key is empty or has characters that no header can carry")
        for name in ("most_body_bytes", "most_choices", "most_prompts", "queue", "connections", "seconds_per_request"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above zero")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def body_bytes(context_tokens: int) -> int:
    """The largest body for a context: 32 bytes a token is more than texts take, and encoding costs memory by length."""
    return min(max(context_tokens * 32, 64 * KIB), 4 * MIB)
