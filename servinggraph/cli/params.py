"""What several commands take and do alike: addresses of servers, seconds, headers, and requests over HTTP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

import click

__all__ = ["SECONDS", "headers_from", "opener", "server_address", "texts_from"]

_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class _Seconds(click.FloatRange):
    """A time to wait, more than none; what is no number would be forever to some libraries and nothing to others."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        return seconds if isfinite(seconds) else self.fail(f"{value!r} is no number of seconds.", param, ctx)


SECONDS: Final = _Seconds()


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: it would take a token along to whoever it names, and a page to log in is not `ready`."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        fp.close()
        raise OSError(f"it answered {code} and names {newurl}: redirects are not followed")


def opener() -> OpenerDirector:
    """Return what sends requests to the address that it is given, and to no other."""
    return build_opener(ProxyHandler({}), _Stay)


def server_address(url: str, schemes: Sequence[str] = ("http", "https")) -> SplitResult:
    """Return the parts of a server's address.

    Raises:
        click.UsageError: it is none.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as whoever looks it up does
        fine = parts.scheme in schemes and parts.port != 0 and host and url.isprintable() and " " not in url
    except ValueError:  # no number as its port, a bracket alone, a name that is too long
        fine = False
    if not fine:
        expected = " or ".join(f"{scheme}://host:port" for scheme in schemes if not scheme.endswith("s"))
        raise click.UsageError(f"'{url}' is no address of a server: expected {expected}")
    return parts


def texts_from(given: Sequence[str], option: str) -> dict[str, str]:
    """Return NAME=VALUE options.

    Raises:
        click.UsageError: there is no equals sign, or no name.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{option} {text!r}: expected NAME=VALUE")
        found[name] = value
    return found


def headers_from(given: Sequence[str]) -> dict[str, str]:
    """Return the headers of `--header` options, which may hold secrets: errors do not quote them.

    Raises:
        click.UsageError: one is no header.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not _HEADER.fullmatch(name):
            raise click.UsageError("--header: expected NAME=VALUE, with a name of letters, digits and '-'")
        if not value.isascii() or not value.isprintable():
            raise click.UsageError(f"--header {name}: its value has line breaks or characters beyond ASCII")
        found[name] = value
    return found
