"""`servinggraph health`: asks a server whether it is ready, for the health check of an image."""

from __future__ import annotations

import sys

import click

from servinggraph.cli.params import SECONDS, opener, server_address

__all__ = ["health"]


@click.command()
@click.argument("url", default="http://127.0.0.1:8080")
@click.option("--live", is_flag=True, help="Ask whether it lives, and not whether it is ready.")
@click.option("--timeout-s", type=SECONDS, default=5, show_default=True)
def health(url: str, live: bool, timeout_s: float) -> None:
    """Ask the server at URL whether it is ready; the exit status is 0 when it is."""
    from http.client import HTTPException

    server_address(url)
    asked = f"{url.rstrip('/')}/v2/health/{'live' if live else 'ready'}"
    try:
        with opener().open(asked, timeout=timeout_s):
            click.echo("live" if live else "ready")
    except (OSError, HTTPException) as error:
        click.echo(f"{asked}: {error}", err=True)
        sys.exit(1)
