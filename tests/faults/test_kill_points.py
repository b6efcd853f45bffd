"""SIGKILL at every named point of the protocol: the run ends with the undisturbed run's bits."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from tests.faults.laboratory import CONFIG, HOURS, Laboratory
from tests.faults.test_told import PLANS as TOLD
from tests.support import models
from torchord import Plateau
from torchord.coordinator.runtime.faults import POINTS, parse

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compression": {"compression": "topk:0.1"},
    "local steps": {"local_steps": 2, "epochs": 6},
    "staleness": {"staleness": 1},
    "fp16": {"precision": "fp16", "loss_scale": 2.0**18, "loss_scale_interval": 2},
    "all": {
        "compression": "topk:0.1",
        "local_steps": 2,
        "staleness": 2,
        "epochs": 6,
        "precision": "fp16",
        "loss_scale_interval": 2,
        "parameter_compression": "int8",
    },
    "rounds": {"round_steps": 6, "epochs": 6},
    "deciding": {"stop_when": Plateau(patience=1, min_delta=1e6), "keep": "best", "evaluate_at_start": True},
    "tree": {"shards": 8, "fan_in": 2},
    "deep tree, all": {
        "shards": 8,
        "fan_in": 2,
        "compression": "topk:0.1,memory=int8",
        "local_steps": 2,
        "staleness": 1,
        "epochs": 6,
    },
}
"""What a version or a slot may carry from step to step: loss scales, residuals, inner optimizers, steps in
flight. The laboratory's local steps are DiLoCo's: the outer optimizer has a momentum."""

PLANS = (
    ("plain", "server.before_acquire:1:kill"),
    ("plain", "server.after_acquire:1:kill"),
    ("plain", "server.before_initialise:1:kill"),
    ("plain", "server.after_initialise:1:kill"),
    ("fp16", "server.before_apply:2:kill;client.before_begin:4:kill"),
    ("fp16", "server.after_apply:2:kill;client.after_begin:4:kill"),
    ("compression", "server.after_publish:2:kill;client.before_put:4:kill"),
    # Killed before the optimizer state of the new version is stored: the next server rolls the head back.
    ("all", "server.after_commit:4:kill;server.before_rollback:1:kill;server.after_rollback:1:kill"),
    ("staleness", "server.before_launch:3:kill;client.after_put:4:kill"),
    ("all", "sender.mid_launch:3:kill"),
    ("local steps", "server.after_launch:3:kill;client.after_slot:4:kill"),
    ("plain", "server.before_checkpoint:2:kill;client.before_part:1:kill"),
    ("fp16", "server.mid_checkpoint:2:kill;client.after_part:2:kill"),
    ("plain", "server.after_checkpoint:2:kill"),
    ("plain", "server.before_state:3:kill"),
    ("fp16", "server.after_state:3:kill"),
    ("deciding", "client.after_evaluation:1:kill;server.before_stop:1:kill"),
    ("deciding", "server.after_stop:1:kill"),
    ("plain", "server.before_finish:1:kill"),
    ("plain", "server.after_finish:1:kill"),
    ("plain", "supervisor.before_look:1:kill"),
    # Rounds of up to four steps, between checks, checkpoints and evaluations.
    ("rounds", "server.after_open:2:kill;client.after_put:9:kill"),
    ("rounds", "server.before_adopt:1:kill"),
    ("rounds", "server.after_adopt:2:kill"),
    ("rounds", "round.before_turn:6:kill"),
    ("rounds", "round.after_slot:5:kill;server.before_checkpoint:3:kill"),
    ("rounds", "round.before_update:3:kill;round.after_update:5:kill"),
    ("rounds", "round.after_report:2:kill;round.after_report:3:kill"),  # all participants
    ("rounds", "round.before_store:1:kill"),
    ("rounds", "round.before_publish:1:kill;round.before_publish:2:kill"),
    ("rounds", "round.after_publish:2:kill"),
    # With a fan-in of 2, eight shards are summed by four partial sums, and those by two more.
    ("tree", "adder.before_begin:4:kill"),
    ("tree", "adder.after_begin:4:kill;server.after_launch:3:kill"),
    ("deep tree, all", "adder.before_put:4:kill;adder.after_slot:7:kill"),
    ("tree", "adder.after_put:4:kill;server.before_apply:2:kill"),
    ("tree", "adder.after_slot:4:kill;server.after_publish:2:kill"),
    ("deep tree, all", "adder.after_delete:4:kill;server.after_commit:3:kill"),
    ("tree", "writer.before_send:4:kill"),
    ("deep tree, all", "writer.before_send:9:kill;client.after_put:12:kill;sender.mid_launch:3:kill"),
)


@pytest.mark.parametrize(("mode", "plan"), PLANS)
def test_killed_at(lab: Laboratory, mode: str, plan: str) -> None:
    config = dataclasses.replace(CONFIG, **MODES[mode])
    reference = lab.undisturbed(config)
    with lab.faults(plan):
        if "supervisor." in plan:
            lab.slow(HOURS)
        run = lab.submit(config)
        lab.hold_for_supervisor(plan, run)
        lab.check(run, reference=reference)
    if "tree" in mode:
        assert run.verify().partial_sums == 6 * run.status().version, "six of each step, once each"
    if mode != "plain":
        assert run.verify(reexecute=[run.status().version - 1]).ok


WIDE = partial(models.Mlp, hidden=8192)
"""Large enough for the same-host tier, in whose memory gradients and versions are then written."""


@pytest.mark.parametrize(
    ("mode", "plan"),
    [
        ("plain", "server.after_apply:2:kill;client.after_put:4:kill"),
        ("plain", "server.after_publish:2:kill;client.before_put:4:kill"),
        ("plain", "server.after_commit:4:kill;server.before_rollback:1:kill"),
        ("staleness", "server.after_launch:3:kill;server.before_state:1:kill"),
        ("plain", "server.after_state:1:kill;server.after_checkpoint:1:kill"),
        ("all", "server.after_commit:4:kill;client.after_slot:6:kill"),
    ],
)
def test_killed_with_versions_in_the_hosts_memory(lab: Laboratory, mode: str, plan: str) -> None:
    config = dataclasses.replace(CONFIG, **MODES[mode])
    reference = lab.undisturbed(config, model=WIDE)
    with lab.faults(plan):
        lab.check(lab.submit(config, model=WIDE), reference=reference)


def test_rounds_have_the_bits_of_single_steps(lab: Laboratory) -> None:
    rounds = dataclasses.replace(CONFIG, **MODES["rounds"])
    assert lab.undisturbed(rounds) == lab.undisturbed(dataclasses.replace(rounds, round_steps=1))


def test_every_point_is_tried() -> None:
    tried = {fault.point for _, plan in (*PLANS, *TOLD) for fault in parse(plan)}
    assert tried == set(POINTS)
