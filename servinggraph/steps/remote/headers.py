"""Headers of requests to other servers: fixed ones, which may be secret, and those of the caller that go along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from pydantic import SecretStr

from servinggraph.spec.environment import spellings

__all__ = ["Secrets", "check_metadata", "check_passed", "forwarded", "plain_headers"]

_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")
_METADATA: Final = re.compile(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)")
_TRACE: Final = ("traceparent", "tracestate", "x-request-id")
_OWN: Final = frozenset(
    {
        "connection", "content-encoding", "content-length", "content-type", "expect", "host",
        "inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade", "x-request-timeout-ms",
    }
)  # fmt: skip
"""Headers that say how a request is sent; they are the client's."""


def plain_headers(headers: Mapping[str, SecretStr], *, content_type: bool = False) -> dict[str, str]:
    """Return headers as they are sent.

    Args:
        headers: headers by name.
        content_type: whether Content-Type may be among them.

    Raises:
        ValueError: a name or a value that cannot be; values are not quoted.
    """
    plain: dict[str, str] = {}
    for name, secret in headers.items():
        value = secret.get_secret_value()
        own = name.lower() in _OWN and not (content_type and name.lower() == "content-type")
        if own or not _NAME.fullmatch(name):
            raise ValueError(f"'{name}' cannot be given: it is no name of a header, or says how requests are sent")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the value of '{name}' has line breaks or characters beyond ASCII")
        plain[name] = value
    return plain


def check_passed(names: Iterable[str]) -> None:
    """See to it that headers of a caller can go along.

    Raises:
        ValueError: one cannot.
    """
    for name in names:
        if name.lower() in _OWN or not _NAME.fullmatch(name):
            raise ValueError(f"'{name}' cannot go along: it is no name of a header, or says how requests are sent")


def check_metadata(names: Iterable[str]) -> None:
    """See to it that headers can be metadata of gRPC.

    Raises:
        ValueError: one cannot.
    """
    for name in names:
        if not _METADATA.fullmatch(name.lower()):
            raise ValueError(
                f"'{name}' cannot go over gRPC: names of metadata are letters, digits, '_', '-' and '.', do not begin with "
                "'grpc-', and end with '-bin' for binary values only"
            )


def forwarded(headers: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return those of a caller's headers that go along: what traces requests, and `names` (lower case)."""
    found: dict[str, str] = {}
    for name in (*_TRACE, *names):
        value = headers.get(name)
        if value is not None and name not in _OWN and _VALUE.fullmatch(value):
            found[name] = value
    return found


class Secrets:
    """Takes secrets out of what other servers say: some quote what they were sent.

    Args:
        values: secret texts; their words are secret, too, unless they are short.
    """

    def __init__(self, values: Iterable[str]) -> None:
        words = {word for value in values for word in (value, *value.split()) if len(word) >= _LONG_ENOUGH}
        self._words = sorted({spelled for word in words for spelled in spellings(word)}, key=len, reverse=True)

    def hide(self, text: str) -> str:
        """Return the text without them."""
        for word in self._words:
            text = text.replace(word, "***")
        if text.endswith("..."):  # it was cut off, maybe in the middle of a word
            for word in self._words:
                for size in range(len(word) - 1, _LONG_ENOUGH - 1, -1):
                    text = f"{text[: -size - 3]}***..." if text.endswith(word[:size] + "...") else text
        return text


_LONG_ENOUGH: Final = 8
"""Shorter words, `Bearer` say, are in texts by accident."""
