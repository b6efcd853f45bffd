"""The files for systemd and Kubernetes: what they start, what they ask, and that no secret is in them."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

from torchord.coordinator.cli import _torchord
from torchord.coordinator.messages import task_names

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MANIFEST = DEPLOY / "kubernetes" / "torchord.yaml"
HEALTH = {option for parameter in _torchord.commands["health"].params for option in parameter.opts}


def unit(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=True)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string(path.read_text())
    return found


def containers() -> list[Any]:
    documents = yaml.safe_load_all(MANIFEST.read_text())
    return [
        container
        for document in documents
        if document["kind"] == "Deployment"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]


@pytest.mark.parametrize("path", [*UNITS, MANIFEST], ids=lambda path: path.name)
def test_no_url_is_on_a_command_line(path: Path) -> None:
    orders = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not re.search(r"rediss?://|--url|password", "\n".join(orders), re.IGNORECASE)


def test_systemd_starts_a_worker_again_however_it_ended() -> None:
    service = unit(DEPLOY / "systemd" / "torchord@.service")["Service"]
    assert service["Restart"] == "always" and service["KillMode"] == "mixed"
    assert "celery -A torchord worker -Q %i -c 1 -n %i@%%h" in service["ExecStart"]
    asked = unit(DEPLOY / "systemd" / "torchord-health@.service")["Service"]
    assert "torchord health --live %i@%H || systemctl restart torchord@%i.service" in asked["ExecStart"]
    assert service["EnvironmentFile"] == asked["EnvironmentFile"]


@pytest.mark.skipif(which("systemd-analyze") is None, reason="NOT TESTED, there is no systemd-analyze here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for path in UNITS:  # the programs that they start are installed elsewhere
        (tmp_path / path.name).write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/sh", path.read_text()))
    units = [str(tmp_path / path.name.replace("@", "@gradients")) for path in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr


def test_memory_is_bounded_on_kubernetes() -> None:
    for container in containers():
        assert container["resources"]["limits"].keys() == {"memory"}


def test_keda_makes_clients_by_their_queue() -> None:
    found = {one["kind"]: one for one in yaml.safe_load_all((MANIFEST.parent / "keda.yaml").read_text())}
    target = found["ScaledObject"]["spec"]
    names = {one["metadata"]["name"] for one in yaml.safe_load_all(MANIFEST.read_text())}
    assert target["scaleTargetRef"]["name"] in names
    [trigger] = target["triggers"]
    assert trigger["metadata"]["listName"] == task_names.GRADIENTS
    assert trigger["authenticationRef"]["name"] == found["TriggerAuthentication"]["metadata"]["name"]
    given = {one["parameter"] for one in found["TriggerAuthentication"]["spec"]["secretTargetRef"]}
    assert given == {"address", "username", "password"}


def test_celery_multi_starts_what_the_page_says() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    [line] = re.findall(r"^celery (-A torchord multi start .*)$", page, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "celery", *line.replace(" start ", " show ").split()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    orders = [order for order in done.stdout.splitlines() if " worker " in order]
    assert ["-Q updates" in order for order in orders] == [True, False, False], done.stdout + done.stderr
    assert all("-c 1" in order and ("-Q gradients" in order or "-Q updates" in order) for order in orders)


def test_kubernetes_asks_whether_a_worker_is_alive_and_whether_it_is_ready() -> None:
    found = containers()
    assert [container["command"][5] for container in found] == ["updates", "gradients"]
    for container in found:
        url = next(entry["value"] for entry in container["env"] if entry["name"] == "TORCHORD_URL_FILE")
        assert url.rpartition("/")[0] in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "envFrom" not in container, "what is in an environment is shown with the container"
        confined = container["securityContext"]
        assert confined["runAsNonRoot"] and confined["readOnlyRootFilesystem"]
        assert not confined["allowPrivilegeEscalation"] and confined["capabilities"] == {"drop": ["ALL"]}
        asked = {name: container[name]["exec"]["command"] for name in container if name.endswith("Probe")}
        assert asked == {
            "startupProbe": ["torchord", "health", "--live"],
            "readinessProbe": ["torchord", "health"],
            "livenessProbe": ["torchord", "health", "--live"],
        }
        assert {word for words in asked.values() for word in words[2:]} <= HEALTH
