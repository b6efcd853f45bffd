from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.support import models
from tests.support.inprocess import InProcess, resolved, same
from torchord.cache.errors import CheckpointError, InvalidInput, NonFinite, RunFailed
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.tensors import tree
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.optimizers import Groups
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.schedules import each_epoch, warmup
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Target

CONFIG = TrainingConfig(epochs=4, batch_size=8, shards=2, seed=5)


class Matrices(nn.Module):
    """Without biases, for optimizers that take matrices only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(models.CLASSES, models.FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T


OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
)
VARIANTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{name: partial(getattr(torch.optim, name), lr=0.01) for name in OPTIMIZERS},
    "SGD momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop centered": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "AdamW amsgrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "Adam fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "Adam tensor lr": "tests.unit.coordinator.compute.test_trainer:adam_with_tensor_lr",  # type: ignore[dict-item]
    "Adam capturable off foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
}
SCHEDULERS: dict[str, Any] = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=3),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 5, 5]),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=9, power=2.0),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=7),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.1, step_size_up=3, mode="triangular2"),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0),
    "LambdaLR": models.lambda_scheduler,
    "each_epoch": partial(each_epoch, scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.5), frequency=2),
    "warmup": partial(warmup, steps=3, scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=7)),
    "SequentialLR": models.warmup_then_cosine,
    "ChainedScheduler": "tests.unit.coordinator.compute.test_trainer:chained",
}


def adam_with_tensor_lr(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=torch.tensor(0.01), foreach=False)


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.ChainedScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def through_json(state: Any) -> Any:
    skeleton, tensors = tree.flatten(state)
    return tree.unflatten(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


def interrupted(recipe: Recipe, stop: int, config: TrainingConfig = CONFIG) -> InProcess:
    """Train to `stop`, throw everything away but version and state, and go on in another process's place."""
    first = InProcess(resolved(recipe), config).train(0, stop)
    version, state = first.trainer.replica.pack(), through_json(first.trainer.state())
    second = InProcess(resolved(recipe), config)
    second.trainer.replica.load(version)
    second.trainer.load_state(state)
    first.train(stop, stop + 1)  # what the first does to its own state must not reach the second
    return second.train(stop)


# --- restoring --------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_any_optimizer_goes_on_bit_for_bit(name: str) -> None:
    recipe = models.mlp(size=24, optimizer=VARIANTS[name], model=Matrices if name == "Muon" else models.Mlp)
    whole = InProcess(resolved(recipe), CONFIG).train()
    for stop in (0, 5):
        assert interrupted(recipe, stop).bits == whole.bits


class Blocks(torch.optim.SGD):
    """Keeps views of its parameters, as optimizers that work on blocks do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.rows = [(p, list(p.detach())) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, rows in self.rows:
            for row, gradient in zip(rows, parameter.grad, strict=True):
                row.add_(gradient, alpha=-self.param_groups[0]["lr"])


def test_an_optimizer_may_keep_views_of_its_parameters() -> None:
    plain, blocks = (
        InProcess(resolved(models.mlp(size=24, optimizer=partial(kind, lr=0.1))), CONFIG).train()
        for kind in (torch.optim.SGD, Blocks)
    )
    assert blocks.bits == plain.bits


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_goes_on_bit_for_bit(name: str) -> None:
    recipe = models.mlp(
        size=24, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), scheduler=SCHEDULERS[name]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        whole = InProcess(resolved(recipe), CONFIG).train()
        other = interrupted(recipe, 5)
    assert other.bits == whole.bits
    assert other.reports == whole.reports[5:]
    assert len({report.lr for report in whole.reports}) > 1


@pytest.mark.parametrize("name", ["Adam", "ASGD", "NAdam", "Adafactor", "Rprop"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_keep_their_dtypes_for_parameters_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    recipe = resolved(models.mlp(optimizer=VARIANTS[name]))
    object.__setattr__(recipe, "model", lambda: models.Mlp().to(dtype))
    first, second = Trainer.build(recipe, CONFIG), Trainer.build(recipe, CONFIG)

    def update(trainer: Trainer, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        gradients = {
            n: torch.randn(p.shape, generator=generator).to(dtype)
            for n, p in trainer.replica.parameters.items()
        }
        trainer.apply(gradients, {}, step=step, loss=1.0)

    for step in range(3):
        update(first, step)
    second.replica.load(first.replica.pack())
    second.load_state(through_json(first.state()))
    before, after = tree.flatten(first.state())[1], tree.flatten(second.state())[1]
    assert all(same(before[n], after[n]) for n in before)
    update(first, 3), update(second, 3)
    assert same(first.replica.pack(), second.replica.pack())


def test_step_counters_stay_tensors() -> None:
    other = interrupted(models.mlp(size=24), 5)
    for state in other.trainer.optimizer.state.values():
        assert isinstance(state["step"], Tensor) and state["step"].dtype == torch.float32


def test_a_state_can_be_loaded_twice() -> None:
    recipe = resolved(models.mlp(size=24))
    first = InProcess(recipe, CONFIG).train(0, 4)
    version, state = first.trainer.replica.pack(), first.trainer.state()
    results = []
    for _ in range(2):
        again = InProcess(recipe, CONFIG)
        again.trainer.replica.load(version)
        again.trainer.load_state(state)
        results.append(again.train(4, 7).bits)
    assert results[0] == results[1] == first.train(4, 7).bits


def test_the_state_passes_through_a_checkpoint(tmp_path: Any) -> None:
    recipe = models.cnn(size=22, scheduler=SCHEDULERS["MultiStepLR"])
    first = InProcess(resolved(recipe), CONFIG).train(0, 5)
    store = CheckpointStore(str(tmp_path), "run")
    store.save(5, first.trainer.replica.state_tensors(), first.trainer.state())
    found = store.load(5)
    second = InProcess(resolved(recipe), CONFIG)
    second.trainer.replica.load_tensors(found.tensors)
    second.trainer.load_state(found.state)
    assert second.train(5).bits == first.train(5).bits


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (torch.optim.SGD, partial(lr_scheduler.StepLR, step_size=2)),
        (torch.optim.SGD, None),
    ],
)
def test_the_state_of_another_recipe_is_refused(optimizer: Any, scheduler: Any) -> None:
    ours = Trainer.build(resolved(models.cnn(scheduler=None if scheduler else SCHEDULERS["StepLR"])), CONFIG)
    theirs = Trainer.build(resolved(models.mlp(optimizer=optimizer, scheduler=scheduler)), CONFIG)
    with pytest.raises(CheckpointError, match="does not fit"):
        ours.load_state(theirs.state())


def test_memory_is_counted() -> None:
    trainer = Trainer.build(resolved(models.mlp()), CONFIG)
    assert trainer.state_nbytes() == 0
    numel = sum(p.numel() for p in trainer.replica.parameters.values())
    gradients = {n: torch.ones_like(p) for n, p in trainer.replica.parameters.items()}
    trainer.apply(gradients, {}, step=0, loss=1.0)
    assert trainer.state_nbytes() == 4 * (2 * numel + len(gradients))
    assert trainer.nbytes() == 2 * trainer.replica.manifest.nbytes + trainer.state_nbytes()


# --- one update -------------------------------------------------------------------------


def trainer_of(config: TrainingConfig = CONFIG, **changes: Any) -> Trainer:
    return Trainer.build(resolved(models.odd(**changes)), config)


def some_gradients(trainer: Trainer, value: float = 1.0) -> dict[str, Tensor]:
    return {
        n: torch.full_like(p, value) for n, p in trainer.replica.parameters.items() if n.startswith("layer")
    }


def test_an_update_is_an_optimizer_step_and_the_new_buffers() -> None:
    trainer = trainer_of(optimizer=partial(torch.optim.SGD, lr=0.5))
    before = {n: t.clone() for n, t in trainer.replica.state_tensors().items()}
    report = trainer.apply(some_gradients(trainer), {"calls": torch.tensor(7)}, step=0, loss=1.0)
    after = trainer.replica.state_tensors()
    for name in ("layer.weight", "layer.bias"):
        assert same(after[name], before[name] - 0.5)
    assert after["calls"] == 7
    for name in ("unused", "frozen", "projection", "mean"):
        assert same(after[name], before[name])
    assert report.lr == (0.5,) and not report.clipped and not report.skipped
    assert report.grad_norm == pytest.approx(math.sqrt(models.CLASSES * (models.FEATURES + 1)))
    assert all(p.grad is None for p in trainer.replica.parameters.values())


def test_parameters_without_gradient_are_left_alone_by_weight_decay_too() -> None:
    trainer = trainer_of(optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    trainer.apply(some_gradients(trainer), {}, step=0, loss=1.0)
    assert trainer.replica.parameters["unused"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("limit", "clipped"), [(0.5, True), (1e6, False)])
def test_clipping_is_torchs(limit: float, clipped: bool) -> None:
    config = TrainingConfig(clip_norm=limit)
    ours, theirs = trainer_of(config), trainer_of(config)
    report = ours.apply(some_gradients(ours, 0.3), {}, step=0, loss=1.0)
    for name, gradient in some_gradients(theirs, 0.3).items():
        theirs.replica.parameters[name].grad = gradient
    norm = nn.utils.clip_grad_norm_(theirs.replica.model.parameters(), limit)
    theirs.optimizer.step()
    assert same(ours.replica.pack(), theirs.replica.pack())
    assert report.clipped is clipped and report.grad_norm == norm.item()


@pytest.mark.parametrize(
    ("value", "loss", "finite"), [(math.nan, 1.0, True), (1.0, math.inf, True), (1.0, 1.0, False)]
)
def test_what_is_not_finite_stops_the_run_and_changes_nothing(
    value: float, loss: float, finite: bool
) -> None:
    trainer = trainer_of()
    before, state = trainer.replica.pack(), trainer.state()
    with pytest.raises(NonFinite, match="step 4"):
        trainer.apply(
            some_gradients(trainer, value), {"calls": torch.tensor(7)}, step=4, loss=loss, finite=finite
        )
    assert same(before, trainer.replica.pack()) and trainer.state() == state


def test_or_is_skipped() -> None:
    config = TrainingConfig(nonfinite="skip", clip_norm=1.0)
    trainer = trainer_of(config, scheduler=partial(lr_scheduler.StepLR, step_size=1, gamma=0.5))
    before = trainer.replica.pack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = trainer.apply(
            some_gradients(trainer, math.nan), {"calls": torch.tensor(7)}, step=0, loss=1.0
        )
    assert report.skipped and not report.clipped and math.isnan(report.grad_norm)
    assert same(before, trainer.replica.pack()) and not trainer.optimizer.state
    after = trainer.apply(some_gradients(trainer), {}, step=1, loss=1.0)
    assert not after.skipped and after.lr == (report.lr[0] / 2,)


def test_a_run_with_a_poisoned_sample_skips_its_steps_only() -> None:
    recipe = models.mlp(dataset=partial(models.poisoned, at=5))
    config = TrainingConfig(epochs=2, batch_size=8, shards=4, nonfinite="skip")
    ours = InProcess(resolved(recipe), config).train()
    assert sum(report.skipped for report in ours.reports) == 2
    assert bool(
        torch.isfinite(
            torch.cat([p.detach().flatten() for p in ours.trainer.replica.parameters.values()])
        ).all()
    )


def test_updates_are_seeded() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(torch.randn_like(p))

    results = []
    for seed, step in ((1, 0), (1, 0), (1, 1), (2, 0)):
        recipe = resolved(models.odd())
        object.__setattr__(recipe, "optimizer", Noisy)
        trainer = Trainer.build(recipe, TrainingConfig(seed=seed))
        before = trainer.replica.state_tensors()["frozen"].clone()
        trainer.apply(some_gradients(trainer), {}, step=step, loss=1.0)
        results.append((trainer.replica.state_tensors()["frozen"] - before).tolist())
    assert results[0] == results[1] and results[0] != results[2] and results[0] != results[3]


def test_parameter_groups_come_from_the_recipe() -> None:
    trainer = Trainer.build(resolved(models.mlp(parameter_groups=models.decay_groups)), CONFIG)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    gradients = {n: torch.ones_like(p) for n, p in trainer.replica.parameters.items()}
    assert len(trainer.apply(gradients, {}, step=0, loss=1.0).lr) == 2


def test_plateau_follows_the_loss() -> None:
    recipe = models.odd(scheduler=partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5))
    trainer = Trainer.build(resolved(recipe), CONFIG)
    rates = [
        trainer.apply(some_gradients(trainer), {}, step=k, loss=loss).lr[0]
        for k, loss in enumerate((3, 2, 2, 1))
    ]
    assert rates == [0.1, 0.1, 0.1, 0.05]


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": torch.optim.LBFGS}, "closure"),
        ({"optimizer": torch.optim.SparseAdam}, "use Adam"),
        ({"optimizer": "builtins:list"}, "returned a list"),
        ({"scheduler": "builtins:id"}, "returned a int"),
        ({"optimizer": "tests.unit.coordinator.compute.test_trainer:foreign"}, "not the model's"),
        (
            {"optimizer": "tests.unit.coordinator.compute.test_trainer:Sharp"},
            "Sharp evaluates the loss several times.*SAM",
        ),
        (
            {"optimizer": "tests.unit.coordinator.compute.test_trainer:Hungry"},
            "Hungry evaluates the loss several times",
        ),
        (
            {"optimizer": "tests.unit.coordinator.compute.test_trainer:Averaging"},
            r"train\(\) and eval\(\).*use .* with a scheduler",
        ),
        (
            {"scheduler": "tests.unit.coordinator.compute.test_trainer:Figured"},
            r"Figured.step\(\) needs figure.*ReduceLROnPlateau",
        ),
    ],
)
def test_what_cannot_optimize_is_refused_at_the_start(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Trainer.build(resolved(models.odd(**changes)), CONFIG)


def foreign(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Sharp(torch.optim.SGD):
    """Two passes a step, as implementations of SAM have them."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Hungry(torch.optim.SGD):
    """A closure by another name."""

    def step(self, loss_again: Any) -> Any: ...  # type: ignore[override]


class Averaging(torch.optim.SGD):
    """Other weights for evaluation, as schedule-free optimizers have them."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class Figured(lr_scheduler.LRScheduler):
    """Steps by a figure, and is no ReduceLROnPlateau."""

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, figure: float) -> None: ...  # type: ignore[override]

    def _initial_step(self) -> None: ...


class Moving(lr_scheduler.LRScheduler):
    """Changes the groups in its second step: the biases join, leave, or a stranger joins."""

    def __init__(self, optimizer: torch.optim.Optimizer, how: str) -> None:
        self.how = how
        self.later = [optimizer.param_groups.pop()] if how == "join" else []
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [group["lr"] * 0.9 for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "later"}

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch == 1 and self.how == "leave":
            self.optimizer.param_groups.pop()
        elif self.last_epoch == 1:
            stranger = {"params": [nn.Parameter(torch.zeros(1))]}
            self.optimizer.add_param_group({**(self.later or [stranger])[0], "lr": 0.05, "momentum": 0.5})
            self.base_lrs.append(0.05)
        super().step()


def moving(how: str) -> Recipe:
    """A recipe with momentum whose scheduler is a `Moving`."""
    return models.mlp(
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        parameter_groups=models.decay_groups,
        scheduler=Target("tests.unit.coordinator.compute.test_trainer:Moving", kwargs={"how": how}),
    )


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_group_that_joins_during_the_run_survives_a_death(at: int) -> None:
    """Before it joined, just after, and later; the bits are those of a loop that was never interrupted."""

    def steps(trainer: Trainer, numbers: range) -> Trainer:
        for step in numbers:
            seed_everything(step)
            gradients = {n: torch.randn_like(p) for n, p in trainer.replica.parameters.items()}
            trainer.apply(gradients, {}, step=step, loss=1.0)
        return trainer

    calm = steps(Trainer.build(resolved(moving("join")), CONFIG), range(6))
    assert [len(group["params"]) for group in calm.optimizer.param_groups] == [2, 2]
    died = steps(Trainer.build(resolved(moving("join")), CONFIG), range(at))
    state, version = through_json(died.state()), died.replica.pack()
    assert ("groups" in state) == (at > 1)
    heir = Trainer.build(resolved(moving("join")), CONFIG)
    heir.replica.load(version)
    heir.load_state(state)
    steps(heir, range(at, 6))
    assert same(calm.replica.pack(), heir.replica.pack())
    assert through_json(heir.state()).keys() == through_json(calm.state()).keys()
    heir.load_state(Trainer.build(resolved(moving("join")), CONFIG).state())  # and back
    assert [len(group["params"]) for group in heir.optimizer.param_groups] == [2]


@pytest.mark.parametrize(
    ("how", "told"),
    [("leave", "'first.bias' left.*lr=0"), ("stranger", "joined that is not the model's")],
)
def test_groups_that_cannot_be_restored_are_refused_in_the_step_that_changes_them(
    how: str, told: str
) -> None:
    trainer = Trainer.build(resolved(moving(how)), CONFIG)
    gradients = {n: torch.ones_like(p) for n, p in trainer.replica.parameters.items()}
    trainer.apply(gradients, {}, step=0, loss=1.0)
    with pytest.raises(InvalidInput, match=rf"step 1: the parameter groups of SGD changed.*{told}"):
        trainer.apply(gradients, {}, step=1, loss=1.0)


def test_a_group_that_joins_under_a_function_for_each_group_is_refused() -> None:
    trainer = Trainer.build(
        resolved(models.mlp(scheduler="tests.unit.coordinator.compute.test_trainer:by_function")), CONFIG
    )
    joining = trainer.optimizer.param_groups[0]["params"].pop()
    groups = Groups(trainer.optimizer, trainer.scheduler, trainer.replica.parameters)
    trainer.optimizer.add_param_group({"params": [joining]})
    with pytest.raises(InvalidInput, match=r"LambdaLR has a function for each.*lr=0"):
        groups.check(3)


def by_function(optimizer: torch.optim.Optimizer) -> lr_scheduler.LambdaLR:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_gradients_that_do_not_fit_are_refused() -> None:
    trainer = trainer_of()
    with pytest.raises(InvalidInput, match="'other'"):
        trainer.apply({"other": torch.ones(1)}, {}, step=0, loss=1.0)
    with pytest.raises(InvalidInput, match=r"\(9,\)"):
        trainer.apply({"layer.bias": torch.ones(9)}, {}, step=0, loss=1.0)
    with pytest.raises(InvalidInput, match="'other'"):
        trainer.apply(some_gradients(trainer), {"other": torch.ones(1)}, step=0, loss=1.0)


def test_what_optimizer_and_scheduler_raise_names_the_step() -> None:
    recipe = models.odd(scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2))
    trainer = Trainer.build(resolved(recipe), CONFIG)
    for step in range(2):
        trainer.apply(some_gradients(trainer), {}, step=step, loss=1.0)
    with pytest.raises(RunFailed, match="step 2: the scheduler raised ValueError"):
        trainer.apply(some_gradients(trainer), {}, step=2, loss=1.0)
