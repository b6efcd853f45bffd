"""The Master: submits runs and finds them again. It computes nothing and need not stay alive."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torchord.cache import keys
from torchord.cache.datasets.datasets import Datasets
from torchord.cache.errors import ConfigMismatch, InvalidInput, RunNotFound
from torchord.cache.files.run_store import RunRecord
from torchord.cache.settings import from_environment, located
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.local_cluster.starting import starting
from torchord.coordinator.master.querying import chosen, known
from torchord.coordinator.master.reports import TrainedModel
from torchord.coordinator.master.run import Run
from torchord.coordinator.master.shards import fixed
from torchord.coordinator.master.starting_point import StartFrom, StartingPoint, read_start
from torchord.coordinator.messages.addressees import On, read_on
from torchord.coordinator.messages.broker import celery_url, publisher, transport_options
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.aggregation import require_equal_shards
from torchord.coordinator.spec.buffer_entries import require_apart
from torchord.coordinator.spec.callback_entries import described as described_callbacks
from torchord.coordinator.spec.config import AUTO, TrainingConfig
from torchord.coordinator.spec.default_dtype import require_float32
from torchord.coordinator.spec.fingerprints import fingerprint
from torchord.coordinator.spec.recipe import Recipe, require_measured
from torchord.coordinator.spec.targets import Entry


class Master:
    """The client side of torchord.

    Args:
        url: Redis URL of broker and control plane; default TORCHORD_URL, then
            redis://localhost:6379/0.
        cache_urls: URLs of the tensor nodes, servers or a Redis Cluster (redis+cluster://HOST:PORT);
            default TORCHORD_CACHE_URLS, then `url`.
        cache_replicas: further nodes that get a copy of each chunk of a tensor; default
            TORCHORD_CACHE_REPLICAS, then 0.
        cache_weights: relative share of each of the nodes, in the order of `cache_urls`; default
            TORCHORD_CACHE_WEIGHTS, then equal. Nodes, replicas and weights are the same for a Master and
            all workers: a process that was told otherwise is refused while others run.
        checkpoint_dir: where the training server keeps checkpoints, if this process can see it;
            default TORCHORD_CHECKPOINT_DIR, then ./checkpoints.

    Raises:
        CacheUnreachable: within seconds, if nothing answers at `url`.
        InvalidInput: an argument or a variable of the environment cannot be used.

    Example:
        >>> master = Master("redis://localhost:6379/0")            # doctest: +SKIP
        >>> run = master.submit(recipe, config, name="digits-01")  # doctest: +SKIP
        >>> trained = run.wait(progress=True)                      # doctest: +SKIP
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        cache_urls: Sequence[str] | None = None,
        cache_replicas: int | None = None,
        cache_weights: Sequence[float] | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> None:
        explicit: dict[str, Any] = {
            "url": url,
            "cache_urls": None if cache_urls is None else tuple(cache_urls),
            "cache_replicas": cache_replicas,
            "cache_weights": None if cache_weights is None else tuple(cache_weights),
            "checkpoint_dir": None if checkpoint_dir is None else located(checkpoint_dir),
        }
        given = {name: value for name, value in explicit.items() if value is not None}
        settings = replace(from_environment(), **given)
        self.url = settings.url
        broker = celery_url(settings.url)
        self._services = Services(settings)
        self._services.require_reachable()
        self._sender = Sender(publisher(broker, transport_options(settings.url)))
        self._submitted: set[str] = set()  # runs whose recipe this process itself gave

    def submit(
        self,
        recipe: Recipe,
        config: TrainingConfig | None = None,
        *,
        name: str | None = None,
        start_from: StartFrom | None = None,
        on: On | None = None,
        callbacks: Sequence[Entry] | None = None,
    ) -> Run:
        """Queue a run and return at once; it goes on without this process.

        The same name with the same recipe and config returns the run that is there, and continues
        it if it was paused or had failed.

        Args:
            recipe: what to train.
            config: how; default `TrainingConfig()`.
            name: 1 to 100 letters, digits, '.', '_' or '-'; default a name made from the time.
            start_from: the weights of version 0, in place of those that the recipe's model has when it is
                made: a run or its name (its newest version, as `run.model()` gives it), (run or name,
                version), or the path of a safetensors file on this machine, a `Path` or a string with a
                slash or the ending ".safetensors". Names, shapes and dtypes must be the model's.
            on: whom to tell what happens to the run (docs/told.md): an event, of done, failed, cancelled,
                paused, resumed and evaluated, -> the name of a task of your own Celery app, or a URL; or a
                list of them. A run that is there keeps what it was submitted with where this is None.
            callbacks: classes, partials of classes or import paths that the training server makes objects
                of, and tells of steps, versions, evaluations and checkpoints (docs/told.md); at most 8. A run
                that is there keeps what it was submitted with where this is None.

        Raises:
            ConfigMismatch: the name is taken by a run with another recipe, config, start, `on` or
                `callbacks`; the message names the fields.
            RecipeError: an entry cannot travel to the workers, or the config contradicts it.
            InvalidInput: an argument is of another type, or torch's default dtype is not float32 here; or no
                model could be trained with the optimizer or scheduler, as far as this process can make them;
                or the workers that run store chunks elsewhere; or the Redis throws keys away when it is full;
                or `start_from` is a file that cannot be read.
            RunNotFound, VersionMissing: `start_from` names a run or version that is not there.
        """
        if not isinstance(recipe, Recipe):
            raise InvalidInput(f"submit() takes a Recipe first, got {type(recipe).__name__}")
        config = TrainingConfig() if config is None else config
        if not isinstance(config, TrainingConfig):
            raise InvalidInput(f"submit() takes a TrainingConfig second, got {type(config).__name__}")
        config = self._fixed(config, name)
        recipe.require_order_of(config)
        require_float32("this program")
        self._services.require_same_placement()
        self._services.registry.require_room_kept()
        name = keys.check_name(
            time.strftime("run-%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4] if name is None else name
        )
        require_apart(recipe.buffers, config)
        described = recipe.to_spec()
        require_measured(recipe, described, config)
        require_equal_shards(recipe.weight, recipe.loss_over, config.aggregation)
        try_optimizers(recipe, config)
        spec = {"recipe": described, "config": config.to_json(), "fingerprint": fingerprint(described)}
        spec["evaluation_seed"] = "dataset"  # a run of before, which has no such word, keeps its evaluations
        spec |= self._told(on, callbacks)
        start = None if start_from is None else read_start(start_from, self.run)
        self._sender.say_turns(name, config.weight, config.priority)
        there = self._create(name, spec, start)
        if there is None:
            self._submitted.add(name)
            self._sender.advance(name)
            return self.run(name)
        if differing := _other(spec, there, recipe, config, start):
            raise ConfigMismatch(
                f"run {name!r} exists with another {', '.join(differing)}; choose another name, or submit it "
                "with what it has"
            )
        self._submitted.add(name)
        run = self.run(name)
        state = run.status().state
        if state in ("paused", "failed"):
            run.resume()
        elif state in ("pending", "running"):
            self._sender.advance(name)
        return run

    def _fixed(self, config: TrainingConfig, name: str | None) -> TrainingConfig:
        """The config with its number of shards: that of the run that is there, else the fleet's."""
        if config.shards != AUTO:
            return config
        if name is not None:
            with suppress(RunNotFound):
                there = self._services.ledger(keys.check_name(name)).spec()["config"]
                return replace(config, shards=TrainingConfig.from_json(there).shard_count)
        started = starting(self.url)  # before the registry, see there
        return fixed(config, self._services.registry.alive(), started)

    def _told(self, on: On | None, callbacks: Sequence[Entry] | None) -> dict[str, Any]:
        """What a spec has of whoever is told of the run."""
        told: dict[str, Any] = {}
        if on is not None:
            told["on"] = read_on(on, self._services.settings)
        if callbacks is not None:
            told["callbacks"] = described_callbacks(callbacks)
        return told

    def _create(self, name: str, spec: dict[str, Any], start: StartingPoint | None) -> dict[str, Any] | None:
        """Create the run unless it is there; the spec of the one that is.

        The weights that it starts from are stored first, so that whoever finds the run finds them.
        """
        ledger = self._services.ledger(name)
        if start is not None:
            with suppress(RunNotFound):
                ledger.head()
                return ledger.spec()
            stored = self._services.parameters.publish_start(ledger, start.weights)
            origin = {"source": start.source, "digest": start.digest, "weights": stored.as_dict()}
            spec = {**spec, "start_from": origin}
        there = ledger.create(spec, incarnation=uuid.uuid4().hex[:12])
        if start is not None and there is not None:  # created by another process meanwhile
            self._services.chunks.delete(stored.blobs())
        return there

    def fit(
        self,
        recipe: Recipe,
        config: TrainingConfig | None = None,
        *,
        name: str | None = None,
        start_from: StartFrom | None = None,
        on: On | None = None,
        callbacks: Sequence[Entry] | None = None,
        progress: bool = True,
        timeout: float | None = None,
    ) -> TrainedModel:
        """`submit`, then `Run.wait`; arguments and errors as there."""
        run = self.submit(recipe, config, name=name, start_from=start_from, on=on, callbacks=callbacks)
        return run.wait(progress=progress, timeout=timeout)

    def run(self, name: str) -> Run:
        """A handle on the run of that name, whether or not it exists yet."""
        return Run(self._services, self._sender, keys.check_name(name), trusted=name in self._submitted)

    @property
    def datasets(self) -> Datasets:
        """The stored datasets: put, list, delete and open what `stored_dataset` in a recipe names.

        Raises:
            InvalidInput: the workers that run store chunks elsewhere.
        """
        self._services.require_same_placement()
        return Datasets(self._services.settings)

    def runs(self, **query: Any) -> list[str]:
        """Names of runs; without arguments of those that Redis knows, oldest first.

        With any of the arguments of `records`, those that fit, in their order; Redis may have forgotten them.
        """
        return [record.name for record in self.records(**query)] if query else self._services.runs.known()

    def records(
        self,
        *,
        state: str | Iterable[str] | None = None,
        since: float | datetime | None = None,
        metric: str | None = None,
        tag: str | Iterable[str] | None = None,
        order: str | None = None,
    ) -> list[RunRecord]:
        """What is known of the runs that fit, those included that Redis has forgotten: see docs/store.md.

        Args:
            state: a state or several; "on disk" for runs of which the checkpoints alone are left.
            since: when they were submitted, at the earliest: Unix time (s), or a datetime.
            metric: one that they have, or a comparison such as "accuracy>=0.9".
            tag: one that they bear, or several that they all bear.
            order: "submitted" (as it is without one), "changed", "name", "version", "loss" or "metric"; with
                a "-" before it the largest first.

        Raises:
            InvalidInput: an argument is none that is known.
            CacheUnreachable: Redis does not answer.
            CheckpointError: the database of runs does not.
        """
        query = {"state": state, "since": since, "metric": metric, "tag": tag, "order": order}
        return chosen(known(self._services).values(), **query)  # type: ignore[arg-type]


def _other(
    spec: dict[str, Any],
    there: dict[str, Any],
    recipe: Recipe,
    config: TrainingConfig,
    start: StartingPoint | None,
) -> list[str]:
    """What of the run that is there is another than what was submitted."""
    before = {"loss_over": recipe.loss_over, **there["recipe"]}
    before_checks = {"audit_fraction": config.audit_fraction}  # such a run goes on without them
    differing = _differences(spec["recipe"], Recipe.from_spec(before).to_spec()) + config.differences(
        TrainingConfig.from_json({**before_checks, **there["config"]})
    )
    if "fork" in there or there.get("start_from", {}).get("digest") != (start.digest if start else None):
        differing.append("start_from")
    for name in ("on", "callbacks"):
        if name in spec and (there.get(name) or None) != (spec[name] or None):
            differing.append(name)
    return differing


def _differences(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """Names of the recipe entries that differ.

    A run that was submitted when a spec had no kinds of arguments, or no `loss_over`, is the same without.
    """
    return [
        f"recipe.{field}"
        for field in sorted({*ours, *theirs})
        if theirs.get(field) not in (ours.get(field), _without_kinds(ours.get(field)))
    ]


def _without_kinds(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    if "target" in entry:
        return {name: value for name, value in entry.items() if name != "kinds"}
    return {name: _without_kinds(value) for name, value in entry.items()}
