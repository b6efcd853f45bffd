"""A run as one process sees it: recipe, config, plan, data and replica, each made once."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.content_digest import chosen
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.errors import DatasetChanged, ManifestMismatch, RunError, Skewed
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord, VersionRecord
from torchord.cache.tensors.codec import Manifest
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.compiling import toolchain
from torchord.coordinator.compute.deltas import forward
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import keeps_state
from torchord.coordinator.compute.splitting import open_evaluation
from torchord.coordinator.compute.switches import own_thread
from torchord.coordinator.compute.visiting import Visiting, visiting_of
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.recorded import recorded_visits, switches_of
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.epochs import Visits
from torchord.coordinator.spec.fingerprints import fingerprint, skewed, source_of
from torchord.coordinator.spec.plan import Indices, Plan
from torchord.coordinator.spec.resolving import ResolvedRecipe, resolve

log = logging.getLogger(__name__)

_CONTEXTS_KEPT = 4


class Contexts:
    """The runs that one process works on.

    Args:
        services: the process's connections and stores.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._contexts: OrderedDict[tuple[str, str], RunContext] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: str, incarnation: str) -> RunContext:
        """The run's recipe, config, data and replica in this process, made at first use."""
        key = (run, incarnation)
        with self._lock:
            found = self._contexts.get(key)
            if found is None:
                found = RunContext(self.services, run, incarnation)
                log.info("run %s: begins here", run)
                for other in [
                    k for k in self._contexts if k[0] == run and revision(k[1]) == revision(incarnation)
                ]:
                    found.adopt(self._contexts.pop(other))
                self._contexts[key] = found
                while len(self._contexts) > _CONTEXTS_KEPT:
                    self._contexts.popitem(last=False)
            self._contexts.move_to_end(key)
            return found

    def holds(self, run: str, version: int) -> bool:
        """Whether this process has a version of a run loaded (of any life of that name)."""
        with self._lock:
            return any(key[0] == run and made.loaded == version for key, made in self._contexts.items())

    def forget(self, run: str) -> None:
        """Drop what this process keeps of a run (after an error in its code, say)."""
        with self._lock:
            for key in [key for key in self._contexts if key[0] == run]:
                del self._contexts[key]

    def close(self) -> None:
        """Let go of the replicas: they map the host's memory."""
        with self._lock:
            self._contexts.clear()


class Held(Protocol):
    """A version that this process has made itself."""

    version: int
    digest: str

    @property
    def slots(self) -> Mapping[int, StateRecord]:
        """What its slots keep."""

    def flat(self) -> Tensor:
        """Its bytes: not to be written to, and another version's after `RunContext.let_go`."""

    def spoil(self) -> None:
        """Something has written to them: `flat` is to write them anew."""


class RunContext:
    """One run as seen by one process. Every part is made lazily and once.

    Args:
        services: the process's stores.
        run: name of the run.
        incarnation: id of this life of the name.
    """

    def __init__(self, services: Services, run: str, incarnation: str) -> None:
        self.services = services
        self.run = run
        self.incarnation = incarnation
        self.ledger = services.ledger(run)
        self.lock = threading.RLock()
        self._spec: dict[str, Any] | None = None
        self._resolved: ResolvedRecipe | None = None
        self._skewed: list[str] | None = None
        self._config: TrainingConfig | None = None
        self._toolchain: str | None = None
        self._datasets: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._visiting: Visiting | None = None  # what the recipe's order or batches gives
        self._digest = ""  # of the dataset's content, where it has one
        self._replica: Replica | None = None
        self.held: Held | None = None  # a version that this process has made itself
        self.joined = False  # whether this process has compared its first shard with the others'
        self.unlike = ""  # how that differed

    def adopt(self, other: RunContext) -> None:
        """Take over what a switch of the config leaves as it was: recipe, data and replica.

        A thread may still be at work on the other; both then share the lock, and the replica knows
        itself which version it holds.
        """
        self.lock, self._resolved, self._skewed = other.lock, other._resolved, other._skewed
        self._datasets, self._replica = other._datasets, other._replica
        self._visiting, self.held = other._visiting, other.held
        self.joined, self.unlike = other.joined, other.unlike

    @property
    def spec(self) -> dict[str, Any]:
        """Recipe and config as submitted."""
        with self.lock:
            if self._spec is None:
                self._spec = self.ledger.spec()
            return self._spec

    def saved_spec(self) -> dict[str, Any]:
        """The spec as it is kept beside the checkpoints, from which a run can be created again."""
        sealed = {"sealed": self.ledger.sealed_spec()} if self.services.file_keyring else {}
        return {**self.spec, "incarnation": self.incarnation, **sealed}

    @property
    def config(self) -> TrainingConfig:
        """The run's configuration."""
        with self.lock:
            if self._config is None:
                self._config = TrainingConfig.from_json(self.spec["config"])
                self.ledger.digest = chosen(self._config.digest, keyed=bool(self.services.file_keyring))
            return self._config

    @property
    def switches(self) -> dict[int, dict[str, Any]]:
        """The live switches of the run: step -> config fields that change from it on."""
        return switches_of(self.spec)

    def skewed(self) -> list[str]:
        """Modules of the recipe whose sources here differ from the submitter's.

        What counts is the source at the time this process first met the module: a file that was
        edited since does not change what the process has imported.
        """
        with self.lock:
            if self._skewed is None:
                theirs = str(self.spec.get("fingerprint", ""))
                self._skewed = skewed(theirs, fingerprint(self.spec["recipe"], like=theirs, read=_first_met))
            return self._skewed

    def require_same_code(self) -> None:
        """Refuse to work on the run with other sources than it was submitted with, or what comes to that.

        Raises:
            Skewed: the sources differ and the run's policy is "refuse", or this process has computed another
                first shard than the run's others (`torchord.coordinator.runtime.joining`).
        """
        if self.unlike:
            raise Skewed(self.unlike)
        modules = self.skewed()
        if modules and self.spec.get("skew", self.config.skew) == "refuse":
            raise Skewed(
                f"run {self.run!r} was submitted with another version of {', '.join(modules)} than this "
                "worker has loaded; give it the same files and restart it, run.resume(admit_code=True) where "
                "the new code is right, or run.resume(admit_skew=True)"
            )

    def require_same_toolchain(self) -> str:
        """Refuse to compute a compiled run with another compiler than its first worker's.

        Returns:
            This process's toolchain, "" for a run that is not compiled.

        Raises:
            Skewed: it is another one and the run's policy is "refuse".
            CompilerMissing: there is none.
        """
        with self.lock:
            if self._toolchain is None:
                self._toolchain = self._claimed_toolchain() if self.config.compile else ""
            return self._toolchain

    def _claimed_toolchain(self) -> str:
        here = toolchain(device())
        first = self.ledger.claim_toolchain(here)
        if first != here and self.spec.get("skew", self.config.skew) == "refuse":
            raise Skewed(
                f"run {self.run!r} is compiled with {first}; this worker has {here}, whose kernels may give "
                "other bits. Give it the same compiler, or run.resume(admit_skew=True)"
            )
        return here

    @property
    def recipe(self) -> ResolvedRecipe:
        """The recipe's callables.

        Raises:
            NotAllowed: the allow-list of this worker has no room for a module of the recipe.
            RecipeError: a module or name cannot be imported here.
        """
        with self.lock:
            if self._resolved is None:
                self.skewed()  # before the import: the sources as they are imported
                leave = own_thread()
                try:
                    self._resolved = resolve(
                        self.spec["recipe"], allowed=self.services.settings.allowed_modules
                    )
                finally:
                    leave()  # a module may have turned gradients off, or chosen a default device
            return self._resolved

    def dataset(self, kind: str = "dataset") -> Any:
        """The training dataset, or the one of `kind` "evaluation".

        Raises:
            RunError: this worker's training data has another length than the run's.
            DatasetChanged: a stored dataset was replaced since the run began.
        """
        with self.lock:
            if kind not in self._datasets:
                seeded = self._evaluation_seed() if kind == "evaluation" else None
                made = open_dataset(self.recipe, self.config, kind, seeded=seeded)
                if kind == "dataset" and self._plan is not None:
                    self._require_same_data(made, self._plan)
                self._datasets[kind] = made
            return self._datasets[kind]

    def _evaluation_seed(self) -> str:
        """By which entry's seed the evaluation dataset is made, as the training server recorded it."""
        ours = str(self.spec.get("evaluation_seed", "evaluation"))
        return ours if ours == "evaluation" else str(self.ledger.manifest().get("evaluation_seed", ours))

    def first_evaluation(self) -> tuple[int, str]:
        """Make the evaluation dataset of a run that begins; its examples, and by which entry's seed."""
        if self.recipe.evaluation is None:
            return 0, ""
        if "evaluation_seed" not in self.spec:
            return len(self.dataset("evaluation")), "evaluation"
        with self.lock:
            made, seeded = open_evaluation(self.recipe, self.config, self.dataset())
            self._datasets["evaluation"] = made
            return len(made), seeded

    def plan(self) -> Plan:
        """Which samples belong to which shard, for the dataset size that the run recorded.

        Raises:
            RunError, DatasetChanged: as `dataset`.
        """
        if self._plan is not None:
            return self._plan
        with self.lock:
            if self._plan is None:
                head = self.ledger.head()
                size, self._digest = head.dataset_size, head.dataset_digest
                plan = self.first_plan() if size is None else self._recorded_plan(size)
                if "dataset" in self._datasets:
                    self._require_same_data(self._datasets["dataset"], plan)
                self._plan = plan
            return self._plan

    def first_plan(self) -> Plan:
        """The plan of a run that has none yet, for the training server to record.

        Raises:
            RecipeError: the recipe's order or batches cannot be used.
        """
        dataset = self.dataset()
        visiting = visiting_of(self.recipe, self.config, dataset)
        visits = None if visiting is None else visiting.survey()
        return Plan(len(dataset), self.config, self.switches, visits=visits, visited=visiting)

    def _recorded_plan(self, size: int) -> Plan:
        visits = recorded_visits(self.ledger, self.spec)
        visited = None if visits is None else partial(self._visited, visits)
        return Plan(size, self.config, self.switches, visits=visits, visited=visited)

    def _visited(self, visits: Visits, epoch: int) -> Indices:
        with self.lock:
            if self._visiting is None:
                self._visiting = visiting_of(self.recipe, self.config, self.dataset(), visits)
            assert self._visiting is not None
            return self._visiting(epoch)

    def _require_same_data(self, loaded: Any, plan: Plan) -> None:
        """Refuse training data that is not what the run was planned for; asked once a process."""
        if len(loaded) != plan.size:
            raise RunError(
                f"the dataset has {len(loaded)} samples on this worker and {plan.size} in the run; "
                "give every worker the same data"
            )
        here = getattr(loaded, "digest", "")
        if self._digest and here != self._digest:
            raise DatasetChanged(
                f"the dataset of run {self.run!r} has the digest {here or 'none'} on this worker and "
                f"{self._digest} in the run: it was replaced. Submit the run anew, under another name"
            )

    def keeps_state(self, step: int) -> bool:
        """Whether the slots of a step hand a state on to the next."""
        return keeps_state(self.plan().config_at(step), self.recipe)

    def replica(self) -> Replica:
        """This process's copy of the model, on its device, holding any version or none."""
        with self.lock:
            if self._replica is None:
                built = Replica.build(self.recipe, self.config, device(), computing=True)
                self.lay_out(built)
                self._replica = built
            return self._replica

    def lay_out(self, replica: Replica) -> None:
        """Lay a new model out like the run's versions, in whatever order this process registered its parts.

        Raises:
            ManifestMismatch: it is another model; names the first tensor that differs.
        """
        try:
            replica.arrange(Manifest.from_json(self.ledger.manifest()))
        except ManifestMismatch as error:
            raise ManifestMismatch(
                f"run {self.run!r}: {error}; this worker's code builds another model than the run's: give it "
                "the same files and restart it"
            ) from error

    @property
    def loaded(self) -> int | None:
        """The version that the replica holds, None if there is none."""
        return None if self._replica is None else self._replica.loaded

    def replica_at(
        self,
        version: int,
        record: VersionRecord | None = None,
        ahead: Callable[[BlobRef], ReadAhead | None] | None = None,
    ) -> tuple[Replica, str]:
        """The replica, holding `version`, and where that came from: "process", "delta", "host" or "store".

        Args:
            record: where the version is, if that is known already.
            ahead: finds what was read of it before it was committed.
        """
        replica = self.replica()
        if replica.loaded == version and not replica.spoilt():
            self.services.parameters.hit()
            return replica, "process"
        ledger = self.ledger
        deltas = self.config.parameter_compression != "none"
        held = deltas and replica.loaded is not None and not replica.spoilt()
        if self.held is not None and replica.loaded == self.held.version and replica.spoilt():
            self.held.spoil()
        replica.loaded = None
        if self.held is not None and self.held.version == version:
            replica.attach(self.held.flat())
            replica.loaded, replica.digest = version, self.held.digest
            return replica, "process"
        if held and self._forward(replica, ledger, version):
            replica.loaded = version
            return replica, "delta"
        record, found, source = self.services.parameters.fetch_bytes(
            ledger,
            version,
            manifest=replica.manifest,
            rest=replica.rest,
            room=partial(self._room, replica),
            record=record,
            ahead=ahead,
        )
        replica.attach(found.own, found.rest)
        replica.loaded, replica.digest = version, record.digest
        return replica, source

    def let_go(self, flat: Tensor) -> None:
        """Have the replica hold no version in this memory any more: it is about to be written to."""
        if self._replica is not None and self._replica.flat is flat:
            self._replica.loaded = None

    def _room(self, replica: Replica, nbytes: int) -> Tensor | None:
        """Memory for a version that the host's tier does not map; None for new memory."""
        if self.held is not None:  # what the replica looks at may be its
            return None
        mapped = self.services.chunks.tiered(nbytes)
        return None if mapped and replica.memory is not None else replica.landing(nbytes)

    def _forward(self, replica: Replica, ledger: Ledger, version: int) -> bool:
        """Bring the replica to a version by the deltas from what it holds, if that can be done."""
        return forward(replica, self.services.parameters, ledger, version, self.recipe.codec)


_sources: dict[str, bytes] = {}


def _first_met(module: str) -> bytes | None:
    """A module's source as it was when this process first met the module; None if it is not here."""
    if module not in _sources and (found := source_of(module)) is not None:
        _sources[module] = found
    return _sources.get(module)
