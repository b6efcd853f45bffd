"""Plain training loops in one process: what a pipeline's weights are compared with, bit for bit.

Nothing of the training server, the Clients, the queue, the store or the averaging is used here. The
loops follow the documented contract alone:

- which examples belong to which shard of which step: `torchord.coordinator.spec.plan.Plan`;
- every generator (torch, numpy's global one, `random`) is seeded with `derive_seed(seed, ...)` of
  "init" before the model is built, "dataset" before the dataset is, "optimizer" before the optimizer
  is, ("data", step, shard) before a shard is read, ("model", step, shard) before its forward, and
  ("update", step) before the optimizer steps;
- one torch thread, deterministic algorithms;
- the step's gradient is the sum over the shards, in shard order, of n_k / N times the gradient of the
  shard's mean loss; with more shards than `fan_in`, they are summed so in contiguous groups, the sums of
  the groups in contiguous groups, and so on, until no more than `fan_in` are left to be summed in order;
- every shard's forward starts from the buffers of the step's version; afterwards a floating buffer is
  b_0 + sum over k > 0 of n_k / N (b_k - b_0), and any other the value of the first shard that changed it;
  in groups, each keeps its own b_0 and sum over the shards that changed the buffer, which shift to the
  first group's b_0 where they meet; the shards that did not change it come last, with the old value;
- with nonfinite="skip" a step with a NaN or infinity leaves everything alone but the scheduler;
- with precision="fp16" torch's own GradScaler scales, unscales and skips.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.utils.data import default_collate

from torchord import Recipe, TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed

Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


@dataclass
class Reference:
    """What a loop ended with.

    Attributes:
        module: the trained model.
        losses: count-weighted mean loss of each step.
        skipped: the steps that were left out.
        lrs: learning rate of each parameter group, for each step.
        scales: loss scale after each step.
    """

    module: nn.Module
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    lrs: list[tuple[float, ...]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    @property
    def bits(self) -> Bits:
        """The bytes of the model's state dict."""
        return bits(self.module)


def bits(state: nn.Module | dict[str, Tensor]) -> Bits:
    """Name -> (dtype, shape, bytes) of a state dict: equal in every bit, NaN and -0.0 included."""
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: (str(t.dtype), tuple(t.shape), _bytes(t)) for name, t in tensors.items()}


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy().tobytes())


def all_bits(module: nn.Module) -> Bits:
    """Like `bits`, and the buffers that are not in the state dict (persistent=False) besides."""
    return bits({**module.state_dict(), **dict(module.named_buffers())})


def accumulate(recipe: Recipe, config: TrainingConfig, device: str = "cpu") -> Reference:
    """The loop that everybody writes: `(loss_k * n_k / N).backward()` shard after shard, then `step()`.

    It has the pipeline's bits where each n_k / N is a power of two, so that the product is exact; for
    other sizes see `average`.
    """
    weights = {n / sum(sizes) for sizes in _sizes(recipe, config) for n in sizes}
    assert all(math.frexp(weight)[0] == 0.5 for weight in weights), f"not powers of two: {weights}"
    return _train(recipe, config, scaled_loss=True, device=device)


def average(recipe: Recipe, config: TrainingConfig, device: str = "cpu") -> Reference:
    """The same for shards of any size: each shard's gradient, then the weighted sum in shard order."""
    return _train(recipe, config, scaled_loss=False, device=device)


def large_batch(recipe: Recipe, config: TrainingConfig) -> Reference:
    """One batch a step, no shards, no seeds inside a step: what training in one process is without us.

    Comparable for models that draw no random numbers and keep no batch statistics.
    """
    model, data, optimizer, scheduler = _parts(recipe, config)
    result = Reference(model)
    plan = Plan(len(data), config)
    with _pinned(config.threads):
        for step in range(plan.total_steps):
            indices = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
            optimizer.zero_grad()
            loss = _loss(recipe, config, model.train(), _read(recipe, data, indices))
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            result.losses.append(loss.item())
    return result


# --- parts ------------------------------------------------------------------------------


def _train(recipe: Recipe, config: TrainingConfig, *, scaled_loss: bool, device: str) -> Reference:
    model, data, optimizer, scheduler = _parts(recipe, config, device)
    result = Reference(model)
    plan = Plan(len(data), config)
    parameters = list(model.parameters())
    scaler = torch.amp.GradScaler(
        device,
        enabled=config.precision == "fp16",
        init_scale=config.loss_scale,
        growth_interval=config.loss_scale_interval,
    )
    for step in range(plan.total_steps):
        shards = range(plan.shards_in(step))
        count = plan.examples(step)
        before = _buffers(model)
        after: list[tuple[float, dict[str, Tensor]]] = []
        found: list[list[Tensor | None]] = []
        mean = 0.0
        optimizer.zero_grad()
        for shard in shards:
            indices = [int(i) for i in plan.indices(step, shard)]
            weight = len(indices) / count
            with _pinned(config.threads):
                _seed(derive_seed(config.seed, "data", step, shard))
                batch = _there(_read(recipe, data, indices), device)
                _set_buffers(model, before)
                _seed(derive_seed(config.seed, "model", step, shard))
                loss = _loss(recipe, config, model.train(), batch)
                if scaled_loss:
                    scaler.scale(loss * weight).backward()
                else:
                    scaler.scale(loss).backward()
                    found.append([p.grad for p in parameters])
                    optimizer.zero_grad()
                    model.zero_grad()
            mean += loss.item() * len(indices)
            after.append((weight, _buffers(model)))
        if not scaled_loss:
            weights = [weight for weight, _ in after]
            for index, parameter in enumerate(parameters):
                parameter.grad = _sum([grads[index] for grads in found], weights, config.fan_in)
        scaler.unscale_(optimizer)
        _set_buffers(model, before)
        result.losses.append(mean / count)
        result.lrs.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
        finite = math.isfinite(mean) and all(
            bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None
        )
        if finite:
            with _pinned(config.threads):
                _seed(derive_seed(config.seed, "update", step))
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                scaler.step(optimizer)
            if len(after) > config.fan_in:
                sizes = plan.shard_sizes(step)
                _set_buffers(model, _averaged_in_groups(before, after, sizes, config.fan_in))
            else:
                _set_buffers(model, _averaged(before, after))
        else:
            assert config.nonfinite == "skip" or scaler.is_enabled(), f"step {step} is not finite"
            result.skipped.append(step)
        scaler.update()
        result.scales.append(scaler.get_scale())
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(result.losses[-1])
        elif scheduler is not None:
            scheduler.step()
    return result


def _parts(
    recipe: Recipe, config: TrainingConfig, device: str = "cpu"
) -> tuple[nn.Module, Any, torch.optim.Optimizer, Any]:
    """Model, dataset, optimizer, scheduler; the recipe's entries are callables here, no strings."""
    made: list[Any] = []
    for name, entry in (("init", recipe.model), ("dataset", recipe.dataset)):
        with _pinned(config.threads, fill=name == "init"):
            _seed(derive_seed(config.seed, name))
            made.append(entry())  # type: ignore[operator]
    model, data = made
    model.to(device)
    with _pinned(config.threads):
        _seed(derive_seed(config.seed, "optimizer"))
        groups = model.parameters() if recipe.parameter_groups is None else recipe.parameter_groups(model)  # type: ignore[operator]
        optimizer = recipe.optimizer(groups)  # type: ignore[operator]
        scheduler = None if recipe.scheduler is None else recipe.scheduler(optimizer)  # type: ignore[operator]
    return model, data, optimizer, scheduler


def _read(recipe: Recipe, data: Any, indices: list[int]) -> Any:
    samples = data.__getitems__(indices) if hasattr(data, "__getitems__") else [data[i] for i in indices]
    return (recipe.collate or default_collate)(samples)  # type: ignore[operator]


def _loss(recipe: Recipe, config: TrainingConfig, model: nn.Module, batch: Any) -> Tensor:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    with nullcontext() if half is None else torch.autocast(_device_of(model), dtype=half):
        if recipe.step is not None:
            return recipe.step(model, batch)  # type: ignore[operator,no-any-return]
        inputs, targets = batch
        return recipe.loss(model(inputs), targets)  # type: ignore[operator,misc,no-any-return]


def _there(batch: Any, device: str) -> Any:
    if isinstance(batch, dict):
        return {name: value.to(device) for name, value in batch.items()}
    return batch if device == "cpu" else [value.to(device) for value in batch]


def _device_of(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _add(total: Tensor | None, gradient: Tensor | None, weight: float) -> Tensor | None:
    if gradient is None:
        return total
    return gradient * weight if total is None else total.add(gradient, alpha=weight)


def _groups(items: list[Any], fan_in: int) -> list[list[Any]]:
    """Contiguous groups of at most `fan_in`, as few as that takes, as even as can be, larger ones first."""
    return [
        [items[int(i)] for i in places]
        for places in np.array_split(np.arange(len(items)), -(-len(items) // fan_in))
    ]


def _sum(gradients: list[Tensor | None], weights: list[float], fan_in: int) -> Tensor | None:
    """The weighted sum of the shards' gradients, group by group."""

    def chain(pairs: list[tuple[Tensor | None, float]]) -> Tensor | None:
        total: Tensor | None = None
        for gradient, weight in pairs:
            total = _add(total, gradient, weight)
        return total

    level: list[tuple[Tensor | None, float]] = list(zip(gradients, weights, strict=True))
    while len(level) > fan_in:
        level = [(chain(group), 1.0) for group in _groups(level, fan_in)]
    return chain(level)


def _averaged_in_groups(
    before: dict[str, Tensor], after: list[tuple[float, dict[str, Tensor]]], sizes: list[int], fan_in: int
) -> dict[str, Tensor]:
    new, count = {}, sum(sizes)
    for name, old in before.items():
        level: list[Any] = [
            None if torch.equal(values[name], old) else (values[name], torch.zeros_like(old), size)
            for size, (_, values) in zip(sizes, after, strict=True)
        ]
        if not old.is_floating_point():
            new[name] = next((item[0] for item in level if item is not None), old)
            continue
        while len(level) > fan_in:
            level = [_shifted(group, count) for group in _groups(level, fan_in)]
        whole = _shifted(level, count)
        if whole is None:
            new[name] = old
            continue
        base, moved, examples = whole
        if examples < count:
            moved = moved.add(old - base, alpha=(count - examples) / count)
        new[name] = base + moved
    return new


def _shifted(items: list[Any], count: int) -> Any:
    """(first value, weighted deviations from it, examples) of a group's members that changed the buffer."""
    there = [item for item in items if item is not None]
    if not there:
        return None
    base, moved, examples = there[0][0], there[0][1].clone(), there[0][2]
    for value, own, size in there[1:]:
        moved.add_(own)
        moved.add_(value - base, alpha=size / count)
        examples += size
    return base, moved, examples


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        home, _, last = name.rpartition(".")
        setattr(model.get_submodule(home), last, value.clone())


def _averaged(before: dict[str, Tensor], after: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    new = {}
    for name, old in before.items():
        values = [found[name] for _, found in after]
        if old.is_floating_point():
            moved = torch.zeros_like(old)
            for (weight, _), value in zip(after[1:], values[1:], strict=True):
                moved.add_(value - values[0], alpha=weight)
            new[name] = values[0] + moved
        else:
            new[name] = next((value for value in values if not torch.equal(value, old)), old)
    return new


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def _pinned(threads: int, *, fill: bool = False) -> Iterator[None]:
    """Thread count and deterministic algorithms of the run, put back afterwards, generators too."""
    memory: Any = torch.utils.deterministic
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    generators = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    filled = memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        memory.fill_uninitialized_memory = filled
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])


def _sizes(recipe: Recipe, config: TrainingConfig) -> list[list[int]]:
    plan = Plan(len(recipe.dataset()), config)  # type: ignore[operator,arg-type]
    return [plan.shard_sizes(step) for step in range(plan.total_steps)]
