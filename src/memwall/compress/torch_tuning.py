"""The trainer of adapters over a frozen packed base: one for all methods of `tuning`.

A step works its batch window by window (or `micro_batch` of them): layers are run without keeping their insides and run
again, the last one first, with the gradient that comes back (gradient checkpointing, by hand: torch's own brings in its
compiler, 150 MB of it); logits are made and judged a few rows at a time, and only adapters have gradients. So what a
step holds is the packed base, the adapters four times over (numbers, gradients, two moments), one hidden state per
layer, and the insides of one layer.

Every step depends on the settings, the text and the step's number alone (order of windows, dropout), so a run that goes
on from saved progress makes the same numbers as one that was never interrupted, on the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from memwall import _native, kernels
from memwall.compress.adamw import AdamSettings, AdamW, HeldMoments, Moments, PagedMoments
from memwall.compress.tune_memory import logit_rows
from memwall.compress.tune_work import MOMENTS_NAME, TuneWork, Windows
from memwall.compress.tuning import Objective, Share, TuneMethod
from memwall.kernels.torch_frozen import FrozenLinear
from memwall.memory import Arena
from memwall.models.config import ModelConfig
from memwall.models.torch_decoder import Context, Layer
from memwall.models.torch_lora import Adapted, LoraLinear

Progress = Callable[[int, int, str], None]


class Trainer:
    """Trains the adapters of `adapted` on windows of text, saving to `work` on the way."""

    def __init__(
        self,
        adapted: Adapted,
        method: TuneMethod,
        windows: Windows,
        objective: Objective,
        work: TuneWork,
        arena: Arena,
        *,
        paged: bool = False,
    ) -> None:
        self.adapted, self.method, self.windows, self.objective = adapted, method, windows, objective
        self._work = work
        named = list(adapted.parameters())
        self.names = [name for name, _ in named]
        self._values = [parameter.detach().numpy() for _, parameter in named]
        self._gradients = []
        for _, parameter in named:
            gradient = arena.allocate(f"{method.owner}/gradients", tuple(parameter.shape), np.float32)
            gradient[...] = 0
            parameter.grad = torch.from_numpy(gradient)
            self._gradients.append(gradient)
        sizes = [value.size for value in self._values]
        self._rates = [method.rate(name) for name in self.names]
        self._places = {name: index for index, name in enumerate(self.names)}
        self._moments: Moments = (
            PagedMoments(sizes, work.path / MOMENTS_NAME, arena) if paged else HeldMoments(sizes, arena)
        )
        settings = AdamSettings(
            learning_rate=method.learning_rate, weight_decay=method.weight_decay, beta2=method.beta2
        )
        self._optimizer = AdamW(settings, self._moments)
        kept = self._values if method.keep_best and windows.held_out else []
        self._best = [arena.allocate(f"{method.owner}/best", value.shape, np.float32) for value in kept]
        self.step = self.resumed_from = self.skipped = self.best_step = 0
        self.best = math.inf
        self.history: list[dict[str, float]] = []
        self.window_losses: list[float] = []
        """Of the windows held out when they were last measured."""
        self._per_epoch = -(-windows.num_train // method.batch)
        self.num_steps = method.steps or method.epochs * self._per_epoch

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None, *, settle: Callable[[], None] | None = None) -> None:
        """All steps that are left. settle: called after each, to look at the process' memory."""
        self._restore()
        if not self.history:
            self._note(None)
        since: list[float] = []
        while self.step < self.num_steps and not self._stalled:
            since.append(self.train_step())
            if settle is not None:
                settle()
            if self.step % self.method.save_every == 0 or self.step == self.num_steps:
                self._note(sum(since) / len(since))
                self._save()
                since = []
            if progress is not None:
                progress(self.step, self.num_steps, f"loss {self.history[-1].get('held_out', 0) or 0:.4f}")
        if self._best:
            for value, best in zip(self._values, self._best, strict=True):
                np.copyto(value, best)

    @property
    def _stalled(self) -> bool:
        """Whether the last measurements, as many as there is patience for, were all no better than one before them."""
        later = sum(note["step"] > self.best_step for note in self.history)
        return 0 < self.method.patience <= later

    def train_step(self) -> float:
        """One step; its loss. A loss or gradient that is no number leaves the adapters as they are."""
        chosen = self._batch(self.step)
        share = Share(tokens=len(chosen) * (self.windows.tokens.shape[1] - 1), sequences=len(chosen))
        for gradient in self._gradients:
            gradient[...] = 0
        loss = 0.0
        self.adapted.decoder.train()
        for start in range(0, len(chosen), self.method.micro_batch):
            loss += self._learn(chosen[start : start + self.method.micro_batch], share, (self.step, start))
        length = math.sqrt(sum(float(np.vdot(each, each)) for each in self._gradients))
        if math.isfinite(loss) and math.isfinite(length):
            limit = self.method.max_grad_norm
            scale = limit / length if limit and length > limit else 1.0
            left = 1 - self.step / self.num_steps if self.method.decay else 1.0
            self._optimizer.step(self._values, self._gradients, scale, [left * rate for rate in self._rates])
        else:
            self.skipped += 1
        self.step += 1
        return loss

    def held_out_loss(self) -> float | None:
        """The objective over the windows that are not trained on, without dropout; None where there are none."""
        chosen = np.array(self.windows.held_out)
        if not len(chosen):
            return None
        self.adapted.decoder.eval()
        share = Share(tokens=len(chosen) * (self.windows.tokens.shape[1] - 1), sequences=len(chosen))
        found: list[float] = []
        with torch.no_grad():
            for window in chosen:
                tokens = torch.from_numpy(self.windows.tokens[None, window])
                hidden = self.adapted.decoder.hidden(tokens[:, :-1])
                found.append(self._judge(hidden, tokens, [int(window)], share))
        self.window_losses = [each * len(chosen) for each in found]
        return sum(found)

    # -- one piece of a batch ----------------------------------------------------------------------------------------

    def _learn(self, chosen: np.ndarray, share: Share, place: tuple[int, int]) -> float:
        """The share of these windows in the batch's loss; their gradients are added to those of the adapters."""
        decoder, first, below = self.adapted.decoder, self.adapted.first_layer, self.adapted.trains_embedding
        tokens = torch.from_numpy(self.windows.tokens[chosen])
        context = decoder.context(tokens.shape[1] - 1)
        layers = list(decoder.model.layers)
        seeds = np.random.default_rng((self.method.seed, 1, *place)).integers(1 << 62, size=len(layers)).tolist()
        with torch.no_grad(), _own_randomness() as random:
            between: list[Tensor] = []  # inputs of the layers that learn
            last = decoder.model.embed_tokens(tokens[:, :-1])
            for index, (layer, seed) in enumerate(zip(layers, seeds, strict=True)):
                if index >= first:
                    between.append(last)
                random.manual_seed(seed)
                last = layer(last, context)
        last.requires_grad_()
        normed = decoder.model.norm(last)
        leaf = normed.detach().requires_grad_()
        loss = self._judge(leaf, tokens, chosen.tolist(), share)
        normed.backward(leaf.grad)
        gradient = last.grad
        del last, normed, leaf
        with _own_randomness() as random:
            for layer, seed in zip(reversed(layers[first:]), reversed(seeds[first:]), strict=True):
                x = between.pop().requires_grad_(bool(between) or below)
                random.manual_seed(seed)
                layer(x, context).backward(gradient)
                gradient = x.grad
        if below:
            decoder.model.embed_tokens(tokens[:, :-1]).backward(gradient)
        return loss

    def _judge(self, hidden: Tensor, tokens: Tensor, windows: list[int], share: Share) -> float:
        """Loss of hidden [B, T - 1, H] against tokens [B, T]; its gradient is left at `hidden` where that wants one."""
        total = 0.0
        for row, window in enumerate(windows):
            for first, last in self._pieces(hidden.shape[1]):
                logits = self.adapted.decoder.logits(hidden[row, first:last])
                loss = self.objective.loss(logits, tokens[row, first + 1 : last + 1], window, first, share)
                if loss.requires_grad:
                    loss.backward()
                total += loss.item()
        return total

    def _pieces(self, num_rows: int) -> Iterator[tuple[int, int]]:
        step = logit_rows(self.adapted.decoder.config)
        return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))

    def _batch(self, step: int) -> np.ndarray:
        """The windows of a step: each epoch goes through all of them in an order of its own."""
        epoch, place = divmod(step, self._per_epoch)
        order = np.random.default_rng((self.method.seed, 0, epoch)).permutation(self.windows.num_train)
        return order[place * self.method.batch : (place + 1) * self.method.batch]

    # -- going on ---------------------------------------------------------------------------------------------------

    def _note(self, trained: float | None) -> None:
        """Measure the windows that are held out, and keep the adapter where it is the best so far."""
        held_out = self.held_out_loss()
        found: dict[str, float] = {"step": self.step}
        if trained is not None and math.isfinite(trained):
            found["loss"] = trained
        if held_out is not None and math.isfinite(held_out):
            found["held_out"] = held_out
            if held_out < self.best:
                self.best, self.best_step = held_out, self.step
                for value, best in zip(self._values, self._best):
                    np.copyto(best, value)
        self.history.append(found)

    def _save(self) -> None:
        told = {
            "step": self.step, "adam_steps": self._optimizer.steps, "skipped": self.skipped,
            "best_step": self.best_step, "best": self.best if math.isfinite(self.best) else None,
            "history": self.history,
        }  # fmt: skip
        self._work.save(self.step, self._state(), told, self._dealt_with)

    def _restore(self) -> None:
        told = self._work.restore(self._state(), self._dealt_with)
        if told is None:
            return
        self.step = self.resumed_from = told["step"]
        self._optimizer.steps, self.skipped, self.best_step = told["adam_steps"], told["skipped"], told["best_step"]
        self.best = math.inf if told["best"] is None else told["best"]
        self.history = told["history"]

    def _state(self) -> dict[str, np.ndarray]:
        found = {f"value.{name}": value for name, value in zip(self.names, self._values, strict=True)}
        found |= {f"moments.{name}": self._moments.get(index) for index, name in enumerate(self.names)}
        return found | {f"best.{name}": best for name, best in zip(self.names, self._best)}

    def _dealt_with(self, name: str) -> None:
        """A tensor of the state was read or written: paged moments leave memory one by one."""
        kind, _, owner = name.partition(".")
        if kind == "moments":
            self._moments.done(self._places[owner])


@contextmanager
def _own_randomness() -> Iterator[torch.Generator]:
    """torch's generator, put back as it was afterwards. (`torch.random` would do, and bring in the compiler.)"""
    generator = torch.default_generator
    held = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(held)


def warm_up() -> None:
    """Bring in what every step needs, before the runtime is measured: code comes in at its first call, and the matrix
    library and every thread that works keep buffers of their own.
    """
    config = ModelConfig.from_dict(_TINY)
    layer = Layer(config, 0)
    for parent in (layer.self_attn, layer.mlp):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                shape = (linear.in_features, linear.out_features)
                setattr(parent, name, LoraLinear(linear.requires_grad_(False), shape, 16, 1.0, 0.1, torch.zeros))
    layer.train()
    x = torch.ones(1, 256, config.hidden_size, requires_grad=True)
    context = Context(torch.ones(config.head_dim // 2), 1.0, torch.arange(256), None, is_start=True)
    with _own_randomness() as random:
        random.manual_seed(0)
        loss = torch.nn.functional.cross_entropy(layer(x, context)[0], torch.zeros(256, dtype=torch.long))
        loss.backward()
    matrix = kernels.matrix(kernels.encode("int4-g64", np.ones((512, 512), np.float32)))
    wide = torch.ones(512, 512, requires_grad=True)
    FrozenLinear(matrix)(wide).sum().backward()
    _native.give_back_freed_memory()


_TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
