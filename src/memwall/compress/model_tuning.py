"""Fine-tuning of a whole compressed model: codebooks and norms learn to say what comes next in the calibration text.

Indices, embedding and head stay as they are. Of the text's sequences every eighth is kept aside, and of all states the
one is taken that predicts those best; where none is better than what there was, nothing changes. Needs torch, which is
imported here and nowhere else on the way.

Source: end-to-end fine-tuning of "VPTQ" (Yifei Liu, 2024, arXiv 2409.17066), section 4.3 and appendix B: the language
model's loss, the same parameters as layer by layer.
Cost: the model in float32 twice (as looked up, and as the gradient of that), gradients and two moments of its
codebooks, and the activations of a batch of sequences; a step is a pass forward and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memwall.compress.base import Trained
from memwall.compress.layer_tuning import LOOK_STEPS, LookedUp, Schedule, require_torch
from memwall.formats import Packed, codec
from memwall.formats.vptq import VptqCodec
from memwall.models.checkpoint import Checkpoint

BATCH_SEQUENCES = 2
KEPT_ASIDE = 8
"""Every so many sequences one chooses among the states that the others lead to."""


def tuned_model(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    made: Mapping[str, Packed],
    schedule: Schedule,
    progress: Trained | None = None,
) -> dict[str, Packed]:
    """Those of `made` (all tensors of a model as they are stored) that changed; none where nothing was won.

    checkpoint: the float model. tokens [sequences, tokens]: the calibration text.
    """
    require_torch("tune_model")
    import torch
    from torch import nn
    from torch.nn import functional

    from memwall.models.torch_decoder import TorchDecoder

    decoder = TorchDecoder.from_checkpoint(checkpoint)
    matrices, norms, fixed = {}, {}, {}
    for name, packed in made.items():
        if isinstance(codec(packed.spec), VptqCodec):
            matrices[name] = LookedUp(packed)
            continue
        floats = torch.from_numpy(np.array(codec(packed.spec).decode(packed), np.float32))
        if len(packed.shape) == 1 and "norm" in name:
            norms[name] = nn.Parameter(floats)
        else:
            fixed[name] = floats
    learning = [each for matrix in matrices.values() for each in matrix.parameters()] + list(norms.values())
    ids = torch.from_numpy(np.array(tokens, np.int64))
    aside = np.arange(len(ids)) % KEPT_ASIDE == KEPT_ASIDE - 1 if len(ids) >= KEPT_ASIDE else np.zeros(len(ids), bool)
    read, judged = ids[~aside], ids[aside] if aside.any() else ids

    def loss(sequences: Any) -> Any:
        held = {name: matrix() for name, matrix in matrices.items()} | norms | fixed
        logits = torch.func.functional_call(decoder, held, (sequences[:, :-1],))
        return functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())

    def judge() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(each)) for each in judged.split(1)]))

    before = best = judge()
    kept = [each.detach().clone() for each in learning]
    optimizer = torch.optim.Adam(learning, lr=schedule.rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / schedule.steps))
    random = np.random.default_rng(schedule.seed)
    for step in range(schedule.steps):
        optimizer.zero_grad()
        loss(read[torch.from_numpy(random.permutation(len(read))[:BATCH_SEQUENCES])]).backward()
        optimizer.step()
        falling.step()
        if progress is not None:
            progress(step + 1, schedule.steps)
        if (step + 1) % LOOK_STEPS == 0 or step + 1 == schedule.steps:
            now = judge()
            if now < best:
                best, kept = now, [each.detach().clone() for each in learning]
    if not best < before:
        return {}
    for parameter, values in zip(learning, kept, strict=True):
        parameter.data.copy_(values)
    found = {name: matrix.packed() for name, matrix in matrices.items()}
    for name, norm in norms.items():
        found[name] = codec("float32").encode(norm.detach().numpy().copy())
    return found
