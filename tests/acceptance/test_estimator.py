"""An `Estimator` is scikit-learn's kind of thing: arrays go in, and its tools take it as one of theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import models
from tests.support.reference import large_batch
from torchord import Estimator, LocalCluster, Master, Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput

SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)


def plain(bias: bool = True) -> torch.nn.Module:
    return torch.nn.Linear(models.FEATURES, models.CLASSES, bias)


def test_arguments_are_those_of_scikit_learns_habits() -> None:
    one = Estimator(partial(plain, bias=False), optimizer=SGD, epochs=3)
    found = one.get_params()
    assert found["epochs"] == 3 and found["optimizer__lr"] == 0.5 and found["model__bias"] is False
    assert one.get_params(deep=False)["optimizer"] is SGD
    one.set_params(epochs=4, optimizer__lr=0.25)
    assert one.epochs == 4 and one.optimizer.keywords == {"lr": 0.25, "momentum": 0.9}
    assert SGD.keywords["lr"] == 0.5
    with pytest.raises(InvalidInput, match="no argument 'epoch'; it has model, optimizer"):
        one.set_params(epoch=4)
    for ask in (one.predict, one.predict_proba):
        with pytest.raises(InvalidInput, match="call fit"):
            ask([[0.0] * models.FEATURES])
    with pytest.raises(InvalidInput, match="X has 2 samples and y 1"):
        one.fit([[0.0], [1.0]], [1])
    with pytest.raises(InvalidInput, match="X must be numbers"):
        one.fit([["a"]], [1])


@pytest.mark.slow
def test_it_learns_classes_and_values_and_is_searched(cluster: Callable[..., LocalCluster]) -> None:
    made = cluster(1, env={"TORCHORD_ALLOWED_MODULES": "tests,torch"})
    inputs, targets = models.points(120).tensors
    X, names = inputs.numpy(), np.array(["one", "three", "two"])
    y = names[targets.numpy()]
    one = Estimator(plain, optimizer=SGD, epochs=8, batch_size=40, shards=2, url=made.url, timeout=120)
    assert one.fit(X, y) is one
    assert one.classes_.tolist() == ["one", "three", "two"]
    assert one.score(X, y) > 0.9 and set(one.predict(X)) <= set(names)
    assert one.predict_proba(X[:5]).sum(1) == pytest.approx(np.ones(5))

    recipe = Recipe(
        model=plain,
        dataset=partial(models.points, size=120),
        loss=torch.nn.functional.cross_entropy,
        optimizer=SGD,
    )
    expected = large_batch(recipe, TrainingConfig(epochs=8, batch_size=40, shards=2)).module.state_dict()
    for name, value in one.module_.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)

    values = models.curve(120).tensors[1].squeeze(1).numpy()
    line: Any = partial(torch.nn.Linear, models.FEATURES, 1)
    two = Estimator(line, optimizer=partial(torch.optim.Adam, lr=0.1), epochs=12, url=made.url, timeout=120)
    assert two.fit(X, values).predict(X).shape == values.shape
    assert two.score(X, values) > 0.6
    with pytest.raises(InvalidInput, match="has no probabilities"):
        two.predict_proba(X)

    search = pytest.importorskip("sklearn.model_selection")
    once = search.ShuffleSplit(1, random_state=0)
    found = search.GridSearchCV(one, {"optimizer__lr": [1e-6, 0.5]}, cv=once, refit=False).fit(X, y)
    assert found.best_params_ == {"optimizer__lr": 0.5} and found.best_score_ > 0.8
    for info in Master(made.url).datasets.list():
        Master(made.url).datasets.delete(info.name)
