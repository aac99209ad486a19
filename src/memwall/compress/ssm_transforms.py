"""Changes to a state space layer that leave what the model computes as it is.

Tensors of one layer go by their names behind `model.layers.N.`, as float32 arrays; all functions give new dictionaries.

    fuse_norm        the norm's weight goes into in_proj, which reads what it makes
    rotate_residual  the residual stream is turned by a Hadamard matrix (legal once norms have no weights)
    turn_output      out_proj reads a gated output that the decoder turns as it comes
    reorder          channels and heads in another order, which must keep heads in their SSD group

Source: "Quamba2" (Hung-Yueh Chiang, 2025, arXiv 2503.22879), sections 4.1, 4.3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from memwall.kernels.scan import hadamard_rows
from memwall.models.ssm_config import SsmConfig

Tensors = Mapping[str, np.ndarray]
IN, OUT = "mixer.in_proj.weight", "mixer.out_proj.weight"


def turned_rows(matrix: np.ndarray) -> np.ndarray:
    """Rows [n, width] times the Hadamard matrix: the input side of a matrix, or vectors of the stream."""
    return hadamard_rows(np.array(matrix, np.float32, order="C"))


def fuse_norm(tensors: Tensors) -> dict[str, np.ndarray]:
    """The norm before the mixer has weights of one."""
    norm = tensors["norm.weight"]
    return {**tensors, IN: tensors[IN] * norm, "norm.weight": np.ones_like(norm)}


def rotate_residual(tensors: Tensors) -> dict[str, np.ndarray]:
    """Reads and writes a residual stream that was turned; after `fuse_norm`."""
    made = {**tensors, IN: turned_rows(tensors[IN]), OUT: np.ascontiguousarray(turned_rows(tensors[OUT].T).T)}
    bias = "mixer.out_proj.bias"
    if bias in tensors:
        made[bias] = turned_rows(tensors[bias][None])[0]
    return made


def turn_output(tensors: Tensors) -> dict[str, np.ndarray]:
    """out_proj undoes the turn that the decoder gives the gated output."""
    return {**tensors, OUT: turned_rows(tensors[OUT])}


def reorder(tensors: Tensors, ssm: SsmConfig, channels: np.ndarray, heads: np.ndarray) -> dict[str, np.ndarray]:
    """Channel channels[i] comes to place i and head heads[j] to place j (Mamba-2).

    z, x, the convolution's rows of x, the gated norm and out_proj's inputs follow the channels; dt and its bias, A and
    D the heads; B and C stay. Equal only where heads keep to their group: the others read another B and C.
    """
    inner, bc = ssm.inner_size, ssm.bc_size
    rest = np.arange(2 * inner, 2 * inner + 2 * bc)
    proj_rows = np.concatenate([channels, inner + channels, rest, 2 * inner + 2 * bc + heads])
    conv_rows = np.concatenate([channels, np.arange(inner, inner + 2 * bc)])
    by = {
        IN: proj_rows,
        "mixer.in_proj.bias": proj_rows,
        "mixer.conv1d.weight": conv_rows,
        "mixer.conv1d.bias": conv_rows,
        "mixer.A_log": heads,
        "mixer.D": heads,
        "mixer.dt_bias": heads,
        "mixer.norm.weight": channels,
    }
    made = {name: tensor[by[name]] if name in by else tensor for name, tensor in tensors.items()}
    made[OUT] = np.ascontiguousarray(tensors[OUT][:, channels])
    return made
