"""The optimizer's side of a run: averaged gradients in, the next version out.

A `Trainer` holds the run's model, optimizer and scheduler on the training server. It is a
state machine over (parameters, optimizer state): the same state and the same averaged
gradient give the same next state, bit for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from torchord.cache.errors import CheckpointError, InvalidInput, NonFinite, RunFailed
from torchord.cache.tensors.codec import aligned, starts_aligned
from torchord.coordinator.compute.averaging import is_average
from torchord.coordinator.compute.deltas import Delta, DeltaEncoder
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient_rule import GradientRule, change
from torchord.coordinator.compute.kernels import worded
from torchord.coordinator.compute.loss_scale import exhausted
from torchord.coordinator.compute.optimizers import (
    Groups,
    held_by,
    require_same_trained,
    servers_optimizer,
    step_scheduler,
)
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe


@dataclass(frozen=True)
class ApplyReport:
    """What one update did.

    Attributes:
        grad_norm: global L2 norm of the averaged gradient, after the recipe's `gradients`, before clipping.
        clipped: whether it was above `clip_norm` and scaled down.
        skipped: whether the update was left out because something was not finite.
        lr: learning rate of each parameter group in this step.
    """

    grad_norm: float
    clipped: bool
    skipped: bool
    lr: tuple[float, ...]


Prepare = Callable[[nn.Module], None]


def nothing_to_prepare(model: nn.Module) -> None:
    """Leave a new model as the recipe made it."""


class Trainer:
    """Model, optimizer and scheduler of one run. Make one with `build`.

    Attributes:
        replica: the model; its state tensors are the newest version.
        optimizer: made by the recipe.
        scheduler: made by the recipe, or None.
        config: the run's config.
        deltas: compresses the steps' differences; None without `parameter_compression`.
        rule: the recipe's `gradients`, None if it has none.
        delta: what leads from the version before to the present one, if it was compressed.
    """

    def __init__(
        self,
        replica: Replica,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        config: TrainingConfig,
        deltas: DeltaEncoder | None = None,
        rule: GradientRule | None = None,
    ) -> None:
        self.replica = replica
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._groups = Groups(optimizer, scheduler, replica.parameters)
        self.config = config
        self.deltas = deltas
        self.rule = rule
        self.delta: Delta | None = None

    @classmethod
    def build(
        cls,
        resolved: ResolvedRecipe,
        config: TrainingConfig,
        device: torch.device | str = "cpu",
        *,
        arrange: Callable[[Replica], None] | None = None,
        prepare: Prepare = nothing_to_prepare,
    ) -> Trainer:
        """Make model, optimizer and scheduler as at the start of the run (version 0).

        Args:
            resolved: the run's recipe.
            config: the run's config.
            device: where the model is to live.
            arrange: lays the new model out like the run's versions; None: there are none yet.
            prepare: what is done to the new model before the optimizer is made over it.

        Raises:
            InvalidInput: an entry returned something else than its kind, or an optimizer that
                cannot work from averaged gradients (see `optimizers.build_optimizer`).
        """
        replica = Replica.build(resolved, config, device)
        if arrange is not None:
            arrange(replica)
        prepare(replica.model)
        with pinned(config.threads, config.deterministic, replica.device, restore=True):
            optimizer, scheduler = servers_optimizer(resolved, config, replica)
        return cls(
            replica, optimizer, scheduler, config, _delta_encoder(resolved, config), resolved.gradients
        )

    def adopt(self, resolved: ResolvedRecipe, config: TrainingConfig) -> None:
        """Go on under a config, which after a switch is another.

        Between plain steps and local steps the optimizer is another one, and starts afresh.
        """
        if config == self.config:
            return
        changed = (config.local_steps > 1) != (self.config.local_steps > 1)
        self.config = self.replica.config = config
        if changed:
            with pinned(config.threads, config.deterministic, self.replica.device, restore=True):
                self.optimizer, self.scheduler = servers_optimizer(resolved, config, self.replica)
            self._groups = Groups(self.optimizer, self.scheduler, self.replica.parameters)

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        step: int,
        loss: float,
        finite: bool = True,
        epoch_ends: bool = False,
    ) -> ApplyReport:
        """Take one optimizer step and bring the state tensors to the next version.

        Args:
            gradients: parameter name -> averaged gradient. The optimizer leaves the parameters
                that are missing alone, as it does in one process. May be scaled in place.
            buffers: buffer name -> new value, for those that changed.
            step: the global step, which seeds optimizers that draw random numbers.
            loss: mean loss of the step; drives ReduceLROnPlateau.
            finite: whether all shards reported finite values.
            epoch_ends: whether the step is its epoch's last, after which a scheduler by epochs steps.

        Returns:
            The figures of the update. With nonfinite="skip", or where fp16's gradients overflow, a
            step that is not finite changes neither parameters nor buffers nor optimizer state; the
            scheduler steps all the same, and the loss scale falls.

        Raises:
            NonFinite: loss or gradient is not finite and the config says "stop"; nothing changed.
            InvalidInput: a name or shape is not the model's.
            RunFailed: optimizer, scheduler or average raised (chained); the trainer must be loaded anew.
            Exception: what the recipe's `gradients` raises, with a note; likewise.
            InvalidInput: one of them changed the optimizer's groups so that they cannot be restored, or which
                parameters are trained, or returned what are not the model's gradients.
        """
        device = self.replica.device
        with pinned(self.config.threads, self.config.deterministic, device):
            seed_everything(derive_seed(self.config.seed, "update", step))
            lr = tuple(float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group)
            self.require_fitting(gradients, buffers)
            self._set_gradients(gradients)
            try:
                norm = self._total_norm()
                if self.rule is not None and self.config.local_steps == 1 and math.isfinite(float(norm)):
                    change(self.rule, self.replica, f"step {step}")
                    norm = self._total_norm()
                size = float(norm)
                clip = self._clip_norm
                skipped = not (finite and math.isfinite(loss) and math.isfinite(size))
                if skipped and self._must_stop(loss):
                    raise NonFinite(
                        f"step {step} has loss {loss} and gradient norm {size}; lower the learning rate, set "
                        "clip_norm, or set nonfinite='skip' to leave such steps out"
                    )
                clipped = clip is not None and not skipped and size > clip
                before = None if self.deltas is None or skipped else _copied(self.replica.state_tensors())
                if not skipped:
                    self._update(norm, buffers, step)
                self._step_scheduler(step, loss, quiet=skipped, epoch_ends=epoch_ends)
                self._groups.check(step)
                require_same_trained(self.replica, f"step {step}")
                self._step_loss_scale(overflow=skipped)
                self.delta = None if before is None else self._encoded(before)
                if not skipped and self.replica.average is not None:
                    self._average(step + 1)
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        return ApplyReport(size, clipped, skipped, lr)

    def require_fitting(self, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Make sure that names and shapes are the model's.

        Raises:
            InvalidInput: one is not; the message names it.
        """
        self._check(gradients, self.replica.parameters, "gradient for")
        self._check(buffers, self.replica.held(), "value for buffer")

    def state(self, *, copies: bool = True) -> dict[str, Any]:
        """Return optimizer and scheduler state, and what deltas hold back, as a tree on the CPU.

        The parameters are not in it: they are the version. See `torchord.cache.tensors.tree` for what the
        tree may hold.

        Args:
            copies: False: tensors that are on the CPU are the optimizer's own, and change with its next step.
        """
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        taken = partial(_on_cpu, copies=copies)
        tree = {"optimizer": taken(self.optimizer.state_dict()), "scheduler": taken(scheduler)}
        if (groups := self._groups.names()) is not None:
            tree["groups"] = groups
        return tree if self.deltas is None else {**tree, "deltas": self.deltas.state()}

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state` returned; the next update has the bits it would have had there.

        Raises:
            CheckpointError: the state belongs to another optimizer or scheduler.
        """
        self._groups.arrange(tree.get("groups"))
        restore_optimizer(self.optimizer, self.scheduler, tree)
        if self.deltas is not None:
            self.deltas.load(tree.get("deltas"))

    def state_nbytes(self) -> int:
        """Return the bytes of the state's tensors; 0 for an optimizer without, or before its first step."""
        held = 0 if self.deltas is None else self.deltas.nbytes()
        return held + sum(
            value.numel() * value.element_size()
            for each in (self.optimizer, *held_by(self.optimizer))
            for values in each.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        )

    def nbytes(self) -> int:
        """Return the bytes that this trainer keeps in memory: state, one set of gradients, optimizer."""
        return 2 * self.replica.manifest.nbytes + self.state_nbytes()

    def _encoded(self, before: Mapping[str, Tensor]) -> Delta:
        """Compress what the step did to the state tensors, and take it back to what that stands for."""
        assert self.deltas is not None
        state = _copied(self.replica.state_tensors())
        others = {
            name: value
            for name, value in state.items()
            if name not in self.replica.parameters and not is_average(name)
        }
        changed = {name: value for name, value in others.items() if not torch.equal(value, before[name])}
        return self.deltas.encode(before, self.replica.parameters, changed)

    def _average(self, version: int) -> None:
        """Average the weights that everybody else has, those that a delta stands for."""
        assert self.replica.average is not None
        moved = self.replica.average.step(version)
        if self.delta is not None:
            self.delta = replace(self.delta, buffers={**self.delta.buffers, **_copied(moved)})

    @staticmethod
    def _check(given: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
        for name, tensor in given.items():
            if name not in own:
                raise InvalidInput(f"a shard sent a {what} {name!r}, which the model does not have")
            if tensor.shape != own[name].shape:
                raise InvalidInput(
                    f"a shard sent a {what} {name!r} of shape {tuple(tensor.shape)}, where the model has "
                    f"{tuple(own[name].shape)}"
                )

    def _set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        memory = self.replica.memory
        here = gradients if memory is None else memory.scatter(gradients)
        for name, parameter in self.replica.parameters.items():
            parameter.grad = here.get(name)

    @property
    def _clip_norm(self) -> float | None:
        """The limit on the averaged gradient; with local steps the shards clip their own."""
        return self.config.clip_norm if self.config.local_steps == 1 else None

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self.replica.parameters.values() if p.grad is not None]
        return get_total_norm(gradients)

    def _update(self, norm: Tensor, buffers: Mapping[str, Tensor], step: int) -> None:
        if self._clip_norm is not None:
            clip_grads_with_norm_(list(self.replica.parameters.values()), self._clip_norm, norm)
        try:
            self.optimizer.step()
        except Exception as error:
            told = worded(error)
            raise RunFailed(f"step {step}: the optimizer raised {type(told).__name__}: {told}") from error
        if not _torchs_own(self.optimizer):  # whose state is laid out like the parameters
            _lay_out(self.optimizer)
        self.replica.write(buffers)

    def _must_stop(self, loss: float) -> bool:
        """Whether a step that is not finite ends the run; an overflow of fp16 need not."""
        scale = self.replica.loss_scale
        if scale is None or self.config.local_steps > 1:
            return self.config.nonfinite == "stop"
        return exhausted(self.config, scale, loss)

    def _step_loss_scale(self, *, overflow: bool) -> None:
        """Move the version's loss scale on; with local steps each slot has its own, and this one rests."""
        scale = self.replica.loss_scale
        if scale is not None and self.config.local_steps == 1:
            interval = self.config.loss_scale_interval
            self.replica.loss_scale = scale.after(overflow=overflow, interval=interval)

    def _step_scheduler(self, step: int, loss: float, *, quiet: bool, epoch_ends: bool) -> None:
        if self.scheduler is None:
            return
        try:
            with warnings.catch_warnings():
                if quiet:  # torch warns of a scheduler that steps before its optimizer ever did
                    warnings.simplefilter("ignore")
                step_scheduler(self.scheduler, loss, epoch_ends=epoch_ends)
        except Exception as error:
            raise RunFailed(f"step {step}: the scheduler raised {type(error).__name__}: {error}") from error


def _delta_encoder(resolved: ResolvedRecipe, config: TrainingConfig) -> DeltaEncoder | None:
    """What compresses the parameters' way to the workers, if the config asks for it."""
    if config.parameter_compression == "none":
        return None
    return DeltaEncoder(config.parameter_compression, resolved.codec(config.parameter_compression))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, tree: Mapping[str, Any]
) -> None:
    """Load the state that `Trainer.state` returned, bit for bit.

    Raises:
        CheckpointError: the state belongs to another optimizer or scheduler.
    """
    saved = _copied(tree["optimizer"])
    try:
        optimizer.load_state_dict(saved)
        if "param_groups" in saved:  # an optimizer that steps others has a form of its own
            _undo_casts(optimizer, saved)
        _lay_out(optimizer)
        if (scheduler is None) != (tree["scheduler"] is None):
            raise ValueError("one has a scheduler, the other has none")
        if scheduler is not None:
            scheduler.load_state_dict(_copied(tree["scheduler"]))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"the saved optimizer state does not fit the recipe's optimizer and scheduler: {error}"
        ) from error


def _undo_casts(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give state tensors the dtype that they were saved with; load_state_dict casts to the parameter's."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    for number, parameter in zip(ids, order, strict=True):
        current = optimizer.state.get(parameter, {})
        for key, value in saved["state"].get(number, {}).items():
            loaded = current.get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                current[key] = value.to(loaded.device)


@torch.no_grad()
def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Bring the state into one layout, the same after a step as after `restore_optimizer`.

    What has a parameter's shape gets its order in memory, like a fresh one; all else is row-major, while
    an optimizer may have left it otherwise (the factors of a matrix come column by column).
    """
    for each in (optimizer, *held_by(optimizer)):
        for parameter, state in each.state.items():
            for key, value in state.items():
                state[key] = _laid_out(value, parameter)


def _laid_out(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor):
        if value.shape != parameter.shape or value.device != parameter.device:
            return aligned(value)
        if value.stride() == parameter.stride() and starts_aligned(value):
            return value
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if type(value) is list:
        return [_laid_out(item, parameter) for item in value]
    if type(value) is dict:
        return {key: _laid_out(item, parameter) for key, item in value.items()}
    return value


def _torchs_own(optimizer: torch.optim.Optimizer) -> bool:
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def _on_cpu(tree: Any, *, copies: bool) -> Any:
    """A tree of dicts, lists, tuples and tensors with its tensors on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=copies)
    if type(tree) is dict:
        return {key: _on_cpu(value, copies=copies) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_on_cpu(value, copies=copies) for value in tree)
    return tree


def _copied(tree: Any) -> Any:
    return _on_cpu(tree, copies=True)
