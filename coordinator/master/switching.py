"""Switching the config of a live run at a step boundary that lies ahead of what is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchord.cache.errors import RunError
from torchord.cache.ledger.incarnation import switched
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.coordinator.runtime.recorded import recorded_visits, switches_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

SWITCHABLE = ("shards", "local_steps", "staleness", "compression")
_TRIES = 20


def plan_of(ledger: Ledger, head: Head, spec: Mapping[str, Any]) -> Plan | None:
    """The plan of a run with the switches that its spec has; None before a server has seen the data."""
    if not head.dataset_size:
        return None
    config = TrainingConfig.from_json(spec["config"])
    return Plan(head.dataset_size, config, switches_of(spec), visits=recorded_visits(ledger, spec))


def switch(ledger: Ledger, fields: Mapping[str, Any]) -> int:
    """See `Run.switch`; fields that cannot be switched were refused."""
    for _ in range(_TRIES):
        head, spec = ledger.head(), ledger.spec()
        plan = plan_of(ledger, head, spec)
        started = head.total_steps is not None
        step = max(head.version, head.reached) + 3 if started else 0
        if plan is not None and started and step >= plan.total_steps:
            raise RunError(
                f"run {ledger.run!r} has {plan.total_steps - head.version} steps left, too few to switch"
            )
        switches = {int(at): dict(values) for at, values in spec.get("switches", {}).items()}
        switches[step] = {**switches.get(step, {}), **fields}
        config = TrainingConfig.from_json(spec["config"])
        visits = None if plan is None else plan.visits
        after = Plan(head.dataset_size or 10**12, config, switches, visits=visits)
        after.config_at(min(step, after.total_steps - 1))  # raises ConfigError for a bad value
        verdict = ledger.switch(
            {**spec, "switches": {str(at): values for at, values in sorted(switches.items())}},
            step=step,
            incarnation=head.incarnation,
            following=switched(head.incarnation),
            total_steps=after.total_steps if started else None,
            data={"step": step, **fields},
        )
        if verdict == "ok":
            return step
        if verdict not in ("late", "changed"):
            raise RunError(f"run {ledger.run!r} is {verdict}; only a live run can be switched")
    raise RunError(f"run {ledger.run!r} advances too fast to be switched; pause() it first, then switch")
