"""Chooses among names by weight: the same name for the same key, in every process and after every restart.

Weighted rendezvous hashing: each name draws a number from a hash of the key and its own
name, `-weight / ln(u)` with u in (0, 1), and the largest wins. The chance of a name is its
share of the weights. A name's draw depends on no other name, so raising its weight moves
keys to it and nowhere else, and lowering it moves keys away from it and from no other.

Source: Schindelhauer and Schomaker, Weighted Distributed Hash Tables (2005). The hash is XXH3
with 64 bits of the key's UTF-8 bytes; its seed is the same hash of salt, a zero byte and name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from math import isfinite, log
from random import random
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from servinggraph.errors import nearest

__all__ = ["Weights", "weights_problem"]

_SCALE: Final = 2.0**-53


class Weights:
    """Names with weights; immutable, so a change is one assignment.

    Args:
        weights: name to weight, 0 or more, not all 0.
        salt: keeps the assignment of one router apart from that of another.
    """

    __slots__ = ("_bounds", "_items", "_names", "shares")

    def __init__(self, weights: Mapping[str, float], salt: str = "") -> None:
        total = sum(weights.values())
        self.shares: dict[str, float] = {name: weight / total for name, weight in weights.items()}
        positive = [(name, float(weight)) for name, weight in weights.items() if weight > 0]
        self._items = [(xxh3_64_intdigest(f"{salt}\0{name}".encode()), name, weight) for name, weight in positive]
        self._names = [name for name, _ in positive]
        self._bounds = list(accumulate(weight / total for _, weight in positive))[:-1]

    def by_key(self, key: str) -> str:
        """Return the name that a key belongs to."""
        if len(self._items) == 1:
            return self._names[0]
        data = key.encode("utf-8", "surrogateescape")
        best, chosen = -1.0, self._names[0]
        for seed, name, weight in self._items:
            # Of 53 bits, the most that a float holds, and +0.5: never 0, and never 1.
            draw = -weight / log(((xxh3_64_intdigest(data, seed) >> 11) + 0.5) * _SCALE)
            if draw > best:
                best, chosen = draw, name
        return chosen

    def at_random(self) -> str:
        """Return a name by chance."""
        return self._names[bisect_right(self._bounds, random())]  # noqa: S311  (chance, not a secret)


def weights_problem(weights: Any, names: Mapping[str, Any]) -> str | None:
    """Say why a mapping cannot be the weights of these names; None when it can. Names that are missing have weight 0."""
    if not isinstance(weights, Mapping) or not weights:
        got = "an empty one" if isinstance(weights, Mapping) else type(weights).__name__
        return f"weights are a mapping of branch to number, got {got}"
    for name, weight in weights.items():
        if name not in names:
            return f"weights name '{name}', which is no branch{nearest(str(name), list(names))}"
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not _is_finite(weight) or weight < 0:
            return f"the weight of '{name}' is a number from 0 on, got {weight!r}"
    total = sum(map(float, weights.values()))
    if not total:
        return "at least one weight is above 0"
    if not isfinite(total):
        return "the weights are too large to be added up: only their ratios matter"
    return None


def _is_finite(number: float) -> bool:
    try:
        return isfinite(number)
    except OverflowError:  # a whole number beyond what a float holds
        return False
