"""Buffers that are no running statistics: a plain loop's, by a rule, or refused by name at the first step.

Each model is compared with a plain loop over the same global batches (`tests.support.stepping.plainly`), in
the server's own sum and in a tree of partial sums, with ragged last batches.
"""

from __future__ import annotations

import enum
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import models
from tests.support.inprocess import resolved, same
from tests.support.stepping import Stepping, plainly
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, RecipeError
from torchord.coordinator.compute.buffer_rules import AGREE, RuledBuffers, contributions, rules_of
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.sums import Accumulator, PartialSum
from torchord.coordinator.spec.buffer_entries import require_apart
from torchord.coordinator.spec.resolving import resolve

FLAT = TrainingConfig(epochs=1, batch_size=12, shards=3, seed=3)  # 40 examples: the last step has 4
TREE = TrainingConfig(epochs=1, batch_size=12, shards=6, fan_in=2, seed=3)
LOCAL = TrainingConfig(epochs=1, batch_size=6, shards=2, local_steps=2, seed=3)


def recipe(model: Any, **changes: Any) -> Recipe:
    """Plain SGD, so that weights are a plain loop's but for rounding."""
    return models.mlp(model=model, optimizer=partial(torch.optim.SGD, lr=0.1), **changes)


# --- models -----------------------------------------------------------------------------


class Base(nn.Module):
    """A linear layer, and what is remembered of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.remember(x)
        found: Tensor = self.inner(x)
        return found

    def remember(self, x: Tensor) -> None:
        raise NotImplementedError


class Queue(Base):
    """MoCo's: the newest keys, of norm 1, in a ring, and where the next goes."""

    def __init__(self, size: int = 40) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(size, models.FEATURES))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def remember(self, x: Tensor) -> None:
        place, size = int(self.pointer), len(self.queue)
        rows = [(place + row) % size for row in range(len(x))]
        self.queue[rows] = F.normalize(x, dim=1)
        self.pointer[0] = (place + len(x)) % size


def append(old: Tensor, values: list[Tensor], examples: list[int]) -> Tensor:
    """A rule for rings: each shard's new rows behind those of the shards before; rows are never alike."""
    new = [value[(value != old).any(1)] for value in values]
    assert [len(rows) for rows in new] == examples
    first = min(int((value != old).any(1).nonzero()[0]) for value in values)
    rows = torch.cat(new)
    made = old.clone()
    made[[(first + row) % len(old) for row in range(len(rows))]] = rows
    return made


def forward_by(old: Tensor, values: list[Tensor], examples: list[int], size: int = 40) -> Tensor:
    """A rule for a ring's pointer."""
    return (old + sum(examples)) % size


class Seen(Base):
    """How many examples there were, how often each class, and which signs: integers, floats and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("examples", torch.tensor(0))
        self.register_buffer("use", torch.zeros(models.FEATURES))
        self.register_buffer("large", torch.zeros(models.FEATURES, dtype=torch.bool))

    def remember(self, x: Tensor) -> None:
        self.examples += len(x)
        self.use += (x.abs() > 1).sum(0)
        self.large |= (x > 2).any(0)


class Codebook(Base):
    """VQ-VAE's: centres that follow the inputs nearest to them, in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 4)[:, None].expand(4, models.FEATURES).clone()
        self.centres = nn.Parameter(start, requires_grad=False)

    def remember(self, x: Tensor) -> None:
        nearest = torch.cdist(x, self.centres).argmin(1)
        for centre in nearest.unique():
            self.centres[centre].lerp_(x[nearest == centre].mean(0), 0.1)


class Average(Base):
    """A running mean by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(models.FEATURES), persistent=False)

    def remember(self, x: Tensor) -> None:
        self.centre = self.centre.lerp(x.mean(0), 0.1)


class Largest(Base):
    """A running maximum, such as an observer's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("max_val", torch.zeros(models.FEATURES))

    def remember(self, x: Tensor) -> None:
        self.max_val.copy_(self.max_val.maximum(x.amax(0)))


def largest(old: Tensor, values: list[Tensor], examples: list[int]) -> Tensor:
    """A rule for running maxima."""
    return torch.stack(values).amax(0)


class Steps(Base):
    """Counts steps, warms a factor up, and keeps a flag: no batch enters them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("factor", torch.tensor(0.5))
        self.register_buffer("begun", torch.tensor(False))

    def remember(self, x: Tensor) -> None:
        self.steps += 1
        self.factor = self.factor.lerp(torch.tensor(1.0), 0.1)
        self.begun.fill_(True)


class Spectral(nn.Module):
    """Spectral norm, by parametrization or by the older hook."""

    def __init__(self, older: bool) -> None:
        super().__init__()
        norm = nn.utils.spectral_norm if older else nn.utils.parametrizations.spectral_norm
        self.one = norm(nn.Linear(models.FEATURES, 8))
        self.two = nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(torch.tanh(self.one(x)))
        return found


class Sequences(nn.Module):
    """An InstanceNorm that tracks: the mean over instances of what each has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
        self.out = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.norm(x.unflatten(1, (2, -1))).flatten(1))
        return found


class Own(Base):
    """A normalisation of somebody's own, by the names that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(models.FEATURES))
        self.moving_variance = nn.Parameter(torch.ones(models.FEATURES), requires_grad=False)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def remember(self, x: Tensor) -> None:
        self.running_mean.lerp_(x.mean(0), 0.1)
        self.moving_variance.lerp_((x**2).mean(0), 0.1)
        self.num_batches_tracked += 1


# --- what is a plain loop's -------------------------------------------------------------


class Word(enum.StrEnum):
    """A rule may be any string."""

    SUM = "sum"


EQUAL = {
    "no batch enters": (Steps, {}),
    "spectral norm": (partial(Spectral, older=False), {}),
    "spectral norm, older": (partial(Spectral, older=True), {}),
    "instance norm": (Sequences, {}),
    "known names": (Own, {}),
    "sums": (Seen, {"examples": "sum", "use": "sum", "large": Word.SUM}),
    "sums by a pattern": (Seen, {"*": "sum"}),
    "mean": (Average, {"centre": "mean"}),
}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("config", [FLAT, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize("name", EQUAL)
def test_buffers_are_a_plain_loops(name: str, config: TrainingConfig) -> None:
    model, rules = EQUAL[name]
    given = recipe(model, buffers=rules)
    assert_equal(Stepping(given, config).train().state, plainly(given, config))


def test_a_running_maximum_by_a_function_of_all_shards_values() -> None:
    given = recipe(Largest, buffers={"max_*": largest})
    assert_equal(Stepping(given, FLAT).train().state, plainly(given, FLAT))


def test_a_queue_by_functions_of_all_shards_values() -> None:
    given = recipe(Queue, buffers={"queue": append, "pointer": partial(forward_by, size=40)})
    found = Stepping(given, FLAT).train().state
    assert_equal(found, plainly(given, FLAT))
    norms = found["queue"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("model", [Queue, Seen, Codebook, Average])
def test_one_shard_needs_no_rule(model: Any) -> None:
    config = TrainingConfig(epochs=1, batch_size=12, shards=1, seed=3)
    given = recipe(model)
    assert_equal(Stepping(given, config).train().state, plainly(given, config))


def test_the_first_shards_value() -> None:
    run = Stepping(recipe(Queue, buffers={"queue": "shard0", "pointer": "shard0"}), FLAT)
    data = run.dataset.tensors[0]
    run.train(2)
    for place, (step, shard) in enumerate([(0, 0), (1, 0)]):
        keys = F.normalize(data[run.plan.indices(step, shard).tolist()], dim=1)
        assert same(run.state["queue"][4 * place : 4 * place + 4], keys)
    assert run.state["pointer"].item() == 8


@pytest.mark.parametrize(
    "model", [partial(Spectral, older=False), Steps, models.Cnn], ids=["spectral", "steps", "cnn"]
)
def test_local_steps(model: Any) -> None:
    """Shards go apart in a round, and what no batch enters is the first shard's, or agreed on."""
    images = {"dataset": partial(models.Images, size=24)} if model is models.Cnn else {}
    rules = {"factor": "shard0"} if model is Steps else {}
    before = Stepping(recipe(model, buffers=rules, **images), LOCAL)
    found = before.train(1).state
    if model is Steps:
        assert found["steps"].item() == 2
    if isinstance(model, partial):
        assert found["one.parametrizations.weight.0._u"].norm().item() == pytest.approx(1, abs=1e-6)


# --- what is refused --------------------------------------------------------------------

REFUSED = {"queue": Queue, "counts": Seen, "codebook": Codebook, "average": Average}
FIRST = {"queue": "queue", "counts": "examples", "codebook": "centres", "average": "centre"}


@pytest.mark.parametrize("config", [FLAT, LOCAL], ids=["plain", "local steps"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_first_shard_of_the_first_step_asks_for_a_rule(name: str, config: TrainingConfig) -> None:
    """Also where the shards agree: each of three equal shards moves a pointer by its own share alone."""
    run = Stepping(recipe(REFUSED[name]), config)
    run.replica.load(run.trainer.replica.pack())
    with pytest.raises(InvalidInput) as met:
        run.work(0, 0)
    told = str(met.value)
    assert FIRST[name] in told or "pointer" in told or "use" in told
    assert all(way in told for way in ("buffers=", "'shard0'", "'mean'", "'sum'", "function", "shards=1"))


def test_a_model_that_takes_one_size_of_batch_is_not_tried_and_its_shards_are_compared() -> None:
    run = Stepping(recipe(FixedSize), FLAT)
    with pytest.raises(InvalidInput, match=r"changes 'centre' .* rule"):
        run.step(0)


class FixedSize(Average):
    """Refuses any batch but one of four."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("four examples, please")
        return super().forward(x)


def values(*numbers: float, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [{"b": torch.tensor([number], dtype=dtype)} for number in numbers]


def summed(shards: list[dict[str, Tensor]], rules: dict[str, Any], old: Tensor, tree: bool) -> Tensor:
    held = {"b": old}
    if not tree:
        total = Accumulator(held, len(shards), rules)
        for shard in shards:
            total.add({}, shard, 1)
        return total.result().buffers["b"]
    whole = PartialSum(len(shards), rules)
    for half in (shards[: len(shards) // 2], shards[len(shards) // 2 :]):
        part = PartialSum(len(shards), rules)
        for shard in half:
            part.add_shard({}, shard, 1)
        whole.add(part.result())
    return whole.average(held).buffers["b"]


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_shards_must_agree(dtype: torch.dtype, tree: bool) -> None:
    old, agree = torch.zeros(1, dtype=dtype), {"b": AGREE}
    assert same(summed(values(1, 1, 1, 1, dtype=dtype), agree, old, tree), torch.ones(1, dtype=dtype))
    differing = values(1, 1, 1, 1, dtype=dtype)
    differing[2] = {"b": torch.tensor([0 if dtype is torch.bool else 2], dtype=dtype)}
    with pytest.raises(InvalidInput, match="changes 'b'"):
        summed(differing, agree, old, tree)


@pytest.mark.parametrize("tree", [False, True])
def test_shards_that_leave_a_buffer_alone(tree: bool) -> None:
    """An integer is what those say that changed it; a number with a point must be changed by all."""
    some: list[dict[str, Tensor]] = [{}, *values(1, dtype=torch.int64), {}, *values(1, dtype=torch.int64)]
    assert summed(some, {"b": AGREE}, torch.tensor([0]), tree).item() == 1
    with pytest.raises(InvalidInput, match="changes 'b'"):
        summed([{}, *values(1.0), {}, *values(1.0)], {"b": AGREE}, torch.tensor([0.0]), tree)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(
    ("dtype", "old", "left", "new"),
    [
        (torch.int64, 5, (6, 8, 5, 7), 11),
        (torch.uint8, 250, (251, 255, 250, 250), 0),
        (torch.float32, 0.5, (1.5, 0.5, 0.25, 2.5), 3.25),
        (torch.bfloat16, 0.5, (1.5, 0.5, 0.25, 2.5), 3.25),
        (torch.bool, False, (False, True, True, False), True),
        (torch.bool, True, (True, False, True, True), False),
    ],
)
def test_a_sum_is_what_all_shards_added(
    dtype: torch.dtype, old: Any, left: tuple[Any, ...], new: Any, tree: bool
) -> None:
    before, rules = torch.tensor([old], dtype=dtype), {"b": "sum"}
    sent = [contributions(shard, {"b": before}, rules) for shard in values(*left, dtype=dtype)]
    assert same(summed(sent, rules, before, tree), torch.tensor([new], dtype=dtype))


def test_a_function_gets_the_old_value_where_a_shard_changed_nothing() -> None:
    def rule(old: Tensor, each: list[Tensor], examples: list[int]) -> Tensor:
        assert [value.item() for value in each] == [1.0, 9.0, 3.0] and examples == [1, 1, 1]
        return torch.stack(each).amax(0)

    shards = [*values(1.0), {}, *values(3.0)]
    assert summed(shards, {"b": rule}, torch.tensor([9.0]), tree=False).item() == 9.0
    for wrong in (None, torch.zeros(2), torch.zeros(1, dtype=torch.float64)):
        with pytest.raises(InvalidInput, match="rule of 'b' returned"):
            summed(shards, {"b": lambda *_, wrong=wrong: wrong}, torch.tensor([9.0]), tree=False)
    with pytest.raises(InvalidInput, match="fan_in"):
        RuledBuffers({"b": rule}, 4).add("b", torch.zeros(1), 1)


def test_rules_are_checked_at_submit_and_when_the_model_is_made() -> None:
    with pytest.raises(RecipeError, match="is 'first', but must be 'shard0', 'mean', 'sum'"):
        recipe(Queue, buffers={"queue": "first"})
    with pytest.raises(RecipeError, match="dict"):
        recipe(Queue, buffers="shard0")
    with pytest.raises(RecipeError, match="lambda"):
        recipe(Queue, buffers={"queue": lambda *_: None}).to_spec()
    given = recipe(Queue, buffers={"queue": append})
    with pytest.raises(RecipeError, match="set fan_in=6"):
        require_apart(given.buffers, TREE)
    require_apart(given.buffers, FLAT)
    require_apart({"queue": "sum"}, TREE)
    for rules, told in (
        ({"queu": "shard0"}, "'queu' fits no buffer.*pointer, queue"),
        ({"pointer": "mean"}, "no mean"),
        ({"q*": "sum", "*e": "mean"}, "several patterns"),
    ):
        with pytest.raises(InvalidInput, match=told):
            Replica.build(resolved(recipe(Queue, buffers=rules)), FLAT)
    both = {"queue": "shard0", "q*": "sum", "pointer": "shard0"}
    assert Replica.build(resolved(recipe(Queue, buffers=both)), FLAT).rules["queue"] == "shard0"


def test_a_recipe_travels_with_its_rules() -> None:
    given = recipe(Queue, buffers={"queue": append, "pointer": Word.SUM})
    spec = given.to_spec()
    assert spec["buffers"] == {
        "queue": {"target": f"{__name__}:append", "args": [], "kwargs": {}},
        "pointer": "sum",
    }
    assert Recipe.from_spec(spec).to_spec() == spec
    assert resolved(given).buffers == {"queue": append, "pointer": "sum"}


def test_a_run_of_before_there_were_rules_goes_on_as_it_began() -> None:
    spec = recipe(Average).to_spec()
    del spec["buffers"]
    made = resolve(spec, allowed=("*",))
    assert made.buffers is None
    assert Replica.build(made, FLAT).rules == {}
    assert Recipe.from_spec(spec).to_spec() == recipe(Average).to_spec()


def test_running_statistics_have_the_rule_of_before() -> None:
    """Mean of floating-point ones, the first of others: what digests of runs with BatchNorm rest on."""
    model = models.Cnn()
    rules = rules_of(model, {})
    assert {name.rpartition(".")[2]: rule for name, rule in rules.items()} == {
        "running_mean": "mean",
        "running_var": "mean",
        "num_batches_tracked": "shard0",
    }
