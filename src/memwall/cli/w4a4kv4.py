"""`--weights W4A4KV4`: one name for weights and activations of a model that `comet` made, and for the 4-bit cache."""

from __future__ import annotations

from pathlib import Path

NAME = "w4a4kv4"
CACHE = "kv4"


def settled(model: str | Path, weights: str, kv: str | None) -> tuple[str, str | None]:
    """Weights and cache as the other parts of the program know them: `saved` and `kv4` where the name was given.

    InputError where the model was not made for it, or another cache is named beside it.
    """
    if weights.lower() != NAME:
        return weights, kv
    from memwall.errors import InputError
    from memwall.formats import codec
    from memwall.kv import parse
    from memwall.models import Checkpoint, ModelConfig, model_directory
    from memwall.models.precision import resolve

    if kv not in (None, "auto") and parse(str(kv)).name != CACHE:
        raise InputError(f"--weights {weights} names the cache too: leave --kv {kv} out, or give --weights saved")
    path = model_directory(model)
    config = ModelConfig.from_directory(path)
    with Checkpoint(path, config) as checkpoint:
        specs = {} if checkpoint.manifest is None else resolve(config, "saved", checkpoint)
    if not any(codec(spec).method == "comet" for spec in specs.values()):
        raise InputError(f"{path}: was not made for {weights}: memwall compress MODEL OUT --method comet, then use OUT")
    return "saved", CACHE if kv in (None, "auto") else kv
