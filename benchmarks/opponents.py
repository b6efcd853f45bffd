"""What `bench_ddp` trains beside torchord: each opponent's own loop, in two processes of its own.

Every one of them trains the same model from the same initial weights on the same batches, one thread a
process. DDP's processes also run the two loops that need no network: one process alone, and two that
never talk (the limit). torchft and hivemind are imported where they are used: `pip install torchft
hivemind`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch

from benchmarks.workloads import BATCH, recipe
from torchord import TrainingConfig
from torchord.coordinator.compute.batch import load_batch
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.resolving import resolve
from torchord.tasks.allocator import keep_memory

PEERS = 2
_ANSWER_SECONDS = 240.0


@dataclass(frozen=True)
class Trace:
    """What a loop did: seconds from step to step, and the loss of each step."""

    seconds: list[float]
    losses: list[float]


class Loop:
    """One peer's model, optimizer and batches, as torchord's run of the workload has them."""

    def __init__(self, workload: str, steps: int, examples: int, shards: int, shard: int) -> None:
        made = resolve(recipe(workload, examples=examples).to_spec(), allowed=("*",))
        batch = BATCH[workload]
        epochs = -(-steps * batch // examples)
        config = TrainingConfig(batch_size=batch, shards=shards, epochs=epochs)
        torch.set_num_threads(1)
        self.model = Replica.build(made, config).model.train()
        seed_everything(derive_seed(config.seed, "dataset"))
        self.dataset = made.dataset()
        assert made.loss is not None
        self.loss = made.loss
        self.plan, self.shard, self.steps = Plan(examples, config), shard, steps
        self.make_optimizer = made.optimizer
        self.optimizer = made.optimizer(self.model.parameters())

    def run(self, model: Callable[[torch.Tensor], torch.Tensor], optimizer: Any) -> Trace:
        """The plain loop: load, forward, backward, step."""
        seconds, losses, before = [], [], time.perf_counter()
        for step in range(self.steps):
            inputs, targets = load_batch(self.dataset, self.plan.indices(step, self.shard))
            optimizer.zero_grad()
            loss = self.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
        return Trace(seconds, losses)


def plain(rank: int, addresses: list[str], work: Iterator[tuple[str, str, int, int]], answer: Any) -> None:
    """DDP over gloo, and the loops without a network: alone, limit."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"tcp://{addresses[0]}", rank=rank, world_size=PEERS)
    for mode, workload, steps, examples in work:
        if mode == "alone" and rank:
            answer(None)
            continue
        loop = Loop(workload, steps, examples, 1 if mode == "alone" else PEERS, rank)
        model = DistributedDataParallel(loop.model) if mode == "ddp" else loop.model
        if mode != "alone":
            dist.barrier()
        answer(loop.run(model, loop.optimizer))


def torchft(rank: int, addresses: list[str], work: Iterator[tuple[str, str, int, int]], answer: Any) -> None:
    """Two replica groups of one process each, under one lighthouse."""
    from torch.distributed import TCPStore
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    def manager(number: int, loop: Loop) -> Any:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        return Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
            load_state_dict=lambda state: None, state_dict=dict, min_replica_size=PEERS, init_sync=False,
            rank=0, world_size=1, store_addr="127.0.0.1", store_port=store.port,
            lighthouse_addr=f"http://{addresses[number]}", replica_id=f"peer{rank}", hostname="127.0.0.1",
        )  # fmt: skip

    stores: list[Any] = []
    lighthouses: list[Any] = []
    for number, (_, workload, steps, examples) in enumerate(work):
        if rank == 0:
            from torchft._torchft import LighthouseServer

            lighthouses.append(LighthouseServer(bind=addresses[number], min_replicas=PEERS))
        loop = Loop(workload, steps, examples, PEERS, rank)
        managed = manager(number, loop)
        answer(loop.run(DistributedDataParallel(managed, loop.model), Optimizer(managed, loop.optimizer)))
        managed.shutdown(wait=False)


def hivemind(rank: int, addresses: list[str], work: Iterator[tuple[str, str, int, int]], answer: Any) -> None:
    """Two peers that average gradients by hivemind's averager in each step."""
    import hivemind as library

    multiprocessing.set_start_method("fork", force=True)  # its processes cannot be spawned
    for number, (_, workload, steps, examples) in enumerate(work):
        loop = Loop(workload, steps, examples, PEERS, rank)
        _, _, port = addresses[0].partition(":")
        where = f"/ip4/127.0.0.1/tcp/{port}"
        identity = os.path.join(os.environ["BENCH_FOLDER"], "hivemind.id")
        if number == 0:
            peers: dict[str, Any] = {"host_maddrs": [where], "identity_path": identity} if rank == 0 else {}
            if rank:
                while not os.path.exists(identity + ".peer"):
                    time.sleep(0.05)
                with open(identity + ".peer") as file:
                    peers = {"initial_peers": [file.read()], "host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
            dht = library.DHT(start=True, **peers)
            if rank == 0:
                with open(identity + ".part", "w") as file:
                    file.write(str(dht.get_visible_maddrs()[0]))
                os.rename(identity + ".part", identity + ".peer")
        parameters = list(loop.model.parameters())
        averager = library.averaging.DecentralizedAverager(
            [torch.zeros_like(p) for p in parameters], dht=dht, prefix=f"{workload}{number}", start=True,
            target_group_size=PEERS, min_matchmaking_time=0.1, request_timeout=0.05,
        )  # fmt: skip
        answer(loop.run(loop.model, _Averaged(averager, parameters, loop.optimizer)))
        averager.shutdown()


class _Averaged:
    """An optimizer that averages the gradients over the peers before each step."""

    def __init__(self, averager: Any, parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
        self.averager, self.parameters, self.optimizer = averager, parameters, optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        with self.averager.get_tensors() as averaged:
            for tensor, parameter in zip(averaged, self.parameters, strict=True):
                tensor.copy_(parameter.grad)
        if self.averager.step(timeout=60, allow_retries=True) is None:
            raise RuntimeError("the peers found no group within 60 s")
        with self.averager.get_tensors() as averaged:
            for tensor, parameter in zip(averaged, self.parameters, strict=True):
                parameter.grad.copy_(tensor)
        self.optimizer.step()


KINDS: dict[str, Callable[..., None]] = {"plain": plain, "torchft": torchft, "hivemind": hivemind}


def _serve(kind: str, rank: int, addresses: list[str], folder: str, keep: bool, pipe: Any) -> None:
    if keep:
        keep_memory()
    os.environ["BENCH_FOLDER"] = folder
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RUST_LOG"] = "error"  # torchft writes a dozen lines a step otherwise
    torch.set_num_threads(1)

    def work() -> Iterator[tuple[str, str, int, int]]:
        while (item := pipe.recv()) is not None:
            yield item

    try:
        pipe.send("ready")
        KINDS[kind](rank, addresses, work(), pipe.send)
    except Exception as error:  # noqa: BLE001  # the words go to the table
        frames = traceback.extract_tb(error.__traceback__)[-1:]
        where = "; ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames)
        pipe.send(f"{type(error).__name__}: {error} ({where})")


class Peers:
    """Two processes of one kind; they wait, without using the processor, until they are given work.

    Args:
        keep: keep freed memory, as torchord's workers do.
    """

    def __init__(self, kind: str, folder: str, *, keep: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self._processes = [], []
        addresses = _free_addresses(32)
        folder = tempfile.mkdtemp(dir=folder)  # what the peers of an earlier round left says where those were
        for rank in range(PEERS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(kind, rank, addresses, folder, keep, theirs))
            process.start()
            self.pipes.append(mine)
            self._processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def train(self, mode: str, workload: str, steps: int, examples: int) -> Trace:
        """Train once; the first peer's seconds, and the mean of the losses.

        Raises:
            RuntimeError: a peer failed, with its words.
        """
        for pipe in self.pipes:
            pipe.send((mode, workload, steps, examples))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(_ANSWER_SECONDS):
                raise RuntimeError(f"no answer within {_ANSWER_SECONDS:g} s")
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        traces = [answer for answer in answers if answer is not None]
        seconds = [max(each) for each in zip(*(trace.seconds for trace in traces), strict=True)]
        means = [sum(each) / len(traces) for each in zip(*(trace.losses for trace in traces), strict=True)]
        return Trace(seconds if mode == "limit" else traces[0].seconds, means)

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                helpers = psutil.Process(process.pid).children(recursive=True)
                for each in (process, *helpers):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.join()


@contextmanager
def peers(kind: str, folder: str, *, keep: bool) -> Iterator[Peers]:
    """Two processes for as long as the block lasts."""
    found = Peers(kind, folder, keep=keep)
    try:
        yield found
    finally:
        found.close()


def _free_addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses
