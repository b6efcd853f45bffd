"""`torchord metrics`: what Prometheus scrapes, once or at a port."""

from __future__ import annotations

import click

from torchord.coordinator.commands.common import BAD, OK, guarded, settings_of, with_json, with_url

_PORT = 9540


@click.command(
    "metrics",
    help="Print the metrics of the fleet and its runs as Prometheus reads them; with --port, serve them at "
    "/metrics until interrupted. Flower's /metrics has them, too.",
)
@with_url
@with_json
@click.option("--port", type=click.IntRange(0, 65535), help=f"Serve at this port; {_PORT} is a good one.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Listen at this address.")
def metrics(url: str | None, as_json: bool, port: int | None, address: str) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.cache.ledger.figures import for_others
        from torchord.coordinator.metrics.collector import Collector
        from torchord.coordinator.metrics.serving import server
        from torchord.coordinator.runtime.control_plane import ControlPlane

        plane = ControlPlane(settings_of(url))
        if port is None:
            plane.require_reachable()
            found = Collector(plane).scrape()
            click.echo(for_others(found.values()) if as_json else found.text().rstrip())
            return OK
        try:
            serving = server(Collector(plane).text, address, port)
        except OSError as error:
            click.echo(f"error: cannot listen at {address}:{port}: {error}; choose another --port", err=True)
            return BAD
        with serving:
            click.echo(f"metrics are at http://{address}:{serving.server_port}/metrics", err=True)
            serving.serve_forever()
        return OK

    return guarded(perform)
