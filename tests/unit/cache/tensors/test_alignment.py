"""No bit depends on where a tensor starts or on its strides: only its values decide."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support import layouts
from tests.support.inprocess import same
from tests.support.layouts import LAYOUTS, NETS, OFFSETS, OPERATORS, Change, fresh, off
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import aligned, has_layout, layout, pack, views
from torchord.coordinator.compute.batch import to_device
from torchord.coordinator.compute.trainer import Trainer

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")

# --- the one layout ---------------------------------------------------------------------


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (13, 8), (4, 1, 3, 1), (0, 3)], ids=str)
def test_a_copy_has_the_bits_and_the_layout(
    shape: tuple[int, ...], dtype: torch.dtype, change: Change
) -> None:
    tensor = layouts.random(*shape).to(dtype)
    found = aligned(change(tensor))
    assert has_layout(found)
    assert found.stride() == torch.empty(shape).stride()
    assert found.data_ptr() % 64 == 0
    assert found.dtype == dtype and same(found, tensor)
    assert aligned(found) is found


def test_nan_keeps_its_payload() -> None:
    tensor = torch.tensor([0x7FC12345, 0x7F812345, -1], dtype=torch.int32).view(torch.float32)
    assert same(aligned(off(tensor, 4)), tensor)


def test_what_has_no_dense_memory_is_left_alone() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        assert aligned(tensor) is tensor


def test_conjugates_are_resolved() -> None:
    tensor = torch.complex(layouts.random(5), layouts.random(5, seed=1))
    found = aligned(tensor.conj())
    assert not found.is_conj() and torch.equal(found, tensor.conj())


def test_gradients_flow_through_a_copy_as_through_the_tensor() -> None:
    leaf = off(torch.ones(3), 4).requires_grad_()
    assert aligned(leaf).is_leaf and aligned(leaf).requires_grad
    weight = torch.ones(3, requires_grad=True)
    aligned((2 * weight).expand(2, 3)).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 4.0))  # type: ignore[arg-type]


# --- what is computed -------------------------------------------------------------------


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, change: Change) -> None:
    assert layouts.applied(name, change) == layouts.applied(name, fresh)


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", NETS)
def test_batches(name: str, change: Change) -> None:
    """Of gradients, evaluations and predictions."""
    assert layouts.shard(name, change) == layouts.shard(name, fresh)


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("name", NETS)
def test_parameters_and_buffers(name: str, change: Change) -> None:
    expected = layouts.parameters(name, fresh, attach=False)
    assert layouts.parameters(name, change, attach=False) == expected
    assert layouts.parameters(name, change, attach=True) == expected


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", NETS)
def test_a_version_gives_the_same_bits_attached_and_copied(name: str, change: Change) -> None:
    """Whatever order in memory a recipe gives its parameters."""
    attached = layouts.parameters(name, change, attach=True)
    assert attached == layouts.parameters(name, change, attach=False)


# --- batches of every form --------------------------------------------------------------


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Record:
    inputs: Tensor
    labels: Tensor
    name: str = "a"


class Encoding(UserDict[str, Any]):
    """Like Hugging Face's BatchEncoding."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {name: tensor.to(device) for name, tensor in self.data.items()}
        return self


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "named tuple": Pair,
    "dict": lambda x, y: {"inputs": x, "labels": y},
    "mapping": lambda x, y: UserDict(inputs=x, labels=y),
    "dataclass": Record,
    "encoding": lambda x, y: Encoding(inputs=x, labels=y),
    "nest": lambda x, y: [{"inputs": (x,)}, Record(y, x)],
}


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (dict, UserDict)):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [*tensors_of(value.inputs), *tensors_of(value.labels)] if isinstance(value, Record) else []


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_a_batch_is_laid_out(form: str) -> None:
    inputs, labels = layouts.random(13, 8), torch.arange(13)
    given = FORMS[form](off(inputs, 4), layouts.every_second(labels))
    before = tensors_of(given)
    found = to_device(given, CPU)
    assert all(map(has_layout, tensors_of(found)))
    assert all(map(same, tensors_of(found), before))
    if form == "dataclass":
        assert found.name == "a" and found is not given and not has_layout(given.inputs)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_laid_out_already_is_not_copied(form: str) -> None:
    inputs, labels = layouts.random(13, 8), torch.arange(13)
    found = tensors_of(to_device(FORMS[form](inputs, labels), CPU))
    assert {id(tensor) for tensor in found} == {id(inputs), id(labels)}


def test_one_tensor_at_two_places_stays_one() -> None:
    tokens = off(torch.arange(12).view(3, 4), 8)
    found = to_device({"input_ids": tokens, "labels": tokens, "others": [tokens.clone()]}, CPU)
    assert found["input_ids"] is found["labels"]
    assert found["others"][0] is not found["labels"]


# --- the optimizer's state --------------------------------------------------------------


class Rotating(torch.optim.Optimizer):
    """Steps in the basis of the gradients' second moment, which LAPACK gives column by column."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.view(len(parameter), -1)
            state = self.state[parameter]
            if not state:
                state["moment"] = torch.zeros(len(gradient), len(gradient))
                state["bases"] = [torch.eye(len(gradient))]
            basis = state["bases"][0]
            turned = basis @ (basis.T @ gradient).sign()[:, :1]
            parameter.sub_((0.1 * (gradient + turned)).view_as(parameter))
            state["moment"] += gradient @ gradient.T
            state["bases"] = [torch.linalg.eigh(state["moment"]).eigenvectors]


def stepped(*, restoring: bool) -> dict[str, Tensor]:
    """The parameters after some steps, by one server or by one after each other."""
    found = replace(layouts.recipe(NETS["thin"]), optimizer=Rotating)
    trainer = Trainer.build(found, layouts.CONFIG)
    for step in range(6):
        gradients = {
            name: layouts.random(*parameter.shape, seed=step)
            for name, parameter in trainer.replica.parameters.items()
        }
        trainer.apply(gradients, {}, step=step, loss=1.0)
        if restoring:
            skeleton, tensors = tree.flatten(trainer.state())
            manifest = layout(tensors)
            flat = trainer.replica.pack()
            stored = views(pack(tensors, manifest), manifest)
            trainer = Trainer.build(found, layouts.CONFIG)
            trainer.replica.load(flat)
            trainer.load_state(tree.unflatten(skeleton, stored))
    return {name: p.detach().clone() for name, p in trainer.replica.parameters.items()}


def test_a_successor_takes_the_steps_that_its_predecessor_would_have_taken() -> None:
    alone, relayed = stepped(restoring=False), stepped(restoring=True)
    assert alone.keys() == relayed.keys()
    assert all(same(alone[name], relayed[name]) for name in alone)


# --- instruction sets -------------------------------------------------------------------

_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    "all": {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    **(
        {
            "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
            "avx2 throughout": {
                "ATEN_CPU_CAPABILITY": "avx2",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
                "MKL_CBWR": "COMPATIBLE",
            },
        }
        if _X86
        else {}
    ),
}
_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.support.layouts import LAYOUTS, digests, fresh
from tests.unit.coordinator.compression.test_compression import LAID_OUT, two_steps
ways = {"fresh": fresh, **LAYOUTS}
found = {way: {**digests(change), **{spec: two_steps(spec, change) for spec in LAID_OUT}}
         for way, change in ways.items()}
print(json.dumps([torch.backends.cpu.get_cpu_capability(), found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limits", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS)
def test_instruction_sets(limits: dict[str, str]) -> None:
    """The libraries read their limits when they are loaded, so each has a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(ROOT)],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    capability, found = json.loads(done.stdout.splitlines()[-1])
    if wanted := limits.get("ATEN_CPU_CAPABILITY"):
        assert capability.replace("NO AVX", "DEFAULT") == wanted.upper()  # torch 2.7's name of it
    expected = found.pop("fresh")
    assert len(found) == len(LAYOUTS)
    for way, digests in found.items():
        differing = [what for what in expected if digests[what] != expected[what]]
        assert not differing, f"{way}: {differing}"
