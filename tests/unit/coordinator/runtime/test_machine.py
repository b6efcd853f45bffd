from __future__ import annotations

from pathlib import Path

import pytest

from torchord.coordinator.runtime import machine

MEBI = 1 << 20


def test_a_process_uses_memory_and_a_machine_has_some_to_spare() -> None:
    assert 10 * MEBI < machine.used_memory_nbytes() < 1 << 45
    assert machine.spare_memory_nbytes() > 0


@pytest.mark.parametrize(
    ("limit", "spare"), [("300", 200), ("50", 0), ("max", None)], ids=["below", "above", "none"]
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, spare: int | None
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("100\n")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(machine, "_available", lambda: 1 << 40)
    assert machine.spare_memory_nbytes() == (1 << 40 if spare is None else spare)
