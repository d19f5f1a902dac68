"""A request whose body is no tensors, to `/v2/models/{model}/invocations`."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import click

__all__ = ["ask_with_body"]


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
    data, kind = body.encode(), "application/json"
    if body.startswith("@"):
        try:
            data = Path(body[1:]).read_bytes()
        except OSError as error:
            raise click.UsageError(f"cannot read {body[1:]}: {error.strerror}") from error
        kind = mimetypes.guess_type(body[1:])[0] or "application/octet-stream"
    place = (
        f"{url}/v2/models/{quote(model, safe='')}"
        + (f"/versions/{quote(version, safe='')}" if version else "")
        + "/invocations"
    )
    request = Request(place, data, {"Content-Type": content_type or kind, **headers})  # noqa: S310  (http or https: Target has looked)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8", "replace")
