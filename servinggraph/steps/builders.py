"""What stands for a step in the Python builder: its kind and options, checked by the compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from servinggraph.interfaces import NodeSketch

__all__ = ["V2", "Callback", "Graph", "Jsonl", "Onnx", "Publish", "Python", "Queue", "Rest"]


def Graph(path: str | os.PathLike[str], **options: Any) -> NodeSketch:  # noqa: N802  (reads as the kind that it makes)
    """Return a node for the builder that stands for a graph from a file.

    Args:
        path: the file; a relative path starts from the working directory.
        options: keys of any node: `batch`, `timeout_ms`, `rename`, ...
    """
    return NodeSketch("step", "graph", {"path": str(path), **options})


__all__ = ["V2", "Callback", "Jsonl", "Onnx", "Publish", "Python", "Queue", "Rest"]


def Onnx(path: str | os.PathLike[str], **options: Any) -> NodeSketch:  # noqa: N802  (reads as the kind that it makes)
    """Return an ONNX model step for the builder.

    Args:
        path: the `.onnx` file; relative paths start from the working directory.
        options: keys of the `onnx` step and of any node: `device`, `batch`, `rename`, ...
    """
    return NodeSketch("step", "onnx", {"path": str(path), **options})


def Python(  # noqa: N802
    call: str | Callable[..., Any], init: Mapping[str, Any] | None = None, **options: Any
) -> NodeSketch:
    """Return a Python step for the builder, where it needs options; a bare function is one, too.

    Args:
        call: function, class, or import string.
        init: arguments for a class.
        options: keys of the `python` step and of any node: `run`, `batch`, `timeout_ms`, ...
    """
    given = {"init": dict(init)} if init else {}
    return NodeSketch("step", "python", {"call": call, **given, **options})


def Rest(url: str, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that asks an HTTP service.

    Args:
        url: where; `{user.id}` in path or query is a field of the value.
        options: keys of the `rest` step and of any node: `method`, `send`, `take`, `headers`, `retry`, ...
    """
    return NodeSketch("step", "rest", {"url": url, **options})


def V2(url: str | Sequence[str], model: str, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that another V2 server runs.

    Args:
        url: `http://host:port` or `grpc://host:port`, or several of them.
        model: name of the model there.
        options: keys of the `v2` step and of any node: `version`, `inputs`, `headers`, `retry`, ...
    """
    return NodeSketch("step", "v2", {"url": url if isinstance(url, str) else list(url), "model": model, **options})


def Publish(topic: str, brokers: str, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that writes a copy of what passes to a Kafka topic.

    Args:
        topic: the topic.
        brokers: `host:port`, with commas between several.
        options: keys of the `publish` step and of any node: `key`, `format`, `on_failure`, ...
    """
    return NodeSketch("step", "publish", {"topic": topic, "brokers": brokers, **options})


def Queue(topic: str, brokers: str, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that hands requests to a later stage over a Kafka topic.

    Args:
        topic: the topic.
        brokers: `host:port`, with commas between several.
        options: keys of the `queue` step and of any node: `key`, `format`, `graph`, ...
    """
    return NodeSketch("step", "queue", {"topic": topic, "brokers": brokers, **options})


def Jsonl(path: str | os.PathLike[str], **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that appends a line to a file for each request.

    Args:
        path: the file; relative paths start from the working directory.
        options: keys of the `jsonl` step and of any node: `on_failure`, `max_bytes`, ...
    """
    return NodeSketch("step", "jsonl", {"path": str(path), **options})


def Callback(url: str | None = None, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a step for the builder that tells somebody of each request, by an HTTP request.

    Args:
        url: where callbacks go; or give `url_header` and `allow`.
        options: keys of the `callback` step and of any node: `headers`, `on_failure`, `attempts`, ...
    """
    return NodeSketch("step", "callback", {**({} if url is None else {"url": url}), **options})
