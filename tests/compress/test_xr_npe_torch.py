"""Training with rounded numbers: rounding and its gradient, sensitivities by hand, phases, the stored form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from memwall.compress import xr_npe_torch as side  # noqa: E402
from memwall.compress.base import Subject  # noqa: E402
from memwall.errors import InputError  # noqa: E402
from memwall.formats import codec  # noqa: E402
from memwall.formats.xr_npe import FORMATS, FP4, POSIT4, POSIT8, POSIT16, LaneFormat, integers, matmul  # noqa: E402
from memwall.memory import Arena, Ledger  # noqa: E402
from memwall.models import Checkpoint  # noqa: E402
from tests.compress.tiny_model import make_model  # noqa: E402


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize("found", FORMATS, ids=lambda found: found.name)
def test_weights_become_levels_of_their_channel(found: LaneFormat) -> None:
    weight = torch.randn(5, 7, 3)
    rounded = side.RoundedWeight(side.engine_levels(found))(weight)
    levels = side.engine_levels(found)
    for row, out in zip(weight, rounded, strict=True):
        scale = float(row.abs().max()) / levels.largest
        expected = levels.decode(levels.encode((row / scale).numpy())) * scale
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5)
        assert float(out.abs().max()) == pytest.approx(float(row.abs().max()), rel=1e-5)


@pytest.mark.parametrize("found", FORMATS, ids=lambda found: found.name)
def test_levels_are_found_as_by_a_whole_search(found: LaneFormat) -> None:
    """Thresholds and their neighbours, zeros of both signs, tiny and huge numbers among them."""
    edges = found.levels.thresholds
    near = [edges, np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))]
    odd = np.array([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38], np.float32)
    random = np.random.default_rng(0).standard_normal(4097).astype(np.float32)
    x = np.concatenate([*near, odd, random, 40 * random])
    got = side._Levels(found.levels).nearest(torch.from_numpy(x))
    np.testing.assert_array_equal(got.numpy(), found.levels.decode(found.levels.encode(x)))


def test_gradients_pass_straight_and_stop_outside() -> None:
    x = torch.tensor([0.2, -3.9, 100.0, -7.0], requires_grad=True)
    y = side._StraightThrough.apply(x, torch.tensor(1.0), side._Levels(FP4.levels))
    assert y.tolist() == [0.0, -4.0, 6.0, -6.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
    zero = side.RoundedWeight(FP4.levels)(torch.zeros(2, 3))
    assert zero.abs().max() == 0


def test_where_posits_are_dense() -> None:
    assert side.engine_levels(POSIT8).largest == 2
    assert side.engine_levels(POSIT8, "largest").largest == 64
    assert side.engine_levels(FP4).largest == 6


def test_activations_learn_their_scale_while_training() -> None:
    layer = side.RoundedInput(POSIT16.levels)
    x = torch.tensor([1.0, -2.0])
    assert layer(x) is x
    layer.active = True
    layer(x)
    assert float(layer.peak) == 2.0
    layer(2 * x)
    assert float(layer.peak) == pytest.approx(0.99 * 2 + 0.01 * 4)
    layer.eval()
    layer(9 * x)
    assert float(layer.peak) == pytest.approx(2.02)


def test_a_rounded_layer_is_what_the_engine_computes() -> None:
    """Codes through the exact multiply-add, times the scales, are the layer's output."""
    model = side.rounded(nn.Sequential(nn.Linear(24, 6, bias=False)), {"0": POSIT8})
    side.activate(model)
    x = torch.randn(4, 24)
    model.train()
    got = model(x)
    levels, layer = side.engine_levels(POSIT8), model[0]
    weight = layer.parametrizations.weight.original.detach()
    scales = weight.abs().amax(1, keepdim=True) / levels.largest
    scale = float(layer.rounded_input.peak) / levels.largest
    a, b = POSIT8.levels.encode((x / scale).numpy()), POSIT8.levels.encode((weight / scales).numpy())
    assert abs(integers(POSIT8, b)).max() <= levels.largest * 64
    exact = matmul(POSIT8, a, b).astype(np.float64) * 2.0**POSIT8.product_unit * scale * scales.numpy().T
    np.testing.assert_allclose(got.detach().numpy(), exact, rtol=2e-5, atol=1e-6)


def test_unknown_layers_are_named() -> None:
    with pytest.raises(InputError, match="layers are 0, 2"):
        side.rounded(small(), {"1": FP4})


def test_fisher_and_trace_by_hand() -> None:
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    curvature = torch.tensor([3.0, 0.5])

    def losses() -> Iterator[Tensor]:
        for factor in (1.0, 2.0):
            yield factor * (curvature * weight**2).sum()

    found = side.fisher_of(losses(), {"w": weight})["w"]
    gradient = 2 * curvature * weight.detach()
    torch.testing.assert_close(found, (gradient**2 + (2 * gradient) ** 2) / 2)
    trace = side.hessian_trace((curvature * weight**2).sum(), {"w": weight}, probes=3)
    assert trace["w"] == pytest.approx(7.0)


class Planted(nn.Module):
    """`shift` adds the same number to all logits: it moves their sum, and nothing that a prediction depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matters, self.shift = nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.matters(x) + 5 * self.shift(x)
        return logits


def test_sensitivity_is_of_the_loss_not_of_the_outputs() -> None:
    model = Planted()
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    weights = {name: layer.weight for name, layer in side.layers_of(model).items()}
    losses = (nn.functional.cross_entropy(model(x[i : i + 4]), y[i : i + 4]) for i in range(0, 64, 4))
    table = side.layer_sensitivity(weights, side.fisher_of(losses, weights), [FP4, POSIT8])
    assert table["matters"]["fp4"] > 1000 * table["shift"]["fp4"]
    assert table["matters"]["fp4"] > 10 * table["matters"]["posit8_0"]
    by_sum = side.fisher_of((model(x[i : i + 4]).sum() for i in range(0, 64, 4)), weights)
    wrong = side.layer_sensitivity(weights, by_sum, [FP4])
    assert wrong["shift"]["fp4"] > wrong["matters"]["fp4"]


def test_inputs_count_by_their_gradients() -> None:
    """y = w x with loss y^2 / 2: the gradient of x is w^2 x."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, 0.0]])
    model, x = nn.Sequential(layer), torch.tensor([[0.9, 6.0]])
    found = side.input_sensitivity(model, (0.5 * model(x).square().sum() for _ in range(3)), ["0"], [FP4, POSIT4])
    # in FP4 of scale 1: 1.0; in Posit(4,1) of scale 1.5 (its dense levels end at 4): 0.75
    assert found["0"]["fp4"] == pytest.approx(0.5 * (4 * 0.9) ** 2 * 0.1**2, rel=1e-4)
    assert found["0"]["posit4_1"] == pytest.approx(0.5 * (4 * 0.9) ** 2 * 0.15**2, rel=1e-4)
    assert not layer._forward_pre_hooks


def test_phases_train_and_bits_are_counted() -> None:
    model = small()
    x = torch.randn(128, 8)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    batches = lambda epoch: [(x[i : i + 32], y[i : i + 32]) for i in range(0, 128, 32)]  # noqa: E731
    loss = nn.functional.cross_entropy
    plain = side.Phase(epochs=30, rate=0.1, weights=False, activations=False)
    assert side.train(model, batches, loss, plain) < 0.5
    side.rounded(model, {"0": FP4, "2": POSIT4})
    seen: list[tuple[int, int]] = []
    coarse = side.Phase(epochs=10, rate=0.02, weights=True, activations=True)
    trained = side.train(model, batches, loss, coarse, progress=lambda done, whole: seen.append((done, whole)))
    assert trained < 0.9
    assert seen[-1] == (10, 10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    once = side.Phase(epochs=1, rate=0.01, weights=True, activations=True)
    side.train(model, batches, loss, once, side.Recipe(adaptive=True, weight_decay=0.0, clip=1.0, warmup_epochs=0.0))
    moved = max(float((now.detach() - then).abs().max()) for now, then in zip(model.parameters(), before, strict=True))
    assert 0 < moved <= 4 * 0.0101  # four steps, none of which is longer than its rate
    assert side.weight_bits(model, {"0": FP4, "2": None}) == 8 * 16 * 4 + 16 * 16 + 16 * 4 * 16
    assert len(side.PHASES) == 3


def test_posit_weights_stay_posits() -> None:
    model = small()
    optimizer = side.PositSgd(model.parameters(), rate=0.05, bits=16, es=1)
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    weight = model[0].weight.detach().numpy()
    np.testing.assert_array_equal(POSIT16.levels.decode(POSIT16.levels.encode(weight)), weight)


@pytest.mark.parametrize("spec", ["e2m1-g64", "posit4es1-g32", "posit8es0-g64"])
def test_decoders_are_trained_on_what_will_be_stored(spec: str) -> None:
    weight = torch.randn(20, 100)
    form = codec(spec)
    stored = form.decode(form.encode(weight.numpy()))
    np.testing.assert_allclose(side.RoundedGroups(spec)(weight).numpy(), stored, atol=1e-6)
    with pytest.raises(InputError, match="float16 scales"):
        side.RoundedGroups("int4-g64")


def test_a_trained_decoder_is_nearer_to_the_float_one(tmp_path: Path) -> None:
    """After rounding, over the text it was trained on; norms and embedding change too, and come out as float32."""
    random = np.random.default_rng(0)
    with Checkpoint(make_model(tmp_path / "model", vocab_size=256)) as checkpoint:
        tokens = random.integers(0, 256, (8, 32))
        arena = Arena(1 << 40, Ledger())
        subject = Subject(checkpoint=checkpoint, tokens=tokens, arena=arena, progress=lambda done, total: None)
        specs = {t.name: "e2m1-g64" if t.role == "linear" else "float32" for t in checkpoint.config.tensors()}
        trained = side.trained_decoder(subject, specs, steps=25, rate=3e-4)
        assert arena.used_bytes == 0
        assert trained.source_dtype("model.norm.weight") == "float32"
        assert trained.stored_bytes("model.norm.weight") == 4 * 128
        float_model = side.TorchDecoder.from_checkpoint(checkpoint, dtype=torch.float32)

        def divergence(source: Checkpoint) -> float:
            model = side.TorchDecoder.from_checkpoint(source, dtype=torch.float32)
            for name in (name for name, spec in specs.items() if spec == "e2m1-g64"):
                weight = model.get_parameter(name)
                weight.data = side.RoundedGroups("e2m1-g64")(weight.data)
            text = torch.from_numpy(tokens)
            wanted, found = (each(text).log_softmax(-1) for each in (float_model, model))
            return float((wanted.exp() * (wanted - found)).sum(-1).mean())

        assert divergence(trained) < 0.5 * divergence(checkpoint)
