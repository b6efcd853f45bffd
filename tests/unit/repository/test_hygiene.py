"""Rules of the house that no linter knows, read from the syntax tree of every file.

Each rule is a function from a parsed file to its violations, and each has sources below that it
must refuse, so that a rule that has stopped seeing anything fails here.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("cache", "coordinator", "tasks", "torchord")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks")

PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
# A module of an imagined user, in which recipes must not reach these; a comparison with what others do.
MAY_PICKLE = {"tests/support/attackable.py", "benchmarks/bench_cache.py"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
MAY_READ_ENVIRONMENT = {"cache/settings.py"}
MAY_COPY_ENVIRONMENT = {"coordinator/local_cluster/cluster.py", "coordinator/local_cluster/guardian.py"}

Rule = Callable[[ast.Module, str], list[str]]


def files(*folders: str) -> list[str]:
    """The Python files below these folders, relative to the root, with `/`."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def imports(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """(local name, dotted name that it stands for, line) of every import, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, alias.name if alias.asname else top, node.lineno
                if not alias.asname and alias.name != top:
                    yield alias.name, alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", node.lineno


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`t.load` as "torch.load" where the file says `import torch as t`; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def names_of(tree: ast.Module) -> dict[str, str]:
    return {local: full for local, full, _ in imports(tree)}


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


# --- the rules -----------------------------------------------------------------------------


def no_pickle(tree: ast.Module, path: str) -> list[str]:
    """Nothing is pickled or unpickled: no such module, torch.load only of weights, no object arrays."""
    if path in MAY_PICKLE:
        return []
    found = [
        f"{path}:{line} imports {full}"
        for _, full, line in imports(tree)
        if full.partition(".")[0] in PICKLERS or full in ("torch.save", "torch.load")
    ]
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node, names) == "torch.save":
            found.append(f"{path}:{node.lineno} torch.save writes pickle; use safetensors")
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if dotted(node.func, names) == "torch.load" and not (
                "weights_only" in keywords and is_true(keywords["weights_only"])
            ):
                found.append(f"{path}:{node.lineno} torch.load without weights_only=True")
            if "allow_pickle" in keywords and is_true(keywords["allow_pickle"]):
                found.append(f"{path}:{node.lineno} allow_pickle=True")
    return found


def one_reader_of_the_environment(tree: ast.Module, path: str) -> list[str]:
    """Only cache/settings.py reads the environment; two launchers hand a copy to their children.

    Setting a variable is no reading: `os.environ[NAME] = value`, or `os.environ.setdefault` as a statement.
    """
    if path in MAY_READ_ENVIRONMENT:
        return []
    names = names_of(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or dotted(node, names) not in ENVIRONMENT:
            continue
        if _is_write(node, parents) or (path in MAY_COPY_ENVIRONMENT and _is_copy(node, parents)):
            continue
        found.append(f"{path}:{node.lineno} reads the environment; add a field to cache/settings.py")
    return found


def _is_write(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents[node]
    if isinstance(parent, ast.Subscript):
        return isinstance(parent.ctx, ast.Store | ast.Del)
    call = parents.get(parent)
    return (
        isinstance(parent, ast.Attribute)
        and parent.attr == "setdefault"
        and isinstance(call, ast.Call)
        and isinstance(parents[call], ast.Expr)
    )


def _is_copy(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """`dict(os.environ)`, `{**os.environ}`, `os.environ | {...}`, `os.environ.copy()`."""
    parent = parents[node]
    return (
        (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "dict")
        or isinstance(parent, ast.Dict)
        or (isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.BitOr))
        or (isinstance(parent, ast.Attribute) and parent.attr == "copy")
    )


def redis_stays_in_the_cache(tree: ast.Module, path: str) -> list[str]:
    """Above cache/ nobody talks to Redis, so that its errors cannot get there either."""
    if path.startswith("cache/"):
        return []
    return [
        f"{path}:{line} imports {full}; use what cache/ offers"
        for _, full, line in imports(tree)
        if full.partition(".")[0] in ("redis", "valkey")
    ]


def public_names_are_documented(tree: ast.Module, path: str) -> list[str]:
    """Modules and public classes, functions and methods have a docstring (overloads share one)."""
    found = [] if ast.get_docstring(tree) else [f"{path}:1 module"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.If | ast.Try):
                visit(node.body, prefix)
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            setter = any(decorator.endswith((".setter", ".deleter")) for decorator in decorators)
            if node.name.startswith("_") or setter or decorators & {"overload", "typing.overload"}:
                continue
            if not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno} {prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return found


RULES: list[tuple[Rule, tuple[str, ...]]] = [
    (no_pickle, FOLDERS),
    (one_reader_of_the_environment, PACKAGES),
    (redis_stays_in_the_cache, (*PACKAGES, "examples")),
    (public_names_are_documented, PACKAGES),
]


@pytest.mark.parametrize(("rule", "folders"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_the_project_keeps_the_rule(rule: Rule, folders: tuple[str, ...]) -> None:
    paths = files(*folders)
    assert {path.partition("/")[0] for path in paths} >= set(PACKAGES)
    broken = [line for path in paths for line in rule(ast.parse((ROOT / path).read_text(), path), path)]
    assert not broken, "\n".join([rule.__doc__ or "", *broken])


REFUSED: list[tuple[Rule, str]] = [
    (no_pickle, "import pickle"),
    (no_pickle, "import cloudpickle as cp"),
    (no_pickle, "def f():\n    from dill import dumps"),
    (no_pickle, "import shelve, os"),
    (no_pickle, "import torch\ntorch.load('f')"),
    (no_pickle, "import torch\ntorch.load('f', weights_only=False)"),
    (no_pickle, "import torch as t\nt.load('f', weights_only=flag)"),
    (no_pickle, "import torch.nn\ntorch.load('f')"),
    (no_pickle, "from torch import load\nload('f')"),
    (no_pickle, "import torch\ntorch.save({}, 'f')"),
    (no_pickle, "import numpy\nnumpy.load('f', allow_pickle=True)"),
    (one_reader_of_the_environment, "import os\nos.environ['A']"),
    (one_reader_of_the_environment, "import os\nos.environ.get('A')"),
    (one_reader_of_the_environment, "import os as o\no.getenv('A')"),
    (one_reader_of_the_environment, "from os import environ\nenviron['A']"),
    (one_reader_of_the_environment, "from os import getenv as g\ng('A')"),
    (one_reader_of_the_environment, "import os\n'A' in os.environ"),
    (one_reader_of_the_environment, "import os\na = os.environ.setdefault('A', '1')"),
    (one_reader_of_the_environment, "import os\ndict(os.environ)"),
    (redis_stays_in_the_cache, "import redis"),
    (redis_stays_in_the_cache, "from redis.exceptions import RedisError"),
    (redis_stays_in_the_cache, "def f():\n    import valkey"),
    (public_names_are_documented, "def f(): ..."),
    (public_names_are_documented, '"""Module."""\nasync def f(): ...'),
    (public_names_are_documented, '"""Module."""\nclass C:\n    x = 1'),
    (public_names_are_documented, '"""Module."""\nclass C:\n    """C."""\n    def m(self): ...'),
    (public_names_are_documented, '"""Module."""\nif True:\n    def f(): ...'),
]


@pytest.mark.parametrize(("rule", "source"), REFUSED)
def test_a_violation_is_noticed(rule: Rule, source: str) -> None:
    assert rule(ast.parse(source), "coordinator/messages/sender.py")


ALLOWED: list[tuple[Rule, str, str]] = [
    (no_pickle, "import torch\ntorch.load('f', weights_only=True)", "cache/tensors/codec.py"),
    (no_pickle, "import json\njson.load(f)", "cache/tensors/codec.py"),
    (one_reader_of_the_environment, "import os\nos.environ.get('A')", "cache/settings.py"),
    (one_reader_of_the_environment, "import os\nos.environ['A'] = '1'", "tasks/worker.py"),
    (one_reader_of_the_environment, "import os\nos.environ.setdefault('A', '1')", "tasks/worker.py"),
    (
        one_reader_of_the_environment,
        "import os\nrun(env=dict(os.environ))",
        "coordinator/local_cluster/cluster.py",
    ),
    (
        one_reader_of_the_environment,
        "import os\nrun(env={**os.environ, 'A': '1'})",
        "coordinator/local_cluster/cluster.py",
    ),
    (
        one_reader_of_the_environment,
        "import os\nrun(env=os.environ | more)",
        "coordinator/local_cluster/guardian.py",
    ),
    (redis_stays_in_the_cache, "import redis", "cache/servers/redis_client.py"),
    (
        public_names_are_documented,
        '"""Module."""\ndef _f(): ...\nclass _C:\n    def m(self): ...',
        "cache/a.py",
    ),
]


@pytest.mark.parametrize(("rule", "source", "path"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, source: str, path: str) -> None:
    assert rule(ast.parse(source), path) == []


def test_a_launcher_may_copy_the_environment_but_not_read_it() -> None:
    tree = ast.parse("import os\nos.environ.get('A')\nos.environ['B']")
    assert len(one_reader_of_the_environment(tree, "coordinator/local_cluster/cluster.py")) == 2
