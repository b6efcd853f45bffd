"""The checksums of a large blob from both ends: every one right, nothing left running."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import xxhash

from tests.support.waiting import wait_until
from torchord.cache.blobs.checksum_thread import WORTH_IT_CHUNKS, Checker
from torchord.cache.tensors.codec import memory
from torchord.cache.tensors.pieces import checksums, split

CHUNK = 1 << 16


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker()
    yield made
    made.close()


def parts_of(count: int) -> list[memoryview]:
    """So many chunks, the last one shorter."""
    generator = torch.Generator().manual_seed(count)
    sent = torch.randint(0, 256, (count * CHUNK - 7,), dtype=torch.uint8, generator=generator)
    return split(memory(sent), CHUNK)


@pytest.mark.parametrize("count", [WORTH_IT_CHUNKS, WORTH_IT_CHUNKS + 1, 300])
def test_the_thread_does_all_that_the_sender_leaves(checker: Checker, count: int) -> None:
    parts = parts_of(count)
    sums = [""] * count
    with checker.beside(parts, sums):
        wait_until(lambda: all(sums), message="the thread at the first chunk")
    assert tuple(sums) == checksums(parts)


def test_what_is_there_already_is_left_alone(checker: Checker) -> None:
    parts = parts_of(40)
    sums = ["from the sender"] * 20 + [""] * 20
    with checker.beside(parts, sums):
        wait_until(lambda: all(sums), message="the meeting")
    assert sums[:20] == ["from the sender"] * 20 and tuple(sums[20:]) == checksums(parts[20:])


def test_a_small_blob_starts_no_thread(checker: Checker) -> None:
    before = threading.active_count()
    sums = [""] * (WORTH_IT_CHUNKS - 1)
    with checker.beside(parts_of(len(sums)), sums):
        pass
    assert not any(sums) and threading.active_count() == before


def test_after_an_error_nothing_is_read_any_more(checker: Checker) -> None:
    """The buffer is the caller's again, who may change or free it."""
    seen: list[str] = []

    class Watched(list[str]):
        def __setitem__(self, index: object, value: object) -> None:
            seen.append(str(index))
            super().__setitem__(index, value)  # type: ignore[call-overload]

    sums = Watched([""] * 2000)
    with pytest.raises(OSError, match="full"), checker.beside(parts_of(2000), sums):
        raise OSError("the server is full")
    count = len(seen)
    with checker.beside(parts_of(20), [""] * 20):
        pass  # one job at a time, in order: the one before is over
    assert len(seen) == count


def test_two_senders_share_one_thread(checker: Checker) -> None:
    """What the thread has no time for is left to the sender, which does not wait for its turn."""
    held, entered = threading.Event(), threading.Event()

    class Slow(list[str]):
        def __getitem__(self, index: object) -> str:  # type: ignore[override]
            entered.set()
            held.wait(30)
            return "done"

    def first() -> None:
        with checker.beside(parts_of(20), Slow([""] * 20)):
            held.wait(30)

    other = threading.Thread(target=first)
    other.start()
    assert entered.wait(30)
    sums = [""] * 20
    with checker.beside(parts_of(20), sums):
        pass
    assert not any(sums)
    held.set()
    other.join()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the scheduling policies of Linux")
def test_only_the_thread_is_a_batch_job(checker: Checker) -> None:
    assert checker._pool().submit(os.sched_getscheduler, 0).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_thread_of_its_own(checker: Checker) -> None:
    parts, sums = parts_of(40), [""] * 40
    with checker.beside(parts, sums):
        pass
    child = os.fork()
    if child == 0:
        good = False
        try:
            fresh = [""] * 40
            with checker.beside(parts, fresh):
                wait_until(lambda: all(fresh), message="the child's thread")
            good = fresh == [xxhash.xxh3_64_hexdigest(part) for part in parts]
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
