"""The Celery side of torchord: `celery -A tasks worker` starts a worker for everything."""

from __future__ import annotations

from tasks.celery_app import app

__all__ = ["app"]
