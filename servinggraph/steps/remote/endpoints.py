"""Addresses of remote servers, as options give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final
from urllib.parse import quote, urlsplit

__all__ = ["Endpoint", "endpoint_of", "is_host"]

_SCHEMES: Final = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is.

    Attributes:
        protocol: "http" or "grpc".
        tls: whether the connection is encrypted.
        host: name or address; an IPv6 address in brackets.
        port: its port.
        path: what stands before `/v2` in URLs; empty or with a slash in front.
        shown: what texts for people call it, where its path may be secret.
    """

    protocol: str
    tls: bool
    host: str
    port: int
    path: str = ""
    shown: str = field(default="", compare=False)

    @property
    def target(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.shown or self.url

    @property
    def url(self) -> str:
        """The address as it is used."""
        return f"{self.protocol}{'s' if self.tls else ''}://{self.target}{self.path}"


def endpoint_of(url: str) -> Endpoint:
    """Return the address that a URL gives.

    Raises:
        ValueError: it is none; the text does not quote it, since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is no URL: expected http://host:port or grpc://host:port") from None
    if parts.scheme not in _SCHEMES:
        scheme = f"scheme '{parts.scheme}'" if "://" in url else "no scheme"
        raise ValueError(f"has {scheme}: expected http://, https://, grpc:// or grpcs://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has a user name or password in it: give 'headers: {Authorization: ...}' instead")
    if parts.query or parts.fragment:
        raise ValueError("has a query or fragment, and it is only where a server is")
    protocol, tls = _SCHEMES[parts.scheme]
    host = parts.hostname or ""
    if not is_host(host) or not all(character.isalnum() or character in "-._:%" for character in host):
        raise ValueError("names no host")
    if port is None:
        if protocol == "grpc":
            raise ValueError("names no port, and gRPC has none of its own")
        port = 443 if tls else 80
    path = quote(parts.path.rstrip("/"), safe="%:@!$&'()*+,;=-._~/")
    if path and protocol == "grpc":
        raise ValueError("has a path, and gRPC has none")
    return Endpoint(protocol, tls, f"[{host}]" if ":" in host else host, port, path)


def is_host(host: str) -> bool:
    """Tell whether a name or address can be one of a host, wherever it leads."""
    try:
        host.encode("idna")  # as whoever looks it up does: parts of 63 characters at most, and none empty
        if host.rpartition(".")[2].isdigit():
            IPv4Address(host)  # `1.2.3` means an address to some, and nothing to others
    except ValueError:
        return False
    return bool(host)
