"""What a recipe's order gives, as a training server and a worker ask for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.support import models, recipes_data
from tests.support.inprocess import resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import RecipeError
from torchord.coordinator.compute import visiting
from torchord.coordinator.compute.visiting import Visiting, digest_of, visiting_of
from torchord.coordinator.spec.epochs import Visits

CONFIG = TrainingConfig(epochs=4, batch_size=8, shards=2, seed=1)
DATA = models.points(recipes_data.SIZE)


def asked(recipe: Recipe, recorded: Visits | None = None) -> Visiting:
    found = visiting_of(resolved(recipe), CONFIG, DATA, recorded)
    assert found is not None
    return found


def test_most_recipes_have_no_order_of_their_own() -> None:
    assert visiting_of(resolved(recipes_data.mlp()), CONFIG, DATA) is None


@pytest.mark.parametrize(
    "order",
    [recipes_data.Remembering, recipes_data.Told, recipes_data.easy_first, recipes_data.twice_the_first_half],
)
def test_an_epoch_is_the_same_whichever_were_asked_before(order: Any) -> None:
    recipe = recipes_data.mlp(order=order)
    straight = asked(recipe)
    expected = [straight(epoch).tolist() for epoch in range(4)]
    crooked = asked(recipe)
    assert [crooked(epoch).tolist() for epoch in (3, 1, 1, 2, 0)] == [expected[e] for e in (3, 1, 1, 2, 0)]
    assert len({tuple(epoch) for epoch in expected}) == 4


def test_a_worker_that_gets_another_order_says_so() -> None:
    recipe = recipes_data.mlp(order=recipes_data.easy_first)
    found = asked(recipe).survey()
    assert found.length == recipes_data.SIZE and len(found.digests) == 4
    asked(recipe, found)(2)
    other = replace(found, digests=(*found.digests[:2], "0123456789abcdef", found.digests[3]))
    with pytest.raises(RecipeError, match="another order of epoch 2 here than on the training server"):
        asked(recipe, other)(2)


def test_an_epoch_that_was_not_looked_at_before_is_looked_at_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visiting, "_LOOKED_AT", 10)
    recipe = recipes_data.mlp(order=recipes_data.shrinking)
    found = asked(recipe).survey()
    assert len(found.digests) == 1
    with pytest.raises(RecipeError, match="gives 40 indices in epoch 2 and 42 in epoch 0"):
        asked(recipe, found)(2)


def test_where_batches_are_cut_is_part_of_their_digest() -> None:
    found = asked(recipes_data.mlp(batches=partial(recipes_data.by_tokens, most=40)))._asked(0)
    joined = [found[0][:1], found[0][1:], *found[1:]]
    assert digest_of(found) != digest_of(joined)
