"""Holds a decoded request against the inputs and outputs that a graph declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from servinggraph.errors import DatatypeMismatch, GraphNotFound, InvalidRequest, ShapeMismatch
from servinggraph.plan import Plan
from servinggraph.tensors import Array, TensorSpec, datatype_of, element_count, fits_shape

__all__ = ["ROUTES", "check_array", "check_input", "check_names", "check_routes", "check_sizes", "check_takes_tensors"]

ROUTES: Final = "/routes/"
"""Stands between a graph's name and a route inside it."""

_MAX_ELEMENTS: Final = 2**63 - 1
_MAX_AXES: Final = 64


def check_takes_tensors(plan: Plan) -> None:
    """Check that a graph is one for V2 inference.

    Raises:
        InvalidRequest: it takes a free-form body; says where to send that.
    """
    if plan.body:
        raise InvalidRequest(
            f"model '{plan.name}' takes one free-form body and no tensors: POST it to /v2/models/{plan.name}/invocations"
        )


def check_routes(plan: Plan) -> None:
    """Check that requests can name a route inside a graph.

    Raises:
        GraphNotFound: nothing in it would look at the route.
    """
    if not plan.routes:
        raise GraphNotFound(f"model '{plan.name}' has no routes: none of its routers is 'router: model' with 'by: path'")


def check_names(given: Mapping[str, object], declared: Mapping[str, TensorSpec], model: str) -> None:
    """Check that exactly the declared inputs are there, optional ones or not.

    Raises:
        InvalidRequest: an input that is not declared, or a required one is missing.
    """
    for name in given:
        if name not in declared:
            raise InvalidRequest(
                f"unexpected inference input '{name}' for model '{model}', expected {', '.join(declared) or 'none'}"
            )
    if len(given) == len(declared):
        return
    missing = [name for name, spec in declared.items() if name not in given and not spec.optional]
    if missing:
        required = sum(not spec.optional for spec in declared.values())
        expected = str(required) if required == len(declared) else f"between {required} and {len(declared)}"
        raise InvalidRequest(
            f"expected {expected} inputs but got {len(given)} inputs for model '{model}'. "
            f"Got input(s) {_quoted(given)}, but missing required input(s) {_quoted(missing)}"
        )


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Check that an input's shape, sizes 0 and more, is one that an array can have.

    Raises:
        InvalidRequest: too many axes, or elements.
    """
    if len(sizes) > _MAX_AXES:
        raise InvalidRequest(
            f"Unable to parse 'shape' of input '{name}': it has {len(sizes)} axes, at most {_MAX_AXES} are possible"
        )
    if element_count(sizes) > _MAX_ELEMENTS:
        raise InvalidRequest(
            f"shape {list(sizes)} of input '{name}' causes total element count to exceed maximum size of {_MAX_ELEMENTS}"
        )


def check_input(name: str, datatype: str, shape: tuple[int, ...], spec: TensorSpec, model: str) -> None:
    """Check one input's datatype and shape.

    Raises:
        DatatypeMismatch: another datatype than declared.
        ShapeMismatch: a shape that does not fit the declared one.
    """
    if spec.datatype is not None and datatype != spec.datatype:
        raise DatatypeMismatch(name, model, spec.datatype, datatype)
    if spec.shape is not None and not fits_shape(shape, spec.shape):
        raise ShapeMismatch(name, model, spec.shape, shape)


def check_array(name: str, array: Array, spec: TensorSpec, model: str) -> None:
    """Check an input that is an array already; see `check_input`."""
    check_input(name, datatype_of(array) or str(array.dtype), array.shape, spec, model)


def _quoted(names: object) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"  # type: ignore[attr-defined]  # any iterable of names
