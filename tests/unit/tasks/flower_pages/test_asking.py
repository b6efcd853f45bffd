"""Questions are answered in threads, once for all who ask the same, and not without bound."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from torchord.tasks.flower_pages import asking
from torchord.tasks.flower_pages.asking import Asking, Busy


def made() -> Asking:
    return Asking(lambda: cast(Any, "pages"))


def test_who_asks_the_same_shares_the_answer() -> None:
    asked = []

    async def both() -> list[Any]:
        one = made()
        question = lambda pages: asked.append(pages) or len(asked)  # noqa: E731
        again = [one.ask(question, key=("list",), seconds=60) for _ in range(3)]
        return [*await asyncio.gather(*again), await one.ask(question)]

    assert asyncio.run(both()) == [1, 1, 1, 2] and asked == ["pages", "pages"]


def test_the_loop_turns_while_an_answer_is_waited_for() -> None:
    gate = threading.Event()

    async def asked() -> str:
        answer = asyncio.ensure_future(made().ask(lambda pages: gate.wait(30) and "answer"))
        await asyncio.sleep(0)
        gate.set()  # reached although the question blocks
        return cast(str, await answer)

    assert asyncio.run(asked()) == "answer"


def test_too_many_questions_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_WAITING_MOST", 2)
    gate = threading.Event()

    async def asked() -> None:
        one = made()
        waiting = [asyncio.ensure_future(one.ask(lambda pages: gate.wait(30))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await one.ask(lambda pages: None)
        gate.set()
        await asyncio.gather(*waiting)
        assert await one.ask(lambda pages: "free") == "free"

    asyncio.run(asked())


def test_an_error_is_the_answer_and_is_not_kept() -> None:
    async def asked() -> Any:
        one = made()
        with pytest.raises(ZeroDivisionError):
            await one.ask(lambda pages: 1 / 0, key=("a",))
        return await one.ask(lambda pages: 3, key=("a",))

    assert asyncio.run(asked()) == 3
