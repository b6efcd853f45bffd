"""The pictures of the documentation, taken anew: `make pictures` (needs Chromium).

A cluster trains the digits twice, and a worker is killed on the way; Flower shows it, and a headless browser
takes what a reader is to see.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch

from examples.digits import DigitNet, accuracy, load_digits
from tests.support.browser import ABSENT, PROGRAM, Browser, Page
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, Recipe, TrainingConfig
from torchord.coordinator.local_cluster.embedded_server import free_port

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
# Name -> page, what is waited for, and what is shown: an element, or so many pixels from the top.
PICTURES = {
    "runs": ("/runs", "#runs-table tbody tr", 540),
    "run": ("/run/digits-01", "#charts .uplot", 900),
    "timeline": ("/run/digits-01", ".lane-box svg", ".lane-box"),
    "compare": ("/runs/compare?run=digits-01&run=digits-02", "#charts .uplot", 880),
}
MOST_NBYTES = 150_000
WIDTH, HEIGHT = 1180, 900


def recipe(lr: float) -> Recipe:
    return Recipe(
        model=partial(DigitNet, channels=8),
        dataset=load_digits,
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        evaluation=partial(load_digits, split="test"),
        metrics={"accuracy": accuracy},
    )


def train(cluster: LocalCluster) -> None:
    """Two runs, and a worker that dies in the first one."""
    master = Master(cluster.url, checkpoint_dir=str(cluster.checkpoint_dir))
    config = TrainingConfig(epochs=8, batch_size=128, shards=4, evaluate_every=12)
    first = master.submit(recipe(1e-2), config, name="digits-01")
    wait_until(lambda: first.status().version >= 30, message="the middle of the run")
    victim = next(process for process in cluster.processes.values() if process.role == "client")
    victim.kill()
    first.wait(timeout=300)
    master.fit(recipe(2e-3), replace(config, epochs=6), name="digits-02", timeout=300)


def taken(page: Page, shown: str | int) -> bytes:
    """A PNG of the card of an element, all of whose buttons "All" are pressed, or of the top of the page."""
    if isinstance(shown, int):
        box = [0, 0, WIDTH, shown]
    else:
        card = f"document.querySelector('{shown}').closest('section, .card')"
        press = "Array.from(document.querySelectorAll('button')).filter(b => b.innerText === 'All')"
        page.ask(f"{press}.forEach(button => button.click())")
        page.until(
            f"document.querySelector('{shown} svg').getAttribute('aria-label').includes(' 1 to')", "all of it"
        )
        box = page.ask(
            f"(b => [b.left + scrollX, b.top + scrollY, b.width, b.height])({card}.getBoundingClientRect())"
        )
    clip = dict(zip(("x", "y", "width", "height"), map(float, box), strict=True), scale=1.0)
    found = page.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return base64.b64decode(found["data"])


def main() -> int:
    """Take all of them; the exit status says whether each is small enough."""
    if PROGRAM is None:
        print(ABSENT, file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, LocalCluster(workers=3, checkpoint_dir=folder) as cluster:
        train(cluster)
        port = free_port()
        flower = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "torchord", "flower", f"--port={port}"],
            env={**os.environ, "TORCHORD_URL": cluster.url, "TORCHORD_CHECKPOINT_DIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: answers(port), message="Flower")
            with Browser() as browser:
                page = browser.page()
                page.prefer("light")
                page.size(WIDTH, HEIGHT)
                for name, (path, awaited, shown) in PICTURES.items():
                    page.go(f"http://127.0.0.1:{port}{path}")
                    page.until(f"document.querySelector({awaited!r})", name)
                    (FOLDER / f"{name}.png").write_bytes(taken(page, shown))
        finally:
            flower.terminate()
            flower.wait()
    sizes = {name: (FOLDER / f"{name}.png").stat().st_size for name in PICTURES}
    for name, nbytes in sizes.items():
        print(f"docs/pictures/{name}.png  {nbytes:,} bytes{'  too large' if nbytes > MOST_NBYTES else ''}")
    return int(max(sizes.values()) > MOST_NBYTES)


def answers(port: int) -> bool:
    try:
        urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5).close()
    except URLError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
