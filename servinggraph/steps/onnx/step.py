"""The `onnx` step itself: options, signature, and the callable that runs the model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from servinggraph.accelerators import placement
from servinggraph.accelerators.devices import DEVICE_PATTERN
from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.errors import DatatypeMismatch, GraphInvalid, InvalidRequest, Problem, ShapeMismatch, StepFailed
from servinggraph.interfaces import BatchPolicy, Operation, Options, Step
from servinggraph.steps.onnx.binding import BoundSession
from servinggraph.steps.onnx.external import external_data
from servinggraph.steps.onnx.probe import has_recurrence, rows_are_independent, run_seconds, sample, thread_hop_seconds
from servinggraph.steps.onnx.session import DeviceMissing, open_session, placed
from servinggraph.steps.onnx.state import ModelState, StateOptions, read_state
from servinggraph.steps.onnx.tensors import decode_text, output_converter, tensor_spec
from servinggraph.steps.state import check_one_row
from servinggraph.tensors import DATATYPES, Array, Signature, TensorSpec, datatype_of, fits_shape

__all__ = ["Onnx", "OnnxOptions", "TensorRtOptions"]

logger = logging.getLogger("servinggraph.steps.onnx")

_measuring = threading.Lock()


class TensorRtOptions(Options):
    """Switches of TensorRT, for `device: tensorrt`."""

    fp16: bool = Field(False, description="Let TensorRT compute in half precision.")
    int8: bool = Field(False, description="Let TensorRT compute in 8-bit integers; needs calibration or Q/DQ nodes.")
    calibration_table: str | None = Field(None, description="Calibration table for `int8`.")
    engine_cache: bool = Field(True, description="Keep built engines on disk: building takes minutes.")
    cache_folder: str = Field(".tensorrt", description="Where engines are kept; relative to the graph file.")
    workspace_mb: int | None = Field(None, ge=1, description="Most scratch memory for building engines, MiB.")


class OnnxOptions(Options):
    """An ONNX model."""

    path: str = Field(description="The .onnx file; a relative path starts from the graph file.")
    device: str = Field(
        "cpu", pattern=DEVICE_PATTERN, description="cpu, cuda, tensorrt, openvino, or auto; `cuda:1` picks one."
    )
    run: Literal["auto", "inline", "thread"] = Field(
        "auto", description="Where it runs: on the event loop, in a thread, or as measured at start."
    )
    threads: int = Field(1, ge=0, description="Threads inside one run; 0 lets ONNX Runtime take every core.")
    inter_threads: int = Field(1, ge=0, description="Parts of the model that run side by side within one run.")
    allow_spinning: bool = Field(True, description="Let idle threads of ONNX Runtime spin instead of sleep.")
    parallel_runs: int = Field(4, ge=1, le=256, description="Runs at the same time when the node is not batched.")
    optimization: Literal["disable", "basic", "extended", "all"] = Field("all", description="Graph optimisation level.")
    provider_options: dict[str, Any] = Field(default_factory=dict, description="Options of the execution provider.")
    session_config: dict[str, str] = Field(default_factory=dict, description="Session configuration entries.")
    tensorrt: TensorRtOptions = Field(default_factory=TensorRtOptions, description="Switches of TensorRT.")
    warmup: bool = Field(True, description="Run the model once for each batch size before the first request.")
    warmup_shapes: dict[str, list[int]] = Field(
        default_factory=dict,
        description="Input name to a whole shape to warm up with, where axes other than the first are free.",
    )
    state: list[StateOptions] = Field(
        default_factory=list,
        description="Tensors that the model gets back with the next request of a sequence; for graphs with `sequences`.",
    )


class Onnx(Step[OnnxOptions]):
    """Runs a model with ONNX Runtime.

    Takes the tensors that the model names and leaves others aside. With no word on `batch`
    it batches if the first axis of every tensor is free and a trial shows that rows do not
    influence each other.
    """

    options_type = OnnxOptions
    gives_row_errors = False
    counts = False
    batches_by_itself = True

    def prepare(self) -> Signature:
        path = Path(self.options.path)
        self._path = path if path.is_absolute() else self.base / path
        if not self._path.is_file():
            what = "is a folder" if self._path.is_dir() else "does not exist"
            raise GraphInvalid([Problem(f"model file '{self.options.path}' {what} (looked at {self._path})", node="path")])
        cache = self.base / self.options.tensorrt.cache_folder
        try:
            self._place = placed(placement(self.options.device))
            if self._place.kind == "tensorrt" and self.options.tensorrt.engine_cache:
                _make_cache(cache, self.options.tensorrt.cache_folder)
            self._session = open_session(self._path, self.options, self._place, cache)
        except DeviceMissing as error:
            raise GraphInvalid([Problem(str(error), node="device")]) from error
        except GraphInvalid:
            raise
        except Exception as error:
            text = f"ONNX Runtime cannot read '{self.options.path}': {_first_line(error)}"
            raise GraphInvalid([Problem(text, node="path")]) from error
        self._session.disable_fallback()  # a device that fails is an error, not a silent move to the CPU
        return self._read_signature()

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        self._threads: WorkerThreads | None = None
        self._execute = self._runner()
        if self._state is not None:
            self._execute = self._state.batch_first(self._execute)
        policy = self._auto_policy() if batch is None else super().load(batch)
        self._batched = policy is not None
        self._takes_empty = self._try_empty()
        # One at a time: graphs and nodes load side by side, and would disturb each other's figures.
        with _measuring:
            slowest = self._warm_up(policy) if self.options.warmup else None
            self._mode = self._chosen_mode(slowest, bounded=policy is not None or not self._first_axis_is_free())
        if self._mode == "thread":
            self._threads = WorkerThreads(policy.instances if policy else self.options.parallel_runs, self.name)
            self._threads.start()
        return policy

    def _chosen_mode(self, slowest: float | None, *, bounded: bool) -> str:
        """Return "inline" or "thread", as told or as measured.

        Args:
            slowest: longest run measured, seconds; None when nothing was.
            bounded: True when no run can have more rows than were measured.
        """
        if self.options.run != "auto":
            return self.options.run
        if slowest is None or not bounded or self._place.is_nvidia:
            return "thread"
        hop = thread_hop_seconds()
        mode = "inline" if slowest < hop else "thread"
        text = "node '%s': its longest run takes %.0f us, a thread hop %.0f us: runs %s"
        logger.info(text, self.name, slowest * 1e6, hop * 1e6, mode)
        return mode

    def unload(self) -> None:
        threads = getattr(self, "_threads", None)
        if threads is not None:
            threads.stop()
        # The session itself goes when a thread that still runs lets go of it.
        self._threads = None
        self.__dict__.pop("_execute", None)
        self.__dict__.pop("_session", None)

    def admit(self, value: Any) -> dict[str, Array]:
        """Pick the model's tensors and check them."""
        admitted = self._admitted(value)
        if self._state is not None and self._state.joins:
            check_one_row(admitted, self.name)
        return admitted

    def _admitted(self, value: Any) -> dict[str, Array]:
        if type(value) is not dict and not isinstance(value, Mapping):
            value = self._as_only_input(value)
        admitted = {}
        for name, datatype, shape, dtype in self._expected:
            try:
                array = value[name]
            except KeyError:
                have = ", ".join(map(str, value)) or "no tensors"
                raise StepFailed(f"model input '{name}' did not arrive: got {have}") from None
            if not isinstance(array, np.ndarray):
                raise StepFailed(f"model input '{name}' must be a numpy array, got {type(array).__name__}")
            if array.dtype is not dtype and datatype_of(array) != datatype:
                raise DatatypeMismatch(name, self.name, datatype, datatype_of(array) or str(array.dtype))
            if not fits_shape(array.shape, shape):
                raise ShapeMismatch(name, self.name, shape, array.shape)
            if not self._takes_empty and array.shape and array.shape[0] == 0:
                raise InvalidRequest(f"input '{name}' has no rows, and the model fails on none: send one or more")
            admitted[name] = array
        return admitted

    def operation(self) -> Operation:
        execute = self._execute
        # Of a batch it is the members that have one row each.
        admit = self._admitted if self._batched else self.admit
        stateful = None if self._state is None else self._state.run(execute)
        run = stateful or (lambda value, context: execute(value))
        if self._threads is not None:
            threads = self._threads

            def in_thread(value: Any, context: Context) -> Any:
                return threads.call(run, admit(value), context)

            return Operation(in_thread, suspends=True)
        if stateful is not None:
            return Operation(lambda value, context: stateful(admit(value), context), suspends=False)
        return Operation(lambda value, context: execute(admit(value)), suspends=False)

    def files(self) -> Iterable[Path]:
        begins = [self.base / kept.initial for kept in self.options.state or () if kept.initial != "zeros"]
        return [self._path, *external_data(self._path), *begins]

    def describe(self) -> str:
        mode = getattr(self, "_mode", None)
        return f"onnx {self.options.path} on {self._place}" + (f" ({mode})" if mode else "")

    def _read_signature(self) -> Signature:
        problems: list[Problem] = []
        inputs: dict[str, TensorSpec] = {}
        outputs: dict[str, TensorSpec] = {}
        for side, metas, specs in (
            ("input", self._session.get_inputs(), inputs),
            ("output", self._session.get_outputs(), outputs),
        ):
            for meta in metas:
                spec = tensor_spec(meta.type, meta.shape)
                if spec is None:
                    text = (
                        f"model {side} '{meta.name}' has type {meta.type}, which ONNX Runtime's Python API or V2 cannot carry"
                    )
                    problems.append(Problem(text, node="path"))
                else:
                    specs[meta.name] = spec
        if problems:
            raise GraphInvalid(problems)
        own = self._signature = Signature(inputs, outputs)
        self._state: ModelState | None = None
        if self.options.state:
            if not self.in_sequences:
                raise GraphInvalid([Problem("'state' is kept for sequences: the graph needs 'sequences: {}'", node="state")])
            self.keeps_state = True
            self._state = read_state(self.name, self.options.state, own, self.base)
            own, self._signature = self._state.own, self._state.whole
            self.unbatchable = self._state.why_alone
        self._expected = [
            (name, spec.datatype or "", spec.shape or (), DATATYPES[spec.datatype or "FP32"])
            for name, spec in (own.inputs or {}).items()
        ]
        return own

    def _as_only_input(self, value: Any) -> dict[str, Any]:
        """A bare array goes to the only input; anything else has no name to find it by."""
        if isinstance(value, np.ndarray) and len(self._expected) == 1:
            return {self._expected[0][0]: value}
        names = ", ".join(name for name, *_ in self._expected)
        raise StepFailed(f"takes tensors {names} by name, but got a {type(value).__name__}: return a mapping of name to array")

    def _runner(self) -> Callable[[dict[str, Array]], dict[str, Array]]:
        """Return the callable that runs the model on admitted tensors."""
        session = self._session
        metas = session.get_outputs()
        names = [meta.name for meta in metas]
        run = BoundSession(session, names, self._place).run if self._place.is_nvidia else None
        plain = session.run
        texts = [name for name, datatype, *_ in self._expected if datatype == "BYTES"]
        converters = [output_converter(meta.type) for meta in metas]
        if not texts and not any(converters) and run is None:
            return lambda feeds: dict(zip(names, plain(names, feeds), strict=True))

        def execute(feeds: dict[str, Array]) -> dict[str, Array]:
            for name in texts:
                if name in feeds:
                    try:
                        feeds = {**feeds, name: decode_text(feeds[name])}
                    except UnicodeDecodeError as error:
                        raise InvalidRequest(f"model input '{name}' is text, and an element is not UTF-8: {error}") from error
            results = run(feeds) if run is not None else plain(names, feeds)
            return {
                name: result if convert is None else convert(result)
                for name, result, convert in zip(names, results, converters, strict=True)
            }

        return execute

    def _first_axis_is_free(self) -> bool:
        sides = (self._signature.inputs or {}, self._signature.outputs or {})
        shapes = [spec.shape for tensors in sides for spec in tensors.values()]
        return bool(self._expected) and all(shape and shape[0] == -1 for shape in shapes)

    def _try_empty(self) -> bool:
        """Tell whether the model takes inputs without rows; many exports do not."""
        if self.keeps_state:
            return True  # not asked: a request for a sequence is one row
        if has_recurrence(self._path):
            return False  # not tried: ONNX Runtime's LSTM crashes the process on a batch of no rows
        if not self._first_axis_is_free() or (values := self._sample(1)) is None:
            return True
        try:
            self._execute({name: array[:0] for name, array in values.items()})
        except Exception:
            return False
        return True

    def _auto_policy(self) -> BatchPolicy | None:
        """Return the default policy if the model may be batched, as its axes say and a trial shows."""
        if not self._first_axis_is_free() or self.unbatchable is not None:
            return None
        rows = 3
        values = self._sample(rows)
        if values is None:
            logger.info("node '%s': not batched, since no trial run worked; 'batch: true' batches it all the same", self.name)
            return None
        try:
            reason = rows_are_independent(self._execute, values, rows)
        except Exception as error:
            reason = f"a trial run failed: {_first_line(error)}"
        if reason is not None:
            logger.info("node '%s': not batched: %s", self.name, reason)
            return None
        return BatchPolicy()

    def _sample(self, rows: int) -> dict[str, Array] | None:
        """Return tensors that the model takes; free axes other than the first are guessed where nothing says them."""
        assert self._signature.inputs is not None
        for free in (1, 8, 32, 224):
            values = sample(self._signature.inputs, rows, self.options.warmup_shapes, free)
            try:
                self._execute(values)
            except Exception as error:
                if self.options.warmup_shapes:
                    raise StepFailed(f"warm-up with 'warmup_shapes' failed: {_first_line(error)}") from error
                continue
            return values
        return None

    def _warm_up(self, policy: BatchPolicy | None) -> float | None:
        """Run every batch size that may occur most; return the longest time in seconds, None if none ran."""
        sizes = {1, policy.max_rows, *(policy.pad_to or policy.preferred_rows or [])} if policy else {1}
        slowest: float | None = None
        for rows in sorted(sizes):
            values = self._sample(rows)
            if values is None:
                text = "node '%s': no warm-up, since no guessed input worked: say 'warmup_shapes', or 'warmup: false'"
                logger.warning(text, self.name)
                return None
            slowest = max(slowest or 0.0, run_seconds(self._execute, values))
        return slowest


def _make_cache(folder: Path, named: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = (
            f"the folder '{named}' for TensorRT's engines cannot be made (at {folder}): {error.strerror}; name one that can be "
            "written with 'cache_folder', or write 'engine_cache: false'"
        )
        raise GraphInvalid([Problem(text, node="tensorrt")]) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
