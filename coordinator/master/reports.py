"""What a person is told of a run: where it stands, what a step did, what it made."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.cache.settings import located
from torchord.coordinator.messages.waits import Wait

if TYPE_CHECKING:
    import torch


def in_a_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """A few facts as HTML, for a notebook."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"


@dataclass(frozen=True, repr=False)
class RunStatus:
    """Where a run stands.

    Attributes:
        name: the run's name.
        state: pending, running, paused, failed, cancelled or done.
        version: committed global steps, which is also the version of the parameters.
        total_steps: global steps of the whole run; None until a training server has seen the data.
        epoch: the epoch that the next step belongs to, from 0; None likewise.
        error: why it failed, one sentence; None otherwise.
        traceback: the last frames of the recipe's code where it raised, "" otherwise.
        submitted_at: Unix time (s).
        server: worker id of the training server, "" if none serves it.
        waiting_for: queues that the run needs and no living worker consumes.
        refused: living workers that may not work on the run, each with the reason: their torch,
            hardware or code would give other bits.
        discarded: queues whose messages somebody throws away who is no torchord worker, each with what to
            look for; the run goes on, many times slower.
        waits: what the run waits for now, since when and who can end it; () at rest.
        reason: which of its rules ends the run before its last step, and why (`TrainingConfig.stop_when`); ""
            where none does.
        untold: what others were to be told, and have not been at the first try: what it was, and why.
    """

    name: str
    state: str
    version: int
    total_steps: int | None
    epoch: int | None
    error: str | None
    traceback: str
    submitted_at: float
    server: str
    waiting_for: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()
    waits: tuple[Wait, ...] = ()
    reason: str = ""
    untold: tuple[str, ...] = ()

    def __repr__(self) -> str:
        said = f"<RunStatus of {self.name!r}: {self.state}, step {self.version} of {self._total}"
        reason = f", waits for {self.waits[0].what}" if self.waits else self.reason and f", {self.reason}"
        return f"{said}{f': {self._failure}' if self.error else reason}>"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("state", self.state), ("step", f"{self.version} of {self._total}")]
        rows += [("ended", self.reason)] if self.reason else []
        rows += [("waits for", f"{wait.what}; {wait.ends}") for wait in self.waits]
        rows += [("refused", each) for each in self.refused]
        rows += [("error", self._failure)] if self.error else []
        rows += [("server", self.server)] if self.server else []
        return in_a_table(f"run {self.name}", rows)

    @property
    def _total(self) -> object:
        return "?" if self.total_steps is None else self.total_steps

    @property
    def _failure(self) -> str:
        return (self.error or "").partition("\n")[0]


@dataclass(frozen=True)
class StepReport:
    """One committed global step.

    Attributes:
        step: its number, from 0.
        version: the version it made (`step + 1`).
        loss: mean loss over its shards by their weights (their examples, as a rule), at the parameters before
            the update.
        examples: examples in the step.
        seconds: from the previous commit to this one.
        nbytes: gradient bytes that its shards stored.
        grad_norm: L2 norm of the averaged gradient, before clipping.
        lr: learning rate of each parameter group.
        skipped: the update was left out because of a NaN or Inf.
        workers: which worker computed each shard, in shard order.
        metrics: name -> what the step measured beside its loss, where `step` returned more than that.
    """

    step: int
    version: int
    loss: float
    examples: int
    seconds: float
    nbytes: int
    grad_norm: float
    lr: tuple[float, ...] = ()
    skipped: bool = False
    workers: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: LedgerEntry) -> StepReport:
        """The report of one ledger entry."""
        return cls(
            step=entry.version - 1,
            version=entry.version,
            loss=entry.loss,
            examples=entry.examples,
            seconds=entry.seconds,
            nbytes=sum(slot.nbytes for slot in entry.slots),
            grad_norm=entry.grad_norm,
            lr=entry.lr,
            skipped=entry.skipped,
            workers=tuple(slot.worker for slot in entry.slots),
            metrics=dict(entry.metrics),
        )


def stop_reason(head: Head) -> str:
    """Why one of its rules ends a run before its last step, in words; "" where none does."""
    return "" if head.stopped is None else f"stopped: {head.stopped['reason']}"


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    """A module's state dict, of which nothing is the module's own, with the versions of its modules.

    Args:
        module: on the CPU.
    """
    import torch

    found: OrderedDict[str, Any] = OrderedDict()
    state = module.state_dict()
    for name, value in state.items():
        tensor = isinstance(value, torch.Tensor)
        found[name] = value.detach().resolve_conj().clone() if tensor else copy.deepcopy(value)
    if (metadata := getattr(state, "_metadata", None)) is not None:
        found._metadata = metadata  # type: ignore[attr-defined]  # what load_state_dict looks for
    return found


@dataclass(repr=False)
class TrainedModel:
    """What `Run.wait` returns.

    Attributes:
        module: the model in eval mode, on CPU, holding the last version.
        history: one report a global step.
        metrics: the last evaluation, {"loss": ..., metric: ...}; empty without an evaluation.
        evaluations: version -> metrics.
        version: the version that `module` holds.
        reason: why the run ended before its last step, as `RunStatus.reason`; "" where it did not.
    """

    module: torch.nn.Module
    history: list[StepReport]
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    version: int = 0
    reason: str = ""

    def __repr__(self) -> str:
        return f"<TrainedModel {', '.join(f'{name} {value}' for name, value in self._facts())}>"

    def _repr_html_(self) -> str:
        return in_a_table("trained model", self._facts())

    def _facts(self) -> list[tuple[str, object]]:
        last = [("loss", f"{self.history[-1].loss:.6g}")] if self.history else []
        measured = [(f"evaluated {name}", f"{value:.6g}") for name, value in sorted(self.metrics.items())]
        return [("module", type(self.module).__name__), ("version", self.version), *last, *measured]

    def save(self, path: str | Path) -> Path:
        """Write the state dict as a safetensors file and return its path.

        Tied tensors are written once each; `torch.nn.Module.load_state_dict` of the file gives the
        same model.

        Raises:
            InvalidInput: the state dict has what a safetensors file cannot hold; the message names it.
            CheckpointError: the file cannot be written.
        """
        import torch
        from safetensors.torch import save_file

        target, tensors = Path(located(path)), {}
        for name, value in state_of(self.module).items():
            if not isinstance(value, torch.Tensor) or value.dtype is torch.complex128:
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise InvalidInput(
                    f"{name!r} is a {kind}, which a safetensors file cannot hold; write the state dict with "
                    "torch.save(trained.module.state_dict(), path)"
                )
            tensors[name] = value.contiguous()
        try:
            save_file(tensors, target)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {target}: {error}; choose a directory that exists"
            ) from error
        return target
