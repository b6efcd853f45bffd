"""Makes a site of docs/ and of the pages that stand elsewhere in the repository; a hook of mkdocs.

Links of a page lead somewhere in the repository. Here one to a page leads to that page of the site, and one
to any other file to a copy of it below `files/`. The reference is made of the names that the packages say
are public. `mkdocs.yml` has the rest.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Page of the repository -> page of the site; one in docs/ keeps its name.
ELSEWHERE = {
    "README.md": "index.md",
    "README.zh.md": "zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/overhead.md": "benchmarks-overhead.md",
    "benchmarks/overlap.md": "benchmarks-overlap.md",
}
# Modules beside `torchord` whose names recipes and programs use.
MODULES = (
    "torchord.coordinator.averages",
    "torchord.coordinator.datasets",
    "torchord.coordinator.local_steps",
    "torchord.coordinator.orders",
    "torchord.coordinator.schedules",
    "torchord.coordinator.streaming",
    "torchord.coordinator.compression",
)
ERRORS = "torchord.cache.errors"
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
HTML_LINK = re.compile(r'((?:src|href|srcset)=")([^"#]+)((?:#[^"]*)?")')


def public_names(module: Path) -> list[str]:
    """What `__all__` of a module says, in its order; without one, its public classes and functions."""
    body = ast.parse(module.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [name for name in defined if not name.startswith("_")]


def reference() -> Mapping[str, str]:
    """Pages of the reference: what stands in them, for mkdocstrings."""
    names = [name for name in public_names(ROOT / "torchord" / "__init__.py") if name != "app"]
    whole = {"show_root_heading": False, "show_root_toc_entry": False}
    modules = "\n".join(f"## {name}\n\n{block(name, heading_level=3, **whole)}" for name in MODULES)
    return {
        "reference.md": "# Public names\n\nWhat `from torchord import ...` gives.\n\n"
        + "\n".join(block(f"torchord.{name}") for name in names),
        "reference-modules.md": f"# Modules for recipes\n\n{modules}",
        "reference-errors.md": f"# Exceptions\n\n{block(ERRORS, **whole)}",
    }


def block(name: str, **options: object) -> str:
    """What mkdocstrings puts the documentation of a name in the place of."""
    return f"::: {name}\n    options: {json.dumps(options)}\n"


def targets(markdown: str) -> Iterator[str]:
    """What the links of a page lead to, without those that name a scheme."""
    prose = FENCE.sub("", markdown)
    for pattern in (LINK, HTML_LINK):
        yield from (found[2] for found in pattern.finditer(prose) if ":" not in found[2])


def resolved(page: str, target: str) -> str:
    """The file of the repository that a link of a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def relinked(markdown: str, page: str) -> str:
    """The page with its links led to places of the site.

    Args:
        markdown: its text.
        page: its path in the repository.
    """
    here = posixpath.dirname(place(page)) or "."

    def replaced(found: re.Match[str]) -> str:
        if ":" in found[2]:
            return found[0]
        return found[1] + posixpath.relpath(place(resolved(page, found[2])), here) + found[3]

    pieces, last = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [markdown[last : fence.start()], fence[0]]
        last = fence.end()
    pieces.append(markdown[last:])
    pieces[::2] = [HTML_LINK.sub(replaced, LINK.sub(replaced, prose)) for prose in pieces[::2]]
    return "".join(pieces)


def pages() -> list[str]:
    """The paths of all pages in the repository."""
    here = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("**/*.md"))]
    return here + [path for path in ELSEWHERE if (ROOT / path).exists()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, the reference, and the files that any page leads to."""
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))
    for page in pages():
        wanted = {page, *(resolved(page, target) for target in targets((ROOT / page).read_text()))}
        for path in sorted(wanted):
            if files.get_file_from_path(place(path)) is None and (ROOT / path).is_file():
                files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the page's links to places of the site."""
    origin = {uri: path for path, uri in ELSEWHERE.items()}
    uri = page.file.src_uri
    return markdown if uri in reference() else relinked(markdown, origin.get(uri, f"docs/{uri}"))
