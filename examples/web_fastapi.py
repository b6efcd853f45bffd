"""A web service that trains a model and answers from it while it trains (`pip install fastapi uvicorn`).

    celery -A torchord worker                                         workers, in this directory
    uvicorn examples.web_fastapi:api                                  the service
    curl -X POST localhost:8000/train/digits-01
    curl localhost:8000/train/digits-01
    curl localhost:8000/train/digits-01/answers --json '{"images": [[[[0, ...]]]]}'

In a checkout the workers need TORCHORD_ALLOWED_MODULES=examples,torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from examples import digits
from torchord import Master, TrainingConfig
from torchord.cache.errors import (
    CacheError,
    ConfigMismatch,
    InvalidInput,
    NoWorker,
    RunError,
    RunFailed,
    RunNotFound,
    VersionMissing,
    WaitTimeout,
)

api = FastAPI(title="digits")
ANSWER_SECONDS = 30


class Question(BaseModel):
    """Images, (number, 1, 8, 8), 0 to 1."""

    images: list[list[list[list[float]]]]


@cache
def master() -> Master:
    """One for the program, made at the first request; all threads may use it."""
    return Master()


def refused(error: Exception) -> HTTPException:
    """Whose fault an error is (docs/your-project.md)."""
    codes: tuple[tuple[tuple[type[Exception], ...], int], ...] = (
        ((RunNotFound, VersionMissing), 404),
        ((CacheError, NoWorker), 503),
        ((WaitTimeout,), 504),
        ((InvalidInput, RunFailed), 422),
        ((ConfigMismatch, RunError), 409),
    )
    return HTTPException(next((code for kinds, code in codes if isinstance(error, kinds)), 500), str(error))


# `def`, not `async def`: each waits for Redis or the workers, in a thread of its own.


@api.post("/train/{name}", status_code=202)
def train(name: str, epochs: int = 20) -> dict[str, Any]:
    """Queue a run, and return at once."""
    config = TrainingConfig(epochs=epochs, batch_size=digits.BATCH, shards=4)
    try:
        run = master().submit(digits.recipe(epochs), config, name=name)
        return {"name": run.name, "state": run.status().state}
    except Exception as error:
        raise refused(error) from error


@api.get("/train/{name}")
def progress(name: str) -> dict[str, Any]:
    """How far a run is, and what it waits for."""
    try:
        status = master().run(name).status()
    except Exception as error:
        raise refused(error) from error
    waits = [wait.what for wait in status.waits]
    return {"state": status.state, "version": status.version, "total": status.total_steps, "waits_for": waits}


@api.post("/train/{name}/answers")
def answers(name: str, question: Question) -> dict[str, Any]:
    """Which digits the images show, by the newest version, whether or not the run goes on."""
    try:
        images = torch.tensor(question.images)
        version, outputs = master().run(name).predict_newest(images, timeout=ANSWER_SECONDS)
    except Exception as error:
        raise refused(error) from error
    return {"version": version, "digits": outputs.argmax(1).tolist()}


@api.delete("/train/{name}")
def cancel(name: str) -> dict[str, Any]:
    """End a run for good; its versions go on answering for a week."""
    try:
        master().run(name).cancel()
        return {"state": master().run(name).status().state}
    except Exception as error:
        raise refused(error) from error
