"""torchord in a Django project: the layout of docs/your-project.md, in a directory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from torchord import LocalCluster
from torchord.coordinator.local_cluster.import_path import ROOT

PROJECT = {
    "proj/__init__.py": """
from .celery import app as celery_app

__all__ = ["celery_app"]
""",
    "proj/settings.py": """
import os

SECRET_KEY = "for a test"
USE_TZ = True
INSTALLED_APPS = ["shop"]
CELERY_BROKER_URL = os.environ["TORCHORD_URL"]
CELERY_RESULT_BACKEND = os.environ["TORCHORD_URL"]
CELERY_RESULT_EXPIRES = 60
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
""",
    "proj/celery.py": """
import os

import torchord
from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")
app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
torchord.install(app)
app.autodiscover_tasks()
""",
    "shop/__init__.py": "",
    "shop/tasks.py": """
from celery import shared_task
from django.conf import settings


@shared_task
def installed(name):
    return name in settings.INSTALLED_APPS
""",
    "shop/training.py": """
import torch
from django.apps import apps


def data():
    assert apps.ready
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))


def net():
    return torch.nn.Linear(4, 1)
""",
    # Names that torchord's own modules have, too.
    "cache.py": "raise ImportError('the project has a cache.py of its own')\n",
    "submit.py": """
import os
from functools import partial

import django
import torch

os.environ["DJANGO_SETTINGS_MODULE"] = "proj.settings"
django.setup()

from shop.tasks import installed
from shop.training import data, net
from torchord import Master, Recipe, TrainingConfig

recipe = Recipe(
    model=net, dataset=data, loss=torch.nn.functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1)
)
run = Master().submit(recipe, TrainingConfig(epochs=2, batch_size=8, shards=2), name="from-django")
print("installed", installed.delay("shop").get(timeout=90))
trained = run.wait(timeout=90)
print("trained", len(trained.history), run.verify().ok, trained.history[-1].loss < trained.history[0].loss)
""",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's directory."""
    for name, text in PROJECT.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    return tmp_path / "project"


def test_a_django_project_trains_on_its_own_workers(project: Path) -> None:
    """Celery's console script finds settings, tasks and models; its own tasks run beside the training."""
    log = project / "worker.log"
    command = [Path(sysconfig.get_path("scripts")) / "celery", "-A", "proj", "worker", "-l", "INFO"]
    with LocalCluster(workers=0) as server:
        environment = {**os.environ, "TORCHORD_URL": server.url, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [*command, "-Q", "celery,gradients,updates", "-c", "2", "--pool", "threads"],
                cwd=project, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(lambda: b" ready." in log.read_bytes(), message=lambda: log.read_text()[-3000:])
            done = subprocess.run(
                [sys.executable, "submit.py"],
                cwd=project, env=environment, capture_output=True, text=True, timeout=200,
            )  # fmt: skip
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    assert done.returncode == 0, done.stderr + log.read_text()[-5000:]
    assert done.stdout.splitlines() == ["installed True", "trained 8 True True"]
