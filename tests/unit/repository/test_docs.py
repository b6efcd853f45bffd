"""What the pages name is there: files, modules and what is in them, make targets, other pages, headings.

Each rule is a function from a text to what it names and is not there, and each has texts below that it must
refuse, so that a rule that has stopped seeing anything fails here.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from product import modules
from torchord.coordinator.messages import task_names

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FOLDERS = (
    "cache",
    "coordinator",
    "tasks",
    "torchord",
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "deploy",
    ".ci",
)
# What a reader has or makes: an imagined project's files, a certificate, and a range of versions to be made.
READERS = {
    "deploy/secrets",
    "deploy/secrets/",
    "deploy/secrets/fleet/worker",
    "deploy/secrets/submit.url",
    "cache.py",
    "coordinator.py",
    "manage.py",
    "my_codecs.py",
    "my_keras.py",
    "my_lightning.py",
    "my_lora.py",
    "my_text.py",
    "my_table.py",
    "my_models.py",
    "tasks.py",
    "train.py",
    "your_training_script.py",
}
TASKS = {value for name, value in vars(task_names).items() if name.isupper() and isinstance(value, str)}

Rule = Callable[[str, Path], list[str]]


def spans(text: str) -> Iterator[str]:
    """What stands between backticks: blocks, then words."""
    yield from re.findall(r"^```[^\n]*\n(.*?)^```", text, re.S | re.M)
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


@cache
def file_names() -> frozenset[str]:
    """The name of every file of the repository."""
    ours = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return frozenset(path.name for path in ours)


def paths_are_there(text: str, page: Path) -> list[str]:
    """A path that begins with a folder of ours is there, from the root or from the page."""
    folders = "|".join(map(re.escape, FOLDERS))
    found = re.findall(rf"(?<![\w./~:@-])((?:{folders})/[\w./*-]*[\w*/])", text)
    return [
        path
        for path in dict.fromkeys(found)
        if path not in READERS and not any([*ROOT.glob(path), *page.parent.glob(path)])
    ]


def files_are_there(text: str, page: Path) -> list[str]:
    """A name between backticks that ends like a source file or a page is that of a file somewhere."""
    found = [
        name
        for span in spans(text)
        for name in re.findall(r"(?<![\w./<-])[\w-]+\.(?:py|lua|md|svg|yml)\b", span)
    ]
    return [name for name in dict.fromkeys(found) if name not in file_names() | READERS]


def modules_are_there(text: str, page: Path) -> list[str]:
    """`torchord.cache.keys`, `benchmarks.bench_gpu`, `torchord.cache.keys.RunKeys.slots`; `.x` is any."""
    names = re.findall(
        r"(?<![\w./-])((?:torchord|benchmarks|examples)(?:\.[A-Za-z_]\w*)+)(?![\w/])", "\n".join(spans(text))
    )
    return [name for name in dict.fromkeys(names) if not (sent(name) or name.endswith(".x") or defined(name))]


def sent(name: str) -> bool:
    """Whether a dotted name is a task's or a queue's."""
    return name in TASKS or task_names.is_ours(name)


def defined(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    if parts[0] != "torchord":
        path = ROOT.joinpath(*parts)
        return path.with_suffix(".py").exists() or path.is_dir()
    known = modules()
    for length in range(len(parts), 0, -1):
        module = known.get(".".join(parts[:length]))
        if module is not None:
            return all_in(module.tree, parts[length:])
    return False


def all_in(node: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Whether the first name is defined or imported in a module or class, and the others in what that is."""
    if not names:
        return True
    for child in ast.walk(node):
        if isinstance(child, ast.ClassDef) and child.name == names[0]:
            return all_in(child, names[1:])
        bound = [child.name] if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else []
        if isinstance(child, ast.Import | ast.ImportFrom):
            bound = [alias.asname or alias.name for alias in child.names]
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            bound = [child.id]
        if names[0] in bound:
            return True
    return False


def targets_are_there(text: str, page: Path) -> list[str]:
    """`make lint` is a target of the Makefile."""
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [
        name for span in spans(text) for name in re.findall(r"(?:^|[;&|] *)make ([a-z][\w-]*)", span, re.M)
    ]
    return [name for name in dict.fromkeys(named) if name not in known]


def links_lead_somewhere(text: str, page: Path) -> list[str]:
    """A link to a file of ours, and to a heading in it."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if (path and not to.exists()) or (
            heading and heading not in headings(to.read_text() if path else text)
        ):
            found.append(target)
    return found


def headings(text: str) -> set[str]:
    """The anchors of a page as GitHub makes them."""
    lines = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


RULES: list[Rule] = [
    paths_are_there,
    files_are_there,
    modules_are_there,
    targets_are_there,
    links_lead_somewhere,
]


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_the_page_names_what_is_there(page: Path, rule: Rule) -> None:
    assert rule(page.read_text(), page) == [], rule.__doc__


def test_docstrings_name_modules_that_are_there() -> None:
    found = {
        f"{module.path}: {name}"
        for module in modules().values()
        for name in modules_are_there(module.text, ROOT / module.path)
    }
    assert not found


@pytest.mark.parametrize(
    ("rule", "text", "missing"),
    [
        (paths_are_there, "see coordinator/step.py.", ["coordinator/step.py"]),
        (paths_are_there, "`tests/unit/test_nothing.py::test_it`", ["tests/unit/test_nothing.py"]),
        (paths_are_there, "`cache/*.rs` and cache/keys.py", ["cache/*.rs"]),
        (
            files_are_there,
            "`nothing.lua`, `commit.lua` and `python nowhere.py`",
            ["nothing.lua", "nowhere.py"],
        ),
        (modules_are_there, "`torchord.cache.chunks`", ["torchord.cache.chunks"]),
        (modules_are_there, "```\npython -m benchmarks.nothing\n```", ["benchmarks.nothing"]),
        (
            modules_are_there,
            "`torchord.coordinator.compression.parse`",
            ["torchord.coordinator.compression.parse"],
        ),
        (modules_are_there, "`torchord.cache.keys.RunKeys.nothing`", ["torchord.cache.keys.RunKeys.nothing"]),
        (targets_are_there, "```\ncd x && make nothing\nmake test\n```", ["nothing"]),
        (
            links_lead_somewhere,
            "[a](nothing.md) [b](cache.md#nothing) [c](#here)\n# Here",
            ["nothing.md", "cache.md#nothing"],
        ),
    ],
)
def test_what_is_not_there_is_noticed(rule: Rule, text: str, missing: list[str]) -> None:
    assert rule(text, ROOT / "docs" / "page.md") == missing


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            paths_are_there,
            "`/opt/cache/x`, s3://docs/x, coordinator/, the cache / the ledger, `cache/scripts/*.lua`",
        ),
        (
            modules_are_there,
            "`torchord.compute_gradient`, `torchord.updates.NODE`, `torchord.cache.keys.RunKeys.slots`",
        ),
        (
            modules_are_there,
            "`torchord.coordinator.compression.TensorCodec`, benchmarks/results/torchord.json",
        ),
        (targets_are_there, "these make no target, and `we make none`"),
        (links_lead_somewhere, "[a](https://x.org/y) [b](../README.md) [c](cache.md)\n```\n[d](no.md)\n```"),
    ],
)
def test_what_is_there_passes(rule: Rule, text: str) -> None:
    assert rule(text, ROOT / "docs" / "page.md") == []
