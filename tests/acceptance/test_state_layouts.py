"""State that lies otherwise in memory, or comes in another order: trained as in a plain loop, or refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import recipes_layouts as layouts
from tests.support.inprocess import InProcess, resolved, run
from tests.support.reference import large_batch
from torchord import Master, Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, ManifestMismatch, RecipeError
from torchord.cache.tensors.codec import Manifest
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.master.reports import TrainedModel, state_of

CONFIG = TrainingConfig(epochs=2, batch_size=16, shards=4, seed=1)


def recipe(model: Any, **entries: Any) -> Recipe:
    given: dict[str, Any] = {
        "dataset": layouts.points,
        "loss": torch.nn.functional.cross_entropy,
        "optimizer": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        **entries,
    }
    return Recipe(model=model, **given)


TRAINED: dict[str, Recipe] = {
    "a transpose": recipe(partial(layouts.Tied, "transposed")),
    "views of numpy's memory": recipe(partial(layouts.Tied, "numpy")),
    "the same memory in another shape": recipe(partial(layouts.Tied, "view")),
    "a part": recipe(layouts.Part),
    "buffers": recipe(layouts.Buffered),
    "strides": recipe(layouts.strided),
    "channels last": recipe(layouts.Pictures),
    "complex64": recipe(layouts.Complex),
    "complex128": recipe(partial(layouts.Complex, torch.complex128)),
    "float64": recipe(layouts.double),
    "extra state and hooks": recipe(layouts.Told),
    "momentum": recipe(
        partial(layouts.Tied, "transposed"), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("attach", [False, True])
def test_it_trains_as_in_a_plain_loop(kind: str, attach: bool) -> None:
    shards = 1 if kind == "extra state and hooks" else 4  # its BatchNorm
    config = TrainingConfig(epochs=2, batch_size=16, shards=shards, seed=1, clip_norm=1.0)
    ours = run(TRAINED[kind], config, clients=2, attach=attach).trainer.replica.model
    plain = large_batch(TRAINED[kind], config)
    found, expected = state_of(ours), state_of(plain.module)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            tolerance = 1e-9 if value.dtype in (torch.float64, torch.complex128) else 1e-5
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=f"{name}: {value}"
            )
    fresh = resolved(TRAINED[kind]).model()
    fresh.load_state_dict(
        found, strict=True, assign=kind == "buffers"
    )  # torch copies to none that is expanded
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("setting", [{"local_steps": 2}, {"parameter_compression": "int8"}])
def test_what_moves_each_of_two_by_itself_is_refused_where_they_share_memory(setting: Any) -> None:
    given = resolved(recipe(partial(layouts.Tied, "transposed")))
    with pytest.raises(
        InvalidInput, match=r"'encode\.weight' and 'decode\.weight' share memory.*one parameter"
    ):
        Trainer.build(given, TrainingConfig(**setting))
    Trainer.build(resolved(recipe(layouts.strided)), TrainingConfig(**setting))


def test_a_trained_parameter_that_is_expanded_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'bias' is expanded.*clone\(\)"):
        Replica.build(resolved(recipe(layouts.expanded)), CONFIG)


# --- order -----------------------------------------------------------------------------------------------


MEANS = {f"seen_{each}": "mean" for each in "abc"}
ORDERS = [recipe(partial(layouts.Disordered, order), buffers=MEANS) for order in ("abc", "cba", "bca")]


def test_processes_that_register_in_another_order_have_one_layout_and_the_same_bits() -> None:
    """The training server by one order, each Client by another; momentum goes by name as well."""
    first = run(ORDERS[0], CONFIG, clients=1)
    mixed = InProcess(resolved(ORDERS[0]), CONFIG, clients=3)
    manifest = mixed.trainer.replica.manifest
    mixed.replicas = [Replica.build(resolved(each), CONFIG) for each in ORDERS]
    for replica in mixed.replicas:
        replica.arrange(Manifest.from_json(json.loads(json.dumps(manifest.to_json()))))
        assert replica.manifest == manifest and list(replica.parameters) == list(
            mixed.trainer.replica.parameters
        )
    mixed.train(0, 3)
    heir = Trainer.build(resolved(ORDERS[1]), CONFIG, arrange=lambda replica: replica.arrange(manifest))
    heir.replica.load(mixed.trainer.replica.pack())
    heir.load_state(mixed.trainer.state())
    mixed.trainer = heir
    assert mixed.train(3).bits == first.bits


def test_arranging_moves_no_layer_in_a_sequence_and_refuses_another_model() -> None:
    model = partial(nn.Linear, layouts.FEATURES, layouts.CLASSES)
    replica, other = (
        Replica.build(resolved(each), CONFIG) for each in (recipe(layouts.strided), recipe(model))
    )
    before = list(replica.model)
    replica.arrange(replica.manifest)
    assert list(replica.model) == before
    with pytest.raises(ManifestMismatch, match=r"'0\.weight' .*: not in the model here"):
        other.arrange(replica.manifest)


# --- torch's default dtype ----------------------------------------------------------------------------------


def test_a_function_that_sets_the_default_dtype_is_refused_and_put_back() -> None:
    with pytest.raises(
        InvalidInput, match=r"model entry sets torch's default dtype to torch\.float64.*double"
    ):
        Replica.build(resolved(recipe(layouts.doubled)), CONFIG)
    with pytest.raises(InvalidInput, match="dataset entry sets torch's default dtype"):
        open_dataset(resolved(recipe(layouts.strided, dataset=layouts.doubled_points)), CONFIG)
    assert torch.get_default_dtype() is torch.float32


def test_a_module_that_sets_the_default_dtype_is_refused_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_the_dtype.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\ndef made(): return torch.nn.Linear(8, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"importing module 'sets_the_dtype' sets .*torch\.float64"):
            resolved(recipe("sets_the_dtype:made"))
    assert torch.get_default_dtype() is torch.float32


def test_a_program_that_set_the_default_dtype_submits_nothing(redis_url: str) -> None:
    master = Master(redis_url)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InvalidInput, match=r"this program sets torch's default dtype to torch\.float64"):
            master.submit(recipe(layouts.strided), CONFIG, name="doubled")
    finally:
        torch.set_default_dtype(torch.float32)
    assert master.runs() == []


# --- what is no tensor --------------------------------------------------------------------------------------


def test_a_file_says_what_it_cannot_hold(tmp_path: Any) -> None:
    with pytest.raises(InvalidInput, match=r"'_extra_state' is a dict.*torch\.save"):
        TrainedModel(layouts.Told(), []).save(tmp_path / "told.safetensors")
    with pytest.raises(InvalidInput, match=r"'weight' is a torch\.complex128"):
        TrainedModel(layouts.Complex(torch.complex128), []).save(tmp_path / "complex.safetensors")
    TrainedModel(layouts.Complex(), []).save(tmp_path / "complex.safetensors")
