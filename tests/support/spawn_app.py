"""torchord's app, whose prefork pool starts its processes afresh instead of forking them."""

from __future__ import annotations

from torchord.tasks import app

app.conf.worker_pool_start_method = "spawn"
