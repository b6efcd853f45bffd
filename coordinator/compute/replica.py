"""`Replica`: one run's model in one process, at one parameter version.

The state of a model is its parameters and all its buffers, non-persistent and integer ones
included; a version is that state in one flat buffer. A replica is built once per run and
process, and versions are then copied into it in place, so that tied weights stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.tensors.codec import (
    Manifest,
    layout,
    pack,
    require_same,
    row_major,
    views,
)
from torchord.cache.tensors.halves import Rest
from torchord.coordinator.compute.averaging import Average, AveragedWeights, average_of
from torchord.coordinator.compute.buffer_rules import Rule, contributions, rules_of
from torchord.coordinator.compute.compiling import compiled
from torchord.coordinator.compute.counted_names import renamed
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.device_memory import CudaCopies, DeviceMemory
from torchord.coordinator.compute.forward_watch import ForwardWatch
from torchord.coordinator.compute.frameworks import adopt, first_names
from torchord.coordinator.compute.held_buffers import HeldBuffers
from torchord.coordinator.compute.loss_scale import ENTRY, LossScale, at_start
from torchord.coordinator.compute.model_state import (
    OnCpu,
    Places,
    align,
    formatted,
    named,
    overlapping,
    reorder,
    require_plain,
    same_bytes,
    unfold,
)
from torchord.coordinator.compute.modes import Modes
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.default_dtype import require_float32
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe


class Replica:
    """A model, its fixed state tensors, and the version they hold.

    Make one with `build`. Attributes:
        model: the module, on `device`.
        config: the run's config.
        device: where the model lives.
        parameters: name -> parameter, tied ones once, frozen ones included.
        buffers: name -> buffer tensor, tied ones once.
        frozen: name -> parameter that is not trained. What a forward writes there is handled like a
            buffer (Keras keeps the moving mean of a BatchNorm in one).
        shared: names of the parameters and buffers that share memory, group by group, such as a parameter
            made from another's transpose: they stay where they are, and move together.
        loss_scale: the version's loss scale; None where the precision needs none.
        average: the version's averaged weights; None where the recipe asks for no average.
        manifest: layout of a version: parameters, then buffers, then the loss scale and the average.
        flat: 1-D uint8 CPU tensor, the version that the model was loaded with, or what moves of it; None
            before the first `load`.
        rest: what the version has beside `flat`; None where that is the whole.
        memory: flat buffers on the device, and what brings bytes there and back; None on the CPU.
        watch: finds out what a forward changes that no version holds.
        compiled: what computes shards in the model's place; None for the model itself.
        loaded: number of the version that `flat` holds, kept by whoever loads it; None if unknown.
        digest: of the bytes in `flat`, kept likewise; "" if unknown.
        modes: puts the model in training or evaluation mode.
        rules: name -> rule of each buffer and frozen parameter (`buffer_rules`).
        version_tensors: what the loaded version has, by name, on the CPU; not to be written to.
        tried: those of them of which this process knows that no batch enters them.
        counts: finds out whether the next model that this process makes has other names.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, device: torch.device, average: Average | None = None
    ) -> None:
        if device.type == "cpu":
            align(model)
        self.model = model
        self.config = config
        self.device = device
        self.loss_scale: LossScale | None = at_start(config)
        self.average = None if average is None else AveragedWeights(average, self._averageable)
        self._take_apart(dict(model.named_parameters()), dict(model.named_buffers()))
        self.flat: Tensor | None = None
        self.rest: Rest | None = None
        self.loaded: int | None = None
        self.digest = ""
        self.compiled: nn.Module | None = None
        self.modes = Modes(model)
        self.rules: Mapping[str, Rule] = {}
        self.tried: set[str] = set()
        self.counts: Callable[[], bool] = lambda: False
        self.version_tensors: dict[str, Tensor] = {}
        self._here: dict[str, Tensor] = {}  # the same on the device, where they are copied from
        self._rest_here: dict[str, Tensor] = {}  # of these, what rests
        self._attached = self._dirty = False
        self._copies = bool(self.shared)
        self.memory: DeviceMemory | None = None
        if device.type == "cuda":
            self.use(DeviceMemory(CudaCopies(device)))

    def _take_apart(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        self.parameters, self.buffers = parameters, buffers
        self.frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.manifest: Manifest = layout(self.state_tensors())
        held = overlapping({**parameters, **buffers})
        self.shared = [group for group in held if not parameters.keys().isdisjoint(group)]
        self.watch = ForwardWatch(self.model, self.parameters, self.frozen)
        self._held = HeldBuffers(self.model, buffers, self.watch)
        self._places = Places(parameters)

    def arrange(self, manifest: Manifest) -> None:
        """Be laid out like a run's versions; to be called before the first `load` and before any optimizer.

        A constructor may register its parts in an order that differs between processes, such as that of a
        set: parameters, buffers and modules take the manifest's order, in the module tree as well. It may
        name them by a count of its process: then they are held under the run's names (`counted_names`).

        Raises:
            ManifestMismatch: the model has other tensors; names the first.
            InvalidInput: names are counts and do not say what is what.
        """
        if manifest == self.manifest:
            return
        names = [spec.name for spec in manifest.tensors]
        parameters = named(self.model.named_parameters, names, self.parameters)
        buffers = named(self.model.named_buffers, names, self.buffers)
        if {*parameters, *buffers}.issubset(names):
            reorder(self.model, names)
            self._take_apart(parameters, buffers)
            require_same(self.manifest, manifest)
            self.manifest = manifest
        elif (theirs := renamed(self.manifest, manifest, self.counts)) is not None:
            parameters = {theirs[name]: parameter for name, parameter in self.parameters.items()}
            self.rules = {theirs.get(name, name): rule for name, rule in self.rules.items()}
            self._take_apart(parameters, {theirs[name]: buffer for name, buffer in self.buffers.items()})

    @classmethod
    def build(
        cls,
        resolved: ResolvedRecipe,
        config: TrainingConfig,
        device: torch.device | str = "cpu",
        *,
        computing: bool = False,
    ) -> Replica:
        """Call the recipe's model entry, seeded by the run, and move the result to a device.

        Args:
            resolved: the run's recipe.
            config: the run's config.
            device: where the model is to live.
            computing: whether it is to compute shards, in the config's memory format and compiled if
                the config says so; else it is plain and contiguous.

        The same run gives the same initial state in every process: the constructor runs with
        all generators seeded and fresh memory filled. The process's switches and generators
        are put back.

        Raises:
            InvalidInput: the entry made no module, its state cannot be laid out (lazy, sparse or
                meta tensors), a rule fits no buffer, or a module needs the whole batch (SyncBatchNorm).
        """
        device = torch.device(device)
        with pinned(config.threads, config.deterministic, device, fill=True, restore=True):
            seed_everything(derive_seed(config.seed, "init"))
            model = _model_of(resolved)
            laid_out = formatted(model.to(device), config if computing else None)
            made = cls(laid_out, config, device, average_of(resolved.average))
            made.modes.require_apart(config)
            made.rules = rules_of(made.model, resolved.buffers)
            made.counts = partial(_counts, resolved, config, device, made.manifest)
            if computing and config.compile:
                made.compiled = compiled(made.model)
            return made

    def state_tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor of the whole state, parameters first; the live tensors, detached."""
        state = {name: parameter.detach() for name, parameter in self.parameters.items()}
        state.update(self.buffers)
        if self.loss_scale is not None:
            state[ENTRY] = self.loss_scale.tensor()
        if self.average is not None:
            state.update(self.average.state_tensors())
        return state

    def _averageable(self) -> dict[str, Tensor]:
        """Name -> live tensor of what the average is of."""
        assert self.average is not None
        found = {name: p.detach() for name, p in self.parameters.items() if name not in self.frozen}
        if self.average.rule.buffers:
            real = {n: b for n, b in self.buffers.items() if b.is_floating_point() or b.is_complex()}
            found.update(real)
        return found

    def nbytes(self) -> int:
        """Return the bytes of one version of this model."""
        return self.manifest.nbytes

    def use(self, memory: DeviceMemory) -> None:
        """Move versions and gradients through a device's memory from now on; call before the first `load`.

        Versions are then always copied into the parameters, device to device: their alignment, by
        which libraries choose kernels, does not depend on what was computed before.
        """
        self.memory, self._copies = memory, True

    def landing(self, nbytes: int) -> Tensor | None:
        """Memory of a length that the next version may be received in; None where there is none yet.

        It may be what `flat` is: then the version that is loaded is gone.
        """
        if self.memory is not None:
            return self.memory.landing(nbytes, self.flat)
        return self.flat if self.flat is not None and self.flat.numel() == nbytes else None

    def may_rest(self) -> set[str]:
        """Names of the tensors that no step is expected to change: frozen parameters and buffers."""
        return {*self.frozen, *self.buffers}

    def version_here(self) -> Mapping[str, Tensor]:
        """Return name -> tensor of the loaded version, on the replica's device; not to be written to."""
        return self._here

    def pack(self, out: Tensor | None = None) -> Tensor:
        """Copy the state as it is now into one flat buffer (1-D uint8 on the CPU)."""
        if self.memory is not None:
            flat = self.memory.gather(self.state_tensors(), self.manifest)
            return flat if out is None else out.copy_(flat)
        return pack(self.state_tensors(), self.manifest, out)

    def load(self, buffer: Tensor, rest: Rest | None = None) -> None:
        """Take over a version.

        Args:
            buffer: 1-D uint8 CPU tensor laid out by `manifest`; beside a `rest`, what moves. It is kept, not
                copied, and must not change until the next `load`.
            rest: what the version has beside `buffer`, likewise.

        Raises:
            ManifestMismatch: the buffer has another size than this model's versions.
        """
        self.own()
        self._take(buffer, rest)
        self.restore()

    def _take(self, buffer: Tensor, rest: Rest | None) -> None:
        manifest = self.manifest if rest is None else rest.halves.moving_layout
        if buffer.numel() != manifest.nbytes:
            raise ManifestMismatch(
                f"a version of this model has {manifest.nbytes} bytes, the one given has "
                f"{buffer.numel()}; the run was started with other code than this worker's"
            )
        beside = {} if rest is None else rest.tensors
        if self.memory is not None and rest is not self.rest:
            self._rest_here = {name: tensor.to(self.device) for name, tensor in beside.items()}
        self.flat, self.rest = buffer, rest
        self.version_tensors = self._here = {**views(buffer, manifest), **beside}
        if self.memory is not None:
            self._here = {**views(self.memory.upload(buffer), manifest), **self._rest_here}

    @torch.no_grad()
    def attach(self, buffer: Tensor, rest: Rest | None = None) -> None:
        """Take over a version without a copy: the parameters become views of the buffer.

        For models that are only read, as in a plain step. A parameter that does not lie in memory as the
        version does (another device, other strides) is copied; so are frozen ones, which a forward may
        write to, and everything from the first time on that something wrote to another parameter.

        Args:
            buffer: as for `load`; a write to a parameter goes to it.
            rest: as for `load`; it serves several versions, so that nothing is attached there.
        """
        if self.spoilt():
            self._copies = True
        shared = rest is not None and not self.may_rest() >= rest.tensors.keys()
        if self._copies or shared or not all(map(row_major, self.parameters.values())):
            self.load(buffer, rest)
            return
        self._take(buffer, rest)
        for name, parameter in self.parameters.items():
            if name not in self.frozen:
                parameter.data = self.version_tensors[name]
        self._places.put(self.frozen, self._here)
        self._attached, self._dirty = True, False
        self._settle()

    def spoilt(self) -> bool:
        """Whether something wrote to an attached version; it has to be attached anew, from good bytes."""
        if self._attached and not self._dirty:
            self._dirty = any(name not in self.frozen for name in self._places.written())
        return self._attached and self._dirty

    @torch.no_grad()
    def own(self) -> bool:
        """Give the parameters memory of their own again, for whoever writes to them.

        Returns:
            Whether they were in other memory.
        """
        if not self._attached:
            return False
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
        self._places.note()
        self._attached = False
        return True

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a version given by name; see `load`.

        Raises:
            ManifestMismatch: names, shapes or dtypes differ from this model's state.
        """
        self.load(pack(tensors, self.manifest))

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the loaded version into parameters and buffers once more."""
        self._places.put(self.parameters, self._here)
        self._settle()

    def _settle(self) -> None:
        """What follows once the parameters hold a version."""
        self._places.note()
        self.reset_buffers()
        if self.loss_scale is not None:
            self.loss_scale = LossScale.of(self.version_tensors[ENTRY])
        if self.average is not None:
            self.average.take(self._here)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Put every buffer back to the loaded version, undoing what a forward did to it.

        Parameters are put back too if something wrote to them since; torch counts writes.
        """
        if written := self._places.written():
            self.spoilt()  # of which nothing is seen afterwards
            self._places.put(written, self._here)
        self._held.put(self._here)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in evaluation mode; afterwards it is in training mode, and nothing of it stays.

        Models that fold trained weights into a frozen one for evaluation take them out again when they are
        to train, and either goes past torch's count of writes.

        Raises:
            InvalidInput: the evaluation changed what no version holds, or a buffer's layout.
        """
        self.watch.begin(whole=self.watch.seldom())
        try:
            yield self.eval()
            self.written_tensors()
        finally:
            self.train()
            self._places.put(self.frozen, self._here)
        self.watch.end(again=False)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, if the recipe asks for an average.

        The loaded version is not written to: the tensors have other memory within the block.
        """
        if self.average is None:
            yield
            return
        version, values = self._here, self.average.tensors()
        trained = {name: self.parameters[name] for name in values if name in self.parameters}
        before = {name: parameter.data for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.data = torch.empty_like(parameter).copy_(values[name])
        self._here = {**version, **values}  # which buffers are put back to
        self._places.note()
        try:
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = before[name]
            self._here = version
            self._places.note()
            self.reset_buffers()

    @torch.no_grad()
    def put_average(self) -> None:
        """Let the model have its averaged weights, if there are any, until the next `load`."""
        if self.average is not None:
            self.own()
            self.write(self.average.tensors())

    def held(self) -> Mapping[str, Tensor]:
        """Return name -> value on the CPU of what a forward may write: buffers and frozen parameters."""
        return OnCpu({**self.buffers, **{name: p.detach() for name, p in self.frozen.items()}})

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy new values into buffers and frozen parameters."""
        for name, value in values.items():
            target = self.buffers.get(name)
            (self.parameters[name] if target is None else target).copy_(value)

    def changed_buffers(self) -> dict[str, Tensor]:
        """Return a CPU copy of each buffer and frozen parameter whose bytes differ from the loaded version.

        Of one whose rule is "sum", it is what was added to it.

        Raises:
            InvalidInput: a forward replaced a buffer by one of another shape or dtype.
        """
        written = self.written_tensors()
        return self.changed(
            {name: value.to("cpu", copy=True).contiguous() for name, value in written.items()}
        )

    def written_tensors(self) -> dict[str, Tensor]:
        """Return name -> live tensor of each buffer, and of each frozen parameter that was written to.

        Raises:
            InvalidInput: a forward replaced a buffer by one of another shape or dtype.
        """
        moved = [name for name in self._places.written() if name in self.frozen]
        return self._held.now() | {name: self.frozen[name].detach() for name in moved}

    def changed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a shard sends of some contiguous CPU tensors whose bytes differ from the loaded version's."""
        found = {name: v for name, v in values.items() if not same_bytes(v, self.version_tensors[name])}
        return contributions(found, self.version_tensors, self.rules)

    def train(self) -> nn.Module:
        """Switch the model to training mode, drop its gradients and return it, compiled if it is to be."""
        self.modes.train()
        self.model.zero_grad(set_to_none=True)
        return self.model if self.compiled is None else self.compiled

    def eval(self) -> nn.Module:
        """Switch the model to evaluation mode and return it."""
        return self.modes.eval()


def _counts(
    resolved: ResolvedRecipe, config: TrainingConfig, device: torch.device, manifest: Manifest
) -> bool:
    return Replica.build(resolved, config, device).manifest != manifest


def _model_of(resolved: ResolvedRecipe) -> nn.Module:
    """What the recipe's model entry makes, if a run can train it."""
    with first_names():
        model = resolved.model()
    require_float32("the recipe's model entry")
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"the recipe's model entry returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    adopt(model)
    require_plain(model)
    unfold(model)
    return model
