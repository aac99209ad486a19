"""How a model makes one vector of a text, as sentence-transformers write it beside embedding models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from memwall.errors import InputError
from memwall.formats import checked_json

CONFIG_NAME = "1_Pooling/config.json"
_KINDS: dict[str, Literal["last", "mean"]] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}


def pooling_of(directory: Path) -> Literal["last", "mean"]:
    """`last` or `mean`, as the model's `1_Pooling/config.json` says; `last` where it has none.

    InputError for another way, such as the mean weighted by place.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        return "last"
    asked = [name for name, on in checked_json.read(path).items() if name.startswith("pooling_mode_") and on is True]
    if len(asked) == 1 and asked[0] in _KINDS:
        return _KINDS[asked[0]]
    told = " and ".join(checked_json.shown(name) for name in asked) or "no pooling"
    raise InputError(f"{path}: asks for {told}; known is one of {', '.join(_KINDS)}")
