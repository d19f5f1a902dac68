"""Certificates that a connection is checked against."""

from __future__ import annotations

import ssl
from pathlib import Path

from servinggraph.errors import GraphInvalid, Problem

__all__ = ["roots_of"]


def roots_of(base: Path, file: str | None) -> str | None:
    """Return the path of a file with root certificates (option `tls_ca`); None where there is none.

    Raises:
        GraphInvalid: it does not exist, or has no certificates.
    """
    if file is None:
        return None
    path = base / file
    if not path.is_file():
        raise GraphInvalid([Problem(f"file '{file}' does not exist (looked at {path})", node="tls_ca")])
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl's own errors are such
        raise GraphInvalid([Problem(f"file '{file}' holds no certificates in PEM ({error.strerror})", node="tls_ca")]) from None
    return str(path)
