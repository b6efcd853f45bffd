"""When a run ends before its last step, and which versions it keeps: rules over what its ledger holds.

A rule's verdict is a function of the figures that are recorded up to a version, in the order of the versions,
and of nothing else: whoever asks again, after any death, is told the same. The training server asks at each
version that has such figures, before any step behind it is committed, so a run stops at the same step on any
fleet (`MaxSeconds` excepted, which asks the clock).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from torchord.cache.errors import ConfigError, RecipeError

MODES = ("min", "max")
OVER = ("evaluations", "steps")
STEP_METRICS = ("loss", "grad_norm")
"""What each step has of figures, beside the metrics that its recipe's `step` or `loss` returns."""


@dataclass(frozen=True)
class _Watching:
    """A rule over one figure; see its subclasses."""

    metric: str = "loss"

    def _require(self, mode: str, over: str) -> None:
        name = type(self).__name__
        _require_name(name, self.metric)
        _require_choice(name, "mode", mode, MODES)
        _require_choice(name, "over", over, OVER)


@dataclass(frozen=True)
class Plateau(_Watching):
    """Stop once a figure has not improved for a while.

    A value v improves on the best so far, b, where v < b - min_delta (mode "max": v > b + min_delta); the
    first number is the best so far, and NaN improves on nothing. The run stops at the `patience`-th value
    in a row that does not improve. Keras' `EarlyStopping` and Lightning's count alike.

    Attributes:
        metric: "loss", the name of one of the recipe's `metrics` ("name.key" of one that has several), or of
            one that its `step` or `loss` returns.
        patience: values in a row without an improvement, at least 1.
        min_delta: by how much a value must be better to be an improvement, 0 or more.
        mode: "min" where less is better, "max" where more is.
        over: "evaluations", or "steps" for "loss", "grad_norm" and metrics of each step.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> Plateau("accuracy", patience=5, mode="max").over
        'evaluations'
    """

    patience: int = 3
    min_delta: float = 0.0
    mode: str = "min"
    over: str = "evaluations"

    def __post_init__(self) -> None:
        self._require(self.mode, self.over)
        _require_count("Plateau", "patience", self.patience)
        _require_number("Plateau", "min_delta", self.min_delta, least=0.0)


@dataclass(frozen=True)
class Threshold(_Watching):
    """Stop once a figure is good enough: at most `value`, or with mode "max" at least.

    Attributes:
        metric: as of `Plateau`.
        value: a finite number.
        mode, over: as of `Plateau`.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> Threshold("accuracy", 0.98, mode="max").metric
        'accuracy'
    """

    value: float = 0.0
    mode: str = "min"
    over: str = "evaluations"

    def __post_init__(self) -> None:
        self._require(self.mode, self.over)
        _require_number("Threshold", "value", self.value)


@dataclass(frozen=True)
class NotFinite:
    """Stop, as done, where a figure is NaN or infinite; without this rule a run fails there.

    A step whose loss or averaged gradient is not finite is not taken: the run ends with the version before it
    (with `nonfinite="skip"` such steps are left out, and the run goes on). An evaluation with a figure that
    is not finite ends the run at the version that was evaluated.
    """


@dataclass(frozen=True)
class MaxSteps:
    """Stop after so many global steps.

    Attributes:
        steps: at least 1; more than the run has are no limit.

    Raises:
        ConfigError: it is not.
    """

    steps: int

    def __post_init__(self) -> None:
        _require_count("MaxSteps", "steps", self.steps)


@dataclass(frozen=True)
class MaxSeconds:
    """Stop after the first step that is committed so long after version 0 was made.

    Time is that between entries of the ledger, by the training server's clock; pauses count. So the step is
    *not* the same on any fleet; once it is recorded it stays, like every other verdict, whoever dies. After
    the loss of Redis the time begins anew.

    Attributes:
        seconds: greater than 0.

    Raises:
        ConfigError: it is not.
    """

    seconds: float

    def __post_init__(self) -> None:
        _require_number("MaxSeconds", "seconds", self.seconds)
        if self.seconds <= 0:
            raise ConfigError(f"MaxSeconds's seconds must be greater than 0, not {self.seconds!r}")


Rule = Plateau | Threshold | NotFinite | MaxSteps | MaxSeconds
_RULES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Plateau, Threshold, NotFinite, MaxSteps, MaxSeconds)
}


@dataclass(frozen=True)
class Keep:
    """Which versions are kept beside the newest: the `n` best by a figure of the evaluations.

    Attributes:
        metric: as of `Plateau`.
        mode: "min" where less is better, "max" where more is; of two equal ones the earlier is the better.
        n: how many, at least 1.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> Keep("accuracy", mode="max").best({4: {"accuracy": 0.5}, 8: {"accuracy": 0.75}})
        (8,)
    """

    metric: str = "loss"
    mode: str = "min"
    n: int = 1

    def __post_init__(self) -> None:
        _require_name("Keep", self.metric)
        _require_choice("Keep", "mode", self.mode, MODES)
        _require_count("Keep", "n", self.n)

    def best(self, evaluations: Mapping[int, Mapping[str, float]]) -> tuple[int, ...]:
        """The versions to be kept, best first; those whose figure is NaN or missing are none.

        Args:
            evaluations: version -> figures.
        """
        sign = 1.0 if self.mode == "min" else -1.0
        found = [
            (sign * figures[self.metric], version)
            for version, figures in evaluations.items()
            if not math.isnan(figures.get(self.metric, math.nan))
        ]
        return tuple(version for _, version in sorted(found)[: self.n])


class Verdict(NamedTuple):
    """That a run stops.

    Attributes:
        rule: name of the rule that says so.
        reason: why, in words.
    """

    rule: str
    reason: str


def rules_of(given: Any) -> tuple[Rule, ...]:
    """The rules of `TrainingConfig.stop_when`: none, one or several, or what `described` made of them.

    Raises:
        ConfigError: it is something else.
    """
    if given is None:
        return ()
    several = list(given) if isinstance(given, (tuple, list)) else [given]
    return tuple(_rule_of(each) for each in several)


def _rule_of(given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    accepted = ", ".join(_RULES)
    if isinstance(given, type) and given.__name__ in _RULES:
        raise ConfigError(
            f"stop_when takes a rule, and {given.__name__} is its class: call it, {given.__name__}(...)"
        )
    if not isinstance(given, Mapping) or given.get("rule") not in _RULES:
        shown = given.get("rule") if isinstance(given, Mapping) else given
        raise ConfigError(f"stop_when takes {accepted}, one or several, not {shown!r:.80}")
    kind = _RULES[given["rule"]]
    rule: Rule = _made(kind, {name: value for name, value in given.items() if name != "rule"})
    return rule


def keep_of(given: Any) -> Keep | None:
    """What `TrainingConfig.keep` says: nothing, "best", a `Keep`, or what `asdict` made of one.

    Raises:
        ConfigError: it is something else.
    """
    if given is None or isinstance(given, Keep):
        return given
    if isinstance(given, str) and given == "best":
        return Keep()
    if isinstance(given, Mapping):
        kept: Keep = _made(Keep, given)
        return kept
    raise ConfigError(f"keep takes 'best', a Keep(metric, mode, n) or None, not {given!r:.80}")


def _made(kind: type[Any], values: Mapping[Any, Any]) -> Any:
    if unknown := sorted(map(str, values.keys() - {field.name for field in fields(kind)})):
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__} lacks a field: {error}") from None


def described(rules: Iterable[Rule]) -> list[dict[str, Any]]:
    """Rules as JSON has them, for `rules_of`."""
    return [{"rule": type(rule).__name__, **asdict(rule)} for rule in rules]


def reads(rule: Rule) -> str:
    """What a rule's verdict is read from: "evaluations", "steps", "clock" or "" (known before)."""
    if isinstance(rule, (Plateau, Threshold)):
        return rule.over
    if isinstance(rule, NotFinite):
        return "evaluations"
    return "clock" if isinstance(rule, MaxSeconds) else ""


def step_figures(loss: float, grad_norm: float, metrics: Mapping[str, float]) -> dict[str, float]:
    """What a rule over steps may read of one."""
    return {**metrics, "loss": loss, "grad_norm": grad_norm}


class Watch:
    """The rules that read one kind of figures, which they are shown version by version.

    Args:
        rules: those of a run.
        over: which of them: "evaluations" or "steps".

    Attributes:
        version: the last that was shown, -1 before the first.
        verdict: what came of that.
    """

    def __init__(self, rules: Iterable[Rule], over: str) -> None:
        self._noun = {"evaluations": "eval", "steps": "step"}[over]
        self._over = over
        self._rules = [rule for rule in rules if reads(rule) == over]
        self._best: dict[int, tuple[float, int]] = {}  # of each Plateau: the best value, at which version
        self._waited: dict[int, int] = {}
        self.version = -1
        self.verdict: Verdict | None = None

    def see(self, version: int, figures: Mapping[str, float]) -> Verdict | None:
        """Show the rules what was measured of a version; the first one's verdict, if any has one."""
        self.version = version
        found = [self._judged(number, version, figures) for number in range(len(self._rules))]
        said = [
            Verdict(type(rule).__name__, reason)
            for rule, reason in zip(self._rules, found, strict=True)
            if reason
        ]
        self.verdict = said[0] if said else None
        return self.verdict

    def _judged(self, number: int, version: int, figures: Mapping[str, float]) -> str:
        rule = self._rules[number]
        if isinstance(rule, NotFinite):
            bad = sorted(name for name, value in figures.items() if not math.isfinite(value))
            return f"{self._noun} {bad[0]} is {figures[bad[0]]} at version {version}" if bad else ""
        assert isinstance(rule, (Plateau, Threshold))
        value = figures.get(rule.metric, math.nan)
        if isinstance(rule, Threshold):
            met = value <= rule.value if rule.mode == "min" else value >= rule.value
            words = "at most" if rule.mode == "min" else "at least"
            return (
                f"{self._noun} {rule.metric} is {value:.6g} at version {version}, {words} {rule.value:g}"
                if met
                else ""
            )
        return self._waits(number, rule, version, value)

    def _waits(self, number: int, rule: Plateau, version: int, value: float) -> str:
        best = self._best.get(number)
        if not math.isnan(value) and (best is None or _better(rule, value, best[0])):
            self._best[number], self._waited[number] = (value, version), 0
            return ""
        self._waited[number] = waited = self._waited.get(number, 0) + 1
        if waited < rule.patience:
            return ""
        by = f" by {rule.min_delta:g}" if rule.min_delta else ""
        found = "there was no number" if best is None else f"best {best[0]:.6g} at version {best[1]}"
        count = f"{waited} {self._over if waited > 1 else self._over[:-1]}"
        return f"{self._noun} {rule.metric} has not improved{by} in {count}; {found}"


def _better(rule: Plateau, value: float, best: float) -> bool:
    return value < best - rule.min_delta if rule.mode == "min" else value > best + rule.min_delta


def over_evaluations(
    rules: Iterable[Rule], evaluations: Mapping[int, Mapping[str, float]], version: int
) -> Verdict | None:
    """What the evaluations up to a version say at that version; None: the run goes on."""
    watch = Watch(rules, "evaluations")
    for each in sorted(evaluations):
        if each <= version:
            watch.see(each, evaluations[each])
    return watch.verdict if watch.version == version else None


def named(rules: Iterable[Rule], keep: Keep | None, over: str) -> list[tuple[str, str]]:
    """(who reads it, figure) of each figure that rules, and `keep`, read of evaluations or of steps."""
    found: list[tuple[str, str]] = [
        (type(rule).__name__, rule.metric)
        for rule in rules
        if isinstance(rule, (Plateau, Threshold)) and rule.over == over
    ]
    return found if keep is None or over == "steps" else [*found, ("keep", keep.metric)]


def unread(rules: Iterable[Rule], keep: Keep | None, over: str, figures: Mapping[str, float]) -> str:
    """The first figure that is read and was not measured, in a sentence; "" if all were.

    Args:
        figures: of the run's first evaluation, or first step.
    """
    for name, metric in named(rules, keep, over):
        if metric not in figures:
            return _unmeasured(name, metric, over, figures)
    return ""


def _unmeasured(name: str, metric: str, over: str, known: Iterable[str]) -> str:
    what = {"evaluations": "evaluation", "steps": "step"}[over]
    return f"{name} reads {metric!r}, which no {what} measures: there are {', '.join(map(repr, known))}"


def _require_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}'s metric is the name of a figure such as 'loss', not {value!r:.80}")


def _require_choice(name: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{name}'s {field} must be one of {', '.join(map(repr, choices))}, not {value!r:.80}"
        )


def _require_count(name: str, field: str, value: object) -> None:
    if type(value) is not int or not 1 <= value < 1 << 53:
        raise ConfigError(f"{name}'s {field} must be a whole number, at least 1, not {value!r:.80}")


def _require_number(name: str, field: str, value: object, *, least: float = -math.inf) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least:  # type: ignore[arg-type,operator]
        least_said = "" if least == -math.inf else f" of at least {least:g}"
        raise ConfigError(f"{name}'s {field} must be a finite number{least_said}, not {value!r:.80}")


def require_decidable(
    rules: Iterable[Rule],
    keep: Keep | None,
    *,
    every: int | None,
    evaluation: bool,
    metrics: Iterable[str],
    others: bool = False,
) -> None:
    """Refuse rules that read what a run does not measure.

    Args:
        rules: the config's.
        keep: likewise.
        every: global steps between two evaluations, None for one at the end.
        evaluation: whether the recipe has a dataset for evaluations.
        metrics: names of the recipe's metrics.
        others: whether there may be more, which only the first evaluation and the first step show.

    Raises:
        RecipeError: names the rule, and the way out.
    """
    given, known = list(rules), ("loss", *metrics)
    for name, metric in [] if others else named(given, None, "steps"):
        if metric not in STEP_METRICS:
            raise RecipeError(_unmeasured(name, metric, "steps", STEP_METRICS))
    for name, metric in named(given, keep, "evaluations"):
        if not evaluation:
            raise RecipeError(
                f"{name} reads the evaluations' {metric!r}, and the recipe has no evaluation dataset; "
                "give it one"
            )
        if every is None:
            raise RecipeError(
                f"{name} reads the evaluations' {metric!r}, and without evaluate_every there is one only, "
                "at the end; set evaluate_every to the steps between two"
            )
        if not others and metric not in known and metric.partition(".")[0] not in known:
            raise RecipeError(_unmeasured(name, metric, "evaluations", known))
