"""A Hugging Face model trains unchanged: a plain loop's bits, with one Client and with two."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from tests.support import recipes_models, reference
from torchord import LocalCluster, Master, TrainingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the library's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="NOT TESTED, transformers is not installed (pip install '.[models]')",
    ),
]
CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=4, seed=3, checkpoint_every=3)


def test_a_hugging_face_model(cluster: Callable[..., LocalCluster]) -> None:
    given = recipes_models.hugging_face()
    made = cluster(1, env={"TORCHORD_ALLOWED_MODULES": "tests,torch"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    found = []
    for clients in (1, 2):
        run = master.submit(given, CONFIG, name=f"gpt2-{clients}")
        trained = run.wait(timeout=120)
        audit = run.verify()
        assert audit.ok, audit.problems
        assert trained.metrics["loss"] < trained.history[0].loss
        found.append(reference.all_bits(trained.module))
        if clients == 1:
            made.add_worker()
            made.wait_ready()
    expected = reference.accumulate(given, CONFIG).bits
    assert found == [expected, expected]
    assert expected["lm_head.weight"] == expected["transformer.wte.weight"], "tied"
