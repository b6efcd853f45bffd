"""The files for systemd and Kubernetes: what they start, what they ask, and that no secret is in them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchord.coordinator.cli import _torchord

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
