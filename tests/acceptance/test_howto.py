"""The code of docs/howto.md as it stands there: one module, whose recipes do what plain loops do."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.fleet import finished, fleet
from tests.support.inprocess import InProcess, resolved
from torchord import Recipe

ROOT = Path(__file__).resolve().parents[2]
AT_UNFREEZING, LIMIT = 8, 0.05


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's module."""
    folder = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "howto.md").read_text(), re.S | re.M)
    (folder / "howto_page.py").write_text("\n\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("howto_page")


def trained(page: ModuleType, recipe: Recipe) -> InProcess:
    return InProcess(resolved(recipe), page.config).train()


def loop(
    page: ModuleType,
    like: InProcess,
    *,
    groups: Callable[[Any], Any] = lambda model: model.parameters(),
    loss: Callable[..., torch.Tensor] = torch.nn.functional.cross_entropy,
    change: Callable[[Any], None] = lambda model: None,
    after: Callable[[int, Any, Any], None] = lambda step, model, optimizer: None,
) -> torch.nn.Module:
    """A plain loop over the run's global batches, from its first weights."""
    model = copy.deepcopy(InProcess(like.recipe, page.config).trainer.replica.model)
    optimizer = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    inputs, targets = page.points().tensors
    for step in range(like.plan.total_steps):
        shards = range(like.plan.shards_in(step))
        batch = [index for shard in shards for index in like.plan.indices(step, shard)]
        optimizer.zero_grad()
        loss(model(inputs[batch]), targets[batch]).backward()
        change(model)
        optimizer.step()
        after(step, model, optimizer)
    return model


def alike(run: InProcess, model: torch.nn.Module) -> None:
    ours = dict(run.trainer.replica.model.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_the_plain_recipe_is_the_plain_loop(page: ModuleType) -> None:
    run = trained(page, page.plain)
    alike(run, loop(page, run))


def test_each_layer_is_clipped_by_itself(page: ModuleType) -> None:
    def clip(model: Any) -> None:
        for layer in (model.encoder[0], model.head):
            torch.nn.utils.clip_grad_norm_(layer.parameters(), LIMIT)

    run = trained(page, page.clipped)
    alike(run, loop(page, run, change=clip))


def test_what_is_unfrozen_later_rests_until_then(page: ModuleType) -> None:
    def unfreeze(step: int, model: Any, optimizer: Any) -> None:
        optimizer.param_groups[1]["lr"] = 0.1 if step + 1 >= AT_UNFREEZING else 0.0

    def at_rest(model: Any) -> list[dict[str, Any]]:
        return [{"params": model.head.parameters()}, {"params": model.encoder.parameters(), "lr": 0.0}]

    run = InProcess(resolved(page.unfrozen), page.config)
    first = copy.deepcopy(run.trainer.replica.model)
    run.train(stop=AT_UNFREEZING)
    assert torch.equal(run.trainer.replica.model.encoder[0].weight, first.encoder[0].weight)
    assert not torch.equal(run.trainer.replica.model.head.weight, first.head.weight)
    run.train(start=AT_UNFREEZING)
    assert not torch.equal(run.trainer.replica.model.encoder[0].weight, first.encoder[0].weight)
    alike(run, loop(page, run, groups=at_rest, after=unfreeze))


def test_the_average_is_torchs(page: ModuleType) -> None:
    kept: list[AveragedModel] = []

    def average(step: int, model: Any, optimizer: Any) -> None:
        if not kept:
            kept.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        kept[0].update_parameters(model)

    run = trained(page, page.averaged)
    loop(page, run, after=average)
    assert run.trainer.replica.average is not None
    ours = run.trainer.replica.average.tensors()
    for name, value in kept[0].module.named_parameters():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_classes_are_drawn_equally_often_or_weighed(page: ModuleType) -> None:
    targets = page.points().tensors[1]
    assert 0.05 < targets.float().mean() < 0.2

    def share(recipe: Recipe) -> float:
        plan = InProcess(resolved(recipe), page.config).plan
        drawn = [
            i
            for step in range(plan.total_steps)
            for s in range(plan.shards_in(step))
            for i in plan.indices(step, s)
        ]
        return float(targets[drawn].float().mean())

    assert share(page.plain) == pytest.approx(float(targets.float().mean())) and 0.4 < share(page.drawn) < 0.6
    run = trained(page, page.weighed)
    alike(run, loop(page, run, loss=page.weighed_loss))


def test_a_part_of_a_file_is_taken_over(page: ModuleType, tmp_path: Path) -> None:
    first = page.Net()
    safetensors.torch.save_file(first.state_dict(), tmp_path / "first.safetensors")
    model = page.with_encoder(str(tmp_path / "first.safetensors"))
    assert torch.equal(model.encoder[0].weight, first.encoder[0].weight) and model.head.out_features == 5


@pytest.mark.slow
def test_a_learning_rate_is_found_and_figures_are_written(page: ModuleType, tmp_path: Path) -> None:
    environment = {"TORCHORD_ALLOWED_MODULES": "howto_page,torch"}
    with fleet(tmp_path, workers=1, layout="single", env=environment) as one:
        run, found = one.train(page.growing(page.plain), page.finding, "find-lr")
        assert len(found.history) == 50  # of 160
        rates = [report.lr[0] for report in found.history]
        assert rates[0] < 0.01 < page.steepest(found.history) < rates[-1]
        last = page.write_csv(run, tmp_path / "figures.csv")
        lines = [line.split(",") for line in (tmp_path / "figures.csv").read_text().splitlines()]
        assert [int(version) for version, *_ in lines] == list(range(1, 51))
        assert [float(loss) for _, loss, _ in lines] == [report.loss for report in found.history]
        assert page.write_csv(run, tmp_path / "figures.csv", last) == last
        _, first = one.train(page.plain, page.config, "digits-01")
        again = one.master.submit(page.plain, page.config, name="digits-02", start_from="digits-01")
        assert finished(again).history[0].loss < first.history[0].loss
