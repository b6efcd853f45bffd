"""Evaluations that are no means, and predictions from whatever people give: in order, the same anywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support import recipes_measured as measured
from tests.support import recipes_models
from tests.support.shuffle import EvaluatingPost, Shuffle
from torchord import Master, Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, RunFailed
from torchord.cache.ledger.records import StateRecord
from torchord.cache.settings import Settings
from torchord.coordinator.compute.outputs import Outputs
from torchord.coordinator.master.prediction import predict

CONFIG = TrainingConfig(batch_size=20, shards=4, seed=3)


class Laboratory(Shuffle):
    """A run whose Clients take parts of evaluations and predictions in turn."""

    POST = EvaluatingPost

    def train(self) -> Laboratory:
        """Deliver everything but evaluations to the end."""
        head = self.run._ledger.head
        while (
            (found := head()).total_steps is None or found.version < found.total_steps or self.post.callbacks
        ):
            self._in_order()
        return self

    def evaluate(self, clients: int, lose: Callable[[int], None] = lambda part: None) -> dict[str, float]:
        """Have every part that waits computed by so many Clients in turn; `lose` acts after each."""
        delivered = 0
        while self.post.parts:
            version, part, of = self.post.parts.pop(0)
            self.clients[delivered % clients].inference.evaluate(self.run.name, version, part, of)
            lose(delivered)
            delivered += 1
            while self.post.callbacks:
                self.post.callbacks -= 1
                self.server.advance(self.run.name)
        assert self.run.status().state == "done"
        (found,) = self.run.evaluations().values()
        return found

    def predict(self, inputs: Any, batch_size: int = 5) -> Any:
        """Have both Clients predict in turn."""
        return predict(
            self.server.services,
            self,  # type: ignore[arg-type]
            self.run._ledger,
            inputs,
            batch_size=batch_size,
            version=self.run._ledger.head().version,
            timeout_seconds=20,
            recipe=self.run._spec()["recipe"],
        )

    def send(self, task: str, kwargs: dict[str, Any], **_: Any) -> None:
        """What `predict` sends: a Client computes it at once."""
        self.clients[kwargs["part"] % 2].inference.predict(**kwargs)

    def advance(self, run: str, *, queue: str = "") -> None:
        """Nobody calls."""


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Callable[..., Laboratory]:
    """A function (recipe, name) -> a run that is submitted and not begun."""

    def make(recipe: Recipe, name: str = "measured", config: TrainingConfig = CONFIG) -> Laboratory:
        run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, config, name=name)
        return Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)

    return make


# --- evaluations --------------------------------------------------------------------------------------------

PAIRS = {
    "auroc": (measured.scores, measured.auroc_of),
    "mistakes": (measured.mistakes, measured.mistakes_of),
    "score": measured.Extremes,
    "hits": measured.hits,
}


def plainly(lab: Laboratory, recipe: Recipe) -> dict[str, float]:
    """The figures of all evaluation data at once, as a plain loop has them."""
    inputs, targets = measured.marks(61, seed=5).tensors
    with torch.no_grad():
        outputs: Tensor = lab.run.model()(inputs)
    counts = {f"mistakes.{name}": value for name, value in measured.mistakes(outputs, targets).items()}
    ends = {"score.low": float(outputs.min()), "score.high": float(outputs.max())}
    return {
        "auroc": float(measured.auroc(outputs, targets)),
        "hits": float(measured.hits(outputs, targets)),
        "loss": float(measured.mark_loss(outputs, targets)),
        **counts,
        **ends,
    }


def test_figures_are_those_of_all_data_at_once_on_any_fleet(start: Callable[..., Laboratory]) -> None:
    recipe = measured.marked(metrics=PAIRS)
    one, two = start(recipe, "one").train(), start(recipe, "two").train()
    found = one.evaluate(1)
    assert found == two.evaluate(2)
    assert found == pytest.approx(plainly(one, recipe), rel=1e-5)


def test_they_do_not_change_with_the_parts(start: Callable[..., Laboratory]) -> None:
    """Of one model: a learning rate of 0, and other sizes of shards."""
    still = measured.marked(metrics=PAIRS, optimizer=measured.standing_still)
    few = start(still, "few").train().evaluate(2)
    many = start(still, "many", TrainingConfig(batch_size=9, shards=3, seed=3)).train().evaluate(2)
    assert few == pytest.approx(many, rel=1e-5)


def test_what_a_part_kept_is_lost(start: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed again, and the figures are those of an evaluation that nothing happened to."""
    monkeypatch.setattr("torchord.cache.blobs.tiered_store.INLINE_NBYTES", 0)
    recipe = measured.marked(metrics=PAIRS)
    expected = start(recipe, "undisturbed").train().evaluate(2)
    lab = start(recipe, "losing").train()
    parts: list[int] = []

    def lose(delivered: int) -> None:
        parts.append(delivered)
        if delivered == 1:
            ledger = lab.run._ledger
            (version,) = ledger.pending_evaluations()
            _, values = ledger.write_part(version, 0, {}, parts=1)  # what is there: it is written once
            lab.server.services.evaluations.delete([StateRecord.from_dict(values[0]["states"])])

    of = len(lab.post.parts)
    assert lab.evaluate(2, lose) == expected
    assert len(parts) == of + 1


def test_nothing_of_an_evaluation_stays(
    start: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchord.cache.blobs.tiered_store.INLINE_NBYTES", 0)
    lab = start(measured.marked(metrics=PAIRS)).train()
    lab.evaluate(2)
    left = [key for key in lab.run._ledger.client.keys("*") if "evaluation:" in key]
    assert left == []


def test_metrics_of_a_step_through_predict(start: Callable[..., Laboratory]) -> None:
    recipe = measured.texts(predict=measured.first_logits, metrics={"first": measured.first_right})
    lab = start(recipe).train()
    found = lab.evaluate(2)
    batch = measured.padded([measured.Texts()[index] for index in range(12)])
    with torch.no_grad():
        outputs = measured.first_logits(lab.run.model(), batch)
    assert found["first"] == pytest.approx(float(measured.first_right(outputs, batch)))


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            {"own": measured.auroc},
            "metric 'own' is .* so it would change with batch_size and shards; give a pair",
        ),
        (
            {"own": measured.f1},
            "metric 'own' is .* so it would change with batch_size and shards; give a pair",
        ),
        ({"own": measured.pair_of_marks}, "metric 'own' returned a Tensor of shape"),
        ({"own": measured.LastBatch}, "merged from its parts"),
    ],
    ids=["auroc", "f1", "shape", "merging"],
)
def test_what_is_no_mean_ends_the_run_before_its_first_step(
    start: Callable[..., Laboratory], metrics: Any, said: str
) -> None:
    lab = start(measured.marked(metrics=metrics))
    with pytest.raises(InvalidInput, match=said):
        lab.train()
    status = lab.run.status()
    assert (status.state, status.version) == ("failed", 0)
    with pytest.raises(RunFailed, match=said):
        lab.run.wait(timeout=20)


# --- predictions --------------------------------------------------------------------------------------------


@pytest.fixture
def reader(start: Callable[..., Laboratory]) -> Laboratory:
    """A model that takes keywords, texts of several lengths, and returns an object."""
    return start(measured.texts()).train()


def alone(lab: Laboratory, text: dict[str, Tensor]) -> Tensor:
    """Logits of one text, (length, 11)."""
    with torch.no_grad():
        found: Tensor = lab.run.model()(text["input_ids"][None]).logits[0]
    return found


def test_samples_of_several_lengths_are_collated_as_in_training(reader: Laboratory) -> None:
    """Parts are padded to lengths of their own, so the outputs are a list, one for each text, in order."""
    data = measured.Texts()
    for given in (data, [data[index] for index in range(12)], (data[index] for index in range(12))):
        found = reader.predict(given)
        assert isinstance(found, Outputs) and found.left_out == ("cache",) and len(found.logits) == 12
        for index in range(12):
            expected = alone(reader, data[index])
            torch.testing.assert_close(found.logits[index][: len(expected)], expected)


def test_a_mapping_of_tensors_is_one_of_keywords(reader: Laboratory) -> None:
    batch = {"input_ids": torch.randint(1, 11, (12, 4), generator=measured.generator(7))}
    found = reader.predict(batch)
    with torch.no_grad():
        expected = reader.run.model()(batch["input_ids"]).logits
    torch.testing.assert_close(found["logits"], expected)
    torch.testing.assert_close(reader.predict(batch["input_ids"]).logits, expected)
    order = torch.arange(11, -1, -1)
    turned = reader.predict({"input_ids": batch["input_ids"][order]})
    torch.testing.assert_close(turned.logits, expected[order])


def test_predict_of_the_recipe_is_what_is_returned(start: Callable[..., Laboratory]) -> None:
    lab = start(measured.texts(predict=measured.named_outputs)).train()
    found = lab.predict(measured.Texts())
    assert found.last.shape == (12, 11) and found.count == [3, 3, 3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (DataLoader(measured.Texts()), "a DataLoader gives batches; give its dataset"),
        ("text", "got str"),
        (3, "got int"),
        ([{"input_ids": object()}], "sample 0 cannot travel to the workers"),
        ({"input_ids": torch.ones(2), "labels": torch.ones(3)}, "input_ids: 2, labels: 3"),
    ],
    ids=["loader", "str", "int", "object", "rows"],
)
def test_what_cannot_be_predicted_from_is_refused_by_name(reader: Laboratory, given: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        reader.predict(given)


def test_without_a_collate_ragged_samples_are_refused(start: Callable[..., Laboratory]) -> None:
    lab = start(measured.marked()).train()
    lab.evaluate(1)
    with pytest.raises(InvalidInput, match=r"these samples make no batch .* give the recipe a collate"):
        lab.predict([torch.ones(4), torch.ones(3)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="NOT TESTED, transformers is not installed (pip install '.[models]')",
)
def test_every_natural_form_for_a_hugging_face_model(start: Callable[..., Laboratory]) -> None:
    from transformers import BatchEncoding

    lab = start(recipes_models.hugging_face()).train()
    data = recipes_models.Texts(12)
    ids = torch.stack([data[index]["input_ids"] for index in range(12)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = lab.run.model()(ids).logits
    forms = [ids, batch, BatchEncoding(batch), data, [data[index] for index in range(12)]]
    for given in forms:
        found = lab.predict(given)
        assert "past_key_values" in found.left_out
        torch.testing.assert_close(found.logits, expected)
