"""What sinks tell of a request, as JSON."""

from __future__ import annotations

from typing import Any

from servinggraph.errors import NotAcceptable, StepFailed
from servinggraph.protocols.freeform.documents import encode_json

__all__ = ["encoded"]


def encoded(document: dict[str, Any]) -> bytes:
    """Return a document as JSON.

    Raises:
        StepFailed: JSON cannot carry what is in it.
    """
    try:
        return encode_json(document)
    except NotAcceptable:  # of an answer that would be the caller's to mend
        raise StepFailed("the value holds bytes that are not UTF-8, which JSON cannot carry") from None
