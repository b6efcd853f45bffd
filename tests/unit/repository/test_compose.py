"""docker-compose.yml and its overlays: valid Compose files, and what the documentation promises of them.

No container engine is needed. The Compose specification's own JSON schema (Apache-2.0, from
compose-spec/compose-spec) comes with the development dependency check-jsonschema.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "docker-compose.yml"
OVERLAYS = sorted((ROOT / "deploy").glob("*.yml"))
MONITORING = ROOT / "deploy" / "monitoring.yml"
Document = dict[str, Any]


def load(path: Path) -> Document:
    return yaml.safe_load(path.read_text())


def schema_errors(path: Path) -> str:
    """What the Compose schema says against the file; empty when it is valid."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def ours(document: Document) -> Document:
    """The services that run torchord's image: all but the store."""
    return {name: service for name, service in document["services"].items() if name != "store"}


def command_of(service: Document) -> str:
    return " ".join(service["command"])


ROLES = {
    "server": "server",
    "client-cpu": "worker",
    "client-gpu": "worker",
    "flower": "monitor",
    "metrics": "monitor",
}

# --- what we promise: each takes the document and yields what is broken --------------------


def health_and_restart(document: Document) -> list[str]:
    broken = []
    for name, service in document["services"].items():
        health = service.get("healthcheck", {})
        if not {"test", "interval", "timeout", "retries"} <= health.keys():
            broken.append(f"{name}: no complete health check")
        if service.get("restart") != "unless-stopped":
            broken.append(f"{name}: not restarted")
        if "stop_grace_period" not in service:
            broken.append(f"{name}: no stop_grace_period")
    return broken


def an_image_for_each_build(document: Document) -> list[str]:
    """One for the CPU and one for GPUs: neither build takes the other's tag."""
    gpu = {name for name, service in document["services"].items() if "gpu" in service.get("profiles", [])}
    found = {
        kind: {
            (service["image"], str(service["build"]))
            for name, service in ours(document).items()
            if (name in gpu) == kind
        }
        for kind in (False, True)
    }
    images, builds = ({pair[place] for pairs in found.values() for pair in pairs} for place in (0, 1))
    alone = all(len(pairs) == 1 for pairs in found.values()) and len(images) == len(builds) == 2
    return [] if alone else [f"images {images}, builds {builds}"]


def memory_is_bounded(document: Document) -> list[str]:
    return [
        f"{name}: no mem_limit"
        for name, service in document["services"].items()
        if "mem_limit" not in service
    ]


def workers_are_begun_anew(document: Document) -> list[str]:
    broken = []
    for name, service in ours(document).items():
        if "-Q " in command_of(service):
            test = " ".join(service.get("healthcheck", {}).get("test", []))
            if "torchord health --live" not in test or "kill -9 -1" not in test:
                broken.append(f"{name}: stays as it is when it lives no more")
    return broken


def profiles(document: Document) -> list[str]:
    expected = {
        "client-cpu": ["cpu"],
        "client-gpu": ["gpu"],
        "metrics": ["tensorboard"],
        "tensorboard": ["tensorboard"],
    }
    found = {name: s["profiles"] for name, s in document["services"].items() if "profiles" in s}
    return [] if found == expected else [f"profiles {found}"]


def gpu_reserved(document: Document) -> list[str]:
    broken = []
    for name, service in document["services"].items():
        reservations = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        devices = reservations.get("devices", [])
        gpus = [d for d in devices if d.get("driver") == "nvidia" and "gpu" in d.get("capabilities", [])]
        if ("gpu" in service.get("profiles", [])) != (len(gpus) == 1):
            broken.append(f"{name}: {len(gpus)} GPU reservations")
    return broken


def store_persists(document: Document) -> list[str]:
    store = document["services"]["store"]
    broken = [
        f"store: no {flag}"
        for flag in ("--appendonly yes", "--maxmemory ", "--maxmemory-policy noeviction")
        if flag not in command_of(store)
    ]
    mounts = [volume.split(":") for volume in store.get("volumes", [])]
    named = [source for source, target, *_ in mounts if target == "/data"]
    if not named or named[0] not in document.get("volumes", {}):
        broken.append("store: /data is not a named volume")
    return broken


def ports_are_local(document: Document) -> list[str]:
    return [
        f"{name}: {port}"
        for name, service in document["services"].items()
        for port in service.get("ports", [])
        if not str(port).startswith("127.0.0.1:")
    ]


def workers_reach_the_store(document: Document) -> list[str]:
    broken = []
    for name, service in ours(document).items():
        if name == "tensorboard":
            continue
        role = ROLES[name]
        if service.get("environment", {}).get("TORCHORD_URL_FILE") != f"/run/secrets/{role}.url":
            broken.append(f"{name}: no URL of the role {role}")
        if service.get("secrets") != [f"{role}.url"] or f"{role}.url" not in document["secrets"]:
            broken.append(f"{name}: has secrets {service.get('secrets')}")
        if service.get("depends_on", {}).get("store", {}).get("condition") != "service_healthy":
            broken.append(f"{name}: does not wait for the store")
    return broken


def nobody_is_root_or_writes_elsewhere(document: Document) -> list[str]:
    broken = []
    for name, service in document["services"].items():
        if service.get("read_only") is not True or service.get("cap_drop") != ["ALL"] or "cap_add" in service:
            broken.append(f"{name}: may write to its root, or has capabilities")
        if "no-new-privileges:true" not in service.get("security_opt", []) or service.get("privileged"):
            broken.append(f"{name}: may gain privileges")
    if document["services"]["store"].get("user") in (None, "root", "0"):
        broken.append("store: runs as root")
    return broken


def passwords_are_in_files(document: Document) -> list[str]:
    broken = []
    for name, service in document["services"].items():
        told = {**service.get("environment", {}), "command": command_of(service)}
        told["healthcheck"] = " ".join(service.get("healthcheck", {}).get("test", []))
        for where, value in told.items():
            words = str(value or "").replace(" -a ", " --pass ").lower()
            if "@" in words.replace("@%h", "").replace("@$$hostname", "") or any(
                word in words for word in ("requirepass", "password", "redis://", "--pass", "auth ")
            ):
                broken.append(f"{name}: {where} may show a password")
    if "--aclfile /run/secrets/users.acl" not in command_of(document["services"]["store"]):
        broken.append("store: asks for no password")
    for name, secret in document["secrets"].items():
        if secret.keys() != {"file"} or not secret["file"].endswith(f"/{name}"):
            broken.append(f"{name}: {secret}")
    return broken


def queues_are_served(document: Document) -> list[str]:
    queues = {name: command_of(s).partition("-Q ")[2].split(" ")[0] for name, s in ours(document).items()}
    expected = {"server": "updates", "client-cpu": "gradients", "client-gpu": "gradients"}
    served = {name: queue for name, queue in queues.items() if queue}
    return [] if served == expected else [f"queues {served}"]


PROMISES: list[Callable[[Document], list[str]]] = [
    health_and_restart,
    an_image_for_each_build,
    memory_is_bounded,
    workers_are_begun_anew,
    profiles,
    gpu_reserved,
    store_persists,
    ports_are_local,
    workers_reach_the_store,
    nobody_is_root_or_writes_elsewhere,
    passwords_are_in_files,
    queues_are_served,
]


@pytest.mark.parametrize("path", [COMPOSE, *OVERLAYS], ids=lambda path: path.name)
def test_the_compose_schema_accepts_the_file(path: Path) -> None:
    assert schema_errors(path) == ""


def test_the_compose_schema_refuses_a_misspelt_key(tmp_path: Path) -> None:
    document = load(COMPOSE)
    document["services"]["store"]["helthcheck"] = document["services"]["store"].pop("healthcheck")
    path = tmp_path / "docker-compose.yml"
    path.write_text(yaml.safe_dump(document))
    assert "helthcheck" in schema_errors(path)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_file_keeps_the_promise(promise: Callable[[Document], list[str]]) -> None:
    assert promise(load(COMPOSE)) == []


def _drop_health(services: Document) -> None:
    del services["client-gpu"]["healthcheck"]


def _drop_restart(services: Document) -> None:
    del services["flower"]["restart"]


def _second_image(services: Document) -> None:
    services["flower"]["image"] = "mher/flower"


def _same_tag(services: Document) -> None:
    services["client-gpu"]["image"] = services["client-cpu"]["image"]


def _no_limit(services: Document) -> None:
    del services["store"]["mem_limit"]


def _only_told(services: Document) -> None:
    services["server"]["healthcheck"]["test"] = ["CMD-SHELL", "torchord health"]


def _gpu_by_default(services: Document) -> None:
    del services["client-gpu"]["profiles"]


def _no_reservation(services: Document) -> None:
    del services["client-gpu"]["deploy"]


def _no_aof(services: Document) -> None:
    services["store"]["command"] = ["valkey-server"]


def _no_volume(services: Document) -> None:
    services["store"]["volumes"] = ["./data:/data"]


def _open_port(services: Document) -> None:
    services["store"]["ports"] = ["6379:6379"]


def _no_url(services: Document) -> None:
    del services["server"]["environment"]["TORCHORD_URL_FILE"]


def _anothers_role(services: Document) -> None:
    services["flower"]["secrets"] = ["server.url"]


def _writes(services: Document) -> None:
    services["flower"]["read_only"] = False


def _store_is_root(services: Document) -> None:
    del services["store"]["user"]


def _password_in_environment(services: Document) -> None:
    services["server"]["environment"]["TORCHORD_URL"] = "redis://:hunter2@store/0"


def _password_in_command(services: Document) -> None:
    services["store"]["healthcheck"]["test"] = ["CMD-SHELL", "valkey-cli -a $PW ping"]


def _everybody_enters(services: Document) -> None:
    services["store"]["command"] = services["store"]["command"][:-2]


def _no_wait(services: Document) -> None:
    services["client-cpu"]["depends_on"] = {"server": {"condition": "service_started"}}


def _no_server(services: Document) -> None:
    services["server"]["command"] = ["celery", "-A", "torchord", "worker"]


@pytest.mark.parametrize(
    ("breakage", "promise"),
    [
        (_drop_health, health_and_restart),
        (_drop_restart, health_and_restart),
        (_second_image, an_image_for_each_build),
        (_same_tag, an_image_for_each_build),
        (_no_limit, memory_is_bounded),
        (_only_told, workers_are_begun_anew),
        (_gpu_by_default, profiles),
        (_no_reservation, gpu_reserved),
        (_no_aof, store_persists),
        (_no_volume, store_persists),
        (_open_port, ports_are_local),
        (_no_url, workers_reach_the_store),
        (_anothers_role, workers_reach_the_store),
        (_writes, nobody_is_root_or_writes_elsewhere),
        (_store_is_root, nobody_is_root_or_writes_elsewhere),
        (_password_in_environment, passwords_are_in_files),
        (_password_in_command, passwords_are_in_files),
        (_everybody_enters, passwords_are_in_files),
        (_no_wait, workers_reach_the_store),
        (_no_server, queues_are_served),
    ],
)
def test_a_broken_promise_is_noticed(
    breakage: Callable[[Document], None], promise: Callable[[Document], list[str]]
) -> None:
    document = load(COMPOSE)
    breakage(document["services"])
    assert promise(document) != []


# In files of secrets, set by each service, or of the submitting process.
NOT_HANDED_ON = {"TORCHORD_URL_FILE", "TORCHORD_DEVICE", "TORCHORD_TELL_KEY", "TORCHORD_API_TOKENS"}


def test_every_setting_is_handed_on() -> None:
    page = (ROOT / "docs" / "workers.md").read_text().partition("\n## Environment\n")[2]
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    known = {name for row in rows for name in re.findall(r"TORCHORD_\w+", row)}
    services = load(COMPOSE)["services"]
    handed = {name for service in ("server", "flower") for name in services[service]["environment"]}
    assert len(known) > 25 and known - handed - NOT_HANDED_ON == set()


@pytest.mark.parametrize(
    ("ready", "alive", "asked", "ended"),
    [
        (0, 0, 20, False),
        (1, 0, 20, False),  # it waits for its store
        (1, 1, 9, False),
        (1, 1, 10, True),
    ],
)
def test_a_worker_is_ended_that_lives_no_more_and_no_other(
    ready: int, alive: int, asked: int, ended: bool, tmp_path: Path
) -> None:
    """The health check in a real shell, with a `torchord` and a `kill` that only tell."""
    kind, check = load(COMPOSE)["services"]["client-cpu"]["healthcheck"]["test"]
    program = tmp_path / "torchord"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--live*) exit {alive} ;; *) exit {ready} ;; esac\n')
    program.chmod(0o755)
    script = f"kill() {{ echo ended; }}\n{check}".replace("$$", "$").replace(
        "/tmp/unwell", str(tmp_path / "unwell")
    )
    answers = [
        subprocess.run(
            ["sh", "-c", script],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        for _ in range(asked)
    ]
    assert kind == "CMD-SHELL" and {answer.returncode for answer in answers} == {ready}
    assert [answer.stdout for answer in answers] == [""] * (asked - 1) + ["ended\n" if ended else ""]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_changes_only_services_that_exist(path: Path) -> None:
    added = {"prometheus", "grafana"} if path == MONITORING else set()
    assert load(path)["services"].keys() - added <= load(COMPOSE)["services"].keys()


def test_what_watches_is_hardened_and_reads_files_that_are_there() -> None:
    document = load(MONITORING)
    assert [*health_and_restart(document), *ports_are_local(document)] == []
    for service in document["services"].values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            named = source in document["volumes"]
            assert named or ((ROOT / source).is_file() and rest.endswith(":ro")), volume


def test_the_fleet_overlay_keeps_the_stores_options() -> None:
    base = load(COMPOSE)["services"]["store"]["command"]
    fleet = load(ROOT / "deploy" / "fleet.yml")["services"]["store"]["command"]
    assert fleet[: len(base)] == base
    assert {"--tls-port", "--aclfile"} <= set(fleet)


def copied() -> dict[Path, PurePosixPath]:
    """What the Dockerfile copies from the build context -> where it lies in the image."""
    places: dict[Path, PurePosixPath] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *sources, goal = (word for word in line.split()[1:] if not word.startswith("--"))
            for source in sources:
                place = PurePosixPath(goal) / (Path(source).name if goal.endswith("/") else "")
                places[ROOT / source] = place
    return places


def ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a path out of the build context: the last line that matches it decides."""
    relative = path.relative_to(ROOT)
    outcome = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        anywhere = line.startswith("**/")
        paths = [relative, *relative.parents][:-1]
        if any(fnmatch(one.name if anywhere else one.as_posix(), pattern) for one in paths):
            outcome = not line.startswith("!")
    return outcome


def test_everything_that_the_image_copies_is_in_its_build_context() -> None:
    sources = copied()
    assert {ROOT / name for name in ("torchord", "pyproject.toml")} <= sources.keys()
    for source in sources:
        assert source.exists(), f"the Dockerfile copies {source.name}, which is not there"
        assert not ignored(source), f".dockerignore leaves out {source.name}, which the Dockerfile copies"
    assert ignored(ROOT / "tests") and ignored(ROOT / "cache" / "__pycache__"), (
        "what decides here does decide"
    )


def test_links_that_the_image_copies_lead_to_what_it_copies() -> None:
    sources = copied()
    links = [path for source in sources if source.is_dir() for path in source.iterdir() if path.is_symlink()]
    assert {link.name for link in links} == {"cache", "coordinator", "tasks"}
    for link in links:
        there = sources[link.parent] / link.readlink()
        assert PurePosixPath(os.path.normpath(there)) == sources[link.resolve()]


def test_no_secret_gets_into_the_image() -> None:
    words = ("password", "secret", "token", "_key", "credential", "redis://")
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if not line.startswith("#"):
            assert not any(word in line.lower() for word in words), line
    for name in (".env", "deploy/secrets/worker.url", "deploy/tls/ca.key", ".git/config"):
        assert ignored(ROOT / name), f"{name} would be sent to whoever builds the image"
    assert not any(path.is_relative_to(ROOT / "deploy") for path in copied())


def test_the_image_needs_no_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    users = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("USER ")]
    assert users and users[-1] != "root"
