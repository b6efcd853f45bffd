"""The examples of other frameworks' models, on real workers: the same bits for one and for three of them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.reference import Bits, all_bits
from torchord import LocalCluster, Master

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own
EXAMPLES = {
    # name of the example: (its packages, a figure, what it must reach, whether more is better)
    "keras_digits": (("keras", "sklearn"), "accuracy", 0.85),
    "lightning_digits": (("lightning", "sklearn"), "val_accuracy", 0.85),
}


def example(name: str) -> ModuleType:
    for package in EXAMPLES[name][0]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"NOT TESTED, {package} is not installed (pip install '.[demo,models]')")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"examples.{name}")


def test_each_trains_to_the_same_bits_with_one_worker_and_with_three(
    cluster: Callable[..., LocalCluster],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    made = cluster(1, env={"TORCHORD_ALLOWED_MODULES": "examples,torch"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    found: dict[str, list[Bits]] = {}
    for workers in (1, 3):
        if workers == 3:
            made.add_worker(), made.add_worker()
            made.wait_ready()
        for name in EXAMPLES:
            module = example(name)
            run = f"{name}-{workers}"
            arguments = ["--url", made.url, "--name", run, "--out", str(tmp_path), "--epochs", "4"]
            assert module.main(arguments) == 0
            trained = master.run(run).wait(timeout=120)
            _, figure, bound = EXAMPLES[name]
            assert trained.metrics[figure] >= bound
            assert f"{figure:<12} {trained.metrics[figure]:.4f}" in capsys.readouterr().out
            found.setdefault(name, []).append(all_bits(trained.module))
    for name, (one, three) in found.items():
        assert one == three, name
