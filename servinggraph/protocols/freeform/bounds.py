"""How much a document may hold: bytes of a body can become fifty times as many bytes of objects."""

from __future__ import annotations

from typing import Any, Final

from servinggraph.errors import InvalidRequest, RequestTooLarge

__all__ = ["MAX_CELLS", "MAX_CONTAINERS", "MAX_NESTING", "check_nesting", "too_many"]

MAX_NESTING: Final = 100
"""Deepest nesting of arrays and objects, as in V2. Encoders have limits, too, and this is below them all."""

MAX_CONTAINERS: Final = 1_000_000
"""Most arrays and objects in a document: an empty one is a byte or two on the wire and 64 in memory."""

MAX_CELLS: Final = 4_000_000
"""Most cells in a table."""


def check_nesting(document: Any) -> None:
    """Hold a decoded document against `MAX_NESTING`, and its keys against text: msgpack has bytes as keys, too.

    Raises:
        InvalidRequest: nested deeper, or a key is no text.
    """
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_NESTING):
        if not level:
            return
        for container in level:
            if type(container) is dict and not all(type(key) is str for key in container):
                raise InvalidRequest("the body has a map with keys that are no text")
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is list or type(item) is dict
        ]
    if level:
        raise InvalidRequest(f"the body's nesting exceeds the maximum allowed depth ({MAX_NESTING})")


def too_many() -> RequestTooLarge:
    """Return the error for a document with too many containers."""
    return RequestTooLarge(
        f"the body holds more than {MAX_CONTAINERS} arrays and objects: send arrays of numbers as msgpack arrays"
    )
