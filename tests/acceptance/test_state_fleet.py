"""State in odd orders and layouts, between processes that differ in the order of a set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.support import recipes_hidden as hidden
from tests.support import recipes_layouts as layouts
from tests.support.fleet import Fleet, finished, fleet
from tests.support.reference import large_batch
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import RunFailed

CONFIG = TrainingConfig(epochs=2, batch_size=16, shards=4, seed=1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and three Clients, with sets in three orders among them."""
    with fleet(tmp_path_factory.mktemp("fleet"), 1, env={"PYTHONHASHSEED": "0"}) as made:
        for seed in "12":
            made.cluster.add_worker(env={"PYTHONHASHSEED": seed})
        made.resize(3)
        yield made


def recipe(model: Any, **entries: Any) -> Recipe:
    return Recipe(
        model=model,
        dataset=layouts.points,
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        **entries,
    )


def test_a_model_made_in_the_order_of_a_set_trains_on_processes_with_other_orders(three: Fleet) -> None:
    made = recipe(layouts.Disordered, buffers={f"seen_{each}": "mean" for each in "abc"})
    run = three.master.submit(made, CONFIG, name="disordered")
    trained = finished(run)
    assert run.status().refused == ()
    assert run.verify(reexecute=[0, 3]).ok
    layouts.Disordered().load_state_dict(run.state_dict(), strict=True)
    plain = large_batch(made, CONFIG).module.state_dict()
    for name, tensor in run.state_dict().items():
        if not name.startswith("seen"):  # which shards average
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6, msg=name)
    inputs = layouts.points().tensors[0][:8]
    with torch.no_grad():
        torch.testing.assert_close(run.predict(inputs), trained.module(inputs))


def test_parameters_that_share_memory_stay_together_where_the_host_maps_versions(three: Fleet) -> None:
    """Of more than 256 KiB: from there on a version is mapped, and not copied."""
    made = recipe(partial(layouts.Tied, "transposed", 8192))
    run, _ = three.train(made, CONFIG, "tied")
    plain = large_batch(made, CONFIG).module.state_dict()
    for name, tensor in run.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_buffer_of_another_shape_ends_the_run_with_the_sentence(three: Fleet, when: str) -> None:
    model = partial(hidden.Resizing, in_place=True, evaluation_only=when == "evaluation")
    run = three.master.submit(recipe(model, evaluation=layouts.points), CONFIG, name=f"resized-{when}")
    with pytest.raises(RunFailed, match=r"turned buffer 'least'.*must keep its layout"):
        run.wait(timeout=60)


def test_so_does_a_prediction(three: Fleet) -> None:
    model = partial(hidden.Resizing, in_place=True, evaluation_only=True)
    run, _ = three.train(recipe(model), CONFIG, "resized-prediction")
    for _ in range(2):
        with pytest.raises(RunFailed, match="turned buffer 'least'"):
            run.predict(layouts.points().tensors[0][:8], timeout=60)
