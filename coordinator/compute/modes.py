"""Which modules of a model are in training mode: as its constructor, its `train` and its `eval` say."""

from __future__ import annotations

from torch import nn

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig


class Modes:
    """The modes of a model's modules as the recipe's model function left them, and those that follow.

    Modules that it put in evaluation mode stay so in training, as a frozen BatchNorm does that must not
    train its statistics. A model that is in evaluation mode as a whole trains as a whole, since that is how
    libraries hand out what they have loaded; so does a part by transformers that is handed out likewise and
    has parameters to train. Each use has the modes of the first, whatever a step or a metric did to them.

    Args:
        model: the model, as it was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made = [(module, module.training) for module in model.modules()]
        training = [module for module, mode in self._made if mode]
        handed_out = [model] if not training else [module for module, _ in self._made if _handed_out(module)]
        fresh = {id(inner) for module in handed_out for inner in module.modules()}
        self._trained: list[tuple[nn.Module, bool]] | None = None  # the modes of the first use
        self._kept = [module for module, mode in self._made if not mode and id(module) not in fresh]

    def train(self) -> nn.Module:
        """Put the model in training mode, but for what stays in evaluation mode."""
        self._model.train()
        if self._trained is None:
            for module in self._kept:
                module.training = False
            self._trained = [(module, module.training) for module, _ in self._made]
        for module, training in self._trained:
            if module.training is not training:
                module.training = training
        return self._model

    def eval(self) -> nn.Module:
        """Put the model in evaluation mode."""
        self._model.eval()
        for module, training in self._made:
            if module.training and not training:
                module.training = False
        return self._model

    def require_apart(self, config: TrainingConfig) -> None:
        """Refuse what shards that are computed apart cannot do together.

        Raises:
            InvalidInput: a SyncBatchNorm is to train on more than one shard a step.
        """
        staying = {id(module) for module in self._kept}
        for name, module in self._model.named_modules():
            synced = any(
                base.__name__ == "SyncBatchNorm" for base in type(module).__mro__
            )  # apex has its own
            if synced and id(module) not in staying and (config.shard_count > 1 or config.micro_batch_size):
                raise InvalidInput(
                    f"{name or 'the model'!r} is a SyncBatchNorm, whose statistics are those of the whole "
                    "batch, while shards are computed apart; use a BatchNorm (each shard's own statistics, "
                    "as each rank's under DDP), a GroupNorm, which needs none, or shards=1 "
                    "and no micro_batch_size"
                )


def _handed_out(module: nn.Module) -> bool:
    """Whether this is a model of transformers that trains, in evaluation mode, as `from_pretrained` is."""
    bases = type(module).__mro__
    pretrained = any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in bases
    )
    if not pretrained or any(inner.training for inner in module.modules()):
        return False
    return any(parameter.requires_grad for parameter in module.parameters())
