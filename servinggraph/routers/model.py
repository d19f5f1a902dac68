"""The `model` router: requests name the branch that answers them, and any number of branches can be told apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, Final, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, GraphNotFound, InvalidRequest, Problem, nearest
from servinggraph.interfaces import RouterOptions, Selector
from servinggraph.routers.selection.keys import KeyReader, key_reader, key_tensors
from servinggraph.routers.signatures import common_signature
from servinggraph.tensors import Signature

__all__ = ["Model", "ModelOptions"]

_VERSION: Final = re.compile(r"v?([1-9][0-9]*)")
_LISTED: Final = 20
"""Choices that an error lists; a graph may have thousands."""
_COMPARED: Final = 300
"""Choices among which an error looks for the nearest: it takes some microseconds for each."""
_LONGEST: Final = 80


class ModelOptions(RouterOptions):
    """Requests name the branch that answers them."""

    by: str = Field(
        "path",
        description="Where a request names it: path (/v2/models/GRAPH/routes/NAME/infer, or the parameter 'route'), version "
        "(/v2/models/GRAPH/versions/2/infer, gRPC's model_version, or the parameter 'version'), header:NAME, "
        "parameter:NAME, tensor:NAME (its first element) or field:PATH of a body.",
    )
    aliases: dict[str, str] = Field(
        {},
        description="Further names and the branches that they lead to; every branch answers to its own name as well, and "
        "with 'by: version' branch v2 to version 2.",
    )
    default: str | None = Field(
        None, description="Branch for requests that name none; without it they get a 404 that lists the choices."
    )
    unknown: Literal["refuse", "default"] = Field(
        "refuse", description="What a request gets that names no branch there is: a 404 that lists the choices, or the default."
    )


class Model(Selector[ModelOptions]):
    """Sends each request to the branch that it names; which one answered stands in `<node>.variant`.

    The look-up takes the same time for two branches and for thousands. Where the default and
    the aliases lead can be changed while it serves.
    """

    options_type = ModelOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        by = self.options.by
        self._names = dict.fromkeys(branches)
        self._read = self._reader(by, problems)
        self.reads = key_tensors(by)
        for setting, value in (("aliases", self.options.aliases), ("default", self.options.default)):
            if reason := self._problem(setting, value):
                problems.append(Problem(reason, node=setting))
        if self.options.unknown == "default" and self.options.default is None:
            problems.append(Problem("'unknown: default' needs 'default'", node="unknown"))
        self.routes = by == "path"
        if by == "version":
            self.versions = self._versions(branches, problems)
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self._decisions = dict.fromkeys(branches, 0)
        self._refused = 0
        self._parameter = f"{self.name}.variant"
        self._set(self.options.aliases, self.options.default)
        return signature

    def choose(self, value: Any, context: Context) -> str:
        named = self._read(value, context)
        branch = self._fallback if named is None else self._table.get(named, self._otherwise)
        if branch is None:
            self._refused += 1
            raise GraphNotFound(self._refusal(named))
        self._decisions[branch] += 1
        context.response_parameters[self._parameter] = branch
        return branch

    def describe(self) -> str:
        return f"model (by {self.options.by}, {len(self._names)} branches)"

    def settings(self) -> dict[str, Any]:
        return {"aliases": dict(self._aliases), "default": self._fallback}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        for name in changes:
            if name not in ("aliases", "default", "revision"):
                raise InvalidRequest(f"'{name}' cannot be changed; 'aliases' and 'default' can")
        aliases = changes.get("aliases", self._aliases)
        default = changes.get("default", self._fallback)
        reason = self._problem("aliases", aliases) or self._problem("default", default)
        if reason is None and default is None and self.options.unknown == "default":
            reason = "'unknown: default' needs 'default'"
        if reason is None and self.versions and set(aliases) != set(self._aliases):
            reason = "versions that a graph takes are fixed: its aliases can lead elsewhere, but none comes or goes"
        if reason:
            raise InvalidRequest(reason)
        self._set(aliases, default)

    def report(self) -> dict[str, Any]:
        return {"decisions": dict(self._decisions), "refused": self._refused}

    def _set(self, aliases: Mapping[str, str], default: str | None) -> None:
        self._aliases, self._fallback = dict(aliases), default
        self._otherwise = default if self.options.unknown == "default" else None
        self._table = {**self._versioned, **self._aliases, **{name: name for name in self._names}}

    @property
    def _versioned(self) -> dict[str, str]:
        """Versions and the branches that are called after them."""
        if not self.versions:
            return {}
        return {found[1]: name for name in self._names if (found := _VERSION.fullmatch(name))}

    def _versions(self, branches: Collection[str], problems: list[Problem]) -> tuple[str, ...]:
        """Return the versions that requests may ask for."""
        versions: dict[str, str] = {}
        for name in (*branches, *self.options.aliases):
            found = _VERSION.fullmatch(name)
            if found is None:
                if name in self.options.aliases or name not in self.options.aliases.values():
                    text = f"'{name}' is no version: call it v2 or 2, or give version and branch in 'aliases'"
                    problems.append(Problem(text, node="aliases" if name in self.options.aliases else "branches"))
            elif versions.setdefault(found[1], name) != name:
                problems.append(Problem(f"version {found[1]} is both '{versions[found[1]]}' and '{name}'", node="branches"))
        return tuple(versions)

    def _problem(self, setting: str, value: Any) -> str | None:
        """Say why a setting cannot have a value; None when it can."""
        if setting == "default":
            if value is None or (isinstance(value, str) and value in self._names):
                return None
            return f"'default' is {value!r}, which is no branch{nearest(str(value), list(self._names))}"
        if not isinstance(value, Mapping):
            return f"'aliases' is a mapping of name to branch, got {type(value).__name__}"
        for alias, branch in value.items():
            if not isinstance(alias, str) or not isinstance(branch, str) or branch not in self._names:
                return f"alias {alias!r} leads to {branch!r}, which is no branch{nearest(str(branch), list(self._names))}"
            if alias in self._names:
                return f"alias '{alias}' is the name of a branch, which answers to it"
        return None

    def _reader(self, by: str, problems: list[Problem]) -> KeyReader:
        """Return what reads the name of a branch from a request."""
        if by == "path":
            return _either(lambda context: context.route, "route")
        if by == "version":
            return _either(lambda context: context.version, "version")
        try:
            if by == "id":
                raise ValueError("'id' tells requests apart, not branches")
            return key_reader(by)
        except ValueError as error:
            problems.append(Problem(f"'by' is path, version, or the place of a key: {error}", node="by"))
            return lambda value, context: None

    def _refusal(self, named: str | None) -> str:
        """Return the text for a request that names no branch; bounded, whatever was asked for and however many there are."""
        choices = list(self.versions) or list(self._table)
        listed = ", ".join(islice(choices, _LISTED)) + (f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else "")
        if named is None:
            return f"the request names no branch (by {self.options.by}). There are: {listed}"
        named = named[:_LONGEST]
        alike = [choice for choice in choices if choice[:1] == named[:1]] if len(choices) > _COMPARED else choices
        hint = nearest(named, alike[:_COMPARED])
        text = f"no branch is called '{named}' (by {self.options.by})"
        return f"{text}{hint} There are: {listed}" if "did you mean" in hint else f"{text}. There are: {listed}"


def _either(addressed: Any, parameter: str) -> KeyReader:
    """Return what reads a name from the request's address, or from a parameter where the address has none."""
    read_parameter = key_reader(f"parameter:{parameter}")

    def read(value: Any, context: Context) -> str | None:
        named: str | None = addressed(context) or None
        if not context.parameters:
            return named
        given = read_parameter(value, context)
        if named is not None and given is not None and given != named:
            raise InvalidRequest(f"the request's address names {parameter} '{named}', its parameter '{given[:_LONGEST]}'")
        return given if named is None else named

    return read
