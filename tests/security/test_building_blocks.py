"""What of torch a recipe may name: a closed list by role, and nothing in it opens files or unpickles."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchord import Recipe
from torchord.cache.errors import NotAllowed, RecipeError
from torchord.coordinator.spec.admission import TORCH_MODULES, Admission
from torchord.coordinator.spec.resolving import resolve
from torchord.coordinator.spec.targets import Target

TORCH = Admission(("torch",))

# Each would have run code, loaded a file or emptied one: parts of torch alone, in places that are not theirs.
ATTACKS = [
    ("collate", "torch.nn:ModuleList.pop"),
    ("loss", "torch.utils.data.datapipes.utils.decoder:basichandlers"),
    ("parameter_groups", "torch.utils.data.datapipes.map:SequenceWrapper"),
    ("dataset", "torch.utils.data:datapipes.iter.FileOpener"),
    ("dataset", "torch.utils.data.datapipes.iter:FileLister"),
    ("model", "torch.utils.data:DataLoader"),
    ("loss", "torch:from_file"),
    ("loss", "torch:load"),
    ("loss", "torch:save"),
    ("loss", "torch:compile"),
    ("loss", "torch:set_default_device"),
    ("loss", "torch:set_num_threads"),
    ("loss", "torch.nn:Linear.load_state_dict"),
    ("step", "torch.nn.functional:cross_entropy"),
    ("predict", "torch.nn:Identity"),
    ("gradients", "torch.nn.utils:clip_grad_norm_"),
    ("collate", "torch.nn.functional:relu"),
    ("model", "torch.nn.functional:relu"),
    ("model", "torch.optim:SGD"),
    ("optimizer", "torch.nn:Linear"),
    ("scheduler", "torch.optim:SGD"),
    ("dataset", "torch.nn:Linear"),
    ("loss", "torch.nn:Linear"),
    ("model", "torch.nn:modules.Linear"),
    ("model", "torch.nn.parallel:DistributedDataParallel"),
    ("loss", "torch.nn.modules.module:register_module_forward_hook"),
    ("argument", "torch.nn.modules.module:register_module_forward_hook"),
    ("argument", "torch:load"),
    ("argument", "torch.utils.data:DataLoader"),
    ("metrics.x", "torch.utils.data:random_split"),
    ("codec", "torch.nn:Linear"),
    ("loss", "torch.nn.functional:handle_torch_function"),
    ("loss", "torch.nn.functional:boolean_dispatch"),
]

ADMITTED = [
    ("model", "torch.nn:Linear"),
    ("model", "torch.nn:Transformer"),
    ("loss", "torch.nn.functional:cross_entropy"),
    ("loss", "torch.nn.functional:mse_loss"),
    ("metrics.error", "torch.nn.functional:l1_loss"),
    ("optimizer", "torch.optim:AdamW"),
    ("outer_optimizer", "torch.optim:SGD"),
    ("scheduler", "torch.optim.lr_scheduler:OneCycleLR"),
    ("scheduler", "torch.optim.lr_scheduler:ReduceLROnPlateau"),
    ("dataset", "torch.utils.data:TensorDataset"),
    ("collate", "torch.utils.data:default_collate"),
    ("order", "torch.utils.data:WeightedRandomSampler"),
    ("batches", "torch.utils.data:BatchSampler"),
    ("average", "torch.optim.swa_utils:get_ema_multi_avg_fn"),
    ("argument", "torch.nn:LayerNorm"),
    ("argument", "torch.nn.functional:gelu"),
    ("argument", "torch.nn.init:xavier_uniform_"),
    ("argument", "torch:relu"),
    ("argument", "torch:tanh"),
    ("argument", "torch.special:erf"),
    ("argument", "torch.optim:SGD"),
]


@pytest.mark.parametrize(("role", "target"), ATTACKS)
def test_torchs_tools_are_no_building_blocks(role: str, target: str) -> None:
    with pytest.raises(NotAllowed):
        TORCH.fetch(target, role)


@pytest.mark.parametrize(("role", "target"), ADMITTED)
def test_building_blocks_are_admitted_in_their_place(role: str, target: str) -> None:
    assert callable(TORCH.fetch(target, role))


def names() -> Iterator[str]:
    """Every public name of every module of torch that could be admitted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {"torch", *TORCH_MODULES}
        for name in TORCH_MODULES:
            if name.startswith("torch._C"):
                continue
            package = importlib.import_module(name)
            for found in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{name}."):
                try:
                    importlib.import_module(found.name)
                except Exception:  # noqa: BLE001  optional parts of torch
                    continue
                modules.add(found.name)
        for name in sorted(modules - {m for m in modules if m.startswith("torch._C")}):
            yield from (f"{name}:{each}" for each in dir(importlib.import_module(name)))


def test_nothing_else_of_torch_is_admitted() -> None:
    """All that torch has, tried in every place: what is admitted is of the kind that the place takes."""
    kinds = {
        "model": lambda found: inspect.isclass(found) and issubclass(found, nn.Module),
        "optimizer": lambda found: inspect.isclass(found) and issubclass(found, torch.optim.Optimizer),
        "scheduler": lambda found: "lr_scheduler" in found.__module__,
        "loss": lambda found: not inspect.isclass(found),
        "dataset": lambda found: found is torch.utils.data.TensorDataset,
        "collate": lambda found: found is torch.utils.data.default_collate,
        "step": lambda found: False,
        "parameter_groups": lambda found: False,
    }
    tried = list(names())
    assert len(tried) > 5_000
    counts = dict.fromkeys(kinds, 0)
    for role, fits in kinds.items():
        for target in tried:
            try:
                found = TORCH.fetch(target, role)
            except (RecipeError, NotAllowed):
                continue
            counts[role] += 1
            assert fits(found), (role, target)
            assert target.partition(":")[2] not in ("load", "save", "from_file", "compile"), target
    assert 100 < counts["model"] < 250 and 10 < counts["optimizer"] < 30
    assert counts["dataset"] == counts["collate"] == 1
    assert counts["step"] == counts["parameter_groups"] == 0


def test_a_recipe_of_blocks_resolves_and_one_of_tools_does_not() -> None:
    blocks = Recipe(
        model=partial(nn.Linear, 4, 3),
        dataset="torch.utils.data:TensorDataset",
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=0.1),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
    )
    assert resolve(blocks.to_spec(), allowed=("torch",)).loss is F.cross_entropy
    tools = {**blocks.to_spec(), "collate": Target("torch.nn:ModuleList.pop", (), {"key": 0}).to_json()}
    with pytest.raises(NotAllowed, match=r"'collate': .* is no building block of torch for this place"):
        resolve(tools, allowed=("torch",))


def test_torchords_own_internals_are_no_recipes_in_its_checkout() -> None:
    """There a worker stands above them, as it stands above a user's modules elsewhere."""
    here = Admission(None, Path(__file__).resolve().parents[2])
    for target in (
        "torchord.coordinator.local_cluster.embedded_server:EmbeddedServer",
        "torchord.coordinator.local_cluster.cluster:LocalCluster",
        "torchord.cache.settings:from_environment",
        "coordinator:LocalCluster",
    ):
        with pytest.raises(NotAllowed):
            here.fetch(target, "model")
    assert here.fetch("torchord.coordinator.averages:ema", "average")


def test_an_allow_list_that_names_a_part_of_torch_admits_it() -> None:
    assert Admission(("torch", "torch.utils.data")).fetch("torch.utils.data:DataLoader", "argument")
    assert Admission(("*",)).fetch("torch.utils.data:DataLoader", "loss") is torch.utils.data.DataLoader
