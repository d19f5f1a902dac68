"""What routers learn from: what became of earlier answers, what a router did with it, and how it adds up over workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from servinggraph.tensors import Array

__all__ = ["Feedback", "Learned", "Receipt"]


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned, as numbers that add up over the workers that share a state.

    Attributes:
        era: counts how often everything was forgotten: what was learned in an earlier era is void.
        sums: name to FP64 numbers in one axis, added up one by one; a shorter array counts as filled up with 0.
    """

    era: int
    sums: Mapping[str, Array]


class Receipt(Enum):
    """What a router did with feedback."""

    TAKEN = "taken"
    """It learned from it."""
    DUPLICATE = "duplicate"
    """It has had feedback for this request already; nothing has changed."""
    UNKNOWN = "unknown"
    """It does not remember this request: it never answered it, or too long ago."""
    PASSED_ON = "passed_on"
    """It does not remember this request; the workers that share its state are asked, and the one that does takes it."""
    UNUSED = "unused"
    """It has no use for such feedback."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What became of an earlier answer.

    Attributes:
        id: id of the request; empty when only the variant is known.
        variant: branch that answered; empty when only the id is known.
        reward: how good the answer was; None where a truth is given instead.
        truth: what the answer should have been, tensors or plain values; None where a reward is given.
        metric: name of what is measured, where a graph has several.
        node: the router that it is for; empty for every one that can use it.
    """

    id: str = ""
    variant: str = ""
    reward: float | None = None
    truth: Any = None
    metric: str = "reward"
    node: str = ""
