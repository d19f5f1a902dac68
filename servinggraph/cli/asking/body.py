"""A request whose body is no tensors, to `/v2/models/{model}/invocations`."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request

import click

from servinggraph.cli.params import opener

__all__ = ["ask_with_body", "model_url", "read_body"]


def ask_with_body(
    url: str, model: str, version: str, body: str, content_type: str | None, headers: Mapping[str, str], timeout_s: float
) -> tuple[int, str]:
    """Send a body and return status and text of the answer.

    Args:
        url: the server's, http or https.
        model: the graph.
        version: its version; empty for the server's choice.
        body: JSON, or @FILE.
        content_type: of the body; None for what the file's name says, or JSON.
        headers: further headers.
        timeout_s: seconds to wait.
    """
    data, kind = read_body(body, content_type)
    place = f"{model_url(url, model, version)}/invocations"
    request = Request(place, data, {"Content-Type": kind, **headers})  # noqa: S310  (http or https: Target has looked)
    try:
        with opener().open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8", "replace")


def read_body(body: str, content_type: str | None) -> tuple[bytes, str]:
    """Return the bytes of a body, JSON or @FILE, and its content type.

    Raises:
        click.UsageError: the file cannot be read.
    """
    if not body.startswith("@"):
        return body.encode(), content_type or "application/json"
    try:
        data = Path(body[1:]).read_bytes()
    except OSError as error:
        raise click.UsageError(f"cannot read {body[1:]}: {error.strerror}") from error
    return data, content_type or mimetypes.guess_type(body[1:])[0] or "application/octet-stream"


def model_url(url: str, model: str, version: str) -> str:
    """Return the address of a model on a server."""
    return f"{url}/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
