"""Parts of evaluations and predictions."""

from __future__ import annotations

import json
import time
from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.fields import METRICS, OUTPUT, PART
from torchord.cache.ledger.figures import figures_in, from_text, to_text
from torchord.cache.ledger.outbox import entry_arguments, entry_text
from torchord.cache.ledger.records import StateRecord
from torchord.cache.reading import number_of

MOST_PARTS = 1 << 20


class Evaluations(ControlPlane):
    """Evaluations and predictions, written in parts."""

    def write_part(
        self, version: int, part: int, value: dict[str, Any], *, parts: int
    ) -> tuple[str, list[Any]]:
        """Write one part of an evaluation once: see scripts/write_part.lua.

        Where a part that is none was among them all, it is deleted, to be computed anew, and the verdict is
        "damaged".
        """
        with self._during(f"write part {part} of the evaluation of version {version}"):
            reply = self._script(
                "write_part",
                [self.keys.parts(version), self.keys.evaluations],
                [
                    part,
                    self._sealed("worker", self.places.part, version, part, text=to_text(value)),
                    parts,
                    keys.WORK_TTL_SECONDS,
                    version,
                ],
            )
            texts = {str(number): text or "" for number, text in enumerate(reply[1:])}
            found = self._sound(
                texts,
                _part,
                self.keys.parts(version),
                opened=lambda number, text: self._opened(
                    "worker", self.places.part, version, number, text=text
                ),
            )
            return reply[0] if len(found) == len(texts) else "damaged", [found[n] for n in sorted(found)]

    def drop_part(self, version: int, part: int) -> None:
        """Forget one part of an evaluation, because what it kept is lost: it is computed again."""
        with self._during(f"drop part {part} of the evaluation of version {version}"):
            self.client.hdel(self.keys.parts(version), str(part))

    def parts_present(self, version: int) -> set[int]:
        """Which parts of an evaluation are written."""
        with self._during(f"count the parts of the evaluation of version {version}"):
            found = cast(list[str], self.client.hkeys(self.keys.parts(version)))
            return set(self._sound(dict.fromkeys(found, ""), str, self.keys.parts(version)))

    def record_evaluation(self, version: int, metrics: dict[str, Any]) -> bool:
        """Record the metrics of a version once; True if this call did."""
        data, id = {"version": version, "metrics": metrics}, f"evaluated-{version}"
        entry = entry_text("evaluated", time.time(), data)
        with self._during(f"record the evaluation of version {version}"):
            return bool(
                self._script(
                    "record_evaluation",
                    [
                        self.keys.evaluations,
                        self.keys.parts(version),
                        self.keys.pins,
                        self.keys.events,
                        self.keys.pending_evaluations,
                        *(self.keys.head, self.keys.outbox, keys.TELLING),
                    ],
                    [
                        version,
                        self._sealed_metrics(version, metrics),
                        to_text(data),
                        *(keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT, self.run),
                        *entry_arguments(
                            "evaluated", id, self._sealed_by_any(self.places.telling, id, text=entry)
                        ),
                    ],
                )
            )

    def launch_evaluation(self, version: int, parts: int, *, pin_seconds: float) -> bool:
        """Record that a version is being evaluated and keep it stored; False if that is done or under way."""
        with self._during(f"record the evaluation of version {version}"):
            names = self.keys
            return bool(
                self._script(
                    "launch_evaluation",
                    [names.evaluations, names.pending_evaluations, names.pins],
                    [version, parts, int((time.time() + pin_seconds) * 1000), keys.RUN_TTL_SECONDS],
                )
            )

    def abandon_evaluation(self, version: int, reason: str) -> bool:
        """Give an evaluation under way up, because its version is lost; True if this call did.

        Event `evaluation lost`: version, and `message` with the reason.
        """
        with self._during(f"give the evaluation of version {version} up"):
            names = self.keys
            return bool(
                self._script(
                    "abandon_evaluation",
                    [names.pending_evaluations, names.parts(version), names.pins, names.events],
                    [
                        version,
                        json.dumps({"version": version, "message": reason}),
                        keys.RUN_TTL_SECONDS,
                        keys.EVENTS_KEPT,
                    ],
                )
            )

    def pending_evaluations(self) -> dict[int, int]:
        """Evaluations under way: version -> number of parts."""
        with self._during("list the evaluations under way"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.pending_evaluations))
            return self._sound(found, _parts, self.keys.pending_evaluations)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Metrics by version, in order."""
        with self._during("read the evaluations"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.evaluations))
            read = self._sound(
                found, _metrics, self.keys.evaluations, opened=self._opened_metrics, forged_stay=True
            )
            return dict(sorted(read.items()))

    def _sealed_metrics(self, version: int, metrics: dict[str, Any]) -> str:
        """Metrics as they are stored: by the Client with the last part, or by who restores a run."""
        return self._sealed_by_any(self.places.metrics, version, text=to_text(metrics))

    def _opened_metrics(self, version: int, text: str) -> str:
        """The text of metrics that somebody has sealed who may record them."""
        return self._opened_by_any(self.places.metrics, version, text=text)

    def write_output(self, request: str, part: int, answer: dict[str, Any]) -> bool:
        """Write one part of a prediction once; True if this call did."""
        key = self.keys.predict(request)
        with self._during(f"write part {part} of a prediction"):
            pipe = self.client.pipeline(transaction=True)
            place = self.places.output(request, part)
            pipe.hsetnx(key, str(part), self.keyring.sealed("worker", place, json.dumps(answer)))
            pipe.expire(key, keys.PREDICT_TTL_SECONDS)
            return bool(pipe.execute()[0])

    def outputs(self, request: str) -> dict[int, dict[str, Any]]:
        """The parts of a prediction that are written."""
        with self._during("read a prediction"):
            key = self.keys.predict(request)
            found = cast(dict[str, str], self.client.hgetall(key))
            return self._sound(
                found,
                OUTPUT.read,
                key,
                opened=lambda part, text: self.keyring.opened(
                    "worker", self.places.output(request, part), text
                ),
            )

    def drop_output(self, request: str, part: int) -> None:
        """Forget one part of a prediction, which is none of what was asked for."""
        with self._during(f"drop part {part} of a prediction"):
            self.client.hdel(self.keys.predict(request), str(part))

    def drop_outputs(self, request: str) -> None:
        """Delete what a prediction left."""
        with self._during("delete a prediction"):
            self.client.delete(self.keys.predict(request))


def _part(text: str) -> dict[str, Any]:
    """A part of an evaluation."""
    found = PART.read(text, figures_in(text))
    if "states" in found:
        StateRecord.from_dict(found["states"])
    return found


def _parts(text: str) -> int:
    """How many parts an evaluation has."""
    if not 1 <= (parts := number_of(text, "the number of its parts")) <= MOST_PARTS:
        raise RecordDamaged(f"an evaluation of {parts} parts")
    return parts


def _metrics(text: str) -> dict[str, float]:
    """The figures of an evaluation."""
    return cast(dict[str, float], METRICS.of({"metrics": from_text(text)})["metrics"])
