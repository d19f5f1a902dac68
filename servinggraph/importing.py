"""Turns `package.module:name` into the object, and says what went wrong in the user's terms."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servinggraph.errors import nearest
from servinggraph.scopes import __file__ as scopes_file, current_scope, without_scope

__all__ = ["ImportProblem", "import_string", "load_object"]

_OURS = (__file__, scopes_file)


class ImportProblem(Exception):
    """An import string leads nowhere; the text says why, the import's own error included."""


def load_object(target: str, base: Path | None = None) -> Any:
    """Import the object that `package.module:name` names.

    Args:
        target: module and attribute path, apart by a colon.
        base: folder to look in first, so that `steps.py` beside a graph file is found; within a
            `ModuleScope` its modules are that scope's own.

    Raises:
        ImportProblem: no such module, an error while importing it, or no such name in it.
    """
    module_name, colon, attributes = target.partition(":")
    if not colon or not module_name or not attributes:
        raise ImportProblem(f"'{target}' is not an import string: expected 'package.module:name'")
    module = _module(module_name, base)
    found: Any = module
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            names = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise ImportProblem(f"module '{module_name}' has no '{attributes}'{_near(attribute, names)}") from None
    return found


def import_string(value: Callable[..., Any]) -> str:
    """Return the import string of a function or class, the reverse of `load_object`.

    Raises:
        ImportProblem: it is a lambda, local, or defined in the program that runs, so that a
            file could not name it.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ImportProblem(f"{value!r} has no name that a file could hold: define it at the top of a module")
    if module == "__main__":
        raise ImportProblem(f"'{name}' is defined in the program that runs (__main__): move it to a module")
    return f"{module}:{name}"


def _near(word: str, names: list[str]) -> str:
    hint = nearest(word, names)
    return hint if "did you mean" in hint else ""


def _module(name: str, base: Path | None) -> Any:
    full = name
    if base is not None:
        scope = current_scope()
        if scope is None:
            _prefer(base, name)
        else:
            full = scope.find(name, base) or name
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        missing = error.name and without_scope(error.name)
        if missing and (name == missing or name.startswith(missing + ".")):
            where = f"{base} and " if base else ""
            raise ImportProblem(f"there is no module '{missing}' in {where}the Python path") from error
        raise ImportProblem(f"module '{name}' failed to import: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise ImportProblem(f"module '{name}' failed to import: {_where(error)}{type(error).__name__}: {error}") from error


def _prefer(base: Path, name: str) -> None:
    """Put the graph's folder first on the path, if it has the module and no other folder's is loaded."""
    top = name.partition(".")[0]
    here = next((path for path in (base / f"{top}.py", base / top / "__init__.py") if path.is_file()), None)
    if here is None and not (base / top).is_dir():
        return
    loaded = sys.modules.get(top)
    origin = getattr(loaded, "__file__", None)
    if here is not None and origin is not None and not here.samefile(origin):
        raise ImportProblem(
            f"module '{top}' is loaded from {origin} already, and this graph wants {here}: "
            "one process cannot hold both under one name; rename one, or put it in a package"
        )
    folder = str(base)
    if folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()


def _where(error: BaseException) -> str:
    """Return "file:line: " of the innermost frame that is the user's, or nothing."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and "importlib" not in file and file not in _OURS:
            place = f"{file}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return place
