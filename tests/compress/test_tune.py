"""Fine-tuning: gradients, going on after a kill, budgets, refusals, and the adapter in the CPU engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.compress import tune
from memwall.compress.tune import HEADROOM_BYTES, tune_model
from memwall.compress.tune_work import Windows
from memwall.compress.tuning import METHODS, CrossEntropy, tune_method
from memwall.engine import Settings, load
from memwall.engine.lone_lora import wear
from memwall.errors import DoesNotFit, InputError
from memwall.memory import Arena, Ledger
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.lora import LoraWeights
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.torch_frozen import frozen_decoder
from memwall.models.torch_lora import Adapted
from memwall.models.weights import load_weights
from tests.compress.tiny_model import contents, make_model

TEXT = "".join(f"A city of {n} lies on a river, and the river comes down from hill {n * 7 % 13}. " for n in range(120))
SMALL = {True: {"rank": "4", "dropout": "0"}, False: {}}
"""By whether the method makes an adapter."""
QUICK = {"rank": "4", "context": "64", "batch": "4", "save_every": "2", "steps": "4", "held_out": "0.1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def adapted(model: Path, spec: str, method: str = "qlora", **options: str) -> Adapted:
    config = ModelConfig.from_directory(model)
    with Checkpoint(model, config) as checkpoint:
        weights = load_weights(config, checkpoint, resolve(config, spec), Arena(1 << 40, Ledger()))
    chosen = tune_method(method, {**SMALL[tune_method(method).makes_adapter], **options})
    made = chosen.fit(frozen_decoder(config, weights), weights, torch.zeros)
    random = torch.Generator().manual_seed(5)
    for _, parameter in made.parameters():  # away from the start, where A has no gradient
        parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    return made


def trained(model: Path, text: Path, out: Path, **options: Any) -> Any:
    return tune_model(model, text, out, options={**QUICK, **options.pop("options", {})}, **options)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_against_finite_differences_and_by_hand(model: Path, method: str) -> None:
    """The trainer's layer-by-layer gradient is autograd's over the whole model, and the slope that differences show."""
    from memwall.compress.torch_tuning import Trainer

    makes_adapter = tune_method(method).makes_adapter
    made = adapted(model, "nf4-dq" if makes_adapter else "float32", method)
    tokens = np.random.default_rng(0).integers(3, 4000, (2, 40))
    chosen = tune_method(method, {**SMALL[makes_adapter], "batch": "2", "held_out": "0", "micro_batch": "2"})
    names = [name for name, _ in made.parameters()]
    trainer = Trainer(
        made, chosen, Windows(tokens=tokens, num_train=2), CrossEntropy(), _Nowhere(), Arena(1 << 40, Ledger())
    )

    def loss() -> torch.Tensor:
        logits = made.decoder(torch.from_numpy(tokens[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten())

    whole = torch.autograd.grad(loss(), [parameter for _, parameter in made.parameters()])
    before = [parameter.detach().clone() for _, parameter in made.parameters()]
    assert trainer.train_step() == pytest.approx(loss_at(made, before, loss), rel=1e-4)
    largest = max(each.abs().max().item() for each in whole)
    for name, expected, gradient in zip(names, whole, trainer._gradients, strict=True):
        np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-3, atol=1e-5 * largest, err_msg=name)
    if method == "dora":
        return  # the norm counts as a constant in the gradient
    random = torch.Generator().manual_seed(1)
    along = [torch.randn(each.shape, generator=random) for each in whole]
    far = 5e-4 if makes_adapter else 5e-5  # along a million weights the loss bends sooner
    ends = [loss_at(made, [b + sign * far * a for b, a in zip(before, along, strict=True)], loss) for sign in (1, -1)]
    slope = sum((a * g).sum().item() for a, g in zip(along, whole, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * far), rel=0.02)


class _Nowhere:
    """A work folder for a trainer that saves nothing."""

    path = Path()


def loss_at(made: Adapted, values: list[torch.Tensor], loss: Any) -> float:
    with torch.no_grad():
        for (_, parameter), value in zip(made.parameters(), values, strict=True):
            parameter.copy_(value)
        return float(loss())


@pytest.mark.parametrize("spec", ["nf4-dq", "int2", "int4-g64"])
def test_gradients_are_those_of_a_dense_float_base(model: Path, spec: str) -> None:
    made, dense = adapted(model, spec), adapted(model, spec)
    config = made.decoder.config
    for name in list(dense.decoder.linears()):
        owner, _, field = name.removesuffix(".weight").rpartition(".")
        parent = dense.decoder.get_submodule(owner)
        held = getattr(parent, field)
        frozen = held.base if hasattr(held, "base") else held
        eye = torch.eye(frozen.matrix.cols)
        plain = torch.nn.Linear(frozen.matrix.cols, frozen.matrix.rows, bias=False)
        plain.weight.data.copy_(frozen(eye).T)
        if hasattr(held, "base"):
            held.base = plain.requires_grad_(False)
        else:
            setattr(parent, field, plain.requires_grad_(False))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, config.vocab_size, (2, 50)))
    found = []
    for each in (made, dense):
        logits = each.decoder(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        found.append(torch.autograd.grad(loss, [parameter for _, parameter in each.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def test_adapter_runs_in_the_engine_with_the_same_logits(model: Path, text: Path, tmp_path: Path) -> None:
    report = trained(model, text, tmp_path / "out", options={"learning_rate": "0.01"})
    losses = [each["held_out"] for each in report.history]
    assert losses[-1] < losses[0]
    assert report.adapter_bytes == 2 * report.trained_parameters
    assert set(contents(tmp_path / "out")) == {"adapter_config.json", "adapter_model.safetensors"}
    config = ModelConfig.from_directory(model)
    weights = LoraWeights.read(tmp_path / "out", config)
    made = adapted(model, "nf4-dq", alpha="16")
    made.load(weights)
    tokens = np.arange(5, 60)
    expected = made.decoder(torch.from_numpy(tokens)).detach().numpy()
    session = load(model, Settings(weights="nf4-dq", kv="float32", context_tokens=64, exact=True, logit_rows=64))
    plain = session.decoder.forward(tokens, session.cache, all_logits=True).copy()
    session.reset()
    wear(session, weights)
    logits = session.decoder.forward(tokens, session.cache, all_logits=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())
    assert np.abs(plain - logits).max() > 100 * np.abs(logits - expected).max()


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    settings = [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]
    return [
        sys.executable,
        "-m",
        "memwall",
        "tune",
        str(model),
        str(text),
        str(out),
        *settings,
        "--threads",
        "1",
        *more,
    ]


def test_a_run_that_gets_no_better_ends_early(model: Path, text: Path, tmp_path: Path) -> None:
    """At such a rate it gets worse with every step."""
    options = {"steps": "40", "save_every": "1", "learning_rate": "2", "keep_best": "yes"}
    stopped = trained(model, text, tmp_path / "stopped", options={**options, "patience": "3"})
    assert stopped.steps == stopped.best_step + 3 < 40
    short = {**options, "steps": str(stopped.steps)}
    assert trained(model, text, tmp_path / "whole", options=short).best_step == stopped.best_step
    assert (
        contents(tmp_path / "stopped")["adapter_model.safetensors"]
        == (contents(tmp_path / "whole")["adapter_model.safetensors"])
    )


def test_a_falling_rate_is_the_whole_one_at_first_and_goes_by_the_length_of_the_run(
    model: Path, text: Path, tmp_path: Path
) -> None:
    def made(name: str, **options: str) -> np.ndarray:
        asked = {"learning_rate": "0.01", "save_every": "1", "held_out": "0", "dropout": "0", **options}
        trained(model, text, tmp_path / name, options=asked)
        found = contents(tmp_path / name)["adapter_model.safetensors"]
        return np.frombuffer(found, np.uint8)

    np.testing.assert_array_equal(made("one", steps="1", decay="yes"), made("plain", steps="1"))
    assert not np.array_equal(made("two", steps="2", decay="yes"), made("both", steps="2"))


def test_a_killed_run_goes_on_to_the_same_bits(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"steps": "24", "dropout": "0.2", "targets": "q_proj,down_proj"}
    more = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(command(model, text, killed, *more), stderr=subprocess.PIPE)
    partial = tmp_path / "killed.partial"
    journal = partial / "progress.json"
    while process.poll() is None and not (journal.is_file() and "step-" in journal.read_text()):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    threads = kernels.num_threads()
    kernels.set_num_threads(1)
    try:
        trained(model, text, whole, options=options)
        with pytest.raises(InputError, match="rank: 4 then, 8 now"):
            trained(model, text, killed, options={**options, "rank": "8"})
        report = trained(model, text, killed, options=options)
    finally:
        kernels.set_num_threads(threads)
    assert 0 < report.resumed_from < 24
    assert contents(killed)["adapter_model.safetensors"] == contents(whole)["adapter_model.safetensors"]
    assert not partial.exists()


def test_paged_moments_give_the_same_bits(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(model, text, tmp_path / "held")
    plan = tune._Run._plan
    monkeypatch.setattr(tune._Run, "_plan", lambda self, cap: (True, plan(self, cap)[1]))
    report = trained(model, text, tmp_path / "paged")
    assert (
        contents(tmp_path / "held")["adapter_model.safetensors"]
        == (contents(tmp_path / "paged")["adapter_model.safetensors"])
    )
    rows = {row["owner"]: int(row["bytes"]) for row in report.rows}
    assert rows["optimizer"] < rows["adapters/weights"] / 4


def test_budget_is_kept_and_paging_moments_helps(model: Path, text: Path, tmp_path: Path) -> None:
    asked = {"rank": "128", "context": "128"}
    more = [part for name, value in asked.items() for part in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    refused = subprocess.run(
        command(model, text, out, *more, "--memory", "150MB"), check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "try --memory" in refused.stderr
    assert not out.exists()
    needed = int(refused.stderr.split("--memory ")[1].split(",")[0])
    done = subprocess.run(
        command(model, text, out, *more, "--memory", str(needed + (2 << 20)), "--json"),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["peak_resident_bytes"] <= needed + (2 << 20)
    rows = {row["owner"]: row["bytes"] for row in report["rows"]}
    predicted = report["predicted"]
    assert rows["optimizer"] == predicted["optimizer"] < predicted["adapters/weights"]  # paged: one tensor at a time
    assert all(rows[owner] == predicted[owner] for owner in predicted if owner.startswith(("adapters", "weights")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "0"}, "rank=0"),
        ({"ranks": "4"}, "no setting 'ranks'"),
        ({"targets": "q_proj,x_proj"}, "'x_proj' is no target"),
        ({"optimizer": "sgd"}, "adamw, paged"),
        ({"context": "100000"}, "at most 256 positions"),
        ({"learning_rate": "fast"}, "expected a number"),
        ({"patience": "2", "held_out": "0"}, "nothing is measured"),
    ],
)
def test_bad_settings(model: Path, text: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune_model(model, text, tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


def test_bad_inputs(model: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(InputError, match="less than 2 windows of 64"):
        trained(model, short, tmp_path / "out")
    with pytest.raises(InputError, match=r"text .*cannot be read"):
        trained(model, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match="known are"):
        trained(model, text, tmp_path / "out", method="zlora")
    with pytest.raises(InputError, match="no teacher"):
        trained(model, text, tmp_path / "out", teacher=model)
    with pytest.raises(DoesNotFit):
        trained(model, text, tmp_path / "out", budget_bytes=HEADROOM_BYTES)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        trained(model, text, tmp_path / "out")


def test_windows_are_of_the_text_in_order(model: Path, text: Path) -> None:
    config = ModelConfig.from_directory(model)
    tokenizer = Tokenizer.from_directory(model, config.vocab_size)
    windows = Windows.read(text, tokenizer, config, 64, 0.1)
    ids = tokenizer.encode(TEXT, add_bos=False)
    assert (windows.tokens[:, 0] == tokenizer.bos_token_id).all()
    np.testing.assert_array_equal(windows.tokens[:, 1:].reshape(-1), ids[: windows.tokens[:, 1:].size])
    assert len(windows.held_out) == max(int(len(windows.tokens) * 0.1), 1)


@pytest.mark.parametrize("method", ["dora", "pissa", "full"])
def test_rows_are_as_planned(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    """Every owner's bytes are those that were worked out before a weight was read."""
    options = {name: value for name, value in QUICK.items() if name != "rank" or method != "full"}
    report = tune_model(model, text, tmp_path / "out", method=method, options={**options, "steps": "2"})
    rows = {row["owner"]: int(row["bytes"]) for row in report.rows}
    assert {owner: rows[owner] for owner in report.predicted} == dict(report.predicted)
    assert report.peak_resident_bytes <= sum(report.predicted.values()) + HEADROOM_BYTES


def test_adapters_that_do_not_go_on(model: Path, text: Path, tmp_path: Path) -> None:
    for method in ("dora", "lora"):
        trained(model, text, tmp_path / method, method=method, options={"steps": "1"})
    with pytest.raises(InputError, match="go on from it with --method dora"):
        trained(model, text, tmp_path / "out", method="lora", lora=tmp_path / "dora")
    with pytest.raises(InputError, match="has no adapter to go on from"):
        tune_model(model, text, tmp_path / "out", method="full", lora=tmp_path / "lora")
    report = trained(model, text, tmp_path / "out", method="dora", lora=tmp_path / "lora", options={"steps": "1"})
    before = trained(model, text, tmp_path / "more", method="lora", lora=tmp_path / "lora", options={"steps": "1"})
    assert report.history[0]["held_out"] == pytest.approx(before.history[0]["held_out"], rel=1e-4)


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_what_is_not_saved_is_made_again(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    """Row lengths and first factors are no part of the saved progress; a run that goes on makes the same ones."""

    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(model, text, tmp_path / "cut", method=method, progress=stop)
    report = trained(model, text, tmp_path / "cut", method=method)
    assert report.resumed_from == 2
    trained(model, text, tmp_path / "whole", method=method)
    name = "adapter_model.safetensors"
    assert contents(tmp_path / "cut")[name] == contents(tmp_path / "whole")[name]
