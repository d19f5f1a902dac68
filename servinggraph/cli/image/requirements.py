"""Reads a requirements file for an image, whose build has that one file and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["BadRequirements", "read_requirements"]

_OPTION: Final = re.compile(r"(-r|--requirement|-c|--constraint|-e|--editable|-f|--find-links)[\s=]*(\S+)")
_LOCAL: Final = re.compile(r"file:|\S+\s*@\s*file:|\.{0,2}/|[^\s:@]+\.(?:whl|zip|tar\.gz)(?:\s|$)")
"""What names a package by a file of this machine."""


class BadRequirements(Exception):
    """A requirements file cannot be used in an image; the text says which line, why, and what to do."""


def read_requirements(file: Path, warnings: list[str], inside: tuple[Path, ...] = ()) -> list[str]:
    """Return the lines of a requirements file, those of files that it includes (`-r`) in their places.

    Args:
        file: the file.
        warnings: gets a line that names what has no version.
        inside: the files that include this one.

    Raises:
        BadRequirements: it cannot be read, or a line needs another file of this machine.
    """
    try:
        given = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequirements(f"cannot read {file}: {error}") from error
    lines: list[str] = []
    loose: list[str] = []
    for number, line in enumerate(given, 1):
        text = line.strip()
        option = _OPTION.match(text)
        local = option is not None and "://" not in option[2]
        if local and option is not None and option[1] in ("-r", "--requirement"):
            included = file.parent / option[2]
            if included in (*inside, file):
                raise BadRequirements(f"{file}:{number}: {option[2]} includes itself")
            lines += read_requirements(included, warnings, (*inside, file))
            continue
        if local or _LOCAL.match(text):
            raise BadRequirements(
                f"{file}:{number}: '{text}' needs a file of this machine, which the image's build does not have: "
                "name the package by its version or a URL"
            )
        lines.append(line)
        needed = text.partition(";")[0].strip()
        if needed and needed[0] not in "#-" and "==" not in needed and "@" not in needed:
            loose.append(needed)
    if loose:
        warnings.append(f"{file.name} pins no version of {', '.join(loose)}: two builds may differ")
    return lines
