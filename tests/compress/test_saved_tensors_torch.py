"""Saved tensors: equal gradients, sharing that is never false, lossless tables, real processes, flat memory."""

from __future__ import annotations

import gc
import multiprocessing
import socket
from typing import Any

import pytest

from memwall.errors import InputError

torch = pytest.importorskip("torch")

from memwall.compress.edkm_torch import Softness, unrolled  # noqa: E402
from memwall.compress.saved_tensors_torch import ProcessGroup, SavedTensors, Saving, Simulated  # noqa: E402

NO = Saving(marshal=False, unique=False)
COUNT = 70_000
PALETTE = torch.linspace(-0.04, 0.04, 8)
SOFTNESS = Softness(tau=2e-5)


def weights(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(COUNT, generator=generator) * 0.02).requires_grad_(True)


def step(saved: SavedTensors | None, w: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Gradient of a clustering in plain torch, and the bytes kept when it is ready to go back."""
    w.grad = None
    upstream = torch.linspace(-1, 1, COUNT)
    if saved is None:
        soft, _ = unrolled(w.bfloat16(), PALETTE, SOFTNESS)
        kept = 0
    else:
        with saved.hooks():
            half = w.bfloat16()
            with saved.made_of(half):
                soft, _ = unrolled(half, PALETTE, SOFTNESS)
        kept = saved.traffic.kept
    soft.float().backward(upstream)
    assert w.grad is not None
    return w.grad.clone(), kept


def test_all_ways_of_keeping_give_the_same_gradients_to_the_bit_and_keep_less_and_less() -> None:
    w = weights()
    wanted, _ = step(None, w)
    kept = []
    for saving, learners in (
        (NO, None),
        (Saving(unique=False), None),
        (Saving(unique=False), Simulated(4)),
        (Saving(), None),
        (Saving(), Simulated(4)),
    ):
        saved = SavedTensors(saving, learners=learners)
        gradient, nbytes = step(saved, w)
        assert torch.equal(gradient, wanted)
        assert saved.traffic.kept == saved.num_kept == 0
        kept.append(nbytes)
    plain, shared, sharded, unique, everything = kept
    assert plain > 1.9 * shared
    assert shared == pytest.approx(4 * sharded, rel=0.02)
    assert shared > 8 * unique
    # of the unique form the index is shared among learners; tables are small and stay
    assert unique - everything == 2 * COUNT * 3 // 4


def test_bytes_are_those_of_torch_s_own_list() -> None:
    sizes: list[int] = []
    w = weights()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        unrolled(w.bfloat16(), PALETTE, SOFTNESS)
    saved = SavedTensors(NO)
    step(saved, w)
    assert saved.traffic.offered == sum(sizes)
    assert saved.traffic.to_host == saved.traffic.to_device > 0


def kept_by(saved: SavedTensors, make: Any) -> tuple[list[Any], int]:
    with saved.hooks():
        made = make()
    return made, saved.traffic.kept


def test_views_are_one_tensor_and_equal_tensors_are_two() -> None:
    x = torch.randn(64, 64, requires_grad=True)

    def views() -> list[Any]:
        y = x * 1
        return [y.sin(), y.t().sin(), y.view(-1).sin(), y[3:9].sin(), y.t().contiguous().sin()]

    saved = SavedTensors()
    made, kept = kept_by(saved, views)
    assert kept == 64 * 64 * 4
    sum(each.sum() for each in made).backward()
    doubled = x.detach().cos()
    doubled[3:9] += x.detach()[3:9].cos() / 4
    torch.testing.assert_close(x.grad, 4 * doubled)

    def equals() -> list[Any]:
        return [(x * 1).sin(), (x * 1).sin()]

    saved = SavedTensors()
    _, kept = kept_by(saved, equals)
    assert kept == 2 * 64 * 64 * 4


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    """What is kept is copied, so the first storage is gone and the next tensor may get its memory."""
    x = torch.randn(4096, requires_grad=True)
    saved = SavedTensors()
    with saved.hooks():
        losses = [((x + float(shift)).sin()).sum() for shift in range(6)]
    assert saved.traffic.kept == 6 * 4096 * 4
    sum(losses).backward()
    torch.testing.assert_close(x.grad, sum((x.detach() + float(shift)).cos() for shift in range(6)))


def test_a_tensor_changed_in_place_is_another_one() -> None:
    x = torch.randn(4096, requires_grad=True)

    def changed() -> list[Any]:
        y = x * 1
        first = y.sin()
        with torch.no_grad():
            y.add_(1)
        return [first, y.sin()]

    saved = SavedTensors()
    made, kept = kept_by(saved, changed)
    assert kept == 2 * 4096 * 4
    made[1].sum().backward()
    torch.testing.assert_close(x.grad, (x.detach() + 1).cos())


def test_a_copy_of_a_tensor_that_changed_before_is_not_taken_for_it() -> None:
    x = torch.randn(4096, requires_grad=True)

    def copied() -> list[Any]:
        y = x * 1
        first = y.sin()
        with torch.no_grad():
            y.add_(1)
        copy = y.clone()
        del y
        return [first, copy.sin()]

    made, kept = kept_by(SavedTensors(), copied)
    assert kept == 2 * 4096 * 4
    made[1].sum().backward()
    torch.testing.assert_close(x.grad, (x.detach() + 1).cos())


def test_a_parameter_that_changed_is_refused_as_torch_does() -> None:
    w = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64, requires_grad=True)
    with SavedTensors().hooks():
        y = (x @ w).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_rows_that_differ_are_kept_whole() -> None:
    """A tensor inside the scope that is not made of the weights alone: nothing is lost."""
    w = weights()
    half = w.bfloat16()
    noise = torch.randn(COUNT, 8)
    saved = SavedTensors()
    with saved.hooks(), saved.made_of(half):
        y = (half.float()[:, None] + noise).sin()
    assert saved.traffic.kept == COUNT * 8 * 4
    y.sum().backward()
    torch.testing.assert_close(w.grad, (half.float()[:, None] + noise).cos().sum(1).detach(), rtol=2e-2, atol=2e-2)


def test_few_weights_make_no_tables() -> None:
    """Where about as many values as weights occur a table and an index take more; then there is none."""
    w = (torch.randn(300) * 0.02).requires_grad_(True)
    half = w.bfloat16()
    kept = []
    for saving in (Saving(unique=False, min_bytes=0), Saving(min_bytes=0)):
        saved = SavedTensors(saving)
        with saved.hooks(), saved.made_of(half):
            unrolled(half, PALETTE, SOFTNESS)
            kept.append(saved.traffic.peak)
    assert kept[1] <= kept[0]


def test_weights_of_32_bits_are_refused() -> None:
    saved = SavedTensors()
    with pytest.raises(InputError, match="float16 or bfloat16"), saved.made_of(torch.ones(4)):
        pass
    with pytest.raises(InputError, match="between 0 and 1"):
        Saving(offload_above=2.0)


def test_small_tensors_and_those_of_an_emptier_device_are_left() -> None:
    x = torch.randn(100_000, requires_grad=True)
    full = 0.3
    saved = SavedTensors(Saving(offload_above=0.5), gauge=lambda: full)
    with saved.hooks():
        first = (x * 1).sin()
        assert (saved.traffic.kept, saved.traffic.left) == (0, 400_000)
        full = 0.6
        second = (x * 1).sin()
        third = (x[:10] * 1).sin()
        assert (saved.traffic.kept, saved.traffic.left) == (400_000, 400_040)
    (first.sum() + second.sum() + third.sum()).backward()
    del first, second, third
    gc.collect()
    assert (saved.traffic.kept, saved.traffic.left) == (0, 0)


def test_a_graph_can_be_gone_back_through_twice() -> None:
    w = weights()
    saved = SavedTensors(learners=Simulated(2))
    with saved.hooks():
        half = w.bfloat16()
        with saved.made_of(half):
            soft, _ = unrolled(half, PALETTE, SOFTNESS)
    upstream = torch.linspace(-1, 1, COUNT).bfloat16()
    (first,) = torch.autograd.grad(soft, w, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(soft, w, upstream)
    assert torch.equal(first, second)


def test_nothing_is_held_from_step_to_step() -> None:
    w = weights()
    saved = SavedTensors(learners=Simulated(2))
    kept = {step(saved, w)[1] for _ in range(20)}
    assert len(kept) == 1
    assert (saved.num_kept, saved.traffic.kept, saved.traffic.left) == (0, 0, 0)
    assert saved._gathered is None


# -- real processes ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def learner(rank: int, size: int, port: int, seed: int, results: Any) -> None:
    import datetime

    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=limit)
    try:
        w = weights(seed)
        wanted, _ = step(None, w)
        alone = step(SavedTensors(), w)[1]
        saved = SavedTensors(learners=ProcessGroup())
        gradient, kept = step(saved, w)
        results.put((rank, torch.equal(gradient, wanted), alone, kept, saved.traffic.sent, saved.traffic.received))
    except RuntimeError as error:
        results.put((rank, str(error)))
    finally:
        dist.destroy_process_group()


def trained_together(seeds: tuple[int, int]) -> list[tuple[Any, ...]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    learners = [context.Process(target=learner, args=(r, 2, port, s, results)) for r, s in enumerate(seeds)]
    for each in learners:
        each.start()
    found = sorted(results.get(timeout=90) for _ in learners)
    for each in learners:
        each.join(30)
    return found


def test_two_processes_hold_half_each_and_get_the_same_gradients() -> None:
    for _, same, alone, kept, sent, received in trained_together((0, 0)):
        assert same
        assert alone - kept == COUNT
        # the index, once, on the way back, however many tensors use it; nothing in forward
        assert sent == received == COUNT


def test_learners_that_differ_are_found() -> None:
    found = trained_together((0, 1))
    assert all("learners hold different tensors" in each[1] for each in found)
