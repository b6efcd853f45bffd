"""The examples run as a user runs them: they train, say what came out, and leave nothing behind."""

from __future__ import annotations

import gzip
import os
import re
import runpy
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from examples import char_gpt, fashion_mnist
from tests.support.processes import MARK, describe, marked
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.cache import errors
from torchord.coordinator.local_cluster.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
Start = Callable[..., LocalCluster]


def start(mark: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python -m examples.digits`, as a leader of its own process group."""
    command = [sys.executable, "-m", "examples.digits", "--out", str(folder / "out")]
    return subprocess.Popen(
        [*command, "--checkpoints", str(folder / "checkpoints"), *arguments],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def nothing_is_left(mark: str) -> None:
    wait_until(lambda: not marked(mark), message=lambda: f"the end of\n{describe(marked(mark))}")


@pytest.mark.slow
def test_the_demo_trains_and_says_what_came_out(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    program = start(mark, tmp_path)
    try:
        stdout, stderr = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == 0, stderr
    assert stderr == ""
    accuracy = re.search(r"^Test accuracy: (\d+\.\d+)%", stdout, re.MULTILINE)
    assert accuracy and float(accuracy[1]) >= 97.0, stdout
    assert "ledger audit clean: 96 steps, 384 gradient slots applied once each" in stdout
    name = re.search(r"^Run (\S+):", stdout)
    assert name, stdout
    made = tmp_path / "out" / name[1]
    assert (made / "loss.png").read_bytes().startswith(PNG)
    assert (made / "model.safetensors").stat().st_size > 10_000
    assert list((tmp_path / "checkpoints" / name[1]).rglob("*.safetensors"))
    assert str(made / "loss.png") in stdout and str(made / "model.safetensors") in stdout
    assert "celery -A torchord flower" in stdout and "--url redis://" in stdout
    nothing_is_left(mark)


@pytest.mark.parametrize("moment", ["while it imports", "while the workers start"])
def test_ctrl_c_ends_it_in_one_line(moment: str, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    program = start(mark, tmp_path)
    try:
        if moment == "while it imports":
            # The first thing that it does is to take SIGINT; importing torch follows, and takes a second.
            wait_until(lambda: takes_interrupt(program.pid), message="the handler of SIGINT")
        else:
            wait_until(lambda: len(marked(mark)) >= 4, message="its workers")
        os.killpg(program.pid, signal.SIGINT)
        _, stderr = program.communicate(timeout=PATIENCE_SECONDS)
    finally:
        program.kill()
    assert program.returncode == 130, stderr
    assert stderr.startswith("Interrupted") and stderr.count("\n") == 1
    nothing_is_left(mark)


def takes_interrupt(pid: int) -> bool:
    """Whether a process handles SIGINT and has gone on to load torch, or has no /proc to tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return psutil.pid_exists(pid)
    caught = int(re.findall(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)[0], 16)
    loads = "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return bool(caught >> (signal.SIGINT - 1) & 1) and loads


def test_fashion_mnist_without_data_says_where_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fashion_mnist.main(["--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {tmp_path}" in said
    assert "dataset-fashion-mnist" in said and "github.com/zalandoresearch/fashion-mnist" in said


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_they_were_written(suffix: str, tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"values{suffix}"
    write_idx(path, values)
    assert np.array_equal(fashion_mnist.read_idx(path), values)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\x0d\1\0\0\0\1abcd", "not an IDX file"),
        (b"", "not an IDX file"),
        (b"\0\0\x08\1\0\0\0\5ab", "truncated"),
    ],
)
def test_a_damaged_idx_file_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        fashion_mnist.read_idx(path)


def test_another_corpus_is_refused() -> None:
    text = char_gpt.standard_library(20_000)
    assert len(text) == 20_000 and text == char_gpt.standard_library(30_000)[:20_000]
    train = char_gpt.windows(20_000, char_gpt.digest(text))
    test = char_gpt.windows(20_000, char_gpt.digest(text), split="test")
    assert len(train) + len(test) == 20_000 // 65 and len(test) == 16
    with pytest.raises(RuntimeError, match="same version of Python"):
        char_gpt.windows(20_000, "0" * 16)


@pytest.mark.slow
def test_the_other_examples_train_on_a_cluster_that_is_up(
    cluster: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = cluster(1, layout="single").url
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.RandomState(0)
    for prefix, size in (("train", 512), ("t10k", 128)):
        labels = random.randint(0, 10, size)
        # A class is a brightness: learnt by any network, so that only the path is under test.
        images = np.broadcast_to(labels[:, None, None] * 25, (size, 28, 28))
        write_idx(data / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(data / f"{prefix}-labels-idx1-ubyte", labels)

    common = ["--out", str(tmp_path / "out"), "--url", url]
    assert fashion_mnist.main([*common, "--data", str(data), "--name", "fashion"]) == 0
    said = capsys.readouterr().out
    assert "of 128 held-out pictures" in said and "ledger audit clean: 4 steps, 16 gradient slots" in said
    assert (tmp_path / "out" / "fashion" / "loss.png").read_bytes().startswith(PNG)

    monkeypatch.setenv("TORCHORD_URL", url)  # from here on by the environment
    readme = tmp_path / "readme.py"
    readme.write_text(python_of("README.md")[0])
    example = runpy.run_path(str(readme))
    assert example["trained"].metrics["accuracy"] > 0.8 and example["run"].verify().ok
    capsys.readouterr()

    small = ["--corpus", "20000", "--layers", "1", "--width", "16"]
    assert char_gpt.main([*small, "--out", str(tmp_path / "out"), "--name", "gpt"]) == 0
    said = capsys.readouterr().out
    assert "bits a byte" in said and "ledger audit clean: 5 steps, 20 gradient slots" in said
    assert "The model goes on from 'def '" in said
    assert (tmp_path / "out" / "gpt" / "model.safetensors").exists()


# --- the pages ------------------------------------------------------------------------

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def python_of(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_quickstart_works_as_it_is_written(tmp_path: Path) -> None:
    module, program, *_ = python_of("docs/quickstart.md")
    (tmp_path / "my_models.py").write_text(module)
    (tmp_path / "train.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ledger audit clean: 80 steps" in done.stdout and done.stderr == ""
    assert (tmp_path / "points.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_error_has_its_way_out() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    names = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.TorchordError)
    ]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_setting_of_a_worker_is_on_its_page() -> None:
    page = (ROOT / "docs" / "workers.md").read_text()
    read = set(re.findall(r"TORCHORD_[A-Z_]+", (ROOT / "cache" / "settings.py").read_text()))
    assert sorted(name for name in read - {"TORCHORD_FAULTS"} if name not in page) == []
