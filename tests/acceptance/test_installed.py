"""torchord as its users have it: installed, started by console scripts, beside code of their own.

That directory has a `tasks.py`, a `cache.py`, a `coordinator.py` and a `utils/cache.py`, which its recipe
imports: names that torchord's own folders have in a checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.installed import ROOT, Installation, checkout, install
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.coordinator.spec.targets import Target

pytestmark = pytest.mark.slow
CONFIG = TrainingConfig(epochs=1, batch_size=16, shards=2)
RECIPE = Recipe(
    model=Target("my_models:Net", kwargs={"hidden": 4}),
    dataset="my_models:points",
    loss="torch.nn.functional:cross_entropy",
    optimizer="my_models:optimizer",
)
PROJECT = {
    "tasks.py": "import torch\ndef optimizer(parameters): return torch.optim.SGD(parameters, lr=0.1)\n",
    "cache.py": "FEATURES = 3\n",
    "coordinator.py": "CLASSES = 2\n",
    "utils/__init__.py": "",
    "utils/cache.py": "EXAMPLES = 48\n",
    "my_models.py": """
import torch
from cache import FEATURES
from coordinator import CLASSES
from torch.utils.data import TensorDataset
from tasks import optimizer
from utils.cache import EXAMPLES

class Net(torch.nn.Sequential):
    def __init__(self, hidden):
        super().__init__(torch.nn.Linear(FEATURES, hidden), torch.nn.Linear(hidden, CLASSES))

def points():
    inputs = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())
""",
    "spawning.py": """
from torchord import app
app.conf.worker_pool_start_method = "spawn"
""",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def installations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Installation]:
    """ "wheel" and "editable"."""
    source = checkout(tmp_path_factory.mktemp("source") / "checkout")
    folder = tmp_path_factory.mktemp("installed")
    return {
        name: install(source, folder / name, editable=name == "editable") for name in ("wheel", "editable")
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with code of its own."""
    folder = tmp_path / "project"
    write(folder, PROJECT)
    return folder


def plain(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a fresh shell."""
    return {"PATH": os.defpath, "HOME": str(folder.parent), "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextmanager
def worker(command: list[str], folder: Path, **environment: str) -> Iterator[Callable[[], str]]:
    """A worker started in a directory, as a function that returns what it has printed."""
    log = folder / "worker.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=plain(folder, **environment), stdout=out, stderr=out
        )
    try:
        yield log.read_text
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def trained(run: Run, log: Callable[[], str]) -> None:
    """Until the run is done, which is audited."""
    wait_until(
        lambda: run.status().state in ("done", "failed"), message=lambda: f"the run's end; log:\n{log()}"
    )
    assert run.status().state == "done", run.status()
    assert run.verify().ok


def test_a_wheel_takes_one_name(installations: dict[str, Installation]) -> None:
    with zipfile.ZipFile(installations["wheel"].wheel) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
    tops = {name.partition("/")[0] for name in names}
    [metadata] = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"torchord", metadata}
    ours = {
        f"torchord/{path.relative_to(ROOT)}".replace("torchord/torchord/", "torchord/")
        for part in ("cache", "coordinator", "tasks", "torchord")
        for suffix in ("py", "lua", "typed", "html", "js", "css", "LICENSE")
        for path in (ROOT / part).rglob(f"*.{suffix}")
    }
    assert {name for name in names if not name.startswith(metadata)} == ours
    assert "torchord/py.typed" in ours and any(name.endswith(".lua") for name in ours)


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("editable", ["-A", "torchord", "worker"]),
        ("wheel", ["-A", "torchord", "worker", "--pool", "prefork", "-c", "1"]),
        ("wheel", ["-A", "torchord", "worker", "--pool", "solo"]),
        ("editable", ["-A", "spawning", "worker", "--pool", "prefork", "-c", "1"]),
    ],
    ids=["threads", "prefork", "solo", "spawn"],
)
def test_the_console_script_finds_the_code_of_its_directory(
    layout: str, arguments: list[str], installations: dict[str, Installation], project: Path, redis_url: str
) -> None:
    # Named like an installed module that a worker imports late: the directory comes after it.
    write(project, {"safetensors.py": "raise SystemExit('a stranger')"})
    command = [installations[layout].program("celery"), *arguments]
    run = Master(redis_url, checkpoint_dir=str(project / "checkpoints")).submit(RECIPE, CONFIG, name="mine")
    with worker(command, project, TORCHORD_URL=redis_url) as log:
        trained(run, log)
        said = log()
    assert f"recipes may use modules under {project} and the building blocks of torch" in said
    assert "(TORCHORD_ALLOWED_MODULES=.,torch)\n" in said
    [places] = (line for line in said.splitlines() if "modules are looked for in" in line)
    looked = places.partition("looked for in ")[2].split(", ")
    assert looked[-1] == str(project) and not [place for place in looked if (Path(place) / "cache").is_dir()]
    assert (project / "checkpoints" / "mine").is_dir()


def test_the_setting_that_a_refusal_names_lets_the_run_train(
    installations: dict[str, Installation], project: Path, tmp_path: Path, redis_url: str
) -> None:
    write(tmp_path / "library", {"nets.py": "from my_models import Net\nclass Deep(Net): pass\n"})
    master = Master(redis_url, checkpoint_dir=str(project / "checkpoints"))
    recipe = Recipe(
        model=Target("nets:Deep", kwargs={"hidden": 4}),
        dataset="my_models:points",
        loss="torch.nn.functional:cross_entropy",
        optimizer="my_models:optimizer",
    )
    run = master.submit(recipe, CONFIG, name="refused")
    command = [installations["wheel"].program("celery"), "-A", "torchord", "worker"]
    shell = {"TORCHORD_URL": redis_url, "PYTHONPATH": str(tmp_path / "library")}
    with worker(command, project, **shell) as log:
        wait_until(lambda: run.status().state == "failed", message=lambda: f"the refusal; log:\n{log()}")
    error = run.status().error
    assert error is not None and "may not import 'nets'" in error
    name, _, value = error.split("start the worker with ")[1].split()[0].partition("=")
    run.resume()
    with worker(command, project, **shell, **{name: value}) as log:
        trained(run, log)


def test_a_program_with_modules_of_the_same_names(
    installations: dict[str, Installation], project: Path
) -> None:
    program = """
import json, subprocess, sys
from functools import partial
import torch
import cache, coordinator, my_models, tasks, utils.cache
from torchord import LocalCluster, Master, Recipe, TrainingConfig

if __name__ == "__main__":
    recipe = Recipe(
        model=partial(my_models.Net, hidden=4), dataset=my_models.points, optimizer=tasks.optimizer,
        loss=torch.nn.functional.cross_entropy,
    )
    with LocalCluster(workers=1) as cluster:
        config = TrainingConfig(epochs=1, batch_size=16, shards=2)
        run = Master(cluster.url).submit(recipe, config, name="mine")
        run.wait(progress=True)
        outputs = run.predict(torch.zeros(5, cache.FEATURES))
        def told(command):
            words = [sys.argv[1], command, "mine", "--url", cluster.url, "--json"]
            return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
        status, verify = told("status"), told("verify")
    print(json.dumps({
        "shape": list(outputs.shape),
        "status": status["state"],
        "verify": verify["steps"],
        "files": [one.__file__ for one in (tasks, cache, coordinator, utils.cache)],
    }))
"""
    write(project, {"train.py": program})
    for layout, one in installations.items():
        done = subprocess.run(
            [one.program("python"), "train.py", one.program("torchord")],
            cwd=project,
            env=plain(project),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{layout}: {done.stdout}{done.stderr}"
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["shape"] == [5, 2] and found["status"] == "done", layout
        assert found["verify"] == 3, layout
        names = ("tasks.py", "cache.py", "coordinator.py", "utils/cache.py")
        assert found["files"] == [str(project / name) for name in names], layout
        assert "waiting for the cluster's workers to start" in done.stdout
        (project / "checkpoints").rename(project / f"checkpoints-{layout}")
