"""`servinggraph top`: what the nodes of a running server do, in the terminal."""

from __future__ import annotations

import sys
import time
from http.client import HTTPException

import click

from servinggraph.cli.params import server_address

__all__ = ["top"]


@click.command()
@click.argument("url", default="http://127.0.0.1:8080")
@click.option(
    "-n", "--interval", type=click.FloatRange(min=0.1), default=2, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look twice, print, and stop; for scripts.")
@click.option("--graph", default="", help="Show one graph only.")
def top(url: str, interval: float, once: bool, graph: str) -> None:
    """Show rates, latencies, batches and queues of each node of the server at URL, live.

    All is read from the server's /metrics (give the address of --metrics-port where it has one), and stands for the time
    between two looks. Percentiles are read off histograms, and so are bounds.
    """
    from servinggraph.cli.asking.scrape import scrape

    if "://" not in url:
        url = f"http://{url}"
    server_address(url)
    try:
        from rich.console import Console
        from rich.live import Live

        from servinggraph.cli.asking.nodes import table
    except ImportError as error:
        raise click.UsageError(f"{error}: this command needs pip install 'servinggraph[tools]'") from error
    console = Console()
    try:
        before = scrape(url)
        if once:
            time.sleep(interval)
            console.print(table(before, scrape(url), url, graph))
            return
        with Live(table(before, before, url, graph), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now = scrape(url)
                live.update(table(before, now, url, graph), refresh=True)
                before = now
    except (OSError, HTTPException, ValueError) as error:
        click.echo(f"{url}/metrics: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
