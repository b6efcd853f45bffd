"""What each command prints of a finished run: at 80 columns, without a terminal, and as JSON."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from tests.support import models
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.errors import RunFailed
from torchord.coordinator.cli import _torchord, main
from torchord.coordinator.commands.common import BAD, NOT_FOUND, OK, USAGE
from torchord.coordinator.drawing.picture import Picture
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.master.run import Run

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=2, evaluate_every=5)
PROGRAMS = ("completion", "predict")  # what these print is for other programs

OUTPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "list": (("list",), r"^digits +done +step 10 of 10"),
    "status": (("status", "digits"), r"^digits: done, step 10 of 10"),
    "watch": (("watch", "digits"), r"step 9: loss "),
    "logs": (("logs", "digits"), r"^\d\d-\d\d [\d:]{8}  started: total_steps 10"),
    "plot": (("plot", "digits"), r"^Loss \(training, evaluation\)\n +\d"),
    "plot FILE": (("plot", "digits", "p.svg"), r"^digits: the curves are in .*p\.svg$"),
    "report": (("report", "digits"), r"^digits: the report is in digits\.html$"),
    "export": (("export", "digits", "m.safetensors"), r"^digits: the weights of version 10 are in "),
    "export --format torch-export": (
        ("export", "digits", "m.pt2", "--format", "torch-export"),
        r"^digits: the model of version 10 is in m\.pt2$",
    ),
    "predict": (("predict", "digits", "x.npy"), r"^\[\[-?[\d.]+"),
    "data list": (("data", "list"), r"^points +40 "),
    "data put": (
        ("data", "put", "points", "tests.support.models:points"),
        r"^points: 40 samples, .* 3 were there$",
    ),
    "data check": (("data", "check", "points"), r"^points: all 40 samples are there and whole$"),
    "verify": (("verify", "digits"), r"audit clean: 10 steps"),
    "health": (("health",), r": idle"),
    "quarantined": (("quarantined",), r"^no worker is quarantined$"),
    "doctor": (("doctor",), r"^(ok|look|WRONG) +broker"),
    "completion": (("completion", "bash"), r"_TORCHORD_COMPLETE"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, Path, Run]]:
    """A cluster with a run that is done, and the directory that the commands are called in."""
    folder = tmp_path_factory.mktemp("commands")
    with LocalCluster(1, checkpoint_dir=folder / "checkpoints", log_dir=folder / "logs") as cluster:
        master = Master(cluster.url, checkpoint_dir=folder / "checkpoints")
        run = master.submit(models.mlp(size=40), CONFIG, name="digits")
        run.wait(timeout=90)
        master.datasets.put("points", models.points())
        np.save(folder / "x.npy", models.points(6).tensors[0].numpy())
        yield cluster, folder, run


@pytest.fixture
def place(done: tuple[LocalCluster, Path, Run], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment and the directory of whoever calls the commands."""
    cluster, folder, _ = done
    monkeypatch.setenv("TORCHORD_URL", cluster.url)
    monkeypatch.setenv("TORCHORD_CHECKPOINT_DIR", str(folder / "checkpoints"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("called", OUTPUTS)
def test_a_commands_output(called: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = OUTPUTS[called]
    code = main(words)
    out, err = capsys.readouterr()
    assert code in (OK, BAD if called == "doctor" else OK) and err == ""
    assert re.search(said, out, flags=re.MULTILINE), out
    assert "\x1b" not in out and "{'" not in out, "colour, or a dict's repr"
    if called not in PROGRAMS:
        long = [line for line in out.splitlines() if len(line) > 80 and str(place) not in line]
        assert not long
    assert main([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert err == "" and [json.loads(line) for line in out.splitlines()]


def test_every_command_is_on_its_page_and_has_help_in_eighty_columns(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, command in _torchord.commands.items():
        assert f"| `{name}" in page, f"docs/cli.md has no {name}"
        assert main([name, "--help"]) == OK
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
        options = {option for parameter in command.params for option in parameter.opts}
        becomes_another = name in ("worker", "flower")
        assert becomes_another or isinstance(command, click.Group) or "--json" in options, name
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)} == {
        0,
        1,
        2,
        3,
        4,
        130,
    }


def test_a_report_needs_nothing_beside_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "digits", "r.html"]) == OK
    text = (place / "r.html").read_text()
    assert not re.search(r"<script|<link|<img|@import|url\(|\bsrc=|href=", text)
    assert (text.count("<svg") == 2 and "audit clean: 10 steps" in text and "AdamW" in text) or "SGD" in text
    for section in ("Curves", "Evaluations", "Who computed which shard", "Events", "Recipe", "Config"):
        assert f"<h2>{section}</h2>" in text
    assert main(["report", "digits", "nowhere/r.html"]) == BAD
    assert "choose a directory that exists" in capsys.readouterr().err


def test_a_picture_is_a_file_or_refused_in_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plot", "digits", "p.svg"]) == main(["plot", "digits", "p.png"]) == OK
    assert ET.parse(place / "p.svg").getroot().tag.endswith("svg")
    assert (place / "p.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for words, said in (
        (("p.png",), "needs matplotlib, which is not installed here; install it, or write an .svg"),
        (("p.gif",), "a picture is a file .svg or .png, not 'p.gif'"),
        (("--curve", "speed"), "run 'digits' has no curve 'speed'; it has loss, grad_norm, lr"),
    ):
        assert main(["plot", "digits", *words]) == USAGE
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["logs", "plot", "report", "export"])
def test_no_such_run(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["x.safetensors"] if command == "export" else []
    assert main([command, "nobody", *more]) == NOT_FOUND
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "'nobody'" in err


def test_a_program_computes_what_the_model_does_for_any_number_of_examples(
    done: tuple[LocalCluster, Path, Run], place: Path
) -> None:
    assert main(["export", "digits", "p.pt2", "--format", "torch-export"]) == OK
    program, model, inputs = (
        torch.export.load(place / "p.pt2").module(),
        done[2].model(),
        models.points(7).tensors[0],
    )
    assert torch.equal(program(inputs), model(inputs)) and torch.equal(program(inputs[:1]), model(inputs[:1]))


def test_onnx_is_refused_in_one_sentence_where_it_is_not_installed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchord.coordinator.commands.export.find_spec", lambda name: None)
    assert main(["export", "digits", "m.onnx", "--format", "onnx"]) == USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: ONNX needs onnx and onnxscript, which this machine lacks")
    assert len(err.splitlines()) == 1 and not (place / "m.onnx").exists()


def test_predictions_are_asked_for_in_any_form(
    done: tuple[LocalCluster, Path, Run],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = models.points(6).tensors[0]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(inputs.tolist())))
    assert main(["predict", "digits", "-"]) == main(["predict", "digits", "x.npy"]) == OK
    from_text, from_file = map(json.loads, capsys.readouterr().out.splitlines())
    assert torch.allclose(torch.tensor(from_text), done[2].model()(inputs)) and from_text == from_file
    for given, said in (
        ("[[1, 2], [3]]", "no rows of numbers"),
        ("{", "cannot be read"),
        ('"a"', "are lists of numbers"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert main(["predict", "digits", "-"]) == USAGE
        assert said in capsys.readouterr().err
    (place / "x.bin").write_bytes(b"")
    assert main(["predict", "digits", "x.bin"]) == USAGE
    assert "'x.bin' is no file .npy" in capsys.readouterr().err


def test_datasets_are_put_checked_and_removed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(place / "rows.npz", image=np.zeros((5, 2)), label=np.arange(5))
    assert main(["data", "put", "rows", "rows.npz", "--in", str(place / "store")]) == OK
    assert main(["data", "check", "rows", "--in", str(place / "store")]) == OK
    [chunk, *_] = (
        each for each in (place / "store").rglob("*") if each.is_file() and "rows" not in each.name
    )
    chunk.write_bytes(b"other")
    capsys.readouterr()
    assert main(["data", "check", "rows", "--in", str(place / "store")]) == BAD
    assert "put it again with verify=True" in capsys.readouterr().err
    assert main(["data", "put", "rows", "rows.npz", "--verify", "--in", str(place / "store")]) == OK
    assert main(["data", "check", "rows", "--in", str(place / "store")]) == OK
    assert main(["data", "remove", "rows", "--in", str(place / "store")]) == OK
    assert main(["data", "remove", "rows", "--in", str(place / "store")]) == NOT_FOUND
    assert main(["data", "put", "rows", "nowhere:data"]) == main(["data", "put", "rows", "no.csv"]) == USAGE


def test_a_worker_that_a_run_fails_on_leaves_its_last_lines(
    done: tuple[LocalCluster, Path, Run], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Master().submit(models.mlp(size=40, loss=models.raising_loss), CONFIG, name="broken")
    with pytest.raises(RunFailed):
        run.wait(timeout=90)
    assert main(["logs", "broken"]) == OK
    out = capsys.readouterr().out
    assert re.search(r"^\d\d-\d\d [\d:]{8}  failed: ", out, flags=re.MULTILINE)
    assert "raised at\n    " in out and "last lines of the log of client1@" in out
    assert main(["logs", "broken", "--json"]) == OK
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["type"] == "failure" and last["traceback"] and last["log"]


def test_logs_follow_until_the_run_rests_and_steps_are_told_if_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", "digits", "-f", "--steps"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert sum(" step " in line for line in lines) == 10 and lines[-1].endswith("done: version 10")


def test_what_a_notebook_shows_is_short(done: tuple[LocalCluster, Path, Run]) -> None:
    run = done[2]
    trained: Any = run.wait()
    for shown in (run.status(), run.verify(), trained, run.plot()):
        assert len(repr(shown)) < 250 and "\n" not in repr(shown)
        ET.fromstring(shown._repr_html_())
    assert repr(run.status()) == "<RunStatus of 'digits': done, step 10 of 10>"
    assert isinstance(run.plot(), Picture) and str(run.plot()).startswith("Loss (training, evaluation)\n")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["worker"], "celery -A torchord worker"),
        (["worker", "--role", "client", "-l", "INFO"], "celery -A torchord worker -Q gradients -c 1 -l INFO"),
        (
            ["worker", "--role=server", "-A", "shop", "-n", "a@%h"],
            "celery -A shop worker -Q updates -c 1 -n a@%h",
        ),
        (["flower", "--port=5556"], "celery -A torchord flower --port=5556"),
    ],
)
def test_a_worker_is_celerys(words: list[str], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--url", "redis://user:secret@h", "--show"]) == OK
    assert capsys.readouterr().out == f"{command}\n"
