"""The pages are registered by `flower` and by no other command."""

from __future__ import annotations

import click
import pytest
from celery import Celery
from click.testing import CliRunner

from torchord.cache.settings import FLOWER_ALLOWS
from torchord.tasks.flower_pages import registering
from torchord.tasks.flower_pages.start import RunsOption, show_runs

Registered = list[tuple[frozenset[str], bool]]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    """What is registered in Flower."""
    found: Registered = []
    monkeypatch.setattr(registering, "register", lambda allows, whole: found.append((allows, whole)))
    monkeypatch.delenv("TORCHORD_FLOWER_ALLOWS", raising=False)
    return found


def invoked(name: str, *arguments: str, whole: bool = True) -> tuple[int, str]:
    app = Celery("shop", set_as_current=False)
    show_runs(app, whole=whole)
    show_runs(app, whole=whole)
    command = click.Command(name, params=list(app.user_options["preload"]), callback=lambda: None)
    done = CliRunner().invoke(command, arguments)
    return done.exit_code, done.output


def test_other_commands_register_nothing(registered: Registered) -> None:
    assert invoked("worker")[0] == 0 and not registered
    assert "--runs-allow" not in invoked("worker", "--help")[1]
    assert "--runs-allow" in invoked("flower", "--help")[1] and not registered


@pytest.mark.parametrize(
    ("environment", "arguments", "allows"),
    [
        (None, (), frozenset()),
        ("pause, resume", (), {"pause", "resume"}),
        ("on", (), FLOWER_ALLOWS),
        ("on", ("--runs-allow=off",), frozenset()),
        ("off", ("--runs-allow", "cancel"), {"cancel"}),
    ],
)
def test_an_argument_comes_before_the_environment(
    environment: str | None,
    arguments: tuple[str, ...],
    allows: frozenset[str],
    registered: Registered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if environment is not None:
        monkeypatch.setenv("TORCHORD_FLOWER_ALLOWS", environment)
    assert invoked("flower", *arguments)[0] == 0 and registered == [(allows, True)]


def test_a_word_that_is_none_is_named(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = invoked("flower", "--runs-allow=delete")
    assert code == 2 and "not 'delete'" in said and not registered
    monkeypatch.setenv("TORCHORD_FLOWER_ALLOWS", "stop")
    assert "TORCHORD_FLOWER_ALLOWS must be on, off, or some of" in " ".join(invoked("flower")[1].split())


def test_an_app_of_ones_own_keeps_flowers_defaults(registered: Registered) -> None:
    invoked("flower", whole=False)
    assert registered == [(frozenset(), False)]
    assert isinstance(RunsOption(whole=True), click.Option)
