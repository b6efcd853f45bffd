"""fp16's loss scale: GradScaler's rule, the same bits as GradScaler's loop, and what ends a run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import models, reference
from tests.support.inprocess import InProcess, resolved
from torchord.cache.errors import InvalidInput, NonFinite
from torchord.coordinator.compute import inner_steps as local_steps
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.loss_scale import ENTRY, LossScale, at_start
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan


def config(**changes: Any) -> TrainingConfig:
    fields = {"epochs": 3, "batch_size": 8, "shards": 2, "seed": 5, "precision": "fp16"}
    return TrainingConfig(**{**fields, "loss_scale_interval": 2, **changes})


def fp16_model() -> nn.Module:
    return models.Mlp().half()


class Steep(nn.Module):
    """Gradients beyond float16 at any scale of 1 and more, with a finite loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Amplified.apply(self.linear(inputs))  # type: ignore[no-any-return]


class _Amplified(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.float()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (gradient * 1e30).half()


def test_the_rule_is_torchs() -> None:
    """2,000 steps with random overflows: the same scale and count as torch's own update."""
    draw = random.Random(3)
    scale, ours = torch.tensor(65536.0), LossScale(65536.0)
    tracker = torch.zeros((), dtype=torch.int32)
    for _ in range(2000):
        overflow = draw.random() < 0.1
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(overflow)), 2.0, 0.5, 7)
        ours = ours.after(overflow=overflow, interval=7)
        assert (ours.scale, ours.steps) == (scale.item(), tracker.item())


def test_the_scale_stays_a_float32_that_has_an_inverse() -> None:
    low = high = LossScale(1.0)
    for _ in range(300):
        low = low.after(overflow=True, interval=1)
        high = high.after(overflow=False, interval=1)
    for scale in (low.scale, high.scale):
        assert 0 < scale < math.inf and 0 < torch.tensor(1 / scale).item() < math.inf


def test_the_state_survives_its_tensor() -> None:
    for scale in (LossScale(65536.0, 1999), LossScale(2.0**-126), LossScale(3.5, 2**31)):
        assert LossScale.of(scale.tensor()) == scale
    assert at_start(config(precision="bf16")) is None and at_start(config()) == LossScale(65536.0)


@pytest.mark.parametrize("make", [models.mlp, models.gpt, models.cnn])
@pytest.mark.parametrize("start", [16, 20])
def test_the_bits_of_torchs_grad_scaler(make: Callable[..., Any], start: int) -> None:
    recipe = make(optimizer=partial(torch.optim.AdamW, lr=1e-2), scheduler=None)
    how = config(loss_scale=2.0**start, clip_norm=0.5)
    ours = InProcess(resolved(recipe), how, clients=2)
    scales = []
    for step in range(ours.plan.total_steps):
        ours.step(step)
        assert ours.trainer.replica.loss_scale is not None
        scales.append(ours.trainer.replica.loss_scale.scale)
    plain = reference.average(recipe, how)
    assert scales == plain.scales and len(set(scales)) > 1
    assert [step for step, report in enumerate(ours.reports) if report.skipped] == plain.skipped != []
    assert reference.all_bits(ours.trainer.replica.model) == reference.all_bits(plain.module)


def test_the_scale_travels_with_the_version() -> None:
    given, how = resolved(models.mlp()), config()
    trainer = Trainer.build(given, how)
    trainer.replica.loss_scale = LossScale(4.0, 1)
    reader = Replica.build(given, how)
    reader.load(trainer.replica.pack())
    assert reader.loss_scale == LossScale(4.0, 1)
    reader.load_tensors({name: value.clone() for name, value in trainer.replica.state_tensors().items()})
    assert reader.loss_scale == LossScale(4.0, 1)
    assert ENTRY not in reader.model.state_dict() and ENTRY not in dict(reader.model.named_buffers())
    plain = Replica.build(given, config(precision="bf16"))
    assert ENTRY not in plain.state_tensors() and plain.loss_scale is None


def test_gradients_do_not_depend_on_a_scale_that_fits() -> None:
    """Powers of two scale without rounding as long as nothing under- or overflows."""
    given = resolved(models.mlp())
    found = []
    for scale in (256.0, 1024.0):
        how = config(loss_scale=scale)
        trainer, data = Trainer.build(given, how), open_dataset(given, how)
        trainer.replica.load(trainer.replica.pack())
        found.append(compute(trainer.replica, given, how, data, range(8), 0, 0))
    assert found[0].loss == found[1].loss
    for name, gradient in found[0].gradients.items():
        torch.testing.assert_close(gradient, found[1].gradients[name], rtol=2e-3, atol=1e-5)


def test_half_precision_parameters_are_refused() -> None:
    given, how = resolved(models.mlp(model=fp16_model)), config()
    replica = Replica.build(given, how)
    replica.load(replica.pack())
    with pytest.raises(InvalidInput, match=r"is float16, but precision='fp16' needs float32"):
        compute(replica, given, how, open_dataset(given, how), range(8), 0, 0)


def test_an_overflow_that_no_scale_cures_stops_the_run() -> None:
    run = InProcess(resolved(models.mlp(model=Steep)), config(loss_scale=4.0, epochs=8))
    run.train(0, 2)
    assert [report.skipped for report in run.reports] == [True, True]
    assert run.trainer.replica.loss_scale == LossScale(1.0)
    before = run.bits
    with pytest.raises(NonFinite, match="step 2"):
        run.step(2)
    assert run.bits == before


def test_with_skip_the_run_goes_on_all_the_same() -> None:
    run = InProcess(resolved(models.mlp(model=Steep)), config(loss_scale=4.0, nonfinite="skip")).train()
    assert all(report.skipped for report in run.reports)
    assert run.trainer.replica.loss_scale == LossScale(2.0 ** (2 - len(run.reports)))


def test_a_loss_that_is_not_finite_stops_the_run_at_once() -> None:
    run = InProcess(resolved(models.mlp(dataset=partial(models.poisoned, at=0))), config())
    with pytest.raises(NonFinite, match="loss nan"):
        run.train()


# --- local steps: a scale for each slot -------------------------------------------------------------


def local(how: TrainingConfig, model: Callable[[], nn.Module] = models.Mlp, rounds: int = 3) -> list[Any]:
    given = resolved(models.mlp(model=model, dataset=partial(models.points, size=96)))
    replica = Replica.build(given, how)
    replica.load(replica.pack())
    data = open_dataset(given, how)
    plan = Plan(len(data), how)
    found: list[Any] = []
    for step in range(rounds):
        state = found[-1].state if found else None
        found.append(local_steps.compute(replica, given, how, data, plan.parts(step, 0), step, 0, state))
    return found


def test_a_slot_has_its_own_scale_and_skips_its_own_steps() -> None:
    found = local(config(local_steps=5, loss_scale=2.0**20, loss_scale_interval=3, epochs=9))
    scales = [LossScale.of(each.state["loss_scale"]) for each in found]
    assert scales[0].scale < 2.0**20, "no overflow happened"
    assert len(set(scales)) > 1
    assert all(each.gradient.finite for each in found)


def test_the_slots_scale_is_grad_scalers() -> None:
    """One shard, H local steps: the weights of torch's loop with a GradScaler, its scale going on."""
    how = config(local_steps=3, loss_scale=2.0**18, epochs=9, shards=1)
    found = local(how)
    given = resolved(models.mlp(dataset=partial(models.points, size=96)))
    replica = Replica.build(given, how)
    replica.load(replica.pack())
    data, plan = open_dataset(given, how), Plan(96, how)
    from torchord.coordinator.compute.batch import read_batch
    from torchord.coordinator.compute.determinism import pinned
    from torchord.coordinator.compute.gradient import forward_backward
    from torchord.coordinator.compute.optimizers import build_optimizer

    with pinned(1, True, restore=True):
        optimizer, _ = build_optimizer(given, how, replica)
        scaler = torch.amp.GradScaler("cpu", init_scale=how.loss_scale, growth_interval=2)
        for step, each in enumerate(found):
            replica.restore()
            for number, part in enumerate(plan.parts(step, 0)):
                scaler.scale(torch.ones(()))  # makes its tensors
                scale = LossScale(scaler.get_scale())
                batch = read_batch(given, how, data, part, (step, 0, number))
                forward_backward(replica, given, how, batch, (step, 0, number), scale)
                for parameter in replica.parameters.values():
                    assert parameter.grad is not None
                    parameter.grad.mul_(scale.scale)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
            assert LossScale.of(each.state["loss_scale"]).scale == scaler.get_scale()
            for name, parameter in replica.parameters.items():
                moved = replica.version_tensors[name] - parameter.detach()
                assert torch.equal(each.gradient.gradients.get(name, torch.zeros_like(moved)), moved)


def test_local_steps_that_overflow_at_any_scale_stop_or_go_on() -> None:
    how = config(local_steps=4, loss_scale=2.0, epochs=9)
    with pytest.raises(NonFinite, match="overflow at a loss scale of 1"):
        local(how, Steep)
    [first, *_] = local(config(local_steps=4, loss_scale=2.0, epochs=9, nonfinite="skip"), Steep)
    assert first.gradient.gradients == {} and LossScale.of(first.state["loss_scale"]).scale == 2.0**-3
