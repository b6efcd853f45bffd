"""What is installed is pinned by hash, listed, and under licences that are allowed; each check can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tomllib
from email.message import Message
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock, sbom = tool("lock"), tool("sbom")
RULES = tomllib.loads((ROOT / ".ci" / "licences.toml").read_text())


# --- hashes -----------------------------------------------------------------------------------


def test_the_hashes_are_of_what_is_pinned() -> None:
    assert lock.faults() == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("run", "celery==", "celery==0", "constraints.txt says"),
        ("run", "celery==", "celeri==", "celeri is not in constraints.txt"),
        ("dev", "pytest==", "pytests==", "no pytest"),
        ("run", "--hash=sha256:", "--hash=md5:", "no hash for"),
        ("torch", "torch==", "torches==", "torch.txt has torch"),
        ("cuda", "nvidia-nccl-cu13==", "numpy==", "cuda.txt has"),
    ],
)
def test_what_does_not_fit_is_noticed(
    file: str, old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (ROOT / "requirements").iterdir():
        text = path.read_text()
        if path.stem == file:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    assert said in "\n".join(lock.faults())


def test_the_image_takes_nothing_else() -> None:
    """But a build of torch of an index whose hash nobody has given, which docs/dependencies.md says."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [part for line in text.splitlines() for part in line.split("pip install")[1:]]
    unseen = [words for words in installs if "--require-hashes" not in words]
    assert all("--no-deps" in words for words in installs)
    assert len(unseen) == 2 and "torch==" in unseen[0] and "/src " in unseen[1]
    assert "pip check" in text


# --- licences and the list --------------------------------------------------------------------


def package(name: str, **metadata: str) -> Any:
    found = Message()
    for key, value in metadata.items():
        found[key.replace("_", "-")] = value
    return SimpleNamespace(name=name, version="1", metadata=found)


def test_what_is_installed_is_under_allowed_licences() -> None:
    installed = sbom.packages()
    assert len(installed) > 50
    assert sbom.faults(installed, RULES) == []


@pytest.mark.parametrize(
    ("metadata", "stands"),
    [
        ({"License_Expression": "GPL-3.0-only"}, "GPL-3.0-only"),
        ({"License_Expression": "MIT AND AGPL-3.0-only"}, "AGPL-3.0-only"),
        ({"License": "Proprietary"}, "names no licence"),
        (
            {"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"},
            "names no licence",
        ),
        ({}, "names no licence"),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, None),
        ({"License_Expression": "Apache-2.0 WITH LLVM-exception"}, None),
        ({"License": "BSD"}, None),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, None),
    ],
)
def test_another_licence_is_refused(metadata: dict[str, str], stands: str | None) -> None:
    found = sbom.faults([package("some", **metadata)], RULES)
    assert (found == []) if stands is None else (len(found) == 1 and stands in found[0])


def test_an_exception_is_for_its_package_alone() -> None:
    theirs = {"License_Expression": "LicenseRef-NVIDIA-Proprietary"}
    assert sbom.faults([package("nvidia-nccl-cu13", **theirs)], RULES) == []
    assert sbom.faults([package("some", **theirs)], RULES) != []


def test_the_bill_names_all_and_is_the_same_each_time(tmp_path: Path) -> None:
    installed = sbom.packages()
    bill = sbom.bill(installed, RULES)
    assert len({one["name"] for one in bill["components"]}) == len(bill["components"]) == len(installed) - 1
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "torchord"
    refs = {one["bom-ref"] for one in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {edge["ref"] for edge in bill["dependencies"]} == refs
    assert {ref for edge in bill["dependencies"] for ref in edge["dependsOn"]} <= refs
    torch = next(one for one in bill["components"] if one["name"] == "torch")
    assert torch["purl"].startswith("pkg:pypi/torch@2.") and "+" not in torch["purl"]
    assert sbom.main([str(tmp_path / "sbom.json")]) == 0
    assert json.loads((tmp_path / "sbom.json").read_text()) == bill


# --- images -----------------------------------------------------------------------------------


def images(folder: Path, *words: str, digest: str = f"sha256:{'a' * 64}") -> subprocess.CompletedProcess[str]:
    docker = folder / "bin" / "docker"
    docker.parent.mkdir(exist_ok=True)
    docker.write_text(f'#!/bin/sh\ncase "$*" in *inspect*Digest*) echo "{digest}" ;; *) exit 1 ;; esac\n')
    docker.chmod(0o755)
    return subprocess.run(
        ["sh", ROOT / "deploy" / "images.sh", *words],
        env={
            **os.environ,
            "PATH": f"{docker.parent}:{os.environ['PATH']}",
            "TORCHORD_ENV": str(folder / ".env"),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_images_are_pinned_by_digest_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    assert images(tmp_path, "--check").returncode == 1
    (tmp_path / ".env").write_text("TORCHORD_GPU=1\nTORCHORD_STORE_IMAGE=valkey/valkey:8\n")
    assert images(tmp_path, "--check").returncode == 1, "a tag is no digest"
    for _ in range(2):
        assert images(tmp_path).returncode == 0
    assert sorted((tmp_path / ".env").read_text().split()) == [
        "TORCHORD_GPU=1",
        f"TORCHORD_PYTHON_IMAGE=python:3.12-slim@sha256:{'a' * 64}",
        f"TORCHORD_STORE_IMAGE=valkey/valkey:9-alpine@sha256:{'a' * 64}",
    ]
    assert images(tmp_path, "--check").returncode == 0
    assert images(tmp_path, digest="").returncode == 1
