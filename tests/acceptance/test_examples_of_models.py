"""Examples of other frameworks' models, on real workers: the same bits for one and three, and in rounds."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.reference import all_bits
from torchord import LocalCluster, Master

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own
EPOCHS = 4
Example = tuple[str, tuple[str, ...], Callable[[Any], Any], str, float]
EXAMPLES: dict[str, Example] = {
    # module, its packages, what makes its recipe, a figure and what it must reach
    "keras": ("keras_digits", ("keras", "sklearn"), lambda m: m.recipe(), "accuracy", 0.85),
    "lightning": ("lightning_digits", ("lightning", "sklearn"), lambda m: m.recipe(), "val_accuracy", 0.85),
    "lora": ("text_topics", ("peft",), lambda m: m.recipe(EPOCHS, lora=True), "accuracy", 0.5),
    "resnet": ("resnet_digits", ("transformers", "sklearn"), lambda m: m.recipe(EPOCHS), "auroc", 0.9),
    "table": ("table", ("pandas", "sklearn"), lambda m: m.recipe(), "accuracy", 0.9),
    "text": ("text_topics", ("transformers",), lambda m: m.recipe(EPOCHS), "accuracy", 0.85),
}


def installed(example: Example) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in example[1])


@pytest.mark.timeout(600)  # each worker imports four frameworks
def test_each_trains_to_the_same_bits_with_one_worker_and_with_three(
    cluster: Callable[..., LocalCluster],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    record_property: Any,
) -> None:
    chosen = {name: example for name, example in EXAMPLES.items() if installed(example)}
    if absent := EXAMPLES.keys() - chosen.keys():
        record_property("summary", f"NOT TESTED: {', '.join(sorted(absent))} (pip install '.[demo,models]')")
    made = cluster(1, env={"TORCHORD_ALLOWED_MODULES": "examples,torch"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    modules = {}
    nbytes: dict[str, float] = {}
    for name, (module, _, _, figure, bound) in chosen.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules[name] = importlib.import_module(f"examples.{module}")
        arguments = ["--url", made.url, "--name", name, "--out", str(tmp_path), "--epochs", str(EPOCHS)]
        assert modules[name].main([*arguments, *(["--lora"] if name == "lora" else [])]) == 0
        shown = capsys.readouterr().out
        value = re.search(rf"^{figure} +([0-9.]+)$", shown, re.M)
        assert value and float(value[1]) >= bound, shown
        sent = re.search(r"^Gradients: +([0-9,]+) bytes a step", shown, re.M)
        assert sent, shown
        nbytes[name] = float(sent[1].replace(",", ""))
    made.add_worker(), made.add_worker()
    made.wait_ready()
    again = {
        name: master.submit(
            chosen[name][2](modules[name]),
            replace(modules[name].config(EPOCHS), round_steps=8 if name != "table" else 1),
            name=f"{name}-3",
        )
        for name in ("keras", "lightning", "table")
        if name in chosen
    }
    for name, run in again.items():
        assert all_bits(run.wait(timeout=240).module) == all_bits(master.run(name).model()), name
    if {"lora", "text"} <= chosen.keys():
        lora, whole = (f"{nbytes[name]:,.0f}" for name in ("lora", "text"))
        told = f"gradients of a step, on the wire: {lora} bytes with LoRA, {whole} without"
        record_property("summary", told)
        assert nbytes["lora"] * 10 < nbytes["text"]
