from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from torchord.tasks.allocator import keep_memory
known = keep_memory() if sys.argv[1] == "keep" else True
def work(): return [torch.ones(12 << 20) for _ in range(3)]  # 48 MB: more than glibc keeps of its own accord
for _ in range(6): work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): work()
print(known, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    def run(how: str) -> tuple[str, int]:
        command = [sys.executable, "-c", FAULTS, how]
        known, faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return known, int(faults)

    known, faults = run("keep")
    if known == "False":
        pytest.skip("another C library")
    assert faults < run("as it comes")[1] / 10
