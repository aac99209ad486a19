"""KV4: the past in 4 bits by pages of 64 tokens, keys per channel, values per token; the newest page exact till full.

Source: "COMET: Towards Practical W4A4KV4 LLMs Serving" (Lian Liu, 2024, ASPLOS 2025, arXiv 2410.12168), the 4-bit
cache of W4A4KV4; no official code was found.
Idea: as KIVI (`kv.kivi`, whose blocks and kernels these are): keys have channels of their own size, values tokens. The
unit is a page: it is exact until it is full, and then coded as a whole; no token of an older page is ever exact.
Units and shapes: rows [tokens, Hkv, D]; `page` in tokens: 16, 32, 64 or 128. A scale and a minimum in float16 belong to
a channel and page of keys, and to a token and 128 channels of values, or 64 or fewer where a head has no more.
Differs from the paper: it leaves the granularity open; this one is chosen here.
Cost: resident layers * Hkv * D * (8 + 32 / page + 32 / G) / 8 bytes a token, G channels to a group of values, and a
page in 16 bits; otherwise as `kv.kivi`.
Holds when: 16 divides D, and numbers stay below 65,504.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from memwall.errors import InputError
from memwall.kv.base import CacheShape
from memwall.kv.coded_state import predict_coded, read_bytes_coded
from memwall.kv.kivi import KiviCache, KiviSettings
from memwall.kv.kivi_state import GROUPS
from memwall.kv.policy import Policy

BITS, PAGE = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kv4Settings(KiviSettings):
    """KIVI's, with keys and values coded by the same whole pages of `key_group` tokens."""

    def to_code(self, num_keys: int, num_values: int) -> tuple[int, int]:
        page = self.key_tokens
        return num_keys - num_keys % page, num_values - num_values % page

    def recent_rows(self, capacity_tokens: int) -> tuple[int, int]:
        rows = min(self.key_tokens, capacity_tokens)
        return rows, rows

    @property
    def units(self) -> tuple[int, int]:
        """A page of each."""
        return self.key_tokens, self.key_tokens


class Kv4Cache(KiviCache):
    """See the module's text."""

    @classmethod
    @lru_cache(maxsize=256)
    def settings_of(cls, policy: Policy, shape: CacheShape) -> KiviSettings:
        exact = {name: text for name, text in policy.settings.items() if name == "exact"}
        page = policy.integers({"page": PAGE}, words=("exact",))["page"]
        if page not in GROUPS:
            raise InputError(f"policy {policy}: a page has {', '.join(map(str, GROUPS))} tokens, not {page}")
        group = max((group for group in GROUPS if shape.head_dim % group == 0), default=0)
        settings = {"bits": str(BITS), "residual": "0", "key_group": str(page), **exact}
        if group:
            settings["group"] = str(group)
        return Kv4Settings.from_policy(replace(policy, settings=settings), shape.head_dim)

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        settings = Kv4Cache.settings_of(policy, shape)
        return predict_coded(settings, shape, (num_tokens, prefill_tokens, capacity_tokens))

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        return read_bytes_coded(Kv4Cache.settings_of(policy, shape), shape, num_tokens)

    @property
    def policy(self) -> str:
        s = self.settings
        exact = "" if s.exact == "float16" else f",exact={s.exact}"
        return f"kv4(page={s.key_tokens}{exact})"
