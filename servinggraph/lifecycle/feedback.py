"""Feedback: what became of an earlier answer, read from any front end and handed to the routers that learn from it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from servinggraph.errors import GraphNotFound, InvalidRequest, RequestNotFound, ServingGraphError, nearest
from servinggraph.interfaces import Feedback, Receipt

if TYPE_CHECKING:
    from servinggraph.lifecycle.control import RouterSeat

__all__ = ["give_feedback", "read_feedback"]

_KEYS = ("id", "variant", "reward", "truth", "metric", "node")


def read_feedback(document: Mapping[str, Any]) -> Feedback:
    """Return the feedback that a mapping of plain values says.

    Raises:
        InvalidRequest: an unknown key, one that is missing, or one of a wrong kind.
    """
    for key in document:
        if key not in _KEYS:
            raise InvalidRequest(f"unknown key '{key}': expected id or variant, reward or truth, metric, node")
    texts = {key: document.get(key, "") for key in ("id", "variant", "metric", "node")}
    for key, text in texts.items():
        if type(text) is not str:
            raise InvalidRequest(f"'{key}' of feedback is text")
    if not (texts["id"] or texts["variant"]):
        raise InvalidRequest("feedback needs the 'id' of the request, or the 'variant' that answered, as text")
    reward, truth = document.get("reward"), document.get("truth")
    if (reward is None) == (truth is None):
        raise InvalidRequest("feedback has a 'reward' (a number) or a 'truth', one of the two")
    metric = texts["metric"] or "reward"
    return Feedback(texts["id"], texts["variant"], None if reward is None else _number(reward), truth, metric, texts["node"])


def _number(reward: Any) -> float:
    """Return a reward as a float; numpy's numbers are what a mean over an answer gives in Python."""
    if isinstance(reward, bool) or not isinstance(reward, int | float | np.integer | np.floating):
        raise InvalidRequest(f"'reward' is a finite number, got a {type(reward).__name__}")
    try:
        number = float(reward)
    except OverflowError:  # an integer of hundreds of digits
        number = inf
    if not isfinite(number):
        raise InvalidRequest(f"'reward' is a finite number, got {number}")
    return number


def give_feedback(seats: Mapping[str, RouterSeat], record: Feedback, graph: str) -> dict[str, Receipt]:
    """Hand an outcome to every router of a graph that can use it; return what became of it, by router.

    Raises:
        InvalidRequest: no router of the graph takes such feedback, or one that does cannot use it; the text then says which
            others have taken it.
        RequestNotFound: no router remembers the request.
        GraphNotFound: `record.node` is no router.
        Unavailable: the graph is not in memory.
    """
    if record.node:
        if record.node not in seats:
            raise GraphNotFound(f"graph '{graph}' has no router '{record.node}'{nearest(record.node, list(seats))}")
        seats = {record.node: seats[record.node]}
    receipts: dict[str, Receipt] = {}
    refusal: ServingGraphError | None = None
    for seat in seats.values():
        seat.require_running()
    for name, seat in seats.items():
        try:
            receipt = seat.router.feedback(record)
        except ServingGraphError as error:  # which must not depend on the order of the routers
            refusal = refusal or error
            continue
        if receipt is Receipt.UNKNOWN and seat.pass_on(record):
            receipt = Receipt.PASSED_ON
        if receipt is not Receipt.UNUSED:
            receipts[name] = receipt
    if refusal is not None:
        if taken := [name for name, receipt in receipts.items() if receipt is Receipt.TAKEN]:
            refusal.message += f"; taken by {', '.join(taken)}"
        raise refusal
    if not receipts:
        text = f"graph '{graph}' has no router that could use this feedback: one that learns from '{record.metric:.100}'"
        raise InvalidRequest(f"{text} with a branch '{record.variant:.100}'" if record.variant else text)
    if all(receipt is Receipt.UNKNOWN for receipt in receipts.values()):
        text = "was never answered here, or so long ago that its feedback is too late"
        raise RequestNotFound(f"request '{record.id:.100}' is not known to {', '.join(receipts)} of graph '{graph}': it {text}")
    return receipts
