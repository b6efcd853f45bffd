"""A LightningModule trains as Lightning's own Trainer trains it, from the same batches."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import torchord
from tests.support import models
from tests.support.inprocess import InProcess, resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, NotAllowed, RecipeError
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.step_metrics import combined
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import resolve

if importlib.util.find_spec("lightning") is None:
    pytest.skip("NOT TESTED, lightning is not installed (pip install '.[models]')", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the library's own
    import lightning

    from examples import lightning_digits
    from tests.support import recipes_lightning as modules

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's Trainer has a word about everything
SHARDS = TrainingConfig(epochs=5, batch_size=8, shards=2, seed=3)
WHOLE = TrainingConfig(epochs=5, batch_size=8, shards=1, seed=3)
DATA, HELD_OUT = partial(models.points, size=44), partial(models.points, size=24)
TRAINER = {"estimated_stepping_batches": 30}


class Batches:
    """The global batches of a run, epoch after epoch."""

    def __init__(self, plan: Plan, epochs: int) -> None:
        self.plan, self.each, self.step = plan, plan.total_steps // epochs, 0

    def __len__(self) -> int:
        return self.each

    def __iter__(self) -> Iterator[list[int]]:
        first, self.step = self.step, self.step + self.each
        for step in range(first, first + self.each):
            shards = range(self.plan.shards_in(step))
            yield [int(i) for shard in shards for i in self.plan.indices(step, shard)]


def fitted(run: InProcess, module: Any, epochs: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What Lightning's Trainer makes of a module that begins with the run's weights."""
    module.load_state_dict(Replica.build(run.recipe, run.config).model.state_dict())
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    held_out = None if run.recipe.evaluation is None else DataLoader(run.recipe.evaluation(), batch_size=100)
    batches: Any = Batches(run.plan, epochs)
    trainer.fit(module, DataLoader(run.dataset, batch_sampler=batches), held_out)
    return dict(module.state_dict()), {name: float(value) for name, value in trainer.callback_metrics.items()}


def figures(run: InProcess, config: TrainingConfig) -> dict[str, float]:
    """The evaluation of the newest version, by two workers."""
    assert run.recipe.evaluation is not None
    data, replica = run.recipe.evaluation(), Replica.build(run.recipe, config)
    replica.load(run.trainer.replica.pack())
    inference.try_metrics(replica, run.recipe, config, data)
    cut = len(data) // 3
    parts = [range(cut), range(cut, len(data))]
    return inference.combine(
        [inference.evaluate(replica, run.recipe, config, data, part) for part in parts], run.recipe, config
    )


def difference(run: InProcess, expected: dict[str, Tensor]) -> float:
    found = run.trainer.replica.model.state_dict()
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def of(name: str) -> tuple[Any, Recipe, TrainingConfig]:
    """Module, recipe and config of a member."""
    if name == "the example":
        config = TrainingConfig(epochs=10, batch_size=lightning_digits.BATCH, shards=4, seed=3)
        return lightning_digits.DigitModule(dropout=0.0), lightning_digits.recipe(dropout=0.0), config
    kind = getattr(modules, name)
    config = WHOLE if name == "Normed" else SHARDS  # a shard's BatchNorm has statistics of its own
    evaluation = HELD_OUT if name == "Warm" else None
    return kind(), torchord.lightning(kind, DATA, evaluation=evaluation, trainer=TRAINER), config


@pytest.mark.parametrize("name", ["Plain", "Normed", "Warm", "the example"])
def test_it_trains_as_lightnings_trainer_does(name: str, record_property: Any) -> None:
    module, given, config = of(name)
    run = InProcess(resolved(given), config).train()
    expected, theirs = fitted(run, module, config.epochs)
    apart = difference(run, expected)
    record_property(
        "summary", f"{name}: {apart:.1e} from Lightning's Trainer after {run.plan.total_steps} steps"
    )
    assert apart < 2e-5
    if run.recipe.evaluation is not None:
        ours = figures(run, config)
        for key in (key for key in theirs if key.startswith("val_")):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert {"val_loss", "val_accuracy"} <= ours.keys() & theirs.keys()
    if name == "the example":
        assert ours["val_accuracy"] > 0.9 and "val_f1" in theirs
        assert ours["loss"] == pytest.approx(ours["val_loss"])


def test_what_a_step_logs_is_measured_with_it() -> None:
    for config in (WHOLE, SHARDS):
        given = resolved(of("Warm")[1])
        run = InProcess(given, config)
        run.replicas[0].load(run.trainer.replica.pack())
        parts = []
        for shard in range(run.plan.shards_in(0)):
            found = compute(run.replicas[0], given, config, run.dataset, run.plan.indices(0, shard), 0, shard)
            parts.append((found.metrics, found.examples, found.weight))
        measured = combined(parts)
        indices = [int(i) for shard in range(run.plan.shards_in(0)) for i in run.plan.indices(0, shard)]
        x, y = (tensor[indices] for tensor in run.dataset.tensors)
        outputs = run.trainer.replica.model(2 * x)
        assert measured == pytest.approx(
            {
                "train_loss": float(torch.nn.functional.cross_entropy(outputs, y)),
                "train_accuracy": float((outputs.argmax(1) == y).float().mean()),
            }
        )


def test_its_scheduler_steps_where_lightnings_does() -> None:
    run = InProcess(resolved(of("Normed")[1]), WHOLE).train()
    rates = [report.lr[0] for report in run.reports]
    assert rates == [0.01] * 12 + [0.005] * 12 + [0.0025] * 6


def test_a_step_is_that_of_the_whole_batch() -> None:
    run = InProcess(resolved(of("Warm")[1]), SHARDS)
    run.replicas[0].load(run.trainer.replica.pack())
    assert probe(run.replicas[0], run.recipe, run.plan, run.dataset, 0, 0) == ""


def test_a_module_of_the_other_package_and_one_by_name() -> None:
    for given in (modules.Older, "tests.support.recipes_lightning:Older"):
        run = InProcess(resolved(torchord.lightning(given, DATA)), SHARDS).train()
        assert run.losses[-1] < run.losses[0]
        found = inference.predict(run.replicas[0], run.recipe, run.dataset.tensors[0][:3])
        torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_arguments_are_bound_and_other_entries_go_before() -> None:
    given = torchord.lightning(
        modules.ARGUED,
        DATA,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        average="torchord.coordinator.averages:ema",
    )
    run = InProcess(resolved(given), SHARDS)
    assert run.trainer.replica.parameters["net.0.weight"].shape[0] == 5
    assert run.trainer.optimizer.param_groups[0]["lr"] == 0.5 and run.trainer.replica.average is not None
    watching = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    run_of = InProcess(resolved(torchord.lightning(modules.Plateau, DATA, scheduler=watching)), SHARDS)
    assert type(run_of.trainer.scheduler) is torch.optim.lr_scheduler.ReduceLROnPlateau
    try_optimizers(torchord.lightning(modules.Plain, DATA), SHARDS)
    pairs = inference.predict(run.replicas[0], run.recipe, [run.dataset.tensors[0], run.dataset.tensors[1]])
    assert pairs.shape == (44, models.CLASSES)


def test_a_module_is_left_as_lightning_wants_it() -> None:
    run = InProcess(resolved(of("Warm")[1]), SHARDS).train(0, 2)
    model: Any = run.trainer.replica.model
    assert model._trainer is None and "log" not in model.__dict__
    expected, _ = fitted(run, model, SHARDS.epochs)  # Lightning's own Trainer goes on with it
    assert expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ByHand", r"ByHand steps its optimizers by hand .*return one loss"),
        ("Two", r"returns 4 optimizers.*group for each network"),
        ("Plateau", r"ReduceLROnPlateau of Plateau watches 'val_loss'.*scheduler= to torchord.lightning"),
        ("Chain", r"returns 2 schedulers.*SequentialLR"),
        ("Often", r"interval 'step' and the frequency 5"),
        ("Unoptimized", r"returns a NoneType, and no torch.optim.Optimizer"),
        ("Hooked", r"Hooked.on_train_batch_end would not be called .*ignore=\['on_train_batch_end'\]"),
        ("Called", r"Called.configure_callbacks would not be called"),
        ("Planned", r"configure_optimizers of Planned reads self.trainer.max_epochs.*trainer=\{'max_epochs'"),
        ("Iterating", r"Iterating.training_step takes dataloader_iter"),
        ("Stepless", r"Stepless has no training_step"),
        ("no_module", r"needs a LightningModule; no_module makes a Linear"),
    ],
)
def test_what_it_cannot_is_refused_before_it_is_submitted(name: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text) as told:
        torchord.lightning(getattr(modules, name), DATA)
    assert "\n" not in str(told.value)
    with pytest.raises(InvalidInput, match=text):  # of a module that nobody has imported, when the run starts
        InProcess(resolved(torchord.lightning(f"tests.support.recipes_lightning:{name}", DATA)), SHARDS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Annealed", r"training_step of Annealed reads self.trainer.current_epoch.*at any time"),
        ("Counting", "uses batch_idx, which a shard has not"),
        ("Skipping", "training_step of Skipping returned nothing, as for a batch to be skipped"),
    ],
)
def test_what_only_a_step_shows_is_refused_by_the_first(name: str, text: str) -> None:
    run = InProcess(resolved(torchord.lightning(getattr(modules, name), DATA)), SHARDS)
    with pytest.raises(InvalidInput, match=text):
        run.step(0)


def test_a_value_that_workers_cannot_reduce_is_refused_before_the_first_step() -> None:
    given = resolved(torchord.lightning(modules.Reduced, DATA, evaluation=HELD_OUT))
    run = InProcess(given, SHARDS)
    with pytest.raises(InvalidInput, match="reduce_fx=<lambda>"):
        inference.try_metrics(run.trainer.replica, given, SHARDS, HELD_OUT())


def test_hooks_may_be_left_out_and_facts_be_given() -> None:
    given = torchord.lightning(modules.Hooked, DATA, ignore=["on_train_batch_end"])
    plain = InProcess(resolved(torchord.lightning(modules.Plain, DATA)), SHARDS).train()
    assert InProcess(resolved(given), SHARDS).train().bits == plain.bits
    given = torchord.lightning(modules.Planned, DATA, trainer={"max_epochs": 4})
    assert InProcess(resolved(given), SHARDS).trainer.optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(RecipeError, match="'on_tuesday', which is no hook"):
        torchord.lightning(modules.Plain, DATA, ignore=["on_tuesday"])


def test_a_module_is_admitted_like_any_entry() -> None:
    spec = torchord.lightning(modules.Plain, "torch.utils.data:TensorDataset").to_spec()
    with pytest.raises(NotAllowed, match=r"tests\.support\.recipes_lightning"):
        resolve(spec, allowed=("torch",))
