"""Training of the autoencoder of `reducers`; torch is needed for this alone, its encoder is applied without it."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

EPOCHS, BATCH, RATE = 10, 64, 1e-3


def train(x: np.ndarray, sizes: tuple[int, ...], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The encoder's layers, weights [inputs, outputs] and biases, learned from x, float32 [n, sizes[0]]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = _stack(sizes), _stack(sizes[::-1])
        both = nn.Sequential(encoder, decoder)
        optimizer = torch.optim.Adam(both.parameters(), lr=RATE)
        vectors = torch.from_numpy(np.ascontiguousarray(x, np.float32))
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(vectors)).split(BATCH):
                given = vectors[batch]
                loss = nn.functional.mse_loss(both(given), given)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return [
        (layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy())
        for layer in encoder
        if isinstance(layer, nn.Linear)
    ]


def _stack(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
