"""The errors that leave servinggraph. They hold data and know no transport.

    ServingGraphError              base: a code, a message, the node at fault, whether a retry can help
    ├── InvalidRequest             the caller's request is wrong
    │   ├── ShapeMismatch          a tensor has another shape than declared
    │   ├── DatatypeMismatch       a tensor has another datatype than declared
    │   ├── UnsupportedType        a free-form body's content type or charset cannot be taken
    │   └── NotAcceptable          the answer cannot be given in a type that the caller takes
    ├── GraphNotFound              no such graph, or no such version of it
    ├── RequestNotFound        feedback for a request that is not remembered
    ├── RegionNotFound             no such shared memory region
    ├── Conflict                   what is to be changed has changed meanwhile
    ├── LimitExceeded              something is full: in-flight requests, a batch queue
    ├── RequestTooLarge            the body, or what it unpacks to, is over its limit
    ├── DeadlineExceeded           the request's time was up
    ├── Cancelled                  the caller went away
    ├── Unavailable                the server or a node is starting or stopping
    ├── Unsupported                understood, but not offered
    ├── StepFailed                 a step raised, or returned what it must not
    ├── LoadFailed                 a graph of the repository did not load; what served before serves on
    └── GraphInvalid               a graph definition was refused; carries every problem found

Each protocol maps `ErrorCode` to its own status in one table (`protocols/*/status.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Self

__all__ = [
    "Cancelled",
    "Conflict",
    "DatatypeMismatch",
    "DeadlineExceeded",
    "ErrorCode",
    "GraphInvalid",
    "GraphNotFound",
    "InvalidRequest",
    "LimitExceeded",
    "NotAcceptable",
    "Problem",
    "RegionNotFound",
    "RequestNotFound",
    "RequestTooLarge",
    "ServingGraphError",
    "ShapeMismatch",
    "StepFailed",
    "Unavailable",
    "Unsupported",
    "UnsupportedType",
    "nearest",
]


class ErrorCode(Enum):
    """Who is at fault and what can be done about it; protocols translate it to a status."""

    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    LIMIT_EXCEEDED = "limit_exceeded"
    TOO_LARGE = "too_large"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"
    UNSUPPORTED_TYPE = "unsupported_type"
    NOT_ACCEPTABLE = "not_acceptable"
    INTERNAL = "internal"


class ServingGraphError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: the kind of failure.
        message: what was wrong, for a person to read; without the node's name.
        node: name of the node that failed, `score.gbm` for a branch; None outside a graph.
        retryable: True when the same request may succeed later.
        of_batch: True when a batch fails with it as a whole: none of its members is to blame, or its work may have been done,
            so they are not run again one by one.
    """

    code = ErrorCode.INTERNAL
    retryable = False
    of_batch = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.node: str | None = None

    def at(self, node: str) -> Self:
        """Name the node that failed, unless a node further inside was named already."""
        if self.node is None:
            self.node = node
        return self

    def copy(self) -> Self:
        """Return an equal error: callers that share a failure each raise an object of their own."""
        rebuild, arguments = self.__reduce__()
        error: Self = rebuild(*arguments)
        error.__cause__ = self.__cause__
        return error

    def __str__(self) -> str:
        return self.message if self.node is None else f"node '{self.node}': {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without __init__: subclasses have parameters of their own, and an
        # error has to survive pickling between processes.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[ServingGraphError], message: str, state: dict[str, Any]) -> ServingGraphError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class InvalidRequest(ServingGraphError):
    """The request cannot be served as it is; sending it again will not help."""

    code = ErrorCode.INVALID_REQUEST


class ShapeMismatch(InvalidRequest):
    """A tensor's shape is not the one that is declared (-1 stands for any size)."""

    def __init__(self, tensor: str, model: str, expected: Sequence[int], got: Sequence[int]) -> None:
        super().__init__(
            f"unexpected shape for input '{tensor}' for model '{model}'. Expected {_dims(expected)}, got {_dims(got)}"
        )
        self.tensor, self.model = tensor, model
        self.expected, self.got = tuple(expected), tuple(got)


class DatatypeMismatch(InvalidRequest):
    """A tensor's datatype is not the one that is declared."""

    def __init__(self, tensor: str, model: str, expected: str, got: str) -> None:
        super().__init__(f"inference input '{tensor}' data-type is '{got}', but model '{model}' expects '{expected}'")
        self.tensor, self.model = tensor, model
        self.expected, self.got = expected, got


class UnsupportedType(InvalidRequest):
    """The body has a content type, or a charset, that cannot be taken; the message lists those that can."""

    code = ErrorCode.UNSUPPORTED_TYPE


class NotAcceptable(InvalidRequest):
    """The answer cannot be given in any type that the caller takes; the message lists those that it can."""

    code = ErrorCode.NOT_ACCEPTABLE


class GraphNotFound(ServingGraphError):
    """No graph is served under this name, or not in this version."""

    code = ErrorCode.NOT_FOUND


class RequestNotFound(ServingGraphError):
    """No request of this id is remembered: it was never answered here, or too long ago."""

    code = ErrorCode.NOT_FOUND


class RegionNotFound(ServingGraphError):
    """No shared memory region is registered under this name."""

    code = ErrorCode.NOT_FOUND


class Conflict(ServingGraphError):
    """What the request would change is not any more what its sender has seen: read it again."""

    code = ErrorCode.CONFLICT


class LimitExceeded(ServingGraphError):
    """A bounded resource is full; the message names the limit. Retry after a pause.

    Attributes:
        uncalled: True where a node's own limit refused the call, which says nothing of how the node does.
    """

    code = ErrorCode.LIMIT_EXCEEDED
    retryable = True

    def __init__(self, message: str, *, uncalled: bool = False) -> None:
        super().__init__(message)
        self.uncalled = uncalled


class RequestTooLarge(ServingGraphError):
    """The request is larger than the server takes."""

    code = ErrorCode.TOO_LARGE


class DeadlineExceeded(ServingGraphError):
    """The request's deadline passed before its answer was ready."""

    code = ErrorCode.DEADLINE_EXCEEDED
    retryable = True


class Cancelled(ServingGraphError):
    """The caller went away, or cancelled the request."""

    code = ErrorCode.CANCELLED


class Unavailable(ServingGraphError):
    """Not ready: still loading, shutting down, or refused by a queue's time-out."""

    code = ErrorCode.UNAVAILABLE
    retryable = True


class Unsupported(ServingGraphError):
    """The protocol knows this, but it is not offered here."""

    code = ErrorCode.UNSUPPORTED


class LoadFailed(ServingGraphError):
    """A graph of the repository did not load; what was served under its name before is served on."""

    code = ErrorCode.INTERNAL


class StepFailed(ServingGraphError):
    """A step raised an exception (`__cause__`) or returned something that it must not."""

    code = ErrorCode.INTERNAL

    @classmethod
    def because_of(cls, error: BaseException, place: str = "") -> Self:
        """Return the failure for what a step raised, which becomes its cause; `place` opens the message."""
        try:
            text = str(error)
        except Exception:  # an error whose own text fails is one all the same
            text = "(its text cannot be read)"
        failure = cls(f"{place}{type(error).__name__}: {text}")
        failure.__cause__ = error
        return failure


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason for which a graph definition is refused.

    Attributes:
        message: what is wrong, what was expected, what to do.
        node: name of the node, `score.gbm` for a branch; None when no node is concerned.
        file: path of the YAML file; None for a graph built in Python.
        line: line in that file, counted from 1.
    """

    message: str
    node: str | None = None
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        node = f"node '{self.node}': " if self.node else ""
        return f"{place}: {node}{self.message}" if place else f"{node}{self.message}"


class GraphInvalid(ServingGraphError):
    """A graph definition was refused. `problems` holds every reason, in file order."""

    code = ErrorCode.INVALID_REQUEST

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def _dims(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def nearest(word: str, words: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the word that is closest, or which words there are."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of: {', '.join(sorted(words))}" if words else ""
