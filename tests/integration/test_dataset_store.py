"""Training from stored datasets, end to end: the same bits, few bytes, clear failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support import models
from tests.support.fleet import WAIT_SECONDS, Fleet, finished, fleet
from tests.support.inprocess import same
from tests.support.stored import Noted
from torchord import Recipe, TrainingConfig, stored_dataset
from torchord.cache.errors import RunFailed

SIZE = 48
CONFIG = TrainingConfig(epochs=2, batch_size=16, shards=4, checkpoint_every=100)
SAMPLE_NBYTES = models.FEATURES * 4  # float32


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and two Clients, who find the data where their broker is."""
    with fleet(tmp_path_factory.mktemp("store"), workers=2) as started:
        yield started


def recipe(dataset: Any, **changes: Any) -> Recipe:
    return models.mlp(dataset=dataset, evaluation=None, metrics=None, **changes)


def test_a_stored_dataset_gives_the_same_bits_and_workers_fetch_what_they_need(
    two: Fleet, tmp_path: Path
) -> None:
    put = two.master.datasets.put("points", models.points(SIZE), chunk_nbytes=SAMPLE_NBYTES)
    inputs, labels = (column.data for column in two.master.datasets.open("points")._manifest.columns)
    assert (len(inputs), len(labels)) == (SIZE, SIZE // 3)  # 24 bytes a chunk: a sample, or three labels
    assert put.uploaded + put.reused == SIZE + SIZE // 3 + 1

    _, expected = two.train(recipe(partial(models.points, SIZE)), CONFIG, "in-process")
    once = replace(CONFIG, audit_fraction=0)  # checks would read samples in datasets of their own
    _, trained = two.train(recipe(partial(Noted, "points", str(tmp_path))), once, "stored")
    ours, theirs = trained.module.state_dict(), expected.module.state_dict()
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)

    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert set().union(*(note["indices"] for note in notes)) == set(range(SIZE))
    for note in notes:  # each chunk once, though every sample is read in both epochs
        needed = {inputs.chunk(index).address for index in note["indices"]}
        needed |= {labels.chunk(index // 3).address for index in note["indices"]}  # some are equal
        assert note["fetched"] == len(needed)
        assert note["nbytes"] == SAMPLE_NBYTES * note["fetched"]


def test_evaluation_and_prediction_read_stored_datasets(two: Fleet) -> None:
    data = models.points(20, seed=1)
    two.master.datasets.put("points", models.points(SIZE))
    two.master.datasets.put("points-test", data)
    config = TrainingConfig(epochs=1, batch_size=16, shards=4, evaluate_every=3)
    outcomes = []
    for name, evaluation in (
        ("evaluated-in-process", partial(models.points, size=20, seed=1)),
        ("evaluated-stored", partial(stored_dataset, name="points-test")),
    ):
        described = models.mlp(dataset=partial(stored_dataset, name="points"), evaluation=evaluation)
        run, trained = two.train(described, config, name)
        outcomes.append((trained.evaluations, run.predict(data.tensors[0])))
        if name == "evaluated-stored":
            inputs = two.master.datasets.put("inputs", data.tensors[0]) and two.master.datasets.open("inputs")
            assert same(run.predict(inputs, batch_size=8), run.predict(data.tensors[0], batch_size=8))
    assert outcomes[0][0] == outcomes[1][0] and outcomes[0][0]
    assert same(outcomes[0][1], outcomes[1][1])


def test_a_missing_dataset_fails_the_run_until_it_is_put(two: Fleet) -> None:
    run = two.master.submit(recipe(partial(stored_dataset, name="later")), CONFIG, name="too-early")
    with pytest.raises(RunFailed, match="no dataset 'later' in the cache"):
        run.wait(timeout=WAIT_SECONDS)
    two.master.datasets.put("later", models.points(SIZE))
    run.resume()
    finished(run)


def test_a_lost_chunk_fails_the_run_until_it_is_put_again(two: Fleet) -> None:
    data = models.points(SIZE, seed=5)
    datasets = two.master.datasets
    datasets.put("frail", data, chunk_nbytes=SAMPLE_NBYTES)
    lost = datasets.open("frail")._manifest.columns[0].data.chunk(7)
    with redis.Redis.from_url(two.cluster.url) as client:
        assert client.delete(f"torchord:chunk:{lost.address}:0") == 1
    run = two.master.submit(recipe(partial(stored_dataset, name="frail")), CONFIG, name="frail")
    with pytest.raises(RunFailed, match=rf"dataset 'frail' .*{lost.address}.* put the same data again"):
        run.wait(timeout=WAIT_SECONDS)
    assert datasets.put("frail", data).uploaded == 1
    run.resume()
    trained = finished(run)
    _, expected = two.train(recipe(partial(models.points, SIZE, 5)), CONFIG, "whole")
    ours, theirs = trained.module.state_dict(), expected.module.state_dict()
    assert all(same(ours[name], theirs[name]) for name in theirs)
