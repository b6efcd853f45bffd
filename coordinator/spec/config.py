"""`TrainingConfig`: how a run is trained, validated once.

The recipe says what is trained; this says how. A config is plain data: it travels as JSON,
and two runs are the same run only if their configs are equal.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torchord.cache.errors import ConfigError
from torchord.cache.ledger.share import checked
from torchord.cache.settings import HARDWARE
from torchord.coordinator.spec import stopping
from torchord.coordinator.spec.aggregation import AGGREGATIONS, require_robust
from torchord.coordinator.spec.stopping import Keep, MaxSteps, Rule

_PRECISIONS = ("fp32", "bf16", "fp16")
_MEMORY_FORMATS = ("contiguous", "channels_last")
AUTO = "auto"
_DIGESTS = ("auto", "xxh3", "blake3", "sha256")
_NONFINITE = ("stop", "skip")
_SKEW = ("refuse", "admit")
_MAX_TASKS = 1 << 20
_MAX_THREADS = 1024  # more than any machine has; a process that asks for 100,000 is ended by its system
_MAX_STALENESS = 1024
_MAX_SEED = (1 << 63) - 1
_MAX_COUNT = (1 << 53) - 1  # what a script of the control plane can count
_MOST_ROUND_STEPS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run is trained; frozen, and checked once when it is made.

    Attributes:
        epochs: passes over the dataset, at least 1.
        batch_size: examples in one global step over all shards together, at least 1.
        shards: gradient tasks in one step, 1 to 2**20; a step with fewer examples than this
            (the ragged end of an epoch, or a small batch) has one shard per example instead.
            The bits of a run depend on it, on the number of workers they do not. "auto": chosen when the run
            is submitted, two for each Client that there is then, and a number from then on; see
            `torchord.coordinator.master.shards`.
        micro_batch_size: examples that a shard's forward and backward have at a time, at least 1, where its
            activations would take more memory than a device has; None: all of the shard's. The gradients of
            the parts add up in their order, as in gradient accumulation. The bits of a run depend on it.
        fan_in: tensors that are summed in one place, at least 2. A step with more shards has them
            summed in groups by the workers, in a tree fixed by the shards' numbers, so that the
            training server reads at most this many tensors. The bits of a run with more shards than
            this depend on it. See docs/protocol.md, "Partial sums".
        seed: root of all randomness of the run, 0 to 2**63 - 1.
        local_steps: optimizer steps that a shard takes by itself between two aggregations, 1 to 2**20,
            each on its part of a batch; 1 is exact synchronous SGD. See
            `torchord.coordinator.compute.inner_steps`.
        staleness: versions by which a gradient may lag the head, 0 to 1024: so many further steps are
            under way beside the present one. The lag is exact, not an upper bound, so that the bits
            do not depend on who is fast.
        compression: how gradients travel: "none", or a codec with error feedback such as "fp16",
            "int8", "topk:0.01" or "powersgd:2". See docs/compression.md.
        parameter_compression: how parameters travel to a worker that holds the version before: "none",
            or a codec for the difference, such as "int8". The parameters of a version are then
            what the workers decode. See docs/compression.md.
        precision: "fp32", or "bf16" or "fp16" for torch.autocast to bfloat16 or float16 around
            forward and loss (parameters, gradients and optimizer state keep their own dtype). With
            "fp16" the loss is scaled; see `torchord.coordinator.compute.loss_scale` and docs/precision.md.
        clip_norm: largest global L2 norm of the averaged gradient, greater than 0; None: no
            clipping.
        threads: intra-op threads of torch while a shard is computed, 1 to 1024. Another count
            gives other bits, hence it belongs to the run and not to the machine.
        checkpoint_every: global steps between two checkpoints, at least 1.
        keep_checkpoints: newest checkpoints that are kept, at least 1; beside the one of version 0 that a
            run with `start_from` has.
        evaluate_every: global steps between two evaluations, at least 1; None: one evaluation,
            of the last version (which is evaluated in any case).
        deterministic: whether torch may use deterministic algorithms only. Without it, runs on
            a GPU can be faster and need not give the same bits twice.
        nonfinite: what to do with a step whose loss or averaged gradient is NaN or infinite:
            "stop" the run, or "skip" the update.
        shard_timeout_seconds: seconds after which a shard that was started counts as lost,
            greater than 0; None: as long as its worker shows signs of life.
        max_attempts: tries of one shard before the run stops, at least 1.
        skew: whether a worker whose copy of the recipe's sources differs from the submitter's
            is refused ("refuse") or takes part all the same ("admit").
        loss_scale: what the loss of "fp16" is multiplied by at first, greater than 0. A step whose
            gradients overflow is skipped and halves it.
        loss_scale_interval: steps in a row without an overflow after which the loss scale is
            doubled, at least 1.
        memory_format: "contiguous", or "channels_last" for convolutions' weights and 4-D inputs
            in that order while shards are computed; what is stored keeps its layout.
        shuffle: whether each epoch visits the dataset in another order; False: always from the first
            example to the last. A recipe with an `order` or `batches` says it itself.
        drop_last: whether the last batch of an epoch is left out where it is smaller than batch_size.
        digest: by what the content of what is stored is known, beside the checksums: "blake3" or "sha256",
            of which nobody can make a second content, so that a sealed record proves the bytes; "xxh3":
            by the checksums alone, which tell damage and no intent; "auto": "blake3" in processes that have
            keys (docs/keys.md), else "xxh3". It changes no bit of a run and no chain.
        aggregation: how a step's shards become one gradient. "mean": the step of the whole batch. "median",
            "trimmed_mean" and "krum" are other estimates, which `aggregation_faults` of the shards cannot
            move far whatever they are, at the price that a run is no longer a plain loop's, and that the
            training server keeps all gradients of a step in memory; see
            `torchord.coordinator.compute.robust`.
        aggregation_faults: f, how many shards of a step may be anything: "trimmed_mean" leaves out so many at
            either end of each coordinate, "krum" counts so many less neighbours; "median" takes no notice.
        max_shard_norm: L2 norm that no shard's gradient (or pseudo-gradient) may exceed, before they are
            averaged; None for no bound. One that does is refused with its worker's name and computed anew; if
            the training server computes the same, the run stops. With partial sums it cannot be had.
        probe: whether the run's first four shards are looked at for whether the losses of parts have the loss
            of the whole as their mean, so that each step is the whole batch's; if they have not, the run is
            refused. It costs about nine forwards of each, once. See `torchord.coordinator.compute.probe`.
        compile: whether shards are computed by torch.compile's kernels. Every worker that computes
            needs the same compiler; see docs/precision.md.
        audit_fraction: part of the steps, 0 to 1, in which one shard is computed once more, by whichever
            worker comes, in fresh copies of model and dataset, and compared byte for byte before the
            step is committed: see docs/recipes.md, "Purity". Up to seven shards of the first four
            steps and one of the second epoch's first are checked besides, and each Client computes the
            run's first shard once, when it joins, to compare it with the others'. What that costs: a check
            makes its step longer by at most one shard, which with a worker for each shard is the whole
            step, and whoever computed the shard waits at most as long for another worker to take the
            check, so 0.004 of the steps cost at most 0.8 %; making the fresh copies takes at most 0.2 % of
            a worker's time, and two seconds besides for the checks at the start. 0: nothing of all this,
            nor is there any with deterministic=False, whose runs need not give the same bits twice. A run
            that was submitted before there were checks has none.

        round_steps: how many global steps the Clients take by themselves between two chords, at least 1, or
            "auto": as many as take about a second, so that what a chord costs does not show. It changes
            no bit of a run. See docs/rounds.md.
        stop_when: when the run ends before its last step, as done: one or several of `torchord.Plateau`,
            `Threshold`, `NotFinite`, `MaxSteps` and `MaxSeconds`, of which the first that is met counts. What
            comes behind an evaluation that a rule reads waits for it. See docs/deciding.md.
        keep: which versions are kept beside the newest: "best", by the evaluations' loss, or a
            `torchord.Keep`; None: no others. What comes behind an evaluation waits for it, likewise.
        evaluate_at_start: whether version 0 is evaluated, too.
        hardware: "native", or "portable" for kernels that give the same bits on all x86-64 processors with
            AVX2, whoever made them, at a price in speed. Workers pin them when they start
            (TORCHORD_HARDWARE=portable); others leave the run to those. See docs/portable.md.

        weight: the run's share of a fleet that several runs use, 0.01 to 100: beside a run of weight 1, one
            of weight 3 has three quarters of it. It changes no bit of a run; see docs/sharing.md.
        priority: -1000 to 1000: work of a higher priority is taken before all of a lower one, whatever the
            weights.

    Raises:
        ConfigError: a value is out of range; the message names field, value and range.

    Example:
        >>> TrainingConfig(epochs=5, batch_size=128, shards=2).shards
        2
    """

    epochs: int = 1
    batch_size: int = 256
    shards: int | str = 4
    micro_batch_size: int | None = None
    fan_in: int = 8
    seed: int = 0
    local_steps: int = 1
    staleness: int = 0
    compression: str = "none"
    parameter_compression: str = "none"
    precision: str = "fp32"
    clip_norm: float | None = None
    threads: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    evaluate_every: int | None = None
    deterministic: bool = True
    nonfinite: str = "stop"
    shard_timeout_seconds: float | None = None
    max_attempts: int = 3
    skew: str = "refuse"
    loss_scale: float = 65536.0
    loss_scale_interval: int = 2000
    memory_format: str = "contiguous"
    compile: bool = False
    shuffle: bool = True
    drop_last: bool = False
    audit_fraction: float = 0.004
    probe: bool = True
    digest: str = "auto"
    max_shard_norm: float | None = None
    aggregation: str = "mean"
    aggregation_faults: int = 1
    round_steps: int | str = 1
    stop_when: Rule | Sequence[Rule] | None = ()
    keep: Keep | str | None = None
    evaluate_at_start: bool = False
    hardware: str = "native"
    weight: float = 1.0
    priority: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._integer(name, minimum=1)
        self._integer("local_steps", minimum=1, maximum=_MAX_TASKS)
        if self.shards != AUTO:
            self._integer("shards", minimum=1, maximum=_MAX_TASKS, words=("'auto'",))
        self._integer("threads", minimum=1, maximum=_MAX_THREADS)
        for name in ("checkpoint_every", "keep_checkpoints", "max_attempts", "loss_scale_interval"):
            self._integer(name, minimum=1)
        self._integer("fan_in", minimum=2)
        self._integer("micro_batch_size", minimum=1, optional=True)
        if self.micro_batch_size is not None and self.local_steps > 1:
            raise ConfigError(
                f"micro_batch_size is for shards of exact steps, and with local_steps={self.local_steps} a "
                "shard takes steps of its own; leave it out, and set a smaller batch_size or more shards"
            )
        self._integer("evaluate_every", minimum=1, optional=True)
        self._integer("seed", minimum=0, maximum=_MAX_SEED)
        self._integer("staleness", minimum=0, maximum=_MAX_STALENESS)
        if self.round_steps != "auto":
            self._integer("round_steps", minimum=1, maximum=_MOST_ROUND_STEPS, words=("'auto'",))
        self._positive("clip_norm", optional=True)
        self._positive("max_shard_norm", optional=True)
        self._choice("aggregation", AGGREGATIONS)
        self._integer("aggregation_faults", minimum=1)
        if self.shards != AUTO:
            self._require_shards()
        self._positive("shard_timeout_seconds", optional=True)
        self._positive("loss_scale")
        self._fraction("audit_fraction")
        for name in ("deterministic", "compile", "shuffle", "drop_last", "probe", "evaluate_at_start"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        object.__setattr__(self, "stop_when", stopping.rules_of(self.stop_when))
        object.__setattr__(self, "keep", stopping.keep_of(self.keep))
        object.__setattr__(self, "weight", checked(self.weight, self.priority)[0])
        self._choice("nonfinite", _NONFINITE)
        self._choice("digest", _DIGESTS)
        self._choice("skew", _SKEW)
        self._choice("precision", _PRECISIONS)
        self._choice("memory_format", _MEMORY_FORMATS)
        self._choice("hardware", HARDWARE)
        if self.hardware == "portable":
            self._require_portable()
        for name in ("compression", "parameter_compression"):
            if getattr(self, name) != "none":
                from torchord.coordinator.spec.codecs import check  # loads torch

                try:
                    check(getattr(self, name))
                except ConfigError as error:
                    raise ConfigError(str(error).replace("compression", name, 1)) from None

    def _require_shards(self) -> None:
        """Refuse what a number of shards is too large or too small for."""
        require_robust(
            self.aggregation,
            self.aggregation_faults,
            shards=self.shard_count,
            fan_in=self.fan_in,
            compression=self.compression,
        )
        if self.max_shard_norm is not None and self.shard_count > self.fan_in:
            raise ConfigError(
                f"max_shard_norm looks at each shard's gradient, and with shards={self.shards} above fan_in="
                f"{self.fan_in} the training server gets sums of them: set fan_in to {self.shards}, or leave "
                "max_shard_norm out"
            )

    @property
    def shard_count(self) -> int:
        """`shards` as the number that it is from when the run was submitted.

        Raises:
            ConfigError: it is "auto" still.
        """
        if isinstance(self.shards, str):
            raise ConfigError("shards='auto' is a number from when the run is submitted; here it is none yet")
        return self.shards

    def _require_portable(self) -> None:
        if self.compile:
            raise ConfigError(
                "hardware='portable' has kernels that machines share, and compile=True makes some for the "
                "machine that it is on; leave one of them out"
            )
        if self.skew != "refuse" or not self.deterministic:
            raise ConfigError(
                "hardware='portable' promises the same bits on unlike machines, which skew='admit' and "
                "deterministic=False give up; leave it out, or those"
            )

    def _integer(
        self,
        name: str,
        *,
        minimum: int,
        maximum: int = _MAX_COUNT,
        optional: bool = False,
        words: tuple[str, ...] = (),
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        limit = f"at least {minimum}" if maximum == _MAX_COUNT else f"from {minimum} to {maximum}"
        others = [*words, *(["None"] if optional else [])]
        accepted = f"an integer, {limit}" + "".join(f", or {other}" for other in others)
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise ConfigError(f"{name} must be {accepted}, not {value!r}") from None
        if not minimum <= number <= maximum:
            shown = repr(value) if abs(number) < 1 << 200 else f"a number of {number.bit_length()} bits"
            raise ConfigError(f"{name} must be {accepted}, not {shown}")
        object.__setattr__(self, name, number)

    def _positive(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        accepted = "a finite number greater than 0" + (", or None" if optional else "")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} must be {accepted}, not {value!r}")
        if isinstance(value, int) and abs(value) >= 1 << 200:
            raise ConfigError(f"{name} must be {accepted}, not one of {value.bit_length()} bits")
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} must be {accepted}, not {value!r}")
        object.__setattr__(self, name, float(value))

    def _fraction(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            shown = f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 1 << 200 else "that"
            raise ConfigError(f"{name} must be a number from 0 to 1, not {shown}")
        object.__setattr__(self, name, float(value))

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
        object.__setattr__(self, name, choices[choices.index(value)])  # a str enumeration's value

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a plain dict that JSON carries without loss."""
        return {**asdict(self), "stop_when": stopping.described(self.rules)}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What `stop_when` holds."""
        return stopping.rules_of(self.stop_when)

    @property
    def most_steps(self) -> int | None:
        """Global steps that `stop_when` lets the run have at most; None for any number."""
        return min((rule.steps for rule in self.rules if isinstance(rule, MaxSteps)), default=None)

    @property
    def keep_rule(self) -> Keep | None:
        """What `keep` holds."""
        return stopping.keep_of(self.keep)

    @property
    def decides_by_evaluations(self) -> bool:
        """Whether what comes behind an evaluation depends on it."""
        return self.keep is not None or any(stopping.reads(rule) == "evaluations" for rule in self.rules)

    @property
    def decides_by_steps(self) -> bool:
        """Whether each step may be the last."""
        return any(stopping.reads(rule) in ("steps", "clock") for rule in self.rules)

    def evaluates(self, version: int) -> bool:
        """Whether a version, other than the run's last, is to be evaluated."""
        if version == 0:
            return self.evaluate_at_start
        return self.evaluate_every is not None and version % self.evaluate_every == 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """Rebuild a config from `to_json`.

        Args:
            data: field names and values; fields left out take their defaults, but for
                `audit_fraction`: what was written before there were checks goes on without them.

        Raises:
            ConfigError: a field is unknown, or a value is out of range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config is an object of fields, not a {type(data).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"unknown TrainingConfig field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**{"audit_fraction": 0.0, **data})

    def differences(self, other: TrainingConfig) -> list[str]:
        """Return one line for each field in which the two configs differ, in field order."""
        return [
            f"{field.name}: {getattr(self, field.name)!r} here, {getattr(other, field.name)!r} there"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
