from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from tests.support import models
from tests.support.inprocess import InProcess, resolved, run, same
from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.coordinator.compute.batch import load_batch, open_dataset
from torchord.coordinator.compute.determinism import COMPUTE_LOCK, pinned, seed_everything
from torchord.coordinator.compute.gradient import ShardGradient, compute
from torchord.coordinator.compute.inference import evaluate
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "mlp": models.mlp,
    "cnn": models.cnn,
    "gpt": models.gpt,
    "odd": models.odd,
}
CONFIG = TrainingConfig(batch_size=8, shards=4, seed=3)


class Bench:
    """A recipe's parts in one process."""

    def __init__(self, recipe: Recipe, config: TrainingConfig = CONFIG) -> None:
        self.recipe = resolved(recipe)
        self.config = config
        self.dataset = open_dataset(self.recipe, config)
        self.plan = Plan(len(self.dataset), config)
        self.replica = Replica.build(self.recipe, config)
        self.replica.load(self.replica.pack())

    def compute(self, step: int = 0, shard: int = 0) -> ShardGradient:
        return compute(
            self.replica, self.recipe, self.config, self.dataset, self.plan.indices(step, shard), step, shard
        )


def assert_equal(one: ShardGradient, other: ShardGradient) -> None:
    assert one.gradients.keys() == other.gradients.keys()
    assert one.buffers.keys() == other.buffers.keys()
    assert all(same(one.gradients[name], other.gradients[name]) for name in one.gradients)
    assert all(same(one.buffers[name], other.buffers[name]) for name in one.buffers)
    assert (one.loss, one.grad_norm, one.examples) == (other.loss, other.grad_norm, other.examples)


# --- purity -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_shard_has_the_same_bits_whatever_was_computed_before(name: str) -> None:
    bench, other = Bench(RECIPES[name]()), Bench(RECIPES[name]())
    first = bench.compute(1, 2)
    bench.compute(0, 0)
    evaluate(bench.replica, bench.recipe, bench.config, bench.dataset, [0, 1, 2])
    seed_everything(12345)
    assert_equal(first, bench.compute(1, 2))
    assert_equal(first, other.compute(1, 2))


@pytest.mark.parametrize("name", RECIPES)
def test_shards_draw_different_random_numbers(name: str) -> None:
    bench = Bench(RECIPES[name]())
    assert bench.compute(0, 0).loss != bench.compute(0, 1).loss


def test_dropout_depends_on_step_and_shard_and_seed() -> None:
    bench = Bench(models.mlp(model=partial(models.Mlp, hidden=64, dropout=0.5)))
    indices = bench.plan.indices(0, 0)
    losses = {
        compute(bench.replica, bench.recipe, config, bench.dataset, indices, step, shard).loss
        for config in (CONFIG, TrainingConfig(batch_size=8, shards=4, seed=4))
        for step, shard in ((0, 0), (0, 1), (1, 0))
    }
    assert len(losses) == 6


def test_the_data_phase_does_not_disturb_the_model_phase() -> None:
    """Data from elsewhere (a data store) gives the bits that the worker's own dataset gives."""
    drawing = Bench(models.mlp())
    first = drawing.compute()

    class Greedy(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            torch.rand(7), np.random.rand(3), random.random()
            return drawing_dataset[index]

    drawing_dataset = drawing.dataset
    drawing.dataset = Greedy()
    assert_equal(first, drawing.compute())


@pytest.mark.parametrize("deterministic", [True, False])
def test_switches_do_not_depend_on_what_ran_before(deterministic: bool) -> None:
    config = TrainingConfig(batch_size=8, shards=4, seed=3, deterministic=deterministic)
    bench = Bench(models.cnn(), config)
    first = bench.compute()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(not deterministic, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        assert_equal(first, bench.compute())
        assert torch.get_num_threads() == 1
        assert torch.get_default_dtype() is torch.float32
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


def test_threads_are_pinned_in_whatever_thread_computes() -> None:
    bench = Bench(models.cnn())
    first = bench.compute()
    torch.set_num_threads(2)
    found: list[tuple[int, ShardGradient]] = []

    def work() -> None:
        result = bench.compute()
        found.append((torch.get_num_threads(), result))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    assert [count for count, _ in found] == [1, 1, 1]
    for _, result in found:
        assert_equal(first, result)


def test_seeding_is_that_of_torch_numpy_and_random() -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(1).item(), torch.nn.functional.dropout(torch.ones(9)).tolist(), torch.initial_seed()

    torch.manual_seed(2**62 + 5), np.random.seed(5), random.seed(2**62 + 5)
    expected = (*draw(), np.random.rand(), random.random())
    seed_everything(2**62 + 5)
    assert (*draw(), np.random.rand(), random.random()) == expected


def test_building_and_opening_leave_the_process_as_it_was() -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    try:
        Bench(models.odd())
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    finally:
        torch.set_num_threads(1)


def test_replicas_of_a_run_start_alike_and_those_of_another_seed_do_not() -> None:
    recipe = resolved(models.odd())
    one, other = Replica.build(recipe, CONFIG), Replica.build(recipe, CONFIG)
    third = Replica.build(recipe, TrainingConfig(seed=99))
    assert same(one.pack(), other.pack()) and one.manifest == other.manifest
    assert not same(one.pack(), third.pack())


def test_unwritten_memory_is_the_same_in_every_process() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1000))

    recipe = resolved(models.mlp())
    object.__setattr__(recipe, "model", Forgetful)
    assert bool(Replica.build(recipe, CONFIG).parameters["weight"].isnan().all())


def test_one_computation_at_a_time() -> None:
    entered = threading.Event()

    def other() -> None:
        with pinned(1, True):
            entered.set()

    with pinned(1, True), pinned(1, True):  # the same thread may enter again
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    assert COMPUTE_LOCK.acquire(blocking=False)
    COMPUTE_LOCK.release()


# --- values -----------------------------------------------------------------------------


def test_the_gradient_is_that_of_plain_torch() -> None:
    bench = Bench(models.mlp())
    found = bench.compute(0, 1)
    model = models.Mlp()
    model.load_state_dict(bench.replica.model.state_dict())
    inputs, targets = default_collate([bench.dataset[int(i)] for i in bench.plan.indices(0, 1)])
    seed_everything(derive_seed(3, "model", 0, 1))
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    assert found.loss == loss.item() and found.examples == 2 and found.finite
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and same(found.gradients[name], parameter.grad)
    total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert found.grad_norm == pytest.approx(float(total.norm()), rel=1e-6)


def test_a_step_gives_the_bits_of_the_same_loss() -> None:
    by_loss = Bench(models.mlp(metrics=None))
    by_step = Bench(models.mlp(loss=None, step=models.classifier_step, metrics=None))
    assert_equal(by_loss.compute(), by_step.compute())


def test_tied_weights_are_one_tensor_and_stay_tied() -> None:
    bench = Bench(models.gpt())
    names = [spec.name for spec in bench.replica.manifest.tensors]
    assert "embed.weight" in names and "head.weight" not in names
    bench.replica.load_tensors({n: torch.zeros_like(t) for n, t in bench.replica.state_tensors().items()})
    assert bench.replica.model.head.weight is bench.replica.model.embed.weight
    assert not bench.replica.model.head.weight.any()
    assert "head.weight" not in bench.compute().gradients


def test_every_kind_of_state_travels() -> None:
    bench = Bench(models.odd())
    assert {spec.name: spec.dtype for spec in bench.replica.manifest.tensors} == {
        "unused": "float32",
        "frozen": "float32",
        "layer.weight": "float32",
        "layer.bias": "float32",
        "projection": "float32",
        "calls": "int64",
        "seen": "bool",
        "mean": "float64",
        "nothing": "float32",
    }
    found = bench.compute()
    assert set(found.gradients) == {"layer.weight", "layer.bias"}
    assert set(found.buffers) == {"calls", "mean"}
    assert found.buffers["calls"] == 1 and found.buffers["calls"].dtype == torch.int64


def test_buffers_start_from_the_version_each_time() -> None:
    bench = Bench(models.odd())
    assert [int(bench.compute(0, k).buffers["calls"]) for k in (0, 1, 2)] == [1, 1, 1]
    bench.replica.reset_buffers()
    assert int(bench.replica.model.calls) == 0
    assert bench.replica.model.calls is bench.replica.buffers["calls"]


def test_a_model_that_writes_to_its_weights_is_refused_and_put_back() -> None:
    bench = Bench(models.mlp(model=models.Writing))
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"wrote to the trained parameter 'layer\.weight'"):
            bench.compute()
    bench.replica.reset_buffers()
    assert all(same(p, bench.replica.version_here()[name]) for name, p in bench.replica.parameters.items())


def test_the_results_belong_to_the_caller() -> None:
    bench = Bench(models.cnn())
    first = bench.compute()
    kept = {name: g.clone() for name, g in {**first.gradients, **first.buffers}.items()}
    bench.compute(1, 1)
    bench.replica.load(torch.zeros_like(bench.replica.pack()))
    assert all(same({**first.gradients, **first.buffers}[name], kept[name]) for name in kept)
    storage = {t.untyped_storage().data_ptr() for t in bench.replica.state_tensors().values()}
    assert not storage & {g.untyped_storage().data_ptr() for g in first.gradients.values()}


def test_bf16_keeps_float32_gradients() -> None:
    full = Bench(models.mlp())
    half = Bench(models.mlp(), TrainingConfig(batch_size=8, shards=4, seed=3, precision="bf16"))
    one, other = full.compute(), half.compute()
    assert all(g.dtype == torch.float32 for g in other.gradients.values())
    assert one.loss != other.loss and one.loss == pytest.approx(other.loss, rel=0.05)


def test_nan_is_reported_not_raised() -> None:
    bench = Bench(models.mlp(dataset=partial(models.poisoned, at=5)))
    where = {
        int(i): (step, shard)
        for step in range(bench.plan.total_steps)
        for shard in range(bench.plan.shards_in(step))
        for i in bench.plan.indices(step, shard)
    }
    bad = bench.compute(*where[5])
    assert not bad.finite and np.isnan(bad.loss) and np.isnan(bad.grad_norm)
    good = next(place for place in where.values() if place != where[5])
    assert bench.compute(*good).finite


# --- data access ------------------------------------------------------------------------


def test_tensor_datasets_are_indexed_as_a_whole_with_the_bytes_of_collate() -> None:
    data = TensorDataset(torch.randn(20, 3, 2), torch.arange(20), torch.randn(20, dtype=torch.float64))
    indices = [7, 3, 3, 19]
    ours = load_batch(data, indices)
    theirs = default_collate([data[i] for i in indices])
    assert all(same(one, other) for one, other in zip(ours, theirs, strict=True))


def test_subclasses_of_tensor_dataset_are_asked_for_samples() -> None:
    class Shifted(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + 1, y

    ours = load_batch(Shifted(torch.zeros(4, 2), torch.arange(4)), [1, 2])
    assert ours[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_getitems_is_asked_once_and_must_answer_in_full() -> None:
    batch = load_batch(models.Batched(), np.array([3, 1]))
    assert same(batch[0], models.points().tensors[0][[3, 1]])

    class Short(models.Batched):
        def __getitems__(self, indices: list[int]) -> Any:
            return super().__getitems__(indices)[1:]

    with pytest.raises(InvalidInput, match="1 samples for 2 indices"):
        load_batch(Short(), [3, 1])


def test_indices_reach_the_dataset_as_python_integers() -> None:
    class Strict(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            assert type(index) is int
            return super().__getitem__(index)

    load_batch(Strict(torch.zeros(4, 2)), np.array([1, 2]))


def test_a_collate_of_ones_own() -> None:
    bench = Bench(models.mlp(collate=models.collate_doubled))
    batch = load_batch(bench.dataset, [4, 2], bench.recipe.collate)
    assert same(batch[0], 2 * models.points().tensors[0][[4, 2]])


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "error", "note"),
    [
        (models.mlp(dataset=partial(models.Raising, at=13)), OSError, "reading sample 13 "),
        (models.mlp(model=partial(models.Exploding, limit=-9.0)), ZeroDivisionError, "forward and loss"),
        (models.mlp(loss=models.raising_loss), ArithmeticError, "forward and loss"),
    ],
    ids=["dataset", "model", "loss"],
)
def test_what_the_users_code_raises_comes_through_with_a_note(
    recipe: Recipe, error: type[Exception], note: str
) -> None:
    bench = Bench(recipe)
    with pytest.raises(error) as raised:
        for step in range(bench.plan.total_steps):
            for shard in range(bench.plan.shards_in(step)):
                bench.compute(step, shard)
    assert any(note in text for text in raised.value.__notes__)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss": models.vector_loss}, r"shape \(2,\)"),
        ({"loss": models.number_loss}, "the loss is a float"),
        ({"loss": models.detached_loss}, "no trainable parameter"),
        ({"loss": models.accuracy}, "no trainable parameter"),
        ({"dataset": models.Sentences}, "a dict with keys inputs, labels; use step="),
        ({"dataset": "tests.unit.coordinator.compute.test_gradient:triples"}, "list of 3 items"),
        ({"model": "tests.unit.coordinator.compute.test_gradient:SparseNet"}, "sparse=False"),
        ({"model": "tests.unit.coordinator.compute.test_gradient:Growing"}, "buffer 'seen'"),
    ],
)
def test_what_cannot_be_used_is_explained(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Bench(models.mlp(metrics=None, **changes)).compute()


def triples() -> TensorDataset:
    return TensorDataset(torch.zeros(8, models.FEATURES), torch.zeros(8), torch.zeros(8))


class SparseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, models.CLASSES, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.embed(inputs[:, 0].long().clamp(0, 9))
        return outputs


class Growing(models.Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.seen: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, inputs[0]])
        return super().forward(inputs)


def test_after_an_error_the_replica_serves_the_next_shard() -> None:
    bench = Bench(
        models.mlp(dataset=partial(models.Raising, at=int(Bench(models.mlp()).plan.indices(0, 0)[0])))
    )
    with pytest.raises(OSError, match="cannot read"):
        bench.compute(0, 0)
    assert_equal(bench.compute(0, 1), Bench(models.mlp()).compute(0, 1))


def test_a_buffer_that_changed_its_shape_is_put_back() -> None:
    bench = Bench(models.mlp(model="tests.unit.coordinator.compute.test_gradient:Growing"))
    for _ in range(2):
        with pytest.raises(InvalidInput, match="keep its layout"):
            bench.compute()


def test_batchnorm_on_a_single_example_is_explained() -> None:
    bench = Bench(
        models.mlp(model="tests.unit.coordinator.compute.test_gradient:Normed"),
        TrainingConfig(batch_size=2, shards=2),
    )
    with pytest.raises(InvalidInput, match="BatchNorm cannot train on a shard of one example"):
        bench.compute()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(models.FEATURES)
        self.layer = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(self.norm(inputs))
        return outputs


def test_a_shard_without_examples_is_refused() -> None:
    bench = Bench(models.mlp())
    with pytest.raises(InvalidInput, match="no examples"):
        compute(bench.replica, bench.recipe, CONFIG, bench.dataset, [], 0, 0)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: 3, "returned a int"),
        (lambda: nn.LazyLinear(3), "lazy module"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
    ],
)
def test_models_that_cannot_be_laid_out(model: Callable[[], Any], text: str) -> None:
    recipe = resolved(models.mlp())
    object.__setattr__(recipe, "model", model)
    with pytest.raises(InvalidInput, match=text):
        Replica.build(recipe, CONFIG)


def test_a_version_of_another_model_is_refused() -> None:
    bench, other = Bench(models.mlp()), Bench(models.cnn())
    with pytest.raises(ManifestMismatch, match="bytes"):
        bench.replica.load(other.replica.pack())
    with pytest.raises(ManifestMismatch):
        bench.replica.load_tensors(other.replica.state_tensors())


@pytest.mark.parametrize("made", [3, iter([1])])
def test_datasets_must_be_map_style(made: Any) -> None:
    recipe = resolved(models.mlp())
    object.__setattr__(recipe, "dataset", lambda: made)
    with pytest.raises(InvalidInput, match="map-style"):
        open_dataset(recipe, CONFIG)
    with pytest.raises(InvalidInput, match="no evaluation"):
        open_dataset(resolved(models.cnn()), CONFIG, "evaluation")


def test_datasets_are_made_alike_in_every_process() -> None:
    recipe = resolved(models.mlp())
    object.__setattr__(
        recipe, "dataset", lambda: TensorDataset(torch.rand(3), torch.as_tensor(np.random.rand(3)))
    )
    torch.manual_seed(1), np.random.seed(1)
    one = open_dataset(recipe, CONFIG)
    torch.manual_seed(2), np.random.seed(2)
    other = open_dataset(recipe, CONFIG)
    assert all(same(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


# --- the run as a whole -----------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_clients_gives_the_same_bits(name: str) -> None:
    config = TrainingConfig(epochs=2, batch_size=8, shards=3, seed=1)
    results = [run(RECIPES[name](size=22), config, clients=clients) for clients in (1, 2, 3)]
    assert results[0].bits == results[1].bits == results[2].bits
    assert results[0].losses == results[1].losses == results[2].losses
    assert results[0].losses[-1] < results[0].losses[0] or name != "mlp"


def test_shards_agree_with_one_large_batch() -> None:
    """Up to rounding: 1e-5 relative after 15 steps, for a model without dropout or BatchNorm."""
    recipe = models.mlp(
        size=41, model=partial(models.Mlp, dropout=0.0), optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    one, many = (
        run(recipe, TrainingConfig(epochs=3, batch_size=9, shards=shards, clip_norm=0.5)) for shards in (1, 4)
    )
    for name, tensor in one.trainer.replica.state_tensors().items():
        torch.testing.assert_close(many.trainer.replica.state_tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert many.losses == pytest.approx(one.losses, rel=1e-5)


# --- versions without a copy --------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_an_attached_version_gives_the_bytes_of_a_loaded_one(name: str) -> None:
    bench = Bench(RECIPES[name]())
    version = bench.replica.pack()
    bench.replica.load(version)
    loaded, kept = bench.compute(), version.clone()
    bench.replica.attach(version)
    assert_equal(bench.compute(), loaded)
    assert not bench.replica.spoilt() and same(version, kept)


def test_attaching_copies_nothing_and_owning_lets_the_version_alone() -> None:
    bench = Bench(models.mlp(size=8))
    version = bench.replica.pack()
    kept = version.clone()
    bench.replica.attach(version)
    first = next(iter(bench.replica.parameters.values()))
    assert first.data_ptr() == version.data_ptr()
    bench.replica.own()
    with torch.no_grad():
        first.add_(1.0)
    assert same(version, kept) and not bench.replica.spoilt()


def test_a_model_that_writes_to_its_parameters_is_attached_once_and_copied_from_then_on() -> None:
    bench = Bench(models.mlp(size=8))
    version = bench.replica.pack()
    kept = version.clone()
    bench.replica.attach(version)
    first = next(iter(bench.replica.parameters.values()))
    with torch.no_grad():
        first.add_(1.0)
    assert bench.replica.spoilt()
    bench.replica.attach(kept)
    assert first.data_ptr() != kept.data_ptr() and same(bench.replica.pack(), kept)


# --- what a forward writes --------------------------------------------------------------------------


class Meaned(nn.Module):
    """A running mean of the inputs: in a buffer, or as in Keras in a parameter that is not trained."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(models.FEATURES, models.CLASSES)
        mean = torch.zeros(models.FEATURES)
        if buffer:
            self.register_buffer("mean", mean)
        else:
            self.mean = nn.Parameter(mean, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(inputs.mean(0), alpha=0.1)
        outputs: Tensor = self.layer(inputs - self.mean)
        return outputs


@pytest.mark.parametrize("attached", [False, True])
def test_a_frozen_parameter_that_a_forward_writes_is_a_buffer(
    attached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attached:
        monkeypatch.setattr(Replica, "load", Replica.attach)
    config = TrainingConfig(epochs=2, batch_size=8, shards=3, seed=3)
    found = {}
    for buffer in (True, False):
        given = resolved(models.mlp(model=partial(Meaned, buffer=buffer), buffers={"mean": "mean"}))
        ours = InProcess(given, config, clients=2).train()
        assert not any(replica.spoilt() for replica in ours.replicas)
        found[buffer] = {name: value.clone() for name, value in ours.trainer.replica.state_tensors().items()}
    assert found[True].keys() == found[False].keys() and found[True]["mean"].abs().sum() > 0
    assert all(torch.equal(value, found[False][name]) for name, value in found[True].items())
