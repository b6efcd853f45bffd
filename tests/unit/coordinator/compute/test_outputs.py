from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.recipes_measured import Cache, Named, ReaderOutput
from torchord.cache.errors import InvalidInput
from torchord.cache.tensors import tree
from torchord.coordinator.compute.outputs import Outputs, joined, plain, restored, rows


def travelled(value: Any) -> Any:
    """An output as whoever asked for it gets it."""
    return restored(tree.unflatten(*tree.flatten(plain(value))))


def test_an_object_arrives_with_its_fields_and_without_what_cannot_travel() -> None:
    found = travelled(ReaderOutput(torch.ones(2, 3), (torch.zeros(2),), Cache()))
    assert isinstance(found, Outputs) and found.left_out == ("cache",)
    assert found.logits is found["logits"] is found[0] and found.logits.tolist() == [[1.0] * 3] * 2
    assert type(found.hidden) is tuple and found.loss is None
    with pytest.raises(AttributeError, match="'cache' cannot travel and was left out"):
        _ = found.cache


def test_a_named_tuple_and_a_model_output_are_objects_too() -> None:
    assert travelled([Named(torch.ones(1), 3)])[0].count == 3
    outputs = pytest.importorskip("transformers.modeling_outputs")
    found = travelled(outputs.CausalLMOutput(logits=torch.ones(2, 1)))
    assert found.logits.shape == (2, 1) and list(found) == ["logits"]


def test_plain_dicts_stay_dicts() -> None:
    assert type(travelled({"a": 1, "b": [2.5, None]})) is dict


def test_parts_are_joined_in_order() -> None:
    parts = [{"x": torch.full((n, 2), float(n)), "n": torch.tensor(n), "none": None} for n in (2, 1)]
    found = joined(parts)
    assert (
        found["x"][:, 0].tolist() == [2.0, 2.0, 1.0]
        and found["n"].tolist() == [2, 1]
        and found["none"] is None
    )


def test_ragged_parts_become_a_list_of_rows() -> None:
    found = joined([torch.zeros(2, 3), torch.ones(1, 5)])
    assert [tuple(row.shape) for row in found] == [(3,), (3,), (5,)]


def test_objects_are_joined_field_by_field() -> None:
    made = travelled(ReaderOutput(torch.ones(2, 3), (torch.zeros(2),), Cache()))
    found = joined([made, made])
    assert found.logits.shape == (4, 3) and found.hidden[0].shape == (4,) and found.left_out == ("cache",)


def test_mappings_are_cut_into_rows() -> None:
    given = {"ids": torch.arange(5), "more": [torch.arange(10).view(5, 2)]}
    cut = rows(given, 2)
    assert cut is not None
    batches = list(cut)
    assert [batch["ids"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches[2]["more"][0].tolist() == [[8, 9]]


def test_a_tokenizers_encoding_is_cut_into_rows() -> None:
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": torch.ones(3, 2)})
    cut = rows(encoding, 2)
    assert cut is not None and [batch["input_ids"].shape[0] for batch in cut] == [2, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.tensor(1.0), "0-d tensor"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, "got a: 2, b: 3; give a list or a Dataset"),
        ({}, "got no tensors"),
        ({"a": [[1, 2], [3]]}, r"'a\.0\.0' is a int; ask the tokenizer for tensors"),
    ],
)
def test_what_has_no_rows_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        rows(given, 2)


def test_samples_are_no_rows() -> None:
    assert rows([torch.ones(2)], 2) is None
