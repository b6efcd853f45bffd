"""The pipeline ends with the bits of a plain loop in one process, however many workers it has.

Every recipe is trained by 1, 2 and 3 Clients and compared, byte for byte, with `tests.support.reference`,
which shares with the pipeline the plan of the examples and the seeds, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from typing import NamedTuple

import pytest
import torch

from tests.support import models, recipes_more, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.waiting import wait_until
from torchord import Recipe, TrainingConfig

WORKERS = (1, 2, 3)
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


class Case(NamedTuple):
    """A recipe, its config, and the loop that it is compared with."""

    recipe: Recipe
    config: TrainingConfig
    loop: Callable[[Recipe, TrainingConfig], reference.Reference]


def _config(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "shards": 4, "seed": 3, **changes})  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    # The three of the headline, against `(loss * n_k / N).backward()` in a loop.
    "mlp with dropout": Case(models.mlp(), _config(evaluate_every=4), reference.accumulate),
    "cnn with BatchNorm and augmentation": Case(models.cnn(32), _config(), reference.accumulate),
    "gpt with tied embeddings, AdamW, warm-up, clipping": Case(
        recipes_more.tied_gpt(size=32), _config(clip_norm=0.5), reference.accumulate
    ),
    # Shards of unlike sizes, against the weighted sum.
    "ragged last batch, uneven shards": Case(
        models.mlp(37), _config(batch_size=10, shards=3), reference.average
    ),
    "ragged last batch under BatchNorm": Case(
        models.cnn(29), _config(batch_size=12, shards=2), reference.average
    ),
    "dataset smaller than a batch": Case(
        models.mlp(5), _config(batch_size=64, epochs=6), reference.average
    ),
    "dataset smaller than the number of shards": Case(
        models.mlp(3), _config(shards=8, epochs=6), reference.average
    ),
    "one example": Case(models.mlp(1), _config(epochs=6), reference.average),
    # What a state can hold.
    "unused, frozen, integer, bool, non-persistent": Case(models.odd(), _config(), reference.average),
    "parameters that some shards do not reach": Case(
        models.mlp(
            model=models.Branching, optimizer=_SGD, loss_over="shard", evaluation=None, metrics=None
        ),
        _config(),
        reference.average,
    ),
    "BatchNorm that counts its batches": Case(
        recipes_more.cumulative_norm(), _config(epochs=3, shards=2), reference.average
    ),
    # Forms of a recipe.
    "step= instead of loss=": Case(
        models.mlp(step=models.classifier_step, loss=None, metrics=None), _config(), reference.accumulate
    ),
    "parameter groups": Case(
        models.mlp(parameter_groups=models.decay_groups), _config(clip_norm=0.1), reference.accumulate
    ),
    "samples by __getitems__, own collate": Case(
        models.mlp(dataset=models.Batched, collate=models.collate_doubled), _config(), reference.accumulate
    ),
    # Schedulers, precision, threads, steps left out.
    "scheduler that looks at the loss": Case(recipes_more.plateau(), _config(), reference.accumulate),
    "scheduler with a function": Case(
        models.mlp(scheduler=models.lambda_scheduler), _config(), reference.accumulate
    ),
    "bfloat16 autocast": Case(models.gpt(32), _config(precision="bf16"), reference.average),
    "float16 autocast, with overflows": Case(
        models.gpt(32),
        _config(precision="fp16", loss_scale_interval=2),
        reference.average,
    ),
    "two threads": Case(models.cnn(16), _config(threads=2), reference.accumulate),
    "a NaN that is skipped": Case(
        models.mlp(
            dataset=partial(models.poisoned, at=11),
            scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2),
            evaluation=None,
            metrics=None,
        ),
        _config(nonfinite="skip"),
        reference.average,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet for the module; each test sets the number of its Clients."""
    with fleet(tmp_path_factory.mktemp("exactness"), workers=1) as one:
        yield one


@cache
def expected(case: str) -> reference.Reference:
    """What the plain loop gives."""
    recipe, config, loop = CASES[case]
    return loop(recipe, config)


_evaluations: dict[str, dict[int, dict[str, float]]] = {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", WORKERS)
def test_the_bits_of_a_plain_loop(grown: Fleet, workers: int, case: str) -> None:
    grown.resize(workers)
    recipe, config, _ = CASES[case]
    run, trained = grown.train(recipe, config, f"case-{list(CASES).index(case)}-{workers}")
    plain = expected(case)
    assert reference.all_bits(trained.module) == reference.all_bits(plain.module)
    assert reference.bits(run.state_dict()) == plain.bits
    # The reports tell of the same training, up to the rounding of a sum of the shards' losses.
    losses = [report.loss for report in trained.history]
    assert losses == pytest.approx(plain.losses, rel=1e-12, nan_ok=True)
    assert [report.lr for report in trained.history] == plain.lrs
    assert [report.step for report in trained.history if report.skipped] == plain.skipped
    # Evaluations have the same bits, too, for any number of workers.
    assert trained.evaluations == _evaluations.setdefault(case, trained.evaluations)


def test_the_cases_are_what_they_say() -> None:
    """A comparison of two models that both stayed as they were would prove nothing."""
    for name, case in CASES.items():
        trained = expected(name)
        start = reference._parts(case.recipe, case.config)[0]
        assert reference.bits(start) != trained.bits, name
    skipped = expected("a NaN that is skipped")
    assert len(skipped.skipped) == 2 and len(skipped.losses) == 10
    odd = expected("unused, frozen, integer, bool, non-persistent").module
    assert "projection" in reference.all_bits(odd) and "projection" not in odd.state_dict()
    assert int(odd.get_buffer("calls")) == 10
    half = expected("float16 autocast, with overflows")
    assert half.skipped == [2, 5] and set(half.scales) == {2.0**16, 2.0**17}
    gpt = expected("gpt with tied embeddings, AdamW, warm-up, clipping").module
    assert gpt.get_parameter("embed.weight") is gpt.get_submodule("head").weight
    assert len(set(expected("scheduler that looks at the loss").lrs)) > 1


@pytest.mark.parametrize("workers", WORKERS)
def test_every_worker_takes_part(grown: Fleet, workers: int) -> None:
    grown.resize(workers)
    recipe, config = models.mlp(evaluation=None, metrics=None), _config(shards=8)
    bits, taken, tries = reference.accumulate(recipe, config).bits, set[str](), count()

    def all_took_part() -> bool:
        """One more run: a worker that the machine holds up may get none of its 80 short tasks."""
        run, trained = grown.train(recipe, config, f"shared-{workers}-{next(tries)}")
        shares = run.verify().workers
        assert sum(shares.values()) == 8 * 10
        assert reference.bits(trained.module) == bits
        taken.update(worker.partition("@")[0] for worker in shares)
        return taken == set(grown.clients)

    wait_until(all_took_part, message=lambda: f"all of {grown.clients}; at work were {taken}")
    assert len(taken) == workers


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_shards_together_are_one_large_batch(grown: Fleet, shards: int) -> None:
    """Stated tolerance: after 10 steps of SGD each weight is within 1e-6 absolute + 1e-5 relative.

    The sums of a batch are split over the shards, so that float32 rounds elsewhere; nothing else differs.
    """
    recipe = models.mlp(model=partial(models.Mlp, dropout=0.0), optimizer=_SGD)
    config = _config(shards=shards, clip_norm=0.5)
    _, trained = grown.train(recipe, config, f"large-{shards}")
    whole = reference.large_batch(recipe, config)
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(trained.module.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    assert [report.loss for report in trained.history] == pytest.approx(whole.losses, rel=1e-5)


def test_the_seed_decides(grown: Fleet) -> None:
    """Other seeds, other bits; the same seed, the same bits once more."""
    recipe, config = models.mlp(evaluation=None, metrics=None), _config(epochs=1)
    found = [
        reference.bits(grown.train(recipe, _config(epochs=1, seed=seed), name)[1].module)
        for name, seed in (("seed-3", 3), ("seed-4", 4), ("seed-3-again", 3))
    ]
    assert found[0] != found[1] and found[0] == found[2]
    assert found[0] == reference.accumulate(recipe, config).bits


def test_two_runs_at_once_keep_their_bits(grown: Fleet) -> None:
    """Both share the Clients step by step, and each ends with the bits that it has alone."""
    grown.resize(2)
    plain = models.mlp(evaluation=None, metrics=None)
    pictures = models.cnn(32)
    one, other = _config(epochs=4), _config(epochs=5)
    submit = grown.master.submit
    runs = [submit(plain, one, name="at-once-mlp"), submit(pictures, other, name="at-once-cnn")]
    wait_until(lambda: all(run.status().version > 0 for run in runs), message="both to make progress")
    trained = [finished(run) for run in runs]
    assert reference.bits(trained[0].module) == reference.accumulate(plain, one).bits
    assert reference.bits(trained[1].module) == reference.accumulate(pictures, other).bits
    spans = [[entry.committed_at for entry in run._ledger.entries()] for run in runs]
    assert spans[0][0] < spans[1][-1] and spans[1][0] < spans[0][-1], "one ran after the other"


def test_a_wrong_gradient_would_be_noticed() -> None:
    """The comparison itself: one weight off by its last bit is a difference, and so is -0.0 for 0.0."""
    recipe, config, _ = CASES["mlp with dropout"]
    module = reference.accumulate(recipe, config).module
    before = reference.bits(module)
    with torch.no_grad():
        weight = module.get_parameter("first.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert reference.bits(module) != before
    assert reference.bits({"x": torch.tensor([0.0])}) != reference.bits({"x": torch.tensor([-0.0])})
