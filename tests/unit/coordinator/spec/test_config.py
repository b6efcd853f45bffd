from __future__ import annotations

import inspect
import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from torchord.cache.errors import ConfigError
from torchord.coordinator.spec.config import TrainingConfig


def test_defaults_are_valid_and_travel_as_json() -> None:
    config = TrainingConfig(clip_norm=1, seed=7, evaluate_every=3)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.clip_norm == 1.0 and isinstance(config.clip_norm, float)


def test_fields_left_out_of_json_take_their_defaults() -> None:
    assert TrainingConfig.from_json({"epochs": 2}) == TrainingConfig(epochs=2, audit_fraction=0)


def test_a_config_from_before_there_were_checks_has_none() -> None:
    """The plan of a run that is under way stays what it is; what is submitted now has checks."""
    written = TrainingConfig().to_json()
    assert TrainingConfig.from_json(written).audit_fraction == TrainingConfig().audit_fraction > 0
    del written["audit_fraction"]
    assert TrainingConfig.from_json(written).audit_fraction == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("epochs", "batch_size", "shards", "threads")
            for value in (0, -1, 1.0, True)
        ),
        *(
            (name, value)
            for name in ("checkpoint_every", "keep_checkpoints", "max_attempts")
            for value in (0, "3")
        ),
        ("evaluate_every", 0),
        ("evaluate_every", False),
        ("epochs", None),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("clip_norm", 0),
        ("clip_norm", -1.0),
        ("clip_norm", float("nan")),
        ("clip_norm", float("inf")),
        ("clip_norm", True),
        ("clip_norm", "1"),
        ("shard_timeout_seconds", 0),
        ("precision", "fp8"),
        ("loss_scale", 0),
        ("loss_scale", None),
        ("loss_scale_interval", 0),
        ("memory_format", "channels_first"),
        ("compile", 1),
        ("hardware", "x86"),
        ("hardware", None),
        ("shuffle", 0),
        ("drop_last", "yes"),
        ("precision", "double"),
        ("precision", None),
        ("nonfinite", "ignore"),
        ("skew", "maybe"),
        ("deterministic", 1),
        *(("audit_fraction", value) for value in (-0.1, 1.5, float("nan"), True, "0.1", None)),
        ("local_steps", 0),
        ("staleness", -1),
        ("compression", "zip"),
        ("compression", "topk:2"),
        ("parameter_compression", "int9"),
        ("parameter_compression", "topk:2"),
        ("compression", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        TrainingConfig(**{name: value})
    assert name in str(refused.value)
    assert repr(value) in str(refused.value)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    "compression", ["none", "fp16", "int8", "topk:0.01", "powersgd:2", "my_codecs:Sign:0.5"]
)
def test_a_known_codec_or_an_import_path_is_taken(compression: str) -> None:
    config = TrainingConfig(local_steps=4, staleness=2, compression=compression)
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("field", "value"), [("compile", True), ("skew", "admit"), ("deterministic", False)])
def test_portable_hardware_goes_with_nothing_that_gives_bits_up(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"hardware='portable' .*{field}={value!r}"):
        TrainingConfig(hardware="portable", **{field: value})
    assert TrainingConfig(hardware="portable").hardware == "portable"
    assert TrainingConfig.from_json({}).hardware == "native"


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainingConfig.from_json({"learning_rate": 0.1})


def test_differences_name_the_fields_in_order() -> None:
    ours, theirs = TrainingConfig(), TrainingConfig(seed=3, batch_size=8)
    assert ours.differences(ours) == []
    assert ours.differences(theirs) == ["batch_size: 256 here, 8 there", "seed: 0 here, 3 there"]


def test_frozen_and_keyword_only() -> None:
    config = TrainingConfig()
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainingConfig(5)  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    documented = inspect.getdoc(TrainingConfig) or ""
    for field in fields(TrainingConfig):
        assert f"\n    {field.name}: " in documented


def test_numpy_integers_are_integers() -> None:
    import numpy as np

    assert type(TrainingConfig(epochs=np.int64(3)).epochs) is int
