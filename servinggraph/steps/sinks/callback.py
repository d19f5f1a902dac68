"""The `callback` step: an HTTP request tells somebody of each value."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, InvalidRequest, Problem, ServingGraphError
from servinggraph.guards import backoff_s
from servinggraph.interfaces import BatchPolicy, Operation, Options, Step
from servinggraph.messages import Body
from servinggraph.steps.outbox import Outbox
from servinggraph.steps.remote.calls import close_on
from servinggraph.steps.remote.endpoints import is_host
from servinggraph.steps.remote.failures import CallFailed, refused
from servinggraph.steps.remote.headers import Secrets, forwarded, plain_headers
from servinggraph.steps.remote.tls import roots_of
from servinggraph.steps.sinks.documents import encoded
from servinggraph.tensors import Signature

__all__ = ["Callback", "CallbackOptions"]

_PATIENCE_S: Final = 5.0
_ANSWER_BYTES: Final = 65_536


class CallbackOptions(Options):
    """Whom to tell, and what becomes of a request whose callback fails."""

    url: str | None = Field(None, description="Where callbacks go.")
    url_header: str | None = Field(
        None, description="Header of the request that says where its callback goes, instead of `url`; needs `allow`."
    )
    allow: list[str] = Field(
        default_factory=list,
        description="What `url_header` may name: beginnings of URLs, `https://hooks.example.com/orders`; also `https://*.example.com`.",
    )
    method: Literal["POST", "PUT"] = Field("POST", description="Method.")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers of each callback, `Authorization: Bearer ${TOKEN}` say; with `url` only."
    )
    on_failure: Literal["fail", "drop"] = Field(
        "drop",
        description="`drop`: a request does not wait for its callback, and one that does not get through is counted and "
        "logged. `fail`: it waits, and fails with it.",
    )
    attempts: int = Field(3, ge=1, description="Most attempts, the first included; a refusal as 400 or 404 is not tried again.")
    first_ms: float = Field(
        200, gt=0, description="Pause after the first attempt, doubled after each further one, with chance in it."
    )
    most_ms: float = Field(10_000, gt=0, description="Longest pause.")
    attempt_timeout_ms: float = Field(5000, gt=0, description="Longest time for an attempt.")
    connections: int = Field(16, ge=1, description="Most connections; more callbacks wait for one.")
    connect_timeout_ms: float = Field(1000, gt=0, description="Longest time to make a connection.")
    max_waiting: int = Field(
        1000, ge=1, description="With `drop`, most callbacks that wait or are under way; one more is dropped."
    )
    tls_ca: str | None = Field(None, description="File with the root certificates (PEM) to trust; by default the system's.")

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        plain_headers(headers)
        return headers

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.url is None and self.url_header is None:
            raise ValueError("it has nowhere to go: give 'url', or 'url_header' with 'allow'")
        if self.url_header is not None and not self.allow:
            raise ValueError("'url_header' needs 'allow': a caller must not choose whom this server sends requests to")
        if self.headers and self.url_header is not None:
            raise ValueError("'headers' go to 'url' only, since what they hold is not for whoever a caller names")
        for key, url in (("url", self.url), *(("allow", pattern) for pattern in self.allow)):
            try:
                if url is not None:
                    _parts(url)
            except ValueError as error:
                raise ValueError(f"'{key}' {error}") from None
        return self


class _Call(NamedTuple):
    url: str
    body: bytes
    headers: dict[str, str]


class Callback(Step[CallbackOptions]):
    """Sends `id`, `graph` and `value` of each request as JSON, and passes the value on as it is.

    A request whose header names no address has no callback where there is no `url`. Any answer of the 200s is taken;
    redirects are not followed.
    """

    options_type = CallbackOptions
    passes_on = True
    sees_requests = True
    _client: Any = None
    _outbox: Outbox[_Call] | None = None

    def prepare(self) -> Signature:
        try:
            import aiohttp  # noqa: F401  (here to be missed before the first request)
        except ImportError as error:
            text = f"needs packages that are not installed ({error}): pip install 'servinggraph[remote]'"
            raise GraphInvalid([Problem(text, node="step")]) from error
        self._headers = plain_headers(self.options.headers)
        self._hide = Secrets(list(self._headers.values())).hide
        self._ca = roots_of(self.base, self.options.tls_ca)
        return Signature()

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        return None

    def files(self) -> Iterable[Path]:
        # One named by an absolute path is the machine's.
        ca = self.options.tls_ca
        return [] if ca is None or Path(ca).is_absolute() else [self.base / ca]

    def operation(self) -> Operation:
        from servinggraph.steps.remote.http import HttpClient

        self._loop = asyncio.get_running_loop()
        options = self.options
        self._client = client = HttpClient(options.connections, options.connect_timeout_ms / 1e3, _ANSWER_BYTES, self._ca)

        async def tell(value: Any, context: Context) -> Any:
            url = self._url(context)
            if url is not None:
                await self._deliver(client, self._call(url, value, context))
            return value

        if options.on_failure == "fail":
            return Operation(tell, suspends=True)

        async def begin(call: _Call) -> Awaitable[object]:
            return self._deliver(client, call)

        self._outbox = outbox = Outbox(self.name, begin, options.max_waiting)

        def note(value: Any, context: Context) -> Any:
            url = self._url(context)
            if url is not None:
                outbox.put(lambda: self._call(url, value, context), context)
            return value

        return Operation(note, suspends=False)

    def _call(self, url: str, value: Any, context: Context) -> _Call:
        document = {"id": context.id, "graph": context.graph, "value": value.value if isinstance(value, Body) else value}
        headers = {**forwarded(context.headers, ()), "Content-Type": "application/json", **self._headers}
        return _Call(url, encoded(document), headers)

    def _url(self, context: Context) -> str | None:
        """Return where a request's callback goes.

        Raises:
            InvalidRequest: its header names an address that is not allowed.
        """
        header = self.options.url_header
        named = context.headers.get(header) if header is not None else None
        if not named:
            return self.options.url
        if not any(_begins_with(named, allowed) for allowed in self.options.allow):
            raise InvalidRequest(f"header '{header}' names an address that callbacks must not go to")
        return named

    async def _deliver(self, client: Any, call: _Call) -> None:
        """Send a callback, in as many attempts as there are.

        Raises:
            ServingGraphError: the last one failed, or the answer says that another makes no sense.
        """
        options = self.options
        where = f"callback to {urlsplit(call.url).hostname}"
        attempt = 1
        while True:
            try:
                async with asyncio.timeout(options.attempt_timeout_ms / 1e3):
                    answer = await client.call(options.method, call.url, call.headers, call.body, where)
                if 200 <= answer.status < 300:
                    return
                raise refused(where, answer.status, answer.body[:2000].decode("utf-8", "replace"))
            except TimeoutError:
                failure: ServingGraphError = DeadlineExceeded(f"{where}: no answer within {options.attempt_timeout_ms:g} ms")
                again = True
            except CallFailed as failed:
                failure, again = failed.error, failed.unhealthy or failed.error.retryable
            if not again or attempt == options.attempts:
                # Some services quote what they were sent.
                failure.message = self.conceal(self._hide(failure.message))
                raise failure
            await asyncio.sleep(backoff_s(attempt, options.first_ms / 1e3, options.most_ms / 1e3, jitter=True))
            attempt += 1

    def unload(self) -> None:
        client, outbox = self._client, self._outbox
        self._client = self._outbox = None

        async def close() -> None:
            if outbox is not None:
                await outbox.close(_PATIENCE_S)
            await client.close()

        if client is not None:
            close_on(self._loop, close())

    def impurity(self) -> str | None:
        return "sends requests to others"

    def describe(self) -> str:
        options = self.options
        return f"callback to {self.conceal(options.url) if options.url else f'what header {options.url_header} names'}"


def _parts(url: str) -> tuple[str, str, int | None, list[str]]:
    """Return scheme, host, port and the parts of the path of an address.

    Raises:
        ValueError: it is none, or has in it what would make two readers see two addresses.
    """
    parts = urlsplit(url)
    path = [part for part in parts.path.split("/") if part]
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not is_host(host):
        raise ValueError("is no URL: expected https://host/path")
    odd = any(character in url for character in "\\@ \t\r\n") or any(
        "%2" in part.lower() or part in (".", "..") for part in path
    )
    if odd or not url.isascii() or not url.isprintable():
        raise ValueError("has a user name, a dot segment, or characters in it that no callback has")
    return parts.scheme, host, parts.port, path


def _begins_with(url: str, allowed: str) -> bool:
    """Tell whether an address is below one that is allowed, whose host may begin with `*.`."""
    try:
        scheme, host, port, path = _parts(url)
    except ValueError:
        return False
    wanted = _parts(allowed)
    same_host = (
        host.endswith(wanted[1][1:]) and len(host) > len(wanted[1]) - 1 if wanted[1].startswith("*.") else host == wanted[1]
    )
    return same_host and (scheme, port) == (wanted[0], wanted[2]) and path[: len(wanted[3])] == wanted[3]
