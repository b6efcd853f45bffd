"""`Estimator`: fit, predict and score on the fleet, in the manner of scikit-learn, which it does not need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from xxhash import xxh3_128_hexdigest

from torchord.cache.errors import InvalidInput
from torchord.coordinator.master.master import Master
from torchord.coordinator.master.run import Run
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Target

_STORED = "torchord.coordinator.datasets:stored_dataset"


class Estimator:
    """A model that is trained on the fleet by `fit(X, y)`, which puts the arrays into the data store.

    Targets that are whole numbers, strings or booleans are classes: the model gives a logit for each,
    `predict` the class, `predict_proba` all probabilities. Targets that are floating-point numbers are
    values: the model gives one for each column of y.

    Args:
        model: () -> torch.nn.Module, importable like any entry of a recipe.
        optimizer: (parameters) -> Optimizer.
        loss: (outputs, targets) -> mean loss; None: cross entropy for classes, squared error for values.
        scheduler: (optimizer) -> scheduler; None: none.
        epochs, batch_size, shards, seed: as in `TrainingConfig`.
        config: further fields of `TrainingConfig`, by name.
        url: of the fleet's server; None: as `Master` finds it.
        timeout: seconds for which `fit` waits; None: for ever.

    Attributes:
        run_: the run that `fit` submitted.
        module_: the trained module.
        classes_: the classes in sorted order, where the targets were such.
        dataset_: what the arrays are called in the data store, where they stay (`Master.datasets.delete`).

    Example:
        >>> Estimator(partial(torch.nn.Linear, 4, 3), epochs=5).get_params()["epochs"]
        5
    """

    def __init__(
        self,
        model: Any,
        *,
        optimizer: Any = torch.optim.AdamW,
        loss: Any = None,
        scheduler: Any = None,
        epochs: int = 10,
        batch_size: int = 256,
        shards: int = 4,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        url: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.scheduler = scheduler
        self.epochs = epochs
        self.batch_size = batch_size
        self.shards = shards
        self.seed = seed
        self.config = config
        self.url = url
        self.timeout = timeout

    def fit(self, X: Any, y: Any) -> Estimator:
        """Train on arrays, tensors or tables, a sample a row.

        Args:
            X: numbers of shape (samples, ...), taken as float32.
            y: of shape (samples,), or (samples, values).

        Raises:
            InvalidInput: X and y have another number of samples, or hold what is no number.
            TorchordError: as `Master.submit` and `Run.wait`.
        """
        inputs, targets = _rows(X), np.asarray(y)
        if len(inputs) != len(targets):
            raise InvalidInput(f"X has {len(inputs)} samples and y {len(targets)}")
        self.classes_: Any = None
        if targets.dtype.kind != "f":
            self.classes_, targets = np.unique(targets, return_inverse=True)
        kept = torch.as_tensor(targets, dtype=torch.float32 if self.classes_ is None else torch.int64)
        master = Master(self.url)
        content = inputs.numpy().tobytes() + kept.numpy().tobytes()
        self.dataset_ = f"estimator-{xxh3_128_hexdigest(content)}"
        master.datasets.put(self.dataset_, TensorDataset(inputs, kept))
        digest = master.datasets.info(self.dataset_).digest
        given = Recipe(
            model=self.model,
            dataset=Target(_STORED, kwargs={"name": self.dataset_, "digest": digest}),
            loss=self.loss or (squared if self.classes_ is None else torch.nn.functional.cross_entropy),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
        )
        config = TrainingConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            shards=self.shards,
            seed=self.seed,
            **(self.config or {}),
        )
        self.run_: Run = master.submit(given, config)
        self.module_ = self.run_.wait(timeout=self.timeout).module
        return self

    def predict(self, X: Any) -> Any:
        """The class or the values of each row, as a numpy array, computed by the workers."""
        outputs = self._outputs(X)
        if self.classes_ is not None:
            return self.classes_[outputs.argmax(1).numpy()]
        return outputs.numpy()

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, in the order of `classes_`: (samples, classes).

        Raises:
            InvalidInput: the targets were no classes.
        """
        outputs = self._outputs(X)
        if self.classes_ is None:
            raise InvalidInput("an Estimator that was fitted to values has no probabilities; use predict")
        return outputs.softmax(1).numpy()

    def score(self, X: Any, y: Any) -> float:
        """The share of right classes, or the coefficient of determination R²."""
        found, wanted = self.predict(X), np.asarray(y)
        if self.classes_ is not None:
            return float((found == wanted).mean())
        return float(1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, and with `deep` what is bound to those that are partials: "optimizer__lr"."""
        found = {name: getattr(self, name) for name in _names(type(self))}
        if not deep:
            return found
        inner = {
            f"{name}__{key}": value
            for name, entry in found.items()
            if isinstance(entry, partial)
            for key, value in entry.keywords.items()
        }
        return found | inner

    def set_params(self, **params: Any) -> Estimator:
        """Set arguments by name; "optimizer__lr" binds an argument of an entry.

        Raises:
            InvalidInput: there is no such argument.
        """
        for name, value in params.items():
            entry, _, key = name.partition("__")
            if entry not in _names(type(self)):
                raise InvalidInput(
                    f"an Estimator has no argument {entry!r}; it has {', '.join(_names(type(self)))}"
                )
            setattr(self, entry, partial(getattr(self, entry), **{key: value}) if key else value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of whatever it is given; only it calls this."""
        tags = import_module("sklearn.utils")
        kind = None
        if hasattr(self, "classes_"):
            kind = "regressor" if self.classes_ is None else "classifier"
        return tags.Tags(
            estimator_type=kind, target_tags=tags.TargetTags(required=True), input_tags=tags.InputTags()
        )

    def _outputs(self, X: Any) -> Tensor:
        if not hasattr(self, "run_"):
            raise InvalidInput("this Estimator has learned nothing yet; call fit(X, y) first")
        outputs: Tensor = self.run_.predict(_rows(X))
        one = self.classes_ is None and outputs.dim() == 2 and outputs.shape[1] == 1
        return outputs.squeeze(1) if one else outputs


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error; a model with one output may have values (samples,) or (samples, 1)."""
    return torch.nn.functional.mse_loss(outputs.reshape(targets.shape), targets)


def _rows(X: Any) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(X), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"X must be numbers, a sample a row ({error})") from error


def _names(kind: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(kind).parameters)
