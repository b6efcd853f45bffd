"""Models of Hugging Face, PEFT and a table train as a plain loop does, and as the library's own Trainer."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.inprocess import InProcess, resolved
from torchord import Recipe, TrainingConfig
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.replica import Replica

NEEDED = ("pandas", "peft", "sklearn", "torchmetrics", "transformers")
if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(
        f"NOT TESTED, {absent[0]} is not installed (pip install '.[demo,models]')", allow_module_level=True
    )
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the libraries' own
    import torchmetrics
    import transformers

    from examples import resnet_digits, table, text_topics

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 4
TEXTS = replace(text_topics.config(EPOCHS), seed=3)
ROWS = TrainingConfig(epochs=EPOCHS, batch_size=table.BATCH, shards=4, seed=3)
PICTURES = TrainingConfig(epochs=2, batch_size=resnet_digits.BATCH, shards=1, seed=3)  # batch statistics


def quiet(lora: bool = False) -> Recipe:
    """Without dropout, whose draws depend on the shards."""
    return text_topics.recipe(EPOCHS, lora=lora, dropout=0.0)


def still() -> Recipe:
    return replace(table.recipe(), model=partial(table.Tabular, dropout=0.0))


MEMBERS: dict[str, tuple[Recipe, TrainingConfig, str, float]] = {
    # recipe, config, a figure, what it must reach
    "transformers": (quiet(), TEXTS, "accuracy", 0.85),
    "LoRA": (quiet(lora=True), TEXTS, "accuracy", 0.55),
    "ResNet": (resnet_digits.recipe(PICTURES.epochs), PICTURES, "auroc", 0.8),
    "a table": (still(), ROWS, "accuracy", 0.9),
}


def batches(run: InProcess) -> list[list[int]]:
    """The global batches of a run, step by step."""
    plan = run.plan
    return [
        [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        for step in range(plan.total_steps)
    ]


def plainly(given: Recipe, run: InProcess) -> nn.Module:
    """What everybody writes: model, optimizer, schedule, clipping, batch after batch."""
    made: Any = run.recipe
    model = Replica.build(made, run.config).model
    optimizer = made.optimizer((made.parameter_groups or nn.Module.parameters)(model))
    scheduler = None if made.scheduler is None else made.scheduler(optimizer)
    model.train()
    for indices in batches(run):
        samples = [run.dataset[index] for index in indices]
        returned = made.step(model, (made.collate or torch.utils.data.default_collate)(samples))
        loss = returned[0] if isinstance(returned, tuple) else returned
        optimizer.zero_grad()
        loss.backward()
        if run.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.config.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def apart(one: nn.Module, other: nn.Module) -> float:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    return max(float((found[name].float() - value.float()).abs().max()) for name, value in expected.items())


def figures(run: InProcess) -> dict[str, float]:
    assert run.recipe.evaluation is not None
    data, replica = run.recipe.evaluation(), run.replicas[0]
    replica.load(run.trainer.replica.pack())
    if run.recipe.metrics:
        inference.try_metrics(replica, run.recipe, run.config, data)
    parts = [
        inference.evaluate(replica, run.recipe, run.config, data, part)
        for part in (range(50), range(50, len(data)))
    ]
    return inference.combine(parts, run.recipe, run.config)


@pytest.fixture(scope="module")
def runs() -> dict[str, InProcess]:
    return {
        name: InProcess(resolved(given), config).train() for name, (given, config, _, _) in MEMBERS.items()
    }


@pytest.mark.parametrize("name", MEMBERS)
def test_it_trains_as_a_plain_loop_does(name: str, runs: dict[str, InProcess], record_property: Any) -> None:
    given, _, figure, bound = MEMBERS[name]
    run = runs[name]
    found = apart(plainly(given, run), run.trainer.replica.model)
    record_property("summary", f"{name}: {found:.1e} from a plain loop after {run.plan.total_steps} steps")
    assert found < 1e-3
    measured = figures(run)
    assert measured[figure] >= bound
    record_property("summary", f"{name}: {figure} {measured[figure]:.3f}")


def test_it_trains_as_the_trainer_of_transformers_does(
    runs: dict[str, InProcess], record_property: Any, tmp_path: Path
) -> None:
    run = runs["transformers"]
    order = batches(run)

    class Same(transformers.Trainer):
        """On the run's batches."""

        def get_train_dataloader(self) -> Any:
            each = run.plan.total_steps // EPOCHS

            class Epochs:
                taken = 0

                def __len__(self) -> int:
                    return each

                def __iter__(self) -> Any:
                    first, self.taken = self.taken, self.taken + each
                    return iter(order[first : first + each])

            sampler: Any = Epochs()
            return torch.utils.data.DataLoader(
                run.dataset, batch_sampler=sampler, collate_fn=text_topics.collate
            )

    model: Any = Replica.build(run.recipe, run.config).model
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=text_topics.BATCH,
        learning_rate=2e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=6,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Same(model=model, args=arguments, train_dataset=run.dataset).train()
    found = apart(model, run.trainer.replica.model)
    record_property("summary", f"transformers: {found:.1e} from transformers' own Trainer")
    assert found < 1e-3


def test_torchmetrics_measures_all_held_out_pictures_at_once(runs: dict[str, InProcess]) -> None:
    run = runs["ResNet"]
    pictures, labels = resnet_digits.load_digits("test").tensors
    with torch.no_grad():
        outputs = resnet_digits.outputs(run.trainer.replica.eval(), (pictures, labels))
    f1 = torchmetrics.classification.MulticlassF1Score(num_classes=10)
    auroc = torchmetrics.classification.MulticlassAUROC(num_classes=10)
    found = figures(run)
    assert found["f1"] == pytest.approx(float(f1(outputs, labels)), abs=1e-5)
    assert found["auroc"] == pytest.approx(float(auroc(outputs, labels)), abs=1e-5)


def sent(run: InProcess) -> dict[str, Tensor]:
    """What a shard sends."""
    return compute(
        run.replicas[0], run.recipe, run.config, run.dataset, run.plan.indices(0, 0), 0, 0
    ).gradients


def test_of_adapters_alone_travels(runs: dict[str, InProcess], record_property: Any) -> None:
    bytes_of = {}
    for name in ("transformers", "LoRA"):
        run = runs[name]
        run.replicas[0].load(run.trainer.replica.pack())
        found = sent(run)
        assert found.keys() == {
            key for key, parameter in run.trainer.replica.parameters.items() if parameter.requires_grad
        }
        bytes_of[name] = sum(tensor.nbytes for tensor in found.values())
        if name == "LoRA":
            assert all("lora_" in key or "classifier" in key for key in found)
    whole, adapters = bytes_of["transformers"], bytes_of["LoRA"]
    told = (
        f"LoRA: a shard's gradient has {adapters:,} bytes, and {whole:,} without ({whole / adapters:.0f} x)"
    )
    record_property("summary", told)
    assert adapters * 10 < whole
