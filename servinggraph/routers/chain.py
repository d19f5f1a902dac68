"""The `chain` router: its branches run one after the other, as one node that other routers can have as a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servinggraph.context import Context
from servinggraph.interfaces import Handler, Router, RouterOptions
from servinggraph.tensors import Signature

__all__ = ["Chain", "ChainOptions"]


class ChainOptions(RouterOptions):
    """Nodes one after the other, as one."""


class Chain(Router[ChainOptions]):
    """Gives each branch what the branch before it gave, and answers with what the last one gives."""

    options_type = ChainOptions
    in_sequence = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        signatures = list(branches.values())
        return Signature(signatures[0].inputs, signatures[-1].outputs)

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        for branch in branches.values():
            value = await branch(value, context)
        return value

    def impurity(self) -> str | None:
        return None

    def describe(self) -> str:
        return "chain"
