"""The `servinggraph` command. Each subcommand imports what it needs when it runs."""

from servinggraph.cli.main import main

__all__ = ["main"]
