"""The Client: what one worker process does for the tasks of the queue of gradients."""

from __future__ import annotations

from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.coordinator.client.inference_task import InferenceTask
from torchord.coordinator.client.partial_sum_task import PartialSumTask
from torchord.coordinator.client.round_task import RoundTask
from torchord.coordinator.client.shard_task import ShardTask
from torchord.coordinator.client.slot_lease import SlotLease
from torchord.coordinator.client.slot_writer import SlotWriter
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.faults import Hook, nothing


class Client:
    """The parts of a Client, one for each kind of task.

    Args:
        contexts: the process's view of the runs.
        heartbeat: the process's lease; its id is what the ledger records.
        sender: for the message that follows a step completed outside its chord.
        fault: called with the name of each point of the protocol; tests use it to die there.

    Attributes:
        lease: takes and hands back slots.
        shards: computes gradients.
        rounds: takes part in rounds.
        sums: computes partial sums.
        inference: evaluates and predicts.
    """

    def __init__(
        self, contexts: Contexts, heartbeat: Heartbeat, sender: Sender, *, fault: Hook = nothing
    ) -> None:
        self.contexts = contexts
        self.heartbeat = heartbeat
        self.lease = SlotLease(contexts, heartbeat, sender)
        writer = SlotWriter(contexts.services, sender, fault)
        self.shards = ShardTask(contexts, self.lease, writer, fault)
        self.rounds = RoundTask(contexts, self.shards, sender, fault)
        self.sums = PartialSumTask(contexts, self.lease, writer, fault)
        self.inference = InferenceTask(contexts, self.lease, fault)
