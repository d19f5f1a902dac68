"""The `rest` step: a request to any HTTP service, made from the value, its answer made the next value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, field_validator

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, nearest
from servinggraph.interfaces import Operation, Options, Step
from servinggraph.steps.remote.calls import close_on
from servinggraph.steps.remote.documents import NoTensor, decoded, encoded, tensor_of
from servinggraph.steps.remote.endpoints import endpoint_of
from servinggraph.steps.remote.failures import CallFailed, garbage, refused
from servinggraph.steps.remote.headers import Secrets, check_passed, forwarded, plain_headers
from servinggraph.steps.remote.templates import Field as TemplateField, UrlTemplate, document_template, look_up
from servinggraph.steps.remote.tls import roots_of
from servinggraph.tensors import Signature, TensorSpec
from servinggraph.tracing import trace_headers

__all__ = ["Rest", "RestOptions"]


class RestOptions(Options):
    """A request to an HTTP service, with JSON out and in."""

    url: str = Field(
        description="Where it goes; `{user.id}` in path or query is a field of the value, quoted, also `{parameters.x}`, "
        "`{headers.x}` and `{id}`. The host is fixed."
    )
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = Field("POST", description="Method.")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers of each request, `Authorization: Bearer ${TOKEN}` say."
    )
    query: dict[str, SecretStr] = Field(
        default_factory=dict, description="More of the query, for what is secret: `key: ${API_KEY}`."
    )
    pass_headers: list[str] = Field(
        default_factory=list,
        description="Headers of the caller that go along, beside traceparent, tracestate and x-request-id; not from a batch.",
    )
    send: Any = Field(
        None,
        description="The JSON that is sent, with fields: `{instances: '{pixels}'}`; by default the whole value, tensors as "
        "nested lists, and nothing with GET and DELETE.",
    )
    take: str | dict[str, str] | None = Field(
        None,
        description="What of the answer becomes the value: a path, `data.0.label`, or name to path. By default all of it. With "
        "declared `outputs` these are made tensors.",
    )
    parse: Literal["json", "text", "bytes"] = Field("json", description="What the answer is read as.")
    connections: int = Field(64, ge=1, description="Most connections; more calls wait for one.")
    connect_timeout_ms: float = Field(1000, gt=0, description="Longest time to make a connection.")
    max_response_bytes: int = Field(8 * 2**20, ge=1, description="Largest answer.")
    tls_ca: str | None = Field(None, description="File with the root certificates (PEM) to trust; by default the system's.")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        base, _ = _split(url)
        if endpoint_of(base).protocol != "http":
            raise ValueError("is not for http:// or https://")
        return url

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        plain_headers(headers, content_type=True)
        return headers

    @field_validator("pass_headers")
    @classmethod
    def _passable(cls, names: list[str]) -> list[str]:
        check_passed(names)
        return names


class Rest(Step[RestOptions]):
    """Sends a request for each value, and gives what the answer holds.

    The time that is left goes along in `X-Request-Timeout-Ms`; when the caller leaves, the connection is closed.
    Redirects are not followed. An answer that is not of the 200s is an error.
    """

    options_type = RestOptions
    gives_row_errors = False

    def prepare(self) -> Signature:
        options = self.options
        self._client: Any = None
        try:
            import aiohttp  # noqa: F401  (here to be missed before the first request)
        except ImportError as error:
            text = f"needs packages that are not installed ({error}): pip install 'servinggraph[remote]'"
            raise GraphInvalid([Problem(text, node="step")]) from error
        base, rest = _split(options.url)
        self._base = endpoint_of(base).url
        # The path may be secret as well.
        self._where = f"{options.method} {self.conceal(options.url).partition('?')[0]}"
        self._headers = plain_headers(options.headers, content_type=True)
        self._hide = Secrets([*self._headers.values(), *(secret.get_secret_value() for secret in options.query.values())]).hide
        self._passed = tuple(name.lower() for name in options.pass_headers)
        self._ca = roots_of(self.base, options.tls_ca)
        self._url, self._secrets = self._template(rest)
        self._body = self._body_of()
        self._check_take()
        return Signature(None, self.declared_outputs)

    def _template(self, rest: str) -> tuple[UrlTemplate, str]:
        try:
            url = UrlTemplate(rest)
        except ValueError as error:
            raise GraphInvalid([Problem(f"'url': {error}", node="url")]) from error
        if url.fields:
            self.unbatchable = f"its URL has the field '{url.fields[0].path}', and a batch has one URL"
        secrets = "&".join(
            f"{quote(name, safe='')}={quote(secret.get_secret_value(), safe='')}" for name, secret in self.options.query.items()
        )
        return url, secrets and ("&" if "?" in rest else "?") + secrets

    def _body_of(self) -> Callable[[Any, Context], bytes | None]:
        send = self.options.send
        if send is None:
            if self.options.method in ("GET", "DELETE"):
                return lambda value, context: None
            return lambda value, context: encoded(value)
        fields: list[TemplateField] = []
        try:
            fill = document_template(send, fields)
        except ValueError as error:
            raise GraphInvalid([Problem(f"'send': {error}", node="send")]) from error
        beside = next((field for field in fields if field.of_request), None)
        if beside is not None:
            self.unbatchable = f"'send' has the field '{beside.path}', which differs between the requests of a batch"
        return lambda value, context: encoded(fill(value, context))

    def _check_take(self) -> None:
        take, outputs = self.options.take, self.declared_outputs
        if self.options.parse != "json" and (take is not None or outputs is not None):
            raise GraphInvalid([Problem(f"'parse: {self.options.parse}' gives no JSON to take parts of", node="parse")])
        if outputs is None or take is None:
            return
        if isinstance(take, str):
            raise GraphInvalid([Problem("'take' says for each of the declared outputs where it is: name to path", node="take")])
        strange = [f"'take' names '{name}', which 'outputs' does not{nearest(name, list(outputs))}" for name in take]
        problems = [text for name, text in zip(take, strange, strict=True) if name not in outputs]
        problems += [f"'take' does not say where output '{name}' is" for name in outputs if name not in take]
        if problems:
            raise GraphInvalid([Problem(text, node="take") for text in problems])

    def files(self) -> Iterable[Path]:
        # One named by an absolute path is the machine's.
        ca = self.options.tls_ca
        return [] if ca is None or Path(ca).is_absolute() else [self.base / ca]

    def operation(self) -> Operation:
        from servinggraph.steps.remote.http import HttpClient

        self._loop = asyncio.get_running_loop()
        options = self.options
        client = self._client = HttpClient(
            options.connections, options.connect_timeout_ms / 1e3, options.max_response_bytes, self._ca
        )
        typed = any(name.lower() == "content-type" for name in self._headers)
        clock, method, where, take = self._loop.time, options.method, self._where, self._taker()

        async def call(value: Any, context: Context) -> Any:
            url = f"{self._base}{self._url.fill(value, context)}{self._secrets}"
            headers = {**forwarded(context.headers, self._passed), **trace_headers(context, self.name), **self._headers}
            body = self._body(value, context)
            if body is not None and not typed:
                headers["Content-Type"] = "application/json"
            if context.deadline is not None:
                headers["X-Request-Timeout-Ms"] = f"{max(0.001, (context.deadline - clock()) * 1e3):.3f}"
            try:
                answer = await client.call(method, url, headers, body, where)
                if not 200 <= answer.status < 300:
                    raise refused(where, answer.status, answer.body[:2000].decode("utf-8", "replace"))
                return take(answer.body)
            except CallFailed as failure:
                # Some services quote what they were sent.
                failure.error.message = self.conceal(self._hide(failure.error.message))
                raise failure.error from failure.__cause__

        return Operation(call, suspends=True)

    def _taker(self) -> Callable[[bytes], Any]:
        """Return what makes a value of an answer's body."""
        parse, where = self.options.parse, self._where
        if parse == "bytes":
            return lambda body: body
        paths = self.options.take
        if paths is None and self.declared_outputs is not None:
            paths = {name: name for name in self.declared_outputs}
        declared = self.declared_outputs

        def take(body: bytes) -> Any:
            try:
                if parse == "text":
                    return body.decode()
                document = decoded(body)
                if paths is None:
                    return document
                if isinstance(paths, str):
                    return look_up(document, paths.split("."), paths)
                found = {name: look_up(document, path.split("."), path) for name, path in paths.items()}
                return found if declared is None else _tensors(found, declared)
            except InvalidRequest as error:  # what the path leads to is the service's doing, not the caller's
                raise garbage(where, error.message) from error
            except (ValueError, NoTensor) as error:
                raise garbage(where, str(error)) from error

        return take

    def unload(self) -> None:
        client, self._client = getattr(self, "_client", None), None
        if client is not None:
            close_on(self._loop, client.close())

    def describe(self) -> str:
        return f"rest {self._where}"


def _split(url: str) -> tuple[str, str]:
    """Return scheme and host of a URL, and what stands behind them.

    Raises:
        ValueError: a field stands in the host, or a fragment at the end.
    """
    parts = urlsplit(url)
    if "{" in parts.netloc or "{" in parts.scheme or (not parts.netloc and "{" in url):
        raise ValueError("has a field in its host: only path and query may have some")
    if parts.fragment:
        raise ValueError("has a fragment, which is never sent")
    rest = parts.path + (f"?{parts.query}" if parts.query else "")
    return f"{parts.scheme}://{parts.netloc}", rest or "/"


def _tensors(found: Mapping[str, Any], declared: Mapping[str, TensorSpec]) -> dict[str, Any]:
    tensors = {}
    for name, spec in declared.items():
        try:
            tensors[name] = tensor_of(found[name], spec.datatype)
        except NoTensor as error:
            raise NoTensor(f"output '{name}': {error}") from error
    return tensors
