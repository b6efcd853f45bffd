from __future__ import annotations

import collections
import enum
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support import models
from torchord.cache.errors import NotAllowed, RecipeError
from torchord.coordinator.spec.admission import START_DIRECTORY, torch_admits
from torchord.coordinator.spec.recipe import Recipe, modules_of
from torchord.coordinator.spec.resolving import resolve
from torchord.coordinator.spec.targets import Target

REPOSITORY = Path(__file__).resolve().parents[4]


def entry(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"target": target, "args": list(args), "kwargs": kwargs}


def spec_of(**changes: Any) -> dict[str, Any]:
    spec = {
        "model": entry("torch.nn:Linear", 2, 2),
        "dataset": entry("torch.utils.data:TensorDataset"),
        "loss": entry("torch.nn.functional:cross_entropy"),
        "optimizer": entry("torch.optim:SGD", lr=0.1),
    }
    return {**spec, **changes}


# --- making a spec ----------------------------------------------------------------------


def test_a_recipe_becomes_names_and_arguments() -> None:
    recipe = models.mlp(model=partial(models.Mlp, hidden=4), metrics={"accuracy": models.accuracy})
    spec = json.loads(json.dumps(recipe.to_spec()))
    assert spec["model"] == entry("tests.support.models:Mlp", hidden=4)
    assert spec["loss"] == entry("torch.nn.functional:cross_entropy")
    assert spec["metrics"] == {"accuracy": entry("tests.support.models:accuracy")}
    assert "scheduler" not in spec


def test_a_spec_makes_the_recipe_again_without_importing() -> None:
    spec = spec_of(
        model=entry("not_there_at_all:Net", 3, depth=[1, 2]), metrics={"a": entry("nor_this:a")}, buffers={}
    )
    spec["loss_over"] = "batch"
    assert Recipe.from_spec(spec).to_spec() == spec
    assert "not_there_at_all" not in sys.modules


def test_a_spec_of_before_there_were_weights_goes_on_as_it_was() -> None:
    spec = spec_of()
    assert "loss_over" not in spec
    assert Recipe.from_spec(spec).to_spec() == {**spec, "loss_over": "shard", "buffers": {}}


def test_partials_of_partials_are_one() -> None:
    inner = partial(models.Mlp, 4, dropout=0.0)
    assert models.mlp(model=partial(inner, outputs=2)).to_spec()["model"] == entry(
        "tests.support.models:Mlp", 4, dropout=0.0, outputs=2
    )


def test_strings_name_what_need_not_be_importable_here() -> None:
    assert models.mlp(model="their_code.nets:Big.tiny").to_spec()["model"] == entry(
        "their_code.nets:Big.tiny"
    )


@pytest.mark.parametrize(
    "text", ["a.b", "a:b:c", "a:", ":b", "a-b:c", "a.:b", "a:b.", "a b:c", "", ".a:b", "1a:b"]
)
def test_malformed_strings_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"package\.module:attribute"):
        models.mlp(model=text)


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        F.relu,
        F.linear,
        F.conv2d,
        F.max_pool2d,
        F.scaled_dot_product_attention,
        torch.relu,
        torch.tanh,
        torch.special.expit,
        F.cross_entropy,
        F.mse_loss,
    ],
    ids=lambda f: getattr(f, "__name__", "f"),
)
def test_torchs_own_functions_keep_a_public_name(function: Callable[..., Any]) -> None:
    spec = models.mlp(loss=function).to_spec()
    assert "_C" not in spec["loss"]["target"]
    assert resolve(spec_of(loss=spec["loss"]), allowed=None).loss is function


def test_torchs_classes_are_named_where_they_are_public() -> None:
    spec = models.mlp(model=partial(torch.nn.Linear, 6, 3), optimizer=torch.optim.AdamW).to_spec()
    assert spec["model"]["target"] == "torch.nn:Linear"
    assert spec["optimizer"]["target"] == "torch.optim:AdamW"


class Outer:
    class Inner(torch.nn.Linear):
        pass

    @classmethod
    def make(cls) -> Outer:
        return cls()

    @staticmethod
    def loss(outputs: Any, targets: Any) -> Any:
        return outputs

    def method(self, outputs: Any, targets: Any) -> Any:
        return outputs


class Below(Outer):
    pass


def test_nested_classes_and_class_methods_have_names() -> None:
    assert models.mlp(model=Outer.Inner).to_spec()["model"]["target"] == f"{__name__}:Outer.Inner"
    assert models.mlp(model=Below.make).to_spec()["model"]["target"] == f"{__name__}:Below.make"
    assert models.mlp(loss=Outer.loss).to_spec()["loss"]["target"] == f"{__name__}:Outer.loss"


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def plain_loss(outputs: Any, targets: Any) -> Any:
    return outputs


replaced_loss = decorated(plain_loss)


def unimportable() -> list[tuple[str, Any, str]]:
    def local(outputs: Any, targets: Any) -> Any:
        return outputs

    class Local(torch.nn.Linear):
        pass

    def main_function() -> None: ...

    main_function.__module__, main_function.__qualname__ = "__main__", "main_function"
    return [
        ("loss", lambda outputs, targets: outputs, "a lambda"),
        ("loss", local, "inside a function"),
        ("model", partial(Local, 3, 3), "inside a function"),
        ("dataset", main_function, "script or session"),
        ("loss", Outer().method, "a method of an object"),
        ("loss", replaced_loss, "not what its name leads to"),
    ]


@pytest.mark.parametrize(("name", "value", "reason"), unimportable(), ids=[u[2] for u in unimportable()])
def test_what_workers_cannot_import_is_refused_with_a_way_out(name: str, value: Any, reason: str) -> None:
    with pytest.raises(RecipeError) as refused:
        models.mlp(**{name: value}).to_spec()
    message = str(refused.value)
    assert f"{name!r}" in message and reason in message
    assert "move it to a module, e.g. my_models.py, and import it from there" in message


def test_a_script_cannot_submit_its_own_definitions(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torchord.coordinator.spec.recipe import Recipe\n"
        "class Net(torch.nn.Linear): pass\n"
        "Recipe(model=Net, dataset='a:b', loss='a:b', optimizer=torch.optim.SGD).to_spec()\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True
    )
    assert b"belongs to the script" in ended.stderr


class Act(str, enum.Enum):  # noqa: UP042  what people have
    RELU = "relu"
    TANH = "tanh"


class Size(enum.IntEnum):
    SMALL = 3


class Way(enum.Flag):
    IN, OUT = 1, 2


Pair = collections.namedtuple("Pair", "a b")


class Name(str):
    pass


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, {"y": object()}], [r"argument 'x'[1]['y']", "object", "inside a function of your module"]),
        (torch.zeros(1), ["Tensor", "inside a function of your module"]),
        ({1, 2}, ["set", "differs between processes", "sorted"]),
        (frozenset("ab"), ["frozenset", "sorted"]),
        (Pair(1, 2), ["Pair", "bind tuple(...) of it"]),
        (collections.OrderedDict(a=1), ["OrderedDict", "bind dict(...) of it"]),
        (Name("n"), ["Name", "bind str(...) of it"]),
        (Way.IN | Way.OUT, ["Way", "bind its value"]),
        ({(1, Name("k")): 2}, [r"the key (1, 'k') of argument 'x'[1]", "bind str(...)"]),
        (lambda: 0, ["argument 'x'", "a lambda", "move it to a module"]),
        (partial(F.relu, inplace=object()), ["argument 'inplace' of argument 'x'", "object"]),
        (Outer().method, ["argument 'x'", "a method of an object"]),
        (endless(), ["argument 'x'", "contains itself"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else None,
)
def test_arguments_that_would_arrive_as_something_else_are_refused(value: Any, words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        models.mlp(model=partial(models.Mlp, x=value)).to_spec()
    assert all(word in str(refused.value) for word in ["'model'", *words])


def given(*args: Any, **kwargs: Any) -> Any:
    """What arrived."""
    return args, kwargs


def same_value(left: Any, right: Any) -> bool:
    """Equal, of one type at every depth, and NaN is NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_value, left, right))
    if isinstance(left, dict):
        return same_value(list(left.items()), list(right.items()))
    if isinstance(left, partial):
        return same_value([left.func, left.args, left.keywords], [right.func, right.args, right.keywords])
    return left is right or bool(left == right) or (left != left and right != right)


@pytest.mark.parametrize(
    "value",
    [
        (0.9, 0.99),
        [1, (2, [3, ()])],
        math.nan,
        [math.inf, -math.inf, -0.0],
        2**70 + 1,
        True,
        "\ud800 é",
        b"\x00\xff",
        1 + 2j,
        range(0, 9, 2),
        Path("~/data") / "x",
        {3: "a", (1, 2): {"k": None}, "s": (1,)},
        {"tuple": [1], "kinds": {}},
        Act.RELU,
        {Act.TANH: Size.SMALL},
        torch.float32,
        torch.channels_last,
        torch.device("cuda", 1),
        torch.Size([2, 3]),
        np.int64(2**62),
        np.float32(0.1),
        np.float64("nan"),
        np.bool_(True),
        torch.nn.LayerNorm,
        Act,
        F.gelu,
        partial(torch.nn.LayerNorm, eps=1e-6, dtype=torch.float64),
        [partial(partial(models.Mlp, 4), act=(Act.RELU, Outer.make))],
    ],
    ids=repr,
)
def test_arguments_arrive_as_what_they_are(value: Any) -> None:
    recipe = models.mlp(model=partial(given, value, x=value))
    spec = json.loads(json.dumps(recipe.to_spec(), allow_nan=False))
    assert Recipe.from_spec(spec).to_spec() == spec == recipe.to_spec()
    (first,), named = resolve(spec, allowed=("*",)).model()
    assert same_value(first, value) and same_value(named["x"], value)


def test_the_nearest_plain_value_is_where_json_readers_look() -> None:
    spec = models.mlp(model=partial(models.Mlp, act=Act.RELU, betas=(0.9, Size.SMALL))).to_spec()
    assert spec["model"]["kwargs"] == {"act": "relu", "betas": [0.9, 3]}
    assert spec["model"]["kinds"] == [
        [["kwargs", "act"], "enum", f"{__name__}:Act", "RELU"],
        [["kwargs", "betas", 1], "enum", f"{__name__}:Size", "SMALL"],
        [["kwargs", "betas"], "tuple"],
    ]


def test_what_arguments_name_is_admitted_like_the_entry_itself() -> None:
    spec = spec_of(model=models.mlp(model=partial(torch.nn.Linear, 2, Act.RELU)).to_spec()["model"])
    assert __name__ in modules_of(spec)
    with pytest.raises(NotAllowed, match=rf"'model'.*{__name__}"):
        resolve(spec, allowed=("torch",))
    spec["model"] = entry("torch.nn:Linear", {"target": "subprocess:run", "args": [], "kwargs": {}})
    spec["model"]["kinds"] = [[["args", 0], "callable"]]
    with pytest.raises(NotAllowed, match="subprocess"):
        resolve(spec, allowed=None)


@pytest.mark.parametrize(
    "kinds",
    [
        3,
        ["tuple"],
        [["kwargs"]],
        [[["kwargs", "none"], "tuple"]],
        [[["args", 0], "unheard"]],
        [[["args", 0], "torch"]],
        [[["args", 0], "enum"]],
        [[["args", 0], "enum", f"{__name__}:Act", "GELU"]],
        [[["args", 0], "enum", "torch.nn:Linear", "RELU"]],
        [[["args", 0], "callable"]],
    ],
)
def test_malformed_kinds_are_refused(kinds: Any) -> None:
    spec = spec_of(model={**entry("torch.nn:Linear", "hub", 2), "kinds": kinds})
    with pytest.raises(RecipeError):
        resolve(spec, allowed=("*",))


def test_positional_arguments_are_checked_too() -> None:
    with pytest.raises(RecipeError, match="argument 1 "):
        models.mlp(model=partial(models.Mlp, 4, object())).to_spec()


@pytest.mark.parametrize("given", [{}, {"loss": F.mse_loss, "step": models.classifier_step}])
def test_exactly_one_of_loss_and_step(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="exactly one"):
        Recipe(model=models.Mlp, dataset=models.points, optimizer=torch.optim.SGD, **given)


def test_metrics_need_a_loss() -> None:
    with pytest.raises(RecipeError, match="a step returns none"):
        models.gpt(metrics={"accuracy": models.accuracy})


@pytest.mark.parametrize("name", ["model", "dataset", "optimizer"])
def test_required_entries_may_not_be_none(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        models.mlp(**{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", models.Mlp()),
        ("loss", torch.nn.CrossEntropyLoss()),
        ("dataset", models.points()),
        ("loss", 3),
    ],
)
def test_objects_in_place_of_callables_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"'{name}' is an object of class"):
        models.mlp(**{name: value})


@pytest.mark.parametrize(
    "value", [torch.nn.CrossEntropyLoss, partial(torch.nn.CrossEntropyLoss, reduction="mean")]
)
def test_a_loss_class_is_not_a_loss(value: Any) -> None:
    with pytest.raises(RecipeError, match="must be a function"):
        models.mlp(loss=value)


def test_metrics_are_named_in_errors() -> None:
    with pytest.raises(RecipeError, match=r"metrics\.accuracy"):
        models.mlp(metrics={"accuracy": lambda o, t: 0.0}).to_spec()


# --- resolving --------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own on the import path, its modules forgotten afterwards."""
    before = set(sys.modules)
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    yield root
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


LEAVES_A_TRACE = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\ndef f(): return 1\n"


def test_resolving_binds_the_arguments() -> None:
    found = resolve(models.mlp(model=partial(models.Mlp, hidden=4)).to_spec(), allowed=("tests", "torch"))
    assert found.model().first.out_features == 4
    assert found.loss is F.cross_entropy and found.step is None and found.scheduler is None
    assert found.metrics == {"accuracy": models.accuracy}
    assert len(found.dataset()) == 40


def test_by_default_modules_under_the_start_directory_and_torch(project: Path) -> None:
    write(project / "mine.py", "def f(): return 1\n")
    write(project / "package/__init__.py")
    write(project / "package/inner.py", "def f(): return 2\n")
    write(project / "namespace/inner.py", "def f(): return 3\n")
    for target, value in (("mine:f", 1), ("package.inner:f", 2), ("namespace.inner:f", 3)):
        assert resolve(spec_of(model=entry(target)), allowed=None, directory=project).model() == value


def test_modules_elsewhere_are_refused_and_do_not_run(project: Path) -> None:
    write(project / "elsewhere.py", LEAVES_A_TRACE)
    write(project / "outside/__init__.py", LEAVES_A_TRACE)
    write(project / "outside/inner.py", LEAVES_A_TRACE)
    here = project / "here"
    here.mkdir()
    for target in ("elsewhere:f", "outside.inner:f"):
        with pytest.raises(NotAllowed) as refused:
            resolve(spec_of(model=entry(target)), allowed=None, directory=here)
        root = target.partition(":")[0].partition(".")[0]
        assert str(refused.value).endswith(f"TORCHORD_ALLOWED_MODULES=.,torch,{root}")
        assert "'model'" in str(refused.value)
    assert list(project.rglob("*.ran")) == []


def test_the_list_in_a_refusal_admits_the_recipe_when_it_is_set_to_the_letter(project: Path) -> None:
    for name in ("here/mine.py", "library_a/__init__.py", "library_a/inner.py", "library_b.py"):
        write(project / name, "def f(): return 1\n")
    here = project / "here"
    spec = spec_of(model=entry("mine:f"), dataset=entry("library_a.inner:f"), optimizer=entry("library_b:f"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(here))
        with pytest.raises(NotAllowed) as refused:
            resolve(spec, allowed=None, directory=here)
        setting = str(refused.value).rpartition("TORCHORD_ALLOWED_MODULES=")[2]
        assert setting == ".,torch,library_a,library_b"
        assert resolve(spec, allowed=tuple(setting.split(",")), directory=here).model() == 1
        with pytest.raises(NotAllowed, match=r"it admits library_b.*=library_b,mine,library_a,torch$"):
            resolve(spec, allowed=("library_b",), directory=here)


def test_the_start_directory_is_a_word_of_the_list(project: Path) -> None:
    write(project / "here/mine.py", "def f(): return 1\n")
    write(project / "elsewhere.py", LEAVES_A_TRACE)
    here = project / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(here))
        spec = spec_of(model=entry("mine:f"), dataset=entry("mine:f"), optimizer=entry("mine:f"))
        assert resolve(spec, allowed=(".", "torch"), directory=here).model() == 1
        with pytest.raises(NotAllowed, match=r"it admits modules under .*here and the building blocks of"):
            resolve(spec_of(model=entry("elsewhere:f")), allowed=(".", "torch"), directory=here)
    assert list(project.rglob("*.ran")) == []


def test_a_link_out_of_the_start_directory_is_outside(project: Path, tmp_path: Path) -> None:
    write(tmp_path / "else" / "linked.py", LEAVES_A_TRACE)
    (project / "linked.py").symlink_to(tmp_path / "else" / "linked.py")
    with pytest.raises(NotAllowed):
        resolve(spec_of(model=entry("linked:f")), allowed=None, directory=project)
    assert list(tmp_path.rglob("*.ran")) == []


@pytest.mark.parametrize("place", ["lib/site-packages", "vendored/dist-packages", "env/lib"])
def test_installed_packages_below_the_start_directory_are_not_the_project(
    project: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project / "env/pyvenv.cfg")
    write(project / place / "installed.py", LEAVES_A_TRACE)
    monkeypatch.syspath_prepend(str(project / place))
    with pytest.raises(NotAllowed):
        resolve(spec_of(model=entry("installed:f")), allowed=None, directory=project)
    assert list(project.rglob("*.ran")) == []


def test_the_standard_library_is_never_the_project() -> None:
    for directory in (Path("/"), Path(sysconfig.get_path("stdlib"))):
        with pytest.raises(NotAllowed):
            resolve(spec_of(model=entry("shelve:open")), allowed=None, directory=directory)


def test_a_project_may_lie_below_the_interpreters_prefix(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /usr/src/app does below /usr."""
    write(project / "mine.py", "def f(): return 1\n")
    monkeypatch.setattr(sys, "prefix", str(project.parent))
    assert resolve(spec_of(model=entry("mine:f")), allowed=None, directory=project).model() == 1


def test_prefixes_end_at_dots(project: Path) -> None:
    write(project / "shop.py", "def f(): return 1\n")
    write(project / "shop2.py", LEAVES_A_TRACE)
    allowed = ("shop", "torch")
    assert resolve(spec_of(model=entry("shop:f")), allowed=allowed).model() == 1
    with pytest.raises(NotAllowed, match="TORCHORD_ALLOWED_MODULES=shop,torch,shop2"):
        resolve(spec_of(model=entry("shop2:f")), allowed=allowed)
    assert list(project.rglob("*.ran")) == []


def test_a_prefix_may_name_an_inner_module(project: Path) -> None:
    write(project / "big/__init__.py")
    write(project / "big/nets.py", "def f(): return 1\n")
    write(project / "big/tools.py", LEAVES_A_TRACE)
    assert resolve(spec_of(model=entry("big.nets:f")), allowed=("big.nets", "torch")).model() == 1
    with pytest.raises(NotAllowed):
        resolve(spec_of(model=entry("big.tools:f")), allowed=("big.nets", "torch"))
    assert list(project.rglob("*.ran")) == []


def test_an_explicit_list_replaces_the_default(project: Path) -> None:
    write(project / "mine.py", "def f(): return 1\n")
    with pytest.raises(NotAllowed, match=r"TORCHORD_ALLOWED_MODULES=mine,torch$"):
        resolve(spec_of(model=entry("mine:f")), allowed=("mine",), directory=project)
    with pytest.raises(NotAllowed, match="it admits nothing"):
        resolve(spec_of(), allowed=())


def test_torch_parts_may_be_listed_alone() -> None:
    found = resolve(
        spec_of(loss=entry("torch.nn.functional:gelu")),
        allowed=("torch.nn", "torch.optim", "torch.utils.data"),
    )
    assert found.loss is F.gelu


ATTACKS = [
    "os:system",
    "subprocess:run",
    "builtins:exec",
    "posix:system",
    "__main__:anything",
    "tests.support.attackable:os.system",
    "tests.support.attackable:system",
    "tests.support.attackable:pickled",
    "tests.support.attackable:hidden",
    "tests.support.models:Mlp.__init__.__globals__",
    "tests.support.models:torch.hub.load",
    "tests.support.models:Mlp.__class__",
    "torch:load",
    "torch:save",
    "torch:from_file",
    "torch:hub.load",
    "torch:ops.load_library",
    "torch:classes.load_library",
    "torch:os.system",
    "torch:serialization.load",
    "torch.hub:load",
    "torch.hub:os.system",
    "torch.serialization:load",
    "torch.package:PackageImporter",
    "torch.jit:load",
    "torch.export:load",
    "torch.distributed:init_process_group",
    "torch.utils.cpp_extension:load_inline",
    "torch.utils.collect_env:run",
    "torch.utils.model_zoo:load_url",
    "torch._C:_jit_get_operation",
    "torch._C:import_ir_module",
    "torch._inductor:compile",
    "torch.nn.functional:importlib.import_module",
    "torch.nn.modules.module:itertools.count",
    "torch.utils.data:dataloader.os.system",
    "torch.compiler:compile",
]


@pytest.mark.parametrize("target", ATTACKS)
def test_names_that_lead_out_are_refused(target: str) -> None:
    with pytest.raises((NotAllowed, RecipeError)) as refused:
        resolve(spec_of(model=entry(target)), allowed=(".", "torch", "tests"))
    assert isinstance(refused.value, NotAllowed) or "no attribute" in str(refused.value)


def test_torch_in_the_list_means_its_building_blocks() -> None:
    assert resolve(spec_of(), allowed=("torch",)).loss is F.cross_entropy
    with pytest.raises(NotAllowed):
        resolve(spec_of(model=entry("torch.hub:load")), allowed=("torch",))
    assert (
        resolve(spec_of(model=entry("torch.hub:load")), allowed=("torch", "torch.hub")).model
        is torch.hub.load
    )


def test_torch_parts_are_all_there() -> None:
    assert torch_admits("torch") and torch_admits("torch.optim.lr_scheduler")
    assert not torch_admits("torch.nnx") and not torch_admits("torchvision")


def test_everything_for_a_process_that_trusts_itself() -> None:
    assert resolve(spec_of(model=entry("decimal:Decimal")), allowed=("*",)).model.__name__ == "Decimal"


def test_missing_modules_and_attributes_are_named(project: Path) -> None:
    write(project / "mine.py", "value = 3\n")
    write(project / "broken.py", "1 / 0\n")
    write(project / "needs.py", "import not_installed_anywhere\n")
    for target, text in (
        ("not_there:f", "no module 'not_there'"),
        ("mine.inner:f", "no module 'mine.inner'"),
        ("mine:f", "no attribute 'f'"),
        ("mine:value", "of type int, but must be a callable"),
        ("broken:f", "raised ZeroDivisionError"),
        ("needs:f", "not_installed_anywhere"),
    ):
        with pytest.raises(RecipeError, match=text) as refused:
            resolve(spec_of(model=entry(target)), allowed=("mine", "broken", "needs", "not_there", "torch"))
        assert "'model'" in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "a:b"},
        {"model": {}},
        {"model": {"target": "a:b", "args": 3}},
        {"model": {"target": "a:b", "kwargs": []}},
        {"model": {"target": "a"}},
        {"extra": entry("a:b")},
        {"loss": None},
        {"metrics": {"m": 3}},
        {"metrics": 3},
    ],
)
def test_malformed_specs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        resolve(spec_of(**changes), allowed=None)


def test_modules_of_a_spec() -> None:
    assert modules_of(spec_of()) == ("torch.nn", "torch.nn.functional", "torch.optim", "torch.utils.data")


def test_targets_compare_by_value() -> None:
    assert Target("a:b", (1,), {"x": 2}) == Target("a:b", (1,), {"x": 2})


def test_the_start_directory_is_that_of_the_process() -> None:
    assert START_DIRECTORY.is_dir()


def test_a_worker_elsewhere_finds_its_own_project(tmp_path: Path) -> None:
    """From another process, started in a directory of its own: what a worker does."""
    shutil.copy(REPOSITORY / "tests/support/attackable.py", tmp_path / "my_models.py")
    script = (
        "from torchord.coordinator.spec.resolving import resolve\n"
        f"spec = {spec_of(model=entry('my_models:fine'))!r}\n"
        "print(resolve(spec, allowed=None).model())\n"
        f"spec = {spec_of(model=entry('torchord.coordinator.spec.recipe:resolve'))!r}\n"
        "resolve(spec, allowed=None)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "fine\n"
    assert "NotAllowed" in ended.stderr and "coordinator" in ended.stderr
