"""What is installed here and under which licences: a bill of materials, and a check that can fail.

python .ci/sbom.py FILE          writes a CycloneDX 1.6 JSON of this environment; no time is in it
python .ci/sbom.py --licences    says whose licence licences.toml does not allow; exit status 1 if any
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RULES = Path(__file__).with_name("licences.toml")
NAMED = {
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "LicenseRef-BSD",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd license": "LicenseRef-BSD",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "new bsd": "BSD-3-Clause",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
    "python software foundation license": "PSF-2.0",
}
"""How metadata of before SPDX name a licence."""
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)*")


def packages() -> list[Distribution]:
    """What is installed here, by name, each once; not what a package carries in itself (setuptools does)."""
    found = [one for one in distributions() if "_vendor" not in str(one.locate_file(""))]
    return [one for _, one in sorted({canonicalize_name(one.name): one for one in found}.items())]


def licence_of(one: Distribution, rules: Mapping[str, Any]) -> str:
    """An SPDX expression, "" where the package names no licence."""
    said = one.metadata.get("License-Expression") or rules["said"].get(canonicalize_name(one.name))
    if said:
        return said
    text = (one.metadata.get("License") or "").strip()
    if named := NAMED.get(text.lower()):
        return named
    if _EXPRESSION.fullmatch(text) and ("-" in text or text in rules["allowed"]):
        return text
    marks = [
        c.rpartition("::")[2].strip() for c in one.metadata.get_all("Classifier", []) if c[:9] == "License :"
    ]
    found = [NAMED[mark.lower()] for mark in marks if mark.lower() in NAMED]
    return " OR ".join(sorted(set(found)))


def refused(expression: str, allowed: frozenset[str]) -> list[str]:
    """The licences that stand in the way; none where one side of an OR is allowed whole."""
    sides = []
    for side in expression.replace("(", "").replace(")", "").split(" OR "):
        sides.append([part for part in side.split(" AND ") if part.strip() not in allowed])
    return min(sides, key=len)


def faults(installed: list[Distribution], rules: Mapping[str, Any]) -> list[str]:
    """Whose licence is not allowed or not known, in a sentence each."""
    found = []
    for one in installed:
        name = canonicalize_name(one.name)
        licence = licence_of(one, rules)
        if not licence:
            found.append(f"{name} {one.version} names no licence: look it up, and say it in licences.toml")
            continue
        more = [its["licence"] for who, its in rules["exceptions"].items() if fnmatch(name, who)]
        for part in refused(licence, frozenset((*rules["allowed"], *more))):
            found.append(f"{name} {one.version} is under {part}, which licences.toml does not allow")
    return found


def bill(installed: list[Distribution], rules: Mapping[str, Any]) -> dict[str, Any]:
    """The bill of materials, torchord at its head."""
    refs = {canonicalize_name(d.name): f"pkg:pypi/{canonicalize_name(d.name)}@{d.version}" for d in installed}
    components, edges = [], []
    for one in installed:
        name = canonicalize_name(one.name)
        component: dict[str, Any] = {"type": "library", "bom-ref": refs[name], "name": name}
        component |= {"version": one.version, "purl": refs[name].replace("+", "%2B")}
        if licence := licence_of(one, rules):
            component["licenses"] = [{"expression": licence}]
        components.append(component)
        wanted = [Requirement(text) for text in one.requires or () if "extra ==" not in text]
        needed = {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate()}
        edges.append({"ref": refs[name], "dependsOn": sorted(refs[n] for n in needed if n in refs)})
    head = next(one for one in components if one["name"] == "torchord")
    components.remove(head)
    content = json.dumps([head, components, edges], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {"component": {**head, "type": "application"}},
        "components": components,
        "dependencies": edges,
    }


def main(words: list[str]) -> int:
    """See the module."""
    rules = tomllib.loads(RULES.read_text())
    here = packages()
    if words == ["--licences"]:
        for fault in (found := faults(here, rules)):
            print(f"licences: {fault}", file=sys.stderr)
        return 1 if found else 0
    if len(words) != 1 or words[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    Path(words[0]).write_text(json.dumps(bill(here, rules), indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
