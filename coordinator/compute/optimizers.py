"""The recipe's optimizer and scheduler: made, judged by what they are, watched for what cannot be kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR, ReduceLROnPlateau

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.coordinator.compute.batch import during
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.schedules import EachEpoch
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe


def build_optimizer(
    resolved: ResolvedRecipe, config: TrainingConfig, replica: Replica
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Make the recipe's optimizer and scheduler over a replica, as at the start of the run.

    Called with the process pinned.

    Raises:
        InvalidInput: an entry returned something else than its kind; or an optimizer that cannot work from
            averaged gradients (LBFGS, SAM and others that compute gradients of their own, SparseAdam), that
            has other weights for evaluation than for training (schedule-free ones), or that holds parameters
            that are not the model's; or a scheduler whose step needs what a run has not.
    """
    seed_everything(derive_seed(config.seed, "optimizer"))
    groups = (
        replica.model.parameters()
        if resolved.parameter_groups is None
        else resolved.parameter_groups(replica.model)
    )
    with during("making the optimizer"):
        optimizer = resolved.optimizer(groups)
    _require_optimizer(optimizer, replica)
    with during("making the scheduler"):
        scheduler = None if resolved.scheduler is None else resolved.scheduler(optimizer)
    if scheduler is not None:
        require_steppable(scheduler, config)
    return optimizer, scheduler


def servers_optimizer(
    resolved: ResolvedRecipe, config: TrainingConfig, replica: Replica
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Make the recipe's optimizer and scheduler, or with local steps the outer optimizer (without scheduler).

    Called with the process pinned.

    Raises:
        InvalidInput: as `build_optimizer`; or parameters share memory, and the config moves each by itself.
    """
    _require_apart(replica, config)
    if config.local_steps == 1:
        return build_optimizer(resolved, config, replica)
    seed_everything(derive_seed(config.seed, "optimizer"))
    outer = resolved.outer_optimizer or partial(torch.optim.SGD, lr=1.0)
    with during("making the outer optimizer"):
        optimizer = outer(replica.model.parameters())
    _require_optimizer(optimizer, replica)
    return optimizer, None


def _require_apart(replica: Replica, config: TrainingConfig) -> None:
    if not replica.shared:
        return
    setting = "local_steps" if config.local_steps > 1 else "parameter_compression"
    if config.local_steps > 1 or config.parameter_compression != "none":
        raise InvalidInput(
            f"{' and '.join(map(repr, replica.shared[0]))} share memory, so that a step moves each of them "
            f"by what is meant for the other as well, which {setting} cannot carry; make them one parameter "
            "(self.a = self.b), or train without it"
        )


def step_scheduler(scheduler: LRScheduler, loss: float, *, epoch_ends: bool = False) -> None:
    """Step a scheduler once: one that watches a figure with the loss, one by epochs where one ends."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif epoch_ends or not isinstance(scheduler, EachEpoch):
        scheduler.step()


def require_same_trained(replica: Replica, where: str) -> None:
    """Refuse that code of the recipe froze or unfroze a parameter for good.

    A version says nothing about `requires_grad`: in another process, or after a restart, the parameter
    would be as it was built.

    Args:
        replica: the model after the code has run.
        where: the step, and the shard if it is one's.

    Raises:
        InvalidInput: names the first such parameter.
    """
    for name, parameter in replica.parameters.items():
        if parameter.requires_grad == (name in replica.frozen):
            done = "unfrozen" if parameter.requires_grad else "frozen"
            raise InvalidInput(
                f"{where}: parameter {name!r} was {done} (requires_grad) in mid-run, which other processes "
                "do not see; leave requires_grad as the model entry sets it, True for what is to train at "
                "some time, and let its group join the optimizer later (add_param_group), or give it lr=0 "
                "until then"
            )


class Groups:
    """Which parameters an optimizer's groups hold: what of them its state dict does not say.

    Code of the recipe may let parameters join in mid-run (`add_param_group`). An optimizer that is made anew
    has only the groups that it began with, and could not take over the state of others.

    Args:
        optimizer: as it was made.
        scheduler: its scheduler, None if there is none.
        parameters: name -> parameter of the model.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._parameters = parameters
        self._made = [list(group["params"]) for group in optimizer.param_groups]

    def names(self) -> list[list[str]] | None:
        """Return the parameters' names by group; None while the groups are as they were made."""
        now = self._now()
        if _ids(now) == _ids(self._made):
            return None
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [[names[each] for each in group] for group in _ids(now)]

    def arrange(self, names: Sequence[Sequence[str]] | None) -> None:
        """Make the groups hold what `names` returned; their options come with the optimizer's state.

        Raises:
            CheckpointError: the model has no such parameter.
        """
        try:
            wanted = self._made if names is None else [[self._parameters[n] for n in some] for some in names]
        except KeyError as error:
            raise CheckpointError(f"the saved state has a parameter {error}, which the model lacks") from None
        if _ids(wanted) != _ids(self._now()):
            options = [*self._optimizer.param_groups, *({} for _ in wanted)]
            pairs = zip(options, wanted, strict=False)
            self._optimizer.param_groups = [{**group, "params": list(some)} for group, some in pairs]

    def check(self, step: int) -> None:
        """Refuse a change of the groups that could not be restored, in the step that made it.

        Raises:
            InvalidInput: a parameter left, one that is not the model's joined, or one joined under a
                scheduler with a function for each group.
        """
        now = self._now()
        if _ids(now) == _ids(self._made):
            return
        held = {id(parameter) for group in now for parameter in group}
        began = {id(parameter) for group in self._made for parameter in group}
        names = [name for name, parameter in self._parameters.items() if id(parameter) in began - held]
        told = f"step {step}: the parameter groups of {type(self._optimizer).__name__} changed during the run"
        if names:
            raise InvalidInput(
                f"{told}: {names[0]!r} left, whose state could not be restored; keep it there with lr=0"
            )
        if held - {id(parameter) for parameter in self._parameters.values()}:
            raise InvalidInput(f"{told}: a parameter joined that is not the model's")
        for each in (self._scheduler, *getattr(self._scheduler, "_schedulers", ())):
            if isinstance(each, LambdaLR | MultiplicativeLR):
                raise InvalidInput(
                    f"{told}, and {type(each).__name__} has a function for each, which could not be "
                    "restored; give all groups from the start, by parameter_groups, those that join later "
                    "with lr=0"
                )

    def _now(self) -> list[list[Tensor]]:
        return [group["params"] for group in self._optimizer.param_groups]


def _ids(groups: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    return [[id(parameter) for parameter in group] for group in groups]


def _require_optimizer(optimizer: Any, replica: Replica) -> None:
    require_serviceable(optimizer)
    own = {id(parameter) for parameter in replica.parameters.values()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(parameter) not in own for parameter in held):
        raise InvalidInput(
            "the optimizer holds a parameter that is not the model's; parameter_groups must return "
            "parameters of the model that it is given"
        )


def require_serviceable(optimizer: Any) -> None:
    """Refuse what an optimizer entry returned, if it could not serve whatever model it were made for.

    Raises:
        InvalidInput: as `build_optimizer`.
    """
    if _are_optimizers(optimizer):
        raise InvalidInput(
            f"the recipe's optimizer entry returned several optimizers (a {type(optimizer).__name__}), but a "
            "step has one loss, one gradient for each parameter and one optimizer; give one with a group for "
            "each network (parameter_groups), or an Optimizer of yours that steps them all, and for a GAN "
            "one loss whose parts reach only their own network"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInput(
            f"the recipe's optimizer entry returned a {type(optimizer).__name__}; it must return a "
            "torch.optim.Optimizer"
        )
    name = type(optimizer).__name__
    if _needed(optimizer.step) or (hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")):
        raise InvalidInput(
            f"{name} evaluates the loss several times in a step (it needs a closure, or two passes as SAM "
            "does), which averaged gradients cannot serve; use an optimizer whose step() takes no closure"
        )
    if callable(getattr(optimizer, "train", None)) or callable(getattr(optimizer, "eval", None)):
        raise InvalidInput(
            f"{name} has other weights for evaluation than for training (train() and eval(), as "
            "schedule-free optimizers do); a version has one set, and the wrong one would be evaluated and "
            "kept; use the optimizer that it is made from, such as AdamW or SGD, with a scheduler"
        )
    if held_by(optimizer) and not _keeps_others(type(optimizer)):
        raise InvalidInput(
            f"{name} holds other optimizers, whose state its own does not have, so that it would be lost "
            "when the run is restored; give it a state_dict and a load_state_dict that have theirs in them"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise InvalidInput("SparseAdam needs sparse gradients, but they travel dense; use Adam")


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that an optimizer keeps in its attributes, each once: those that it steps itself."""
    found: dict[int, torch.optim.Optimizer] = {}
    for value in vars(optimizer).values():
        several = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else (value,)
        )
        found.update((id(each), each) for each in several if isinstance(each, torch.optim.Optimizer))
    return [each for each in found.values() if each is not optimizer]


def _are_optimizers(made: Any) -> bool:
    """Whether an entry returned several optimizers, in a list, tuple or dict."""
    several = [*made.values()] if isinstance(made, dict) else made if isinstance(made, (list, tuple)) else []
    return bool(several) and all(isinstance(each, torch.optim.Optimizer) for each in several)


def _keeps_others(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer has a state dict of its own making."""
    plain = torch.optim.Optimizer
    return kind.state_dict is not plain.state_dict and kind.load_state_dict is not plain.load_state_dict


def require_steppable(scheduler: Any, config: TrainingConfig) -> None:
    """Refuse what a scheduler entry returned, if it is no scheduler or needs what it is not given.

    Raises:
        InvalidInput: says which.
    """
    if not isinstance(scheduler, LRScheduler):
        raise InvalidInput(
            f"the recipe's scheduler entry returned a {type(scheduler).__name__}; it must return a scheduler "
            "from torch.optim.lr_scheduler, or a subclass of LRScheduler"
        )
    if isinstance(scheduler, EachEpoch) and config.local_steps > 1:
        raise InvalidInput(
            "a scheduler by epochs (each_epoch) has no place in local steps, whose slots see no epoch end; "
            "give the scheduler itself, which is stepped once a global step"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    if needed := _needed(scheduler.step):
        raise InvalidInput(
            f"{type(scheduler).__name__}.step() needs {', '.join(needed)}, which it is not given: only "
            "ReduceLROnPlateau and its subclasses are given the loss; make it one, or use a scheduler whose "
            "step() needs nothing"
        )


def _needed(method: Callable[..., Any]) -> list[str]:
    """Names of the arguments without which a method cannot be called."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(method).parameters.values())
    if getattr(
        method, "_wrapped_by_lr_sched", False
    ):  # a scheduler's function around it, which shows its `self`
        parameters = parameters[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in several]
