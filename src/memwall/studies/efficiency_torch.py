"""Jobs of the efficiency study that train and decode small torch models; run by `efficiency_worker`, each in a fork.

`pretrain` trains one variant on text and judges it on held-out windows; `decode` decodes with one through its caches.
Both meter the stretch after warm-up and give a record as `Record.to_dict` tells it.

The model of declared work, where no counter of joules can be read: a training step is three forward passes, and moves
each parameter ten times (read forwards and backwards, gradient written and read, two moments and the parameter itself
read and written); a decoding step reads the parameters that work on the token and what its caches read. Activations are
left out.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from memwall import _native, kernels
from memwall.hardware.meter import Meter
from memwall.hardware.power import WorkModel, power_source
from memwall.hardware.system import describe_system
from memwall.memory import resident_bytes
from memwall.models.torch_blocks import MixerSpec
from memwall.models.torch_grouped import Grouped
from memwall.models.torch_mamba import Mamba
from memwall.models.torch_mla import Latent
from memwall.models.torch_moe import Dense, ExpertFeed, Experts
from memwall.models.torch_nsa import Sparse
from memwall.models.torch_rwkv import Rwkv
from memwall.models.torch_small import SmallConfig, SmallLm, matched_feed
from memwall.studies.efficiency_records import EXACTLY, Record, metrics_of, software_versions
from memwall.studies.efficiency_sizes import ATTENTION, EXPERTS, POSITIONS, TINY, Sizes
from memwall.studies.efficiency_worker import Report

BYTES_A_TRAINED_PARAMETER = 10 * 4


def mixer_of(name: str, sizes: Sizes) -> MixerSpec:
    """Attention, or what stands for it, by its name. Grouped has half of the heads for keys and values. The latent row
    with its turned part is 3 heads long: more than multi-query's key and value, less than those of two heads. Turned
    is as much as a head has: with half of that (DeepSeek-V2's share, where heads have 128 numbers) models of this size
    learn later what stands before what, and stay behind grouped attention by 0.08 nats a byte.
    """
    heads, size = sizes.heads, sizes.width // sizes.heads
    if name == "mla":
        return Latent(heads=heads, head_dim=size, rank=2 * size, turned_dim=size)
    if name == "mamba":
        return Mamba(heads=2 * heads, head_dim=size)
    if name == "rwkv":
        return Rwkv(size=sizes.width)
    if name == "nsa":
        return Sparse(heads=heads, kv_heads=heads // 2, head_dim=size)
    return Grouped(heads=heads, head_dim=size, kv_heads={"mha": heads, "gqa": heads // 2, "mqa": 1}[name])


def config_of(axis: str, technique: str, sizes: Sizes) -> SmallConfig:
    """A variant. Those of attention have the parameters of multi-head's, by the size of their feeds; experts have a
    dense feed's operations.
    """
    base = SmallConfig(
        mixer=mixer_of("mha", sizes), feed=Dense(size=sizes.feed), width=sizes.width, num_layers=sizes.num_layers,
        most_tokens=sizes.tokens,
    )  # fmt: skip
    if axis == ATTENTION:
        variant = replace(base, mixer=mixer_of(technique, sizes))
        return replace(variant, feed=Dense(size=matched_feed(variant, parameters_of(base))))
    if axis == EXPERTS and technique == "moe":
        return replace(base, feed=Experts(count=sizes.experts, top=sizes.top, size=sizes.feed // sizes.top))
    if axis == POSITIONS:
        mixer = Grouped(
            heads=sizes.heads, kv_heads=sizes.heads, head_dim=sizes.width // sizes.heads,
            turned=technique == "rotary", relative=technique == "relative",
        )  # fmt: skip
        return replace(base, mixer=mixer, positions=technique)
    return base


def parameters_of(config: SmallConfig) -> int:
    """Without making the model."""
    with torch.device("meta"):
        return SmallLm(config).num_parameters


def group_of(sizes: Sizes) -> str:
    """Name of the group of models that are ranked together, by the baseline's parameters."""
    return f"{parameters_of(config_of(EXPERTS, 'dense', sizes)) / 1e6:.1f}M"


class Batches:
    """Rows of tokens + 1 bytes at places that seed and step alone decide: equal for all techniques."""

    def __init__(self, text: bytes, sizes: Sizes, seed: int) -> None:
        self.held = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        self.sizes, self.random = sizes, np.random.default_rng([seed, 1])

    def __next__(self) -> Tensor:
        count = self.sizes.tokens + 1
        starts = self.random.integers(0, len(self.held) - count + 1, self.sizes.batch)
        return torch.stack([self.held[start : start + count] for start in starts]).long()


def pretrain(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Trains one variant. request: axis, technique, sizes, seed, text, held_out (paths), weights (where to save)."""
    sizes, base_bytes = _begin(request)
    config, seed = config_of(request["axis"], request["technique"], sizes), request["seed"]
    model = SmallLm(config, seed=seed).train()
    batches = Batches(Path(request["text"]).read_bytes(), sizes, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    work, total = WorkModel(), sizes.warm_up + sizes.steps
    tokens = sizes.batch * sizes.tokens
    flop = model.flop((sizes.tokens + 1) // 2)  # the context that a token sees on average
    meter = Meter(dt_s=sizes.training_dt_s, memory=resident_bytes, exact=EXACTLY, power=power_source(work))
    steps_s: list[float] = []
    products = torch.autocast("cpu", torch.bfloat16, enabled=sizes.arithmetic == "bfloat16")
    for step in range(total):
        if step == sizes.warm_up:
            _native.give_back_freed_memory()
            meter.start()
        if step == sizes.warm_up + sizes.steps // 2:
            _reset(model)
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * _schedule(step, total)
        with products:
            loss = model.loss(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        work.add(3 * flop * tokens, BYTES_A_TRAINED_PARAMETER * model.num_parameters)
        if step >= sizes.warm_up:
            steps_s.append(time.perf_counter() - began)
        if step % 10 == 0:
            report(step, total, "training")
    series = meter.stop()
    figures = {"steps_s": steps_s, "others": series.mean_others, "arithmetic": sizes.arithmetic, **_load(model)}
    losses = held_out_losses(model, Path(request["held_out"]).read_bytes(), sizes)
    if request.get("weights"):
        save_file(model.state_dict(), request["weights"])
    metrics = metrics_of(
        series, steps_s=steps_s, stage="pretraining", count=tokens * sizes.steps, num_parameters=model.num_parameters,
        tokens=tokens * sizes.steps, base_bytes=base_bytes,
    )  # fmt: skip
    return _record(
        request, sizes, model, flop, stage="pretraining", tokens=tokens * total, dt_s=sizes.training_dt_s,
        series=series, metrics=metrics, quality={"losses": losses}, figures=figures,
    )  # fmt: skip


def decode(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Decodes with one variant: a prompt of held-out text through its caches, random rows up to the context, then real
    tokens. request: as `pretrain`'s, and losses (those of its training).
    """
    sizes, base_bytes = _begin(request)
    model = SmallLm(config_of(request["axis"], request["technique"], sizes), seed=request["seed"])
    if request.get("weights"):
        model.load_state_dict(load_file(request["weights"]))
    model.eval()
    held = torch.from_numpy(np.frombuffer(Path(request["held_out"]).read_bytes(), np.uint8).copy())
    rest = sizes.warm_up + sizes.decoded
    # no more tokens than learned positions have, where positions are compared
    context = sizes.tokens - rest if request["axis"] == POSITIONS else sizes.context
    prompt = min(sizes.tokens - rest, context)
    tokens = held[: prompt + rest].long()[None]
    caches = model.caches(1, context + rest)
    work = WorkModel()
    steps_s: list[float] = []
    meter = Meter(dt_s=sizes.inference_dt_s, memory=resident_bytes, exact=EXACTLY, power=power_source(work))
    active = 4 * model.num_active
    with torch.inference_mode():
        model.prefill(tokens[:, :prompt], caches)
        if context > prompt:
            for cache in caches:
                cache.fill(context - prompt)
        _native.give_back_freed_memory()  # copies of the weights from reading them, and what the prompt took
        for step in range(rest):
            if step == sizes.warm_up:
                meter.start()
            began = time.perf_counter()
            model.step(tokens[:, prompt + step : prompt + step + 1], caches)
            work.add(model.flop(context + step + 1), active + sum(cache.read_bytes() for cache in caches))
            if step >= sizes.warm_up:
                steps_s.append(time.perf_counter() - began)
    series = meter.stop()
    report(1, 1, "decoding")
    kept = sum(cache.nbytes for cache in caches)
    figures = {
        "context": context,
        "steps_s": steps_s,
        "others": series.mean_others,
        "kv_bytes": kept,
        "kv_bytes_per_token": kept / caches[0].length,
        "kv_bytes_per_token_more": bytes_a_token_more(model),
        "read_bytes_per_step": sum(cache.read_bytes() for cache in caches),
    }
    metrics = metrics_of(
        series, steps_s=steps_s, stage="inference", count=len(steps_s), num_parameters=model.num_parameters,
        tokens=len(steps_s), base_bytes=base_bytes,
    )  # fmt: skip
    return _record(
        request, sizes, model, model.flop(context), stage="inference", tokens=len(steps_s),
        dt_s=sizes.inference_dt_s, series=series, metrics=metrics, quality={"losses": request["losses"]},
        figures=figures,
    )  # fmt: skip


def bytes_a_token_more(model: SmallLm) -> float:
    """Bytes by which real caches grow a token, once all that is of fixed size is full: from 1024 tokens to 2048."""
    sizes = []
    for length in (1024, 2048):
        caches = model.caches(1, length)
        for cache in caches:
            cache.fill(length)
        sizes.append(sum(cache.nbytes for cache in caches))
    return (sizes[1] - sizes[0]) / 1024


def held_out_losses(model: SmallLm, text: bytes, sizes: Sizes) -> list[float]:
    """Mean loss in nats of each window; the first byte of a window is not scored."""
    held = torch.from_numpy(np.frombuffer(text, np.uint8).copy()).long()
    count = min(sizes.windows, len(held) // (sizes.tokens + 1))
    model.eval()
    found = []
    with torch.inference_mode():
        for window in held[: count * (sizes.tokens + 1)].view(count, 1, -1):
            logits = model(window[:, :-1])
            found.append(float(functional.cross_entropy(logits[0], window[0, 1:])))
    return found


def _begin(request: dict[str, Any]) -> tuple[Sizes, int]:
    """Sizes, and the resident bytes before there is a model. A tiny one of the same kind is trained, decoded with and
    dropped first, so that what the run adds is data and not the code of libraries.
    """
    torch.set_num_threads(request["threads"])
    kernels.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    first = SmallLm(config_of(request["axis"], request["technique"], TINY))
    optimizer = torch.optim.AdamW(first.parameters())
    tokens = torch.zeros(2, TINY.tokens + 1, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=request["sizes"]["arithmetic"] == "bfloat16"):
        first.loss(tokens).backward()
    optimizer.step()
    with torch.inference_mode():
        caches = first.eval().caches(1, TINY.tokens)
        first.prefill(tokens[:1, :-2], caches)
        first.step(tokens[:1, :1], caches)
    del first, optimizer, caches
    _native.give_back_freed_memory()
    return Sizes(**request["sizes"]), resident_bytes(exact=True)


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: up over a tenth of the steps, then down as a cosine to a tenth."""
    rise = max(total // 10, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(total - rise, 1))


def _reset(model: SmallLm) -> None:
    """The first half is left out: the router begins with what chance gave it."""
    for layer in model.blocks:
        if isinstance(layer.feed, ExpertFeed):
            layer.feed.reset()


def _load(model: SmallLm) -> dict[str, Any]:
    """Of experts in the second half of training: choices by layer and expert, the largest over a fair share, and the
    share dropped.
    """
    feeds = [layer.feed for layer in model.blocks if isinstance(layer.feed, ExpertFeed)]
    if not feeds:
        return {}
    loads = [feed.load.tolist() for feed in feeds]
    return {
        "expert_load": loads,
        "largest_load": max(max(load) * len(load) / sum(load) for load in loads),
        "dropped": sum(int(feed.dropped) for feed in feeds) / sum(map(sum, loads)),
    }


def _record(request: dict[str, Any], sizes: Sizes, model: SmallLm, flop: float, **measured: Any) -> dict[str, Any]:
    system = describe_system()
    return Record(
        axis=request["axis"],
        group=group_of(sizes),
        technique=request["technique"],
        model=model.config.to_dict(),
        num_parameters=model.num_parameters,
        num_active=model.num_active,
        num_trainable=model.num_parameters,
        flop_per_token=flop,
        hardware={**asdict(system), "caches": len(system.caches), "threads": request["threads"]},
        versions=software_versions(),
        seed=request["seed"],
        **measured,
    ).to_dict()
