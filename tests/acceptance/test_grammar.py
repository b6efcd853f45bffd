"""Random small models: a plain loop's weights, the same bits on any fleet and after a kill, or one sentence.

`make test ARGS='tests/acceptance/test_grammar.py --models 500'` tries more of them, others each time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from tests.support import grammar, reference
from tests.support.one_process import EACH_STEP, ONCE, Fleet, Outcome
from torchord.coordinator.compute.averaging import ENTRY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
STATED = "refused by: "
KILL = st.one_of(
    st.tuples(st.sampled_from(EACH_STEP), st.integers(1, 7)),
    st.tuples(st.sampled_from(EACH_STEP), st.integers(1, 7)),
    st.tuples(st.sampled_from(ONCE), st.just(1)),
)


def test_a_model_is_a_plain_loop_on_any_fleet_or_is_refused(request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--models")
    counts: Counter[str] = Counter()
    fixed = settings(
        max_examples=asked or 32,
        derandomize=asked is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if asked else (Phase.generate,),
        print_blob=True,
    )
    fixed(given(grammar.SENTENCES, KILL)(lambda sentence, kill: check(sentence, kill, counts)))()
    compared = f"{counts['batches']} compared with whole batches, {counts['shards']} with shards bit by bit"
    ends = f"{counts['killed']} processes killed; {counts['refused']} models refused"
    told = [f"{counts['tried']} models tried: {compared}; {ends}:"]
    stated = [(name, count) for name, count in counts.most_common() if name.startswith(STATED)]
    told += [f"  {count} x {name.removeprefix(STATED)}" for name, count in stated]
    request.node.user_properties.append(("summary", "\n".join(told)))
    assert (
        counts["tried"] > counts["refused"] > 0
        and counts["batches"]
        and counts["shards"]
        and counts["killed"]
    )


def check(sentence: grammar.Sentence, kill: tuple[str, int], counts: Counter[str]) -> None:
    """Train one model by one worker, by three, and with a kill; all must agree, with plain loops too."""
    one = trained(sentence, 1)
    three = trained(sentence, 3, seed=1)
    killed = trained(sentence, 3, seed=2, kill=kill)
    note(f"{one.state}, {three.state}, {killed.state}: {one.error or three.error or killed.error}")
    counts["tried"] += 1
    counts["killed"] += len(killed.kills)
    assert one.state == three.state == killed.state
    assert one.state == "failed" or not sentence.must_be_refused
    if one.state == "failed":
        counts["refused"] += 1
        stated = sentence.refused_by(one.error)
        assert stated is not None, f"no sentence that is stated: {one.error}"
        assert sentence.refused_by(three.error) == sentence.refused_by(killed.error) == stated
        counts[STATED + stated] += 1
        return
    assert one.bits == three.bits, "one worker and three"
    assert one.bits == killed.bits, f"a kill at {killed.kills}"
    assert one.losses == three.losses == killed.losses
    if sentence.batchwise:
        counts["batches"] += 1
        compare(one, batches(sentence))
    if sentence.shardwise:
        counts["shards"] += 1
        module = reference.average(sentence.recipe(), sentence.config()).module
        expected = reference.bits({**dict(module.named_parameters()), **dict(module.named_buffers())})
        assert {name: bits for name, (_, _, bits) in expected.items()} == one.bits


def trained(sentence: grammar.Sentence, clients: int, **how: Any) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return Fleet(folder, clients, **how).run(sentence.recipe(), sentence.config())


def compare(found: Outcome, expected: dict[str, Tensor]) -> None:
    """Within rounding, in every tensor of the version."""
    assert found.tensors.keys() - {ENTRY} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.tensors[name], value.detach(), rtol=1e-7, atol=1e-9, msg=name)


def batches(sentence: grammar.Sentence) -> dict[str, Tensor]:
    """The loop that everybody writes, over whole batches; what of it a version has."""
    recipe, config = sentence.recipe(), sentence.config()
    model, data, optimizer, scheduler = reference._parts(recipe, config)
    average: Any = None if recipe.average is None else recipe.average()  # type: ignore[operator]
    mean: AveragedModel | None = None
    rule: Callable[..., Any] | None = recipe.gradients  # type: ignore[assignment]
    for step, batch in enumerate(sentence.batches()):
        optimizer.zero_grad()
        loss: Any = reference._loss(recipe, config, model.train(), reference._read(recipe, data, batch))
        if isinstance(loss, tuple):
            loss = loss[0] / loss[1]
        loss.backward()
        parameters = dict(model.named_parameters())
        if rule is not None:
            rule({name: p.grad for name, p in parameters.items() if p.grad is not None}, parameters)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.item())
        elif scheduler is not None:
            scheduler.step()
        if average is not None and average.takes(step + 1):
            mean = mean or AveragedModel(model, multi_avg_fn=average.update)
            mean.update_parameters(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if average is None:
        return state
    kept = (model if mean is None else mean.module).named_parameters()
    return state | {f"{ENTRY}/{name}": value for name, value in kept if value.requires_grad}
