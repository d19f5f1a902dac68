"""Modules of a graph's own folder, private to one load of that graph.

One process holds several versions of a graph, and loads a graph again after its files have
changed; each load gets modules of its own. Such a module is in `sys.modules` under a private
name (`servinggraph_modules.<label>.steps`), so that classes can be pickled within the process
and relative imports work. Absolute imports of its neighbours find the same load's modules:
the module's `__builtins__` has an `__import__` that looks there first. What is not in the
folder comes from the Python path and is shared, as always.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import itertools
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

__all__ = ["ModuleScope", "current_scope", "without_scope"]

_ROOT: Final = "servinggraph_modules"
_numbers = itertools.count(1)
_scopes: dict[str, ModuleScope] = {}
_current: ContextVar[ModuleScope | None] = ContextVar("servinggraph_module_scope", default=None)


def current_scope() -> ModuleScope | None:
    """Return the scope of the load that goes on in this context."""
    return _current.get()


def without_scope(name: str) -> str:
    """Return a module's name as its author knows it."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == _ROOT and len(parts) > 2 else name


class ModuleScope:
    """The modules of one load of one graph.

    Args:
        label: the graph's name and version, for people who meet a module's name.
    """

    def __init__(self, label: str) -> None:
        self._prefix = f"{_ROOT}.{re.sub(r'[^A-Za-z0-9_]', '_', label)}_{next(_numbers)}"
        self._bases: dict[Path, str] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let import strings be resolved in this scope."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def find(self, name: str, base: Path) -> str | None:
        """Return the private name of a module of a folder; None when the folder does not have it."""
        base = base.resolve()
        if not has_module(base, name.partition(".")[0]):
            return None
        with self._lock:
            package = self._bases.get(base)
            if package is None:
                package = self._bases[base] = self._prefix + (f"_{len(self._bases)}" if self._bases else "")
                _install(package, base, self)
        return f"{package}.{name}"

    def drop(self) -> None:
        """Forget the modules; functions and classes that are still in use stay usable."""
        for package in self._bases.values():
            _scopes.pop(package, None)
            for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
                del sys.modules[name]
        self._bases.clear()


def has_module(base: Path, top: str) -> bool:
    """Tell whether a folder has a module or package; a folder without `__init__.py` only if no other is called so."""
    if (base / f"{top}.py").is_file() or (base / top / "__init__.py").is_file():
        return True
    if any(base.glob(f"{top}.*.so")) or any(base.glob(f"{top}.*.pyd")):
        return True
    if not (base / top).is_dir():
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    return spec is None or spec.origin is None


def _install(package: str, base: Path, scope: ModuleScope) -> None:
    """Make the private package whose path is the folder."""
    root = sys.modules.get(_ROOT)
    if root is None:
        root = ModuleType(_ROOT, "Modules of graphs' own folders; see servinggraph.scopes.")
        root.__path__ = []
        sys.modules[_ROOT] = root
        sys.meta_path.insert(0, _Finder())
    module = ModuleType(package, f"Modules of {base}.")
    module.__path__ = [str(base)]
    sys.modules[package] = module
    _scopes[package] = scope
    # A file that was written a moment ago may be missing in what the import system has listed.
    importlib.invalidate_caches()


class _Finder:
    """Finds the modules of private packages."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None or not name.startswith(_ROOT + "."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
            spec.cached = None
        return spec

    def invalidate_caches(self) -> None:
        """There are none."""


class _Loader(SourceFileLoader):
    """Runs a module from its source, with the `__import__` of its scope."""

    def get_code(self, fullname: str) -> Any:
        # Bytecode on disk is held against seconds and size: a file that was just changed could pass for the old one.
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        package = ".".join(module.__name__.split(".")[:2])
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(package)}
        super().exec_module(module)


def _importer(package: str) -> Any:
    """Return an `__import__` that looks for absolute names among the modules of a private package first."""
    base = Path(sys.modules[package].__path__[0])
    own: dict[str, bool] = {}

    def scoped_import(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or top == _ROOT:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        if top not in own:
            own[top] = has_module(base, top)
        if not own[top]:
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        # With something asked for, the module itself comes back, not the first package of its name.
        leaf = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or ("__name__",), 0)
        return leaf if fromlist else sys.modules[f"{package}.{top}"]

    return scoped_import
