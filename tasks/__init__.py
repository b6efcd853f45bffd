"""The Celery side of torchord: `celery -A torchord worker` starts a worker for everything."""

from __future__ import annotations

from torchord.tasks.celery_app import app

__all__ = ["app"]

if not __name__.startswith("torchord."):  # a checkout's folder, imported by its own name
    from torchord.doors import open_door

    open_door(__name__)
