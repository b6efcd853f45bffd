"""Rules that end a run: what each says of a series of figures, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from torchord.cache.errors import ConfigError, RecipeError
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.stopping import (
    Keep,
    MaxSeconds,
    MaxSteps,
    NotFinite,
    Plateau,
    Rule,
    Threshold,
    Watch,
    over_evaluations,
    require_decidable,
    unread,
)

NAN = math.nan


def ends(rule: Rule, values: list[float], over: str = "evaluations") -> tuple[int, str] | None:
    """At which of a series a rule ends a run, from 1, and why."""
    watch = Watch([rule], over)
    for version, value in enumerate(values, 1):
        if (verdict := watch.see(version, {"loss": value})) is not None:
            return version, verdict.reason
    return None


@pytest.mark.parametrize(
    ("rule", "values", "end"),
    [
        (Plateau(patience=2), [3, 2, 2, 1, 1, 1], 6),
        (Plateau(patience=1), [3, 2, 1], None),
        (Plateau(patience=2, min_delta=0.5), [3, 2.6, 2.6, 2], 3),
        (Plateau(patience=2, min_delta=0.5), [3, 2.6, 2.4, 2.1, 2.0], 5),
        (Plateau(patience=2, mode="max"), [1, 2, 3, 3, 2], 5),
        (Plateau(patience=2), [NAN, 5, NAN, 4, NAN, NAN], 6),
        (Plateau(patience=2), [NAN, NAN, 1], 2),
        (Plateau(patience=2), [math.inf, 1, -math.inf, 0, 0], 5),
        (Threshold("loss", 1.0), [3, 2, 1, 0], 3),
        (Threshold("loss", 1.0, mode="max"), [NAN, 0, 1.5], 3),
        (NotFinite(), [1, 2, math.inf], 3),
        (NotFinite(), [1, 2], None),
    ],
    ids=str,
)
def test_where_a_rule_ends_a_series(rule: Rule, values: list[float], end: int | None) -> None:
    found = ends(rule, values)
    assert (found and found[0]) == end


def test_a_plateaus_reason_names_figure_count_and_best() -> None:
    found = ends(Plateau(patience=3, min_delta=0.001), [0.5, 0.213, 0.3, 0.2125, 0.4])
    assert found == (5, "eval loss has not improved by 0.001 in 3 evaluations; best 0.213 at version 2")
    assert ends(Plateau(patience=1, over="steps"), [1, 1], "steps") == (
        2,
        "step loss has not improved in 1 step; best 1 at version 1",
    )
    assert ends(Plateau(patience=1), [NAN]) == (
        1,
        "eval loss has not improved in 1 evaluation; there was no number",
    )


def test_the_verdict_at_a_version_is_a_function_of_the_evaluations_up_to_it() -> None:
    rules = [Plateau(patience=2)]
    figures = {2: {"loss": 1.0}, 4: {"loss": 1.0}, 6: {"loss": 1.0}, 8: {"loss": 0.0}}
    assert over_evaluations(rules, figures, 4) is None
    assert over_evaluations(rules, figures, 5) is None
    verdict = over_evaluations(rules, dict(reversed(figures.items())), 6)
    assert verdict is not None
    assert verdict.rule == "Plateau"
    assert over_evaluations(rules, figures, 8) is None


def test_the_first_rule_that_is_met_is_named() -> None:
    watch = Watch([Threshold("loss", 0.0), Threshold("loss", 5.0), NotFinite()], "evaluations")
    verdict = watch.see(1, {"loss": 3.0, "other": NAN})
    assert verdict is not None
    assert verdict.rule == "Threshold"


@pytest.mark.parametrize(
    ("keep", "figures", "best"),
    [
        (Keep(), {1: 3.0, 2: 1.0, 3: 2.0}, (2,)),
        (Keep(n=2), {1: 3.0, 2: 1.0, 3: 2.0}, (2, 3)),
        (Keep(mode="max"), {1: 3.0, 2: 3.0}, (1,)),
        (Keep(n=3), {1: NAN, 2: 1.0}, (2,)),
        (Keep(), {}, ()),
    ],
)
def test_the_best_versions(keep: Keep, figures: dict[int, float], best: tuple[int, ...]) -> None:
    assert keep.best({version: {"loss": value} for version, value in figures.items()}) == best


def test_a_config_carries_its_rules_as_json() -> None:
    rules = (Plateau("accuracy", patience=5, mode="max"), MaxSteps(9), MaxSeconds(1.5), NotFinite())
    config = TrainingConfig(stop_when=rules, keep=Keep("accuracy", "max", 2), evaluate_at_start=True)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainingConfig(stop_when=MaxSteps(9)) == TrainingConfig(
        stop_when=[{"rule": "MaxSteps", "steps": 9}]
    )
    assert TrainingConfig(keep="best").keep_rule == Keep()
    assert TrainingConfig(stop_when=None) == TrainingConfig()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop_when": "plateau"}, "stop_when takes Plateau, Threshold"),
        ({"stop_when": Plateau}, "Plateau is its class: call it"),
        ({"stop_when": [{"rule": "Plateau", "patients": 3}]}, "Plateau has no field patients"),
        ({"stop_when": [{"rule": "MaxSteps"}]}, "MaxSteps lacks a field"),
        ({"keep": "worst"}, "keep takes 'best'"),
        ({"keep": 3}, "keep takes 'best'"),
        ({"evaluate_at_start": 1}, "evaluate_at_start must be True or False"),
    ],
    ids=str,
)
def test_a_config_refuses_what_is_no_rule(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(**fields)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Plateau, {"patience": 0}),
        (Plateau, {"patience": True}),
        (Plateau, {"min_delta": -1}),
        (Plateau, {"min_delta": NAN}),
        (Plateau, {"mode": "least"}),
        (Plateau, {"over": "epochs"}),
        (Plateau, {"metric": ""}),
        (Threshold, {"value": math.inf}),
        (Threshold, {"value": "1"}),
        (MaxSteps, {"steps": 1.5}),
        (MaxSeconds, {"seconds": 0}),
        (Keep, {"n": 0}),
        (Keep, {"mode": None}),
    ],
    ids=str,
)
def test_a_rule_refuses_what_is_out_of_range(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=kind.__name__):
        kind(**values)


def test_steps_are_limited_in_the_plan() -> None:
    plan = Plan(10, TrainingConfig(batch_size=2, stop_when=[MaxSteps(4), MaxSteps(3)]))
    assert (plan.total_steps, plan.all_steps) == (3, 5)
    assert Plan(10, TrainingConfig(batch_size=2, stop_when=MaxSteps(99))).total_steps == 5


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        (Plateau(), {"evaluation": False}, "Plateau reads the evaluations' 'loss'.*give it one"),
        (
            Threshold("f1", 0.9),
            {},
            "Threshold reads 'f1', which no evaluation measures: there are 'loss', 'auc'",
        ),
        (Threshold("f1", 0.9, over="steps"), {}, "which no step measures: there are 'loss', 'grad_norm'"),
        (Plateau(), {"every": None}, "set evaluate_every"),
        (None, {"every": None}, "keep reads.*set evaluate_every"),
    ],
    ids=str,
)
def test_rules_over_what_is_not_measured_are_refused(
    rule: Rule | None, options: dict[str, Any], words: str
) -> None:
    given = {"every": 2, "evaluation": True, "metrics": ["auc"], **options}
    rules, keep = ([], Keep()) if rule is None else ([rule], None)
    with pytest.raises(RecipeError, match=words):
        require_decidable(rules, keep, **given)
    require_decidable(
        [Plateau("auc.macro"), Plateau(over="steps"), NotFinite()], None, **{**given, **DECIDABLE}
    )


def test_what_a_step_may_measure_is_left_to_the_first_evaluation_and_the_first_step() -> None:
    rules = [Plateau("f1"), Threshold("reward", 1.0, over="steps")]
    require_decidable(rules, Keep("f1"), metrics=(), others=True, **DECIDABLE)
    assert unread(rules, None, "evaluations", {"loss": 1.0, "f1": NAN}) == ""
    assert (
        unread(rules, Keep("auc"), "evaluations", {"loss": 1.0, "f1": 0.5})
        == "keep reads 'auc', which no evaluation measures: there are 'loss', 'f1'"
    )
    assert "Threshold reads 'reward', which no step" in unread(rules, None, "steps", {"loss": 1.0})


DECIDABLE: dict[str, Any] = {"every": 2, "evaluation": True}
