"""KIVI's settings and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from memwall.errors import InputError
from memwall.kernels import attention
from memwall.kernels.parts import CodedForm
from memwall.kv.base import CacheShape
from memwall.kv.coded_state import SLACK_TOKENS, predict_coded, read_bytes_coded
from memwall.kv.float_store import float_dtype
from memwall.kv.policy import Policy
from memwall.memory.pages import round_up

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128)
QUERIES = ("float32", "int8")
INTEGER_BITS = (2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviSettings:
    """bits per code; numbers per group; tokens of the residual R; type of the exact tokens; key_group: tokens of a
    group of keys where they are not as many as the channels of one of values (0: as many); queries: what meets codes,
    float32 or, where these have 2 or 4 bits, int8, so that products are integers.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    exact: str = "float16"
    key_group: int = 0
    queries: str = "float32"

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy, head_dim: int) -> KiviSettings:
        """Settings of a policy string, checked against the model's head dimension."""
        exact, queries = policy.settings.get("exact", "float16"), policy.settings.get("queries", "float32")
        fitting = [group for group in GROUPS if head_dim % group == 0]
        if not fitting:
            raise InputError(f"kivi needs a head dimension that 16 divides, not {head_dim}; use float16")
        default = 32 if 32 in fitting else max(fitting)
        own, defaults = Policy(policy.name, policy.settings), {"bits": 2, "group": default, "residual": 128}
        numbers = own.integers({**defaults, "key_group": 0}, words=("exact", "queries"))
        settings = cls(**numbers, exact=exact, queries=queries)
        float_dtype(exact)
        if settings.bits not in BITS:
            raise InputError(f"policy {policy}: {settings.bits} bits; must be one of {', '.join(map(str, BITS))}")
        if settings.group not in fitting:
            raise InputError(
                f"policy {policy}: group {settings.group} does not work for a head dimension of {head_dim}; "
                f"must be one of {', '.join(map(str, fitting))}"
            )
        if settings.key_group not in (0, *GROUPS):
            raise InputError(f"policy {policy}: key_group must be one of {', '.join(map(str, GROUPS))}")
        if queries not in QUERIES:
            raise InputError(f"policy {policy}: queries={queries}; must be one of {', '.join(QUERIES)}")
        if settings.integers and settings.bits not in INTEGER_BITS:
            raise InputError(f"policy {policy}: int8 queries meet codes of 2 or 4 bits, not {settings.bits}")
        if settings.residual % settings.key_tokens:
            near = round_up(settings.residual, settings.key_tokens)
            raise InputError(
                f"policy {policy}: residual {settings.residual} is not a multiple of the group {settings.key_tokens}; "
                f"try {near}"
            )
        return settings

    @property
    def key_tokens(self) -> int:
        """Tokens of a group of keys."""
        return self.key_group or self.group

    @property
    def integers(self) -> bool:
        """Whether queries and shares meet codes as integers."""
        return self.queries == "int8"

    @property
    def form(self) -> CodedForm:
        """As kernels are told."""
        return CodedForm(bits=self.bits, group=self.group, key_group=self.key_tokens, integers=self.integers)

    @property
    def cycle(self) -> int:
        """Keys that are coded together: R, or one group when R is 0."""
        return max(self.residual, self.key_tokens)

    def key_bytes(self, shape: CacheShape, tokens: int, key_dim: int | None = None) -> int:
        """Bytes of the coded keys of one layer (`tokens` whole groups), of fewer channels where `key_dim` says so."""
        block = attention.kivi_key_block_bytes(self.bits, self.key_tokens, key_dim or shape.head_dim)
        return tokens // self.key_tokens * shape.num_kv_heads * block

    def value_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Bytes of the coded values of one layer: whole blocks."""
        block = attention.kivi_block_bytes(self.bits, self.group, shape.head_dim)[1]
        return -(-tokens // attention.VALUE_BLOCK_TOKENS) * shape.num_kv_heads * block

    def recent_rows(self, capacity_tokens: int) -> tuple[int, int]:
        """Rows kept for exact keys and for exact values of one layer."""
        return min(self.cycle, capacity_tokens), min(self.residual + SLACK_TOKENS, capacity_tokens)

    def to_code(self, num_keys: int, num_values: int) -> tuple[int, int]:
        """Keys once a cycle is full, values as they leave the residual."""
        return num_keys - num_keys % self.cycle, max(num_values - self.residual, 0)

    @property
    def units(self) -> tuple[int, int]:
        """A group of keys; values are coded token by token."""
        return self.key_tokens, 1

    @property
    def bits_per_value(self) -> tuple[float, float]:
        """Codes, scale and minimum."""
        return self.bits + 32 / self.key_tokens, self.bits + 32 / self.group


def predict_kivi(
    policy: Policy, shape: CacheShape, sizes: tuple[int, int, int], key_dim: int | None = None
) -> dict[str, int]:
    """As `KiviCache.predict`; sizes: tokens held, tokens at once, capacity; key_dim: channels that coded keys have."""
    return predict_coded(KiviSettings.from_policy(policy, shape.head_dim), shape, sizes, key_dim)


def read_bytes_kivi(policy: Policy, shape: CacheShape, num_tokens: int, key_dim: int | None = None) -> int:
    """As `KiviCache.read_bytes`; key_dim: channels that coded keys have."""
    return read_bytes_coded(KiviSettings.from_policy(policy, shape.head_dim), shape, num_tokens, key_dim)
