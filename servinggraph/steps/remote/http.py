"""HTTP to other servers: one pool of connections, answers of bounded size, failures told apart."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import aiohttp
from yarl import URL

from servinggraph.steps.remote.failures import broken, garbage, unreachable

__all__ = ["HttpAnswer", "HttpClient"]


_WATCHED: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""A peer that has vanished without a word is noticed after a minute: seconds before the first probe and between them, how many,
and milliseconds for what it has not acknowledged."""


class HttpAnswer(NamedTuple):
    """An answer."""

    status: int
    """Status code."""
    headers: Mapping[str, str]
    """Headers; names in any case find them."""
    body: bytes
    """The whole body."""


class HttpClient:
    """A pool of connections. To be made on the event loop.

    Args:
        connections: most connections; more calls wait for one.
        connect_timeout_s: longest time to make one.
        max_bytes: largest body of an answer.
        tls_ca: file with the root certificates (PEM) to trust; the system's by default.
    """

    def __init__(self, connections: int, connect_timeout_s: float, max_bytes: int, tls_ca: str | None = None) -> None:
        trusted = ssl.create_default_context(cafile=tls_ca) if tls_ca else True
        self._max_bytes = max_bytes
        self._connect_timeout_s = connect_timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=trusted, socket_factory=_socket),
            # Deadlines are the executor's; it cancels.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "servinggraph"},
            auto_decompress=False,
        )

    async def call(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, where: str) -> HttpAnswer:
        """Send a request and read the answer.

        Args:
            method: the method.
            url: the URL, encoded.
            headers: headers of the request.
            body: its body.
            where: how errors name the server.

        Raises:
            CallFailed: there is no answer, or it is too large.
        """
        try:
            async with self._session.request(
                method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as answer:
                return HttpAnswer(answer.status, answer.headers, await self._body(answer, where))
        except aiohttp.ClientConnectorError as error:
            raise unreachable(where, _reason(error)) from error
        # What aiohttp says in these has the whole URL in it, which may be secret, and a log has the cause, too.
        except aiohttp.ConnectionTimeoutError:
            raise unreachable(where, f"not within {self._connect_timeout_s * 1e3:g} ms (limit 'connect_timeout_ms')") from None
        except aiohttp.InvalidURL as error:
            raise unreachable(where, error.description or "this is no URL") from None
        except aiohttp.ClientPayloadError as error:
            raise broken(where, "in the middle of its answer") from error
        except aiohttp.ClientResponseError as error:
            raise garbage(where, error.message) from None
        except (aiohttp.ClientError, OSError) as error:
            if url in str(error):
                raise broken(where, "while the request was written") from None
            raise broken(where, _reason(error)) from error

    async def _body(self, answer: aiohttp.ClientResponse, where: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_any():
            size += len(part)
            if size > self._max_bytes:
                answer.close()  # the rest is not wanted
                raise garbage(where, f"it is larger than {self._max_bytes} bytes (limit 'max_response_bytes')")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def _socket(address: Any) -> socket.socket:
    """Return a socket for a connection; without it a call that has no deadline could wait for ever."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _WATCHED.items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has them all
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, ssl.SSLError):
            return str(error.os_error.strerror or error.os_error)  # its numbers are not the system's
        number = error.os_error.errno
        # asyncio's own text repeats the address.
        return os.strerror(number) if number is not None and number > 0 else str(error.os_error.strerror or error.os_error)
    return str(error) or type(error).__name__
