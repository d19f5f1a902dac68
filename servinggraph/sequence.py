"""One request's turn in a sequence, as steps see it: `context.sequence`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SequenceId", "Turn"]

SequenceId = int | str
"""A caller's name for a sequence. The number 5 and the text "5" are two sequences, as in Triton."""


class Turn:
    """One request's turn in its sequence.

    What steps keep here becomes the sequence's state when the whole request has succeeded. A
    request that fails leaves the state of every node as it was.

    Attributes:
        id: the sequence's id, a number above 0 or a text.
        start: True for the first request of the sequence.
        end: True for its last.
    """

    __slots__ = ("_states", "end", "id", "kept", "start")

    def __init__(self, id: SequenceId, states: Mapping[str, Mapping[str, Any]], *, start: bool, end: bool) -> None:
        self.id = id
        self.start = start
        self.end = end
        self.kept: dict[str, dict[str, Any]] = {}
        self._states = states

    def state(self, node: str) -> dict[str, Any]:
        """Return a copy of what a node has kept in the requests before this one; empty in the first.

        What was kept in this request is not in it: a node that is run again, after its batch
        failed say, must begin where it began before.
        """
        return dict(self._states.get(node, ()))

    def keep(self, node: str, state: dict[str, Any]) -> None:
        """Keep a node's state for the next request, if this one succeeds."""
        self.kept[node] = state

    def stays(self, router: str, branch: str) -> str:
        """Return the branch that the sequence began with, where its state is; `branch` for the first request.

        Args:
            router: name of the router that decides.
            branch: what it would choose for a request by itself.
        """
        kept = {} if self.start else self.state(router)
        self.keep(router, kept or {"branch": branch})
        began: str = kept.get("branch", branch)
        return began

    def __repr__(self) -> str:
        return f"Turn({self.id!r}, start={self.start}, end={self.end})"
