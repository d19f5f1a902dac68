"""The batcher: who is answered with what, and when, whatever happens to a batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, steps
from servinggraph.batching import Batcher
from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    ServingGraphError,
    StepFailed,
    Unavailable,
)
from servinggraph.interfaces import BatchPolicy, Operation, RowErrors
from servinggraph.testing import ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]
OperationOf = Callable[[Callable[[Any, Context], Any]], Operation]


def value_of(*numbers: float, dtype: str = "f4") -> dict[str, np.ndarray]:
    return {"x": np.array(numbers, dtype).reshape(-1, 1)}


def doubled(value: Any, context: Context) -> Any:
    return {"y": value["x"] * 2}


def numbers_in(result: Any) -> list[float]:
    return [float(number) for number in result["y"][:, 0]]


class Gate:
    """An async operation that doubles and remembers, each run held until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.cancelled = 0
        self._held: list[asyncio.Future[None]] = []

    async def __call__(self, value: Any, context: Context) -> Any:
        self.batches.append([float(number) for number in value["x"][:, 0]])
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append(held)
        try:
            await held
        except asyncio.CancelledError:
            self.cancelled += 1
            if held in self._held:
                self._held.remove(held)
            raise
        return doubled(value, context)

    def open(self, error: BaseException | None = None) -> None:
        held = self._held.pop(0)
        if error is None:
            held.set_result(None)
        else:
            held.set_exception(error)

    def batcher(self, **policy: Any) -> Batcher:
        return Batcher(Operation(self, suspends=True), BatchPolicy(**policy), "node")


async def busy(batcher: Batcher) -> asyncio.Future[Any]:
    """Make the node busy with a request for 100."""
    first = batcher.submit(value_of(100), Context())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 1 == batcher.running
    return first


# What leaves together.


def test_what_arrives_in_one_turn_of_the_loop_is_one_batch(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=32)
        waiting = [batcher.submit(value_of(number), Context()) for number in range(8)]
        await manual_clock.settle()
        gate.open()
        await manual_clock.settle()
        # The very first found everything idle and ran at once; all others made one batch.
        gate.open()
        assert [[0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]] == gate.batches
        assert [[number * 2.0] for number in range(8)] == [numbers_in(await future) for future in waiting]

    run(check())


def test_while_the_node_is_busy_a_batch_gathers_and_leaves_when_it_is_free(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=3)
        first = await busy(batcher)
        waiting = [batcher.submit(value_of(number), Context()) for number in range(4)]
        await manual_clock.settle()
        assert [[100.0]] == gate.batches
        assert 4 == batcher.queued
        gate.open()
        await manual_clock.settle()
        assert [0.0, 1.0, 2.0] == gate.batches[1]
        gate.open()
        await manual_clock.settle()
        gate.open()
        await first
        assert [0.0, 2.0, 4.0, 6.0] == [numbers_in(await future)[0] for future in waiting]
        assert 0 == batcher.running == batcher.queued

    run(check())


def test_max_delay_holds_for_requests_that_found_the_node_busy(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=8, max_delay_ms=10)
        first = await busy(batcher)
        waiting = [batcher.submit(value_of(1), Context())]
        gate.open()
        await manual_clock.advance(0.009)
        assert 1 == len(gate.batches)
        waiting.append(batcher.submit(value_of(2), Context()))
        await manual_clock.advance(0.002)
        assert [1.0, 2.0] == gate.batches[1]
        gate.open()
        await asyncio.gather(first, *waiting)

    run(check())


def test_a_request_that_finds_the_node_idle_never_waits(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(max_delay_ms=1000), "node")
        for number in range(10):
            waiting = batcher.submit(value_of(number), Context())
            await manual_clock.settle()
            assert [2.0 * number] == numbers_in(waiting.result())

    run(check())


def test_wait_when_idle_makes_even_a_lonely_request_wait(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        policy = BatchPolicy(max_delay_ms=10, wait_when_idle=True)
        batcher = Batcher(Operation(doubled, suspends=False), policy, "node")
        for _ in range(8):
            waiting = batcher.submit(value_of(1), Context())
            await manual_clock.advance(0.009)
            assert not waiting.done()
            await manual_clock.advance(0.001)
            assert waiting.done()

    run(check())


def test_a_lonely_request_runs_without_a_turn_of_the_loop_and_a_second_in_the_same_turn_does_not(run: Run) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(), "node")
        lonely, second, third = (batcher.submit(value_of(number), Context()) for number in range(3))
        assert [True, False, False] == [lonely.done(), second.done(), third.done()]
        await asyncio.gather(second, third)
        crowd = [batcher.submit(value_of(number), Context()) for number in range(2)]
        assert not any(future.done() for future in crowd)  # it had company of late, so it waits for the turn's end
        await asyncio.gather(*crowd)

    run(check())


def test_the_shortcut_for_lonely_requests_overtakes_nobody(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=4, max_delay_ms=10)
        first = await busy(batcher)
        waiting = batcher.submit(value_of(1), Context())
        gate.open()
        await first
        assert 0 == batcher.running
        late = batcher.submit(value_of(2), Context())
        await manual_clock.advance(0.011)
        assert [1.0, 2.0] == gate.batches[1]
        gate.open()
        await asyncio.gather(waiting, late)

    run(check())


def test_instances_run_batches_side_by_side(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=1, instances=3)
        waiting = [batcher.submit(value_of(number), Context()) for number in range(5)]
        await manual_clock.settle()
        assert 3 == batcher.running == len(gate.batches)
        assert 2 == batcher.queued
        for _ in range(5):
            gate.open()
            await manual_clock.settle()
            assert batcher.running <= 3
        assert [2.0 * number for number in range(5)] == [numbers_in(future.result())[0] for future in waiting]

    run(check())


def test_priority_decides_who_goes_first(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=1, priorities=2)
        waiting = [await busy(batcher)]
        waiting += [batcher.submit(value_of(number), Context(priority=number)) for number in (2, 1, 2, 1)]
        for _ in range(5):
            gate.open()
            await manual_clock.settle()
        assert [[100.0], [1.0], [1.0], [2.0], [2.0]] == gate.batches
        await asyncio.gather(*waiting)

    run(check())


def test_datatypes_and_shapes_never_mix(run: Run, operation_of: OperationOf) -> None:
    seen: list[tuple[Any, ...]] = []

    def remember(value: Any, context: Context) -> Any:
        seen.append((value["x"].dtype, value["x"].shape[1:]))
        return {"y": value["x"].copy()}

    async def check() -> None:
        batcher = Batcher(operation_of(remember), BatchPolicy(max_rows=64), "node")
        values = [
            np.full((1, *shape), number, dtype)
            for number, (dtype, shape) in enumerate(
                (dtype, shape) for dtype in ("f4", "f8", "i4", ">f4") for shape in ((1,), (2,), (2, 1)) for _ in range(3)
            )
        ]
        results = await asyncio.gather(*(batcher.submit({"x": value}, Context()) for value in values))
        for value, result in zip(values, results, strict=True):
            assert value.dtype == result["y"].dtype
            np.testing.assert_array_equal(value, result["y"])

    run(check())
    assert 12 == len(set(seen))


def test_the_order_in_which_tensors_are_named_does_not_keep_requests_apart(run: Run) -> None:
    sizes: list[int] = []

    def subtract(value: Any, context: Context) -> Any:
        sizes.append(len(value["a"]))
        return {"y": value["a"] - value["b"]}

    async def check() -> None:
        batcher = Batcher(
            Operation(subtract, suspends=False), BatchPolicy(max_rows=2, wait_when_idle=True, max_delay_ms=1), "n"
        )
        a, b = np.ones((1, 1)), np.zeros((1, 1))
        results = await asyncio.gather(batcher.submit({"a": a, "b": b}, Context()), batcher.submit({"b": b, "a": a}, Context()))
        assert [1.0, 1.0] == [float(result["y"][0, 0]) for result in results]

    run(check())
    assert [2] == sizes


# Large requests, padding, no rows.


def test_a_request_larger_than_max_rows_runs_in_pieces_and_is_joined(run: Run, operation_of: OperationOf) -> None:
    sizes: list[int] = []

    def remember(value: Any, context: Context) -> Any:
        sizes.append(len(value["x"]))
        return doubled(value, context)

    async def check() -> None:
        batcher = Batcher(operation_of(remember), BatchPolicy(max_rows=4), "node")
        result = await batcher.submit(value_of(*range(11)), Context())
        assert [2.0 * number for number in range(11)] == numbers_in(result)

    run(check())
    assert [4, 4, 3] == sizes


def test_others_get_their_turn_between_the_pieces_of_a_large_request(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=1)
        large = batcher.submit(value_of(*range(1000)), Context())
        await manual_clock.settle()
        assert batcher.queued <= 1
        small = batcher.submit(value_of(5000), Context())
        for _ in range(6):
            gate.open()
            await manual_clock.settle()
        assert small.done()
        large.cancel()
        await manual_clock.settle()
        assert 0 == batcher.running == batcher.queued

    run(check())


def test_a_failing_piece_fails_the_whole_request_and_names_the_row_in_it(run: Run, manual_clock: ManualClock) -> None:
    def picky(value: Any, context: Context) -> Any:
        bad = {row: "is 9" for row, number in enumerate(value["x"][:, 0]) if number == 9}
        return RowErrors(doubled(value, context), bad)

    async def check() -> None:
        batcher = Batcher(Operation(picky, suspends=False), BatchPolicy(max_rows=4), "node")
        with pytest.raises(StepFailed, match="node 'node': row 9: is 9"):
            await batcher.submit(value_of(*range(20)), Context())
        await manual_clock.settle()
        assert 0 == batcher.queued

    run(check())


def test_pieces_whose_results_do_not_fit_each_other_are_not_coerced(run: Run) -> None:
    calls: list[int] = []

    def fickle(value: Any, context: Context) -> Any:
        calls.append(1)
        return {"y": value["x"].astype("f4" if len(calls) == 1 else "f8")}

    async def check() -> None:
        batcher = Batcher(Operation(fickle, suspends=False), BatchPolicy(max_rows=2), "node")
        with pytest.raises(StepFailed, match="output 'y' is float32 in one and float64 in another"):
            await batcher.submit(value_of(1, 2, 3), Context())

    run(check())


def test_pad_to_fills_up_with_copies_of_the_last_row(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=8, pad_to=[2, 8])
        first = batcher.submit(value_of(100), Context())
        waiting = [batcher.submit(value_of(number, number), Context()) for number in (1, 2)]
        await manual_clock.settle()
        gate.open()
        await manual_clock.settle()
        gate.open()
        assert [[100.0, 100.0], [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]] == gate.batches
        assert [200.0] == numbers_in(await first)
        assert [[2.0, 2.0], [4.0, 4.0]] == [numbers_in(await future) for future in waiting]

    run(check())


def test_a_request_without_rows_is_answered_without_rows(run: Run, operation_of: OperationOf) -> None:
    async def check() -> None:
        batcher = Batcher(operation_of(doubled), BatchPolicy(pad_to=[32]), "node")
        empty, full = await asyncio.gather(batcher.submit(value_of(), Context()), batcher.submit(value_of(1), Context()))
        assert [] == numbers_in(empty)
        assert [2.0] == numbers_in(full)

    run(check())


# Refusals.


@pytest.mark.parametrize(
    "value",
    [
        {},
        None,
        {"x": np.float32(1)},
        {"x": [1, 2]},
        {"a": np.zeros((1, 1)), "b": np.zeros((2, 1))},
    ],
)
def test_what_has_no_rows_is_the_callers_mistake(run: Run, value: Any) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(), "node")
        with pytest.raises(InvalidRequest, match="node 'node'"):
            await batcher.submit(value, Context())

    run(check())


def test_a_refusal_comes_through_the_awaitable_and_not_out_of_the_call(run: Run) -> None:
    """A router that calls its branches one after the other must get an awaitable of each."""

    async def check() -> None:
        def admit(value: Any) -> Any:
            raise InvalidRequest("no")

        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(), "node", admit)
        refused = batcher.submit(value_of(1), Context())
        with pytest.raises(InvalidRequest, match="node 'node': no"):
            await refused
        await batcher.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await batcher.submit(value_of(1), Context())

    run(check())


def test_a_full_queue_refuses_and_names_the_limit(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_queue=2)
        waiting = [await busy(batcher)]
        waiting += [batcher.submit(value_of(number), Context()) for number in range(2)]
        with pytest.raises(LimitExceeded, match=r"batch\.max_queue") as caught:
            await batcher.submit(value_of(3), Context())
        assert caught.value.retryable
        waiting[1].cancel()
        waiting.append(batcher.submit(value_of(4), Context()))  # its place is free again
        gate.open()
        await manual_clock.settle()
        gate.open()
        await asyncio.wait(waiting)
        assert [[100.0], [1.0, 4.0]] == gate.batches

    run(check())


def test_an_idle_node_does_not_refuse_for_a_queue_that_one_turn_has_filled(run: Run) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(max_queue=2, max_rows=2), "node")
        results = await asyncio.gather(*(batcher.submit(value_of(number), Context()) for number in range(20)))
        assert [2.0 * number for number in range(20)] == [numbers_in(result)[0] for result in results]

    run(check())


def test_an_expired_member_leaves_before_the_run(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher()
        first = await busy(batcher)
        now = manual_clock.time()
        late = batcher.submit(value_of(1), Context(deadline=now + 0.010))
        fine = batcher.submit(value_of(2), Context(deadline=now + 10))
        await manual_clock.advance(0.010)
        with pytest.raises(DeadlineExceeded, match="node 'node'"):
            late.result()
        assert 1 == batcher.queued
        gate.open()
        await manual_clock.settle()
        gate.open()
        await asyncio.gather(first, fine)
        assert [[100.0], [2.0]] == gate.batches

    run(check())


def test_an_expired_request_does_not_run_on_an_idle_node_either(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher()
        for deadline in (manual_clock.time(), manual_clock.time() - 5):
            with pytest.raises(DeadlineExceeded):
                await batcher.submit(value_of(1), Context(deadline=deadline))
        assert [] == gate.batches

    run(check())


def test_a_deadline_that_passes_while_an_earlier_batch_held_the_loop_counts(run: Run, manual_clock: ManualClock) -> None:
    batches: list[list[float]] = []

    def slow(value: Any, context: Context) -> Any:
        batches.append(value["x"][:, 0].tolist())
        later = manual_clock.time() + 0.1 * len(batches)
        asyncio.get_event_loop().time = lambda: later  # type: ignore[method-assign]  # it has held the loop
        return doubled(value, context)

    async def check() -> None:
        batcher = Batcher(Operation(slow, suspends=False), BatchPolicy(max_rows=1, wait_when_idle=True), "node")
        deadline = manual_clock.time() + 0.15
        waiting = [batcher.submit(value_of(number), Context(deadline=deadline)) for number in range(4)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [False, False, True, True] == [isinstance(outcome, DeadlineExceeded) for outcome in outcomes]

    run(check())
    assert 2 == len(batches)


def test_queue_timeout_refuses_with_a_retry_flag_or_lets_it_continue(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        for action in ("reject", "continue"):
            gate = Gate()
            batcher = gate.batcher(queue_timeout_ms=10, on_timeout=action, max_rows=1)
            first = await busy(batcher)
            old = batcher.submit(value_of(1), Context())
            await manual_clock.advance(0.011)
            fresh = batcher.submit(value_of(2), Context())
            if action == "reject":
                with pytest.raises(Unavailable, match="queue_timeout_ms' = 10") as caught:
                    old.result()
                assert caught.value.retryable
            for _ in range(3 if action == "continue" else 2):
                gate.open()
                await manual_clock.settle()
            await asyncio.gather(first, fresh)
            assert [[100.0], [2.0], [1.0]][: len(gate.batches)] == gate.batches
            assert (action == "continue") == (3 == len(gate.batches))

    run(check())


# One member's fate is never another's.


@pytest.mark.parametrize("bad", [0, 13, 31])
@pytest.mark.parametrize("poison", ["raises", "nan", "row error", "wrong shape", "too few rows"])
def test_one_bad_member_of_32_touches_no_other(
    run: Run, manual_clock: ManualClock, operation_of: OperationOf, poison: str, bad: int
) -> None:
    sizes: list[int] = []

    def operation(value: Any, context: Context) -> Any:
        sizes.append(len(value["x"]))
        is_bad = np.atleast_1d(value["x"][:, 0] == -1)
        if poison == "raises" and is_bad.any():
            raise ValueError("poisoned")
        if poison == "row error":
            return RowErrors(doubled(value, context), {int(row): "poisoned" for row in np.flatnonzero(is_bad)})
        if poison == "too few rows":
            return {"y": value["x"][~is_bad] * 2}
        if value["x"].shape[1:] != (1,):
            raise ValueError("poisoned")
        return doubled(value, context)

    values = [value_of(number) for number in range(32)]
    values[bad] = {"nan": value_of(np.nan), "wrong shape": {"x": np.full((1, 3), -1, "f4")}}.get(poison, value_of(-1))

    async def check() -> None:
        batcher = Batcher(operation_of(operation), BatchPolicy(max_rows=32, max_delay_ms=1, wait_when_idle=True), "node")
        waiting = [batcher.submit(value, Context()) for value in values]
        await manual_clock.advance(0.001)  # a batch with one of another shape is never full
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            if number != bad:
                assert [2.0 * number] == numbers_in(outcome)
        if poison == "nan":
            assert np.isnan(outcomes[bad]["y"]).all()
        else:
            assert isinstance(outcomes[bad], StepFailed)
            assert "node" == outcomes[bad].node
        assert 0 == batcher.running == batcher.queued

    run(check())
    expected = {"raises": [32] + [1] * 32, "too few rows": [32] + [1] * 32, "wrong shape": [1, 31]}
    assert sorted(expected.get(poison, [32])) == sorted(sizes)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_cancelling_any_member_of_32_touches_no_other(run: Run, manual_clock: ManualClock, moment: str) -> None:
    async def check() -> None:
        for leaving in range(32):
            gate = Gate()
            batcher = gate.batcher(max_rows=32, max_delay_ms=1, wait_when_idle=True)
            waiting = [batcher.submit(value_of(number), Context()) for number in range(32)]
            if moment == "before":
                waiting[leaving].cancel()
                await manual_clock.advance(0.001)
                assert 31 == len(gate.batches[0])
            await manual_clock.settle()
            if moment == "during":
                waiting[leaving].cancel()
                await manual_clock.settle()
            gate.open()
            if moment == "after":
                await manual_clock.settle()
                assert not waiting[leaving].cancel()
            await manual_clock.settle()
            for number, future in enumerate(waiting):
                if number == leaving and moment != "after":
                    assert future.cancelled()
                else:
                    assert [2.0 * number] == numbers_in(future.result())
            assert 0 == batcher.running == batcher.queued
            assert 0 == gate.cancelled

    run(check())


def test_a_batch_that_nobody_waits_for_any_more_is_cancelled_and_its_instance_is_free(
    run: Run, manual_clock: ManualClock
) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher()
        hanging = await busy(batcher)
        waiting = batcher.submit(value_of(1), Context())
        hanging.cancel()
        await manual_clock.settle()
        assert 1 == gate.cancelled
        gate.open()
        assert [2.0] == numbers_in(await waiting)

    run(check())


def test_a_batch_keeps_running_while_one_member_waits(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_delay_ms=1, wait_when_idle=True)
        waiting = [batcher.submit(value_of(number), Context()) for number in range(4)]
        await manual_clock.advance(0.001)
        for future in waiting[:3]:
            future.cancel()
        await manual_clock.settle()
        assert 0 == gate.cancelled
        gate.open()
        assert [6.0] == numbers_in(await waiting[3])

    run(check())


def test_without_isolation_a_failing_batch_fails_all_its_members_each_with_its_own_error(
    run: Run, operation_of: OperationOf
) -> None:
    def fail(value: Any, context: Context) -> Any:
        raise KeyError("k")

    async def check() -> None:
        policy = BatchPolicy(isolate=False, max_rows=3, max_delay_ms=1, wait_when_idle=True)
        batcher = Batcher(operation_of(fail), policy, "node")
        outcomes = await asyncio.gather(*(batcher.submit(value_of(1), Context()) for _ in range(3)), return_exceptions=True)
        assert 3 == len({id(outcome) for outcome in outcomes})
        for outcome in outcomes:
            assert isinstance(outcome, StepFailed)
            assert "node 'node': KeyError: 'k'" == str(outcome)
            assert isinstance(outcome.__cause__, KeyError)

    run(check())


def test_members_of_a_failing_batch_run_again_behind_what_waits_and_one_by_one(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=2, max_delay_ms=5)
        first = await busy(batcher)
        pair = [batcher.submit(value_of(number), Context()) for number in (1, 2)]
        gate.open()
        await manual_clock.settle()
        other = [batcher.submit(value_of(number), Context()) for number in (3, 4)]
        gate.open(ValueError("together"))
        await manual_clock.settle()
        for _ in range(3):
            gate.open()
            await manual_clock.settle()
        assert [[100.0], [1.0, 2.0], [3.0, 4.0], [1.0], [2.0]] == gate.batches
        await asyncio.gather(first, *pair, *other)

    run(check())


# Errors of every kind.


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        StopIteration("s"),
        StopAsyncIteration(),
        SystemExit(3),
        GeneratorExit(),
        asyncio.CancelledError(),
        TimeoutError(),
        Odd(),
        Unreadable(),
        MemoryError(),
        RecursionError(),
        ExceptionGroup("g", [ValueError()]),
        InvalidRequest("i"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("members", [1, 3])
def test_an_error_of_any_type_is_an_answer_to_every_member(
    run: Run, operation_of: OperationOf, error: BaseException, members: int
) -> None:
    def fail(value: Any, context: Context) -> Any:
        if (value["x"] == 1).any():
            raise error
        return doubled(value, context)

    async def check() -> None:
        policy = BatchPolicy(max_rows=members, max_delay_ms=1, wait_when_idle=True)
        batcher = Batcher(operation_of(fail), policy, "node")
        bad, *good = [batcher.submit(value_of(number), Context()) for number in range(1, members + 1)]
        with pytest.raises(ServingGraphError) as caught:
            await bad
        assert "node" == caught.value.node
        if isinstance(error, ServingGraphError):
            assert type(caught.value) is type(error)
        else:
            assert isinstance(caught.value, StepFailed)
        for number, future in enumerate(good, start=2):
            assert [2.0 * number] == numbers_in(await future)
        # And the batcher goes on as if nothing had happened.
        again = [batcher.submit(value_of(7), Context()) for _ in range(members)]
        assert [[14.0]] * members == [numbers_in(await future) for future in again]

    run(check())


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "must return a mapping"),
        ([1], "must return a mapping"),
        ({"y": [1, 2, 3]}, "expected a numpy array"),
        ({"y": np.float32(1)}, "first axis"),
        ({"y": np.zeros((7, 1))}, "first axis"),
        ({"y": type("Odd", (), {"shape": 3})()}, ""),
        ({"y": type("Odd", (), {"shape": (3,)})()}, ""),
        (RowErrors({"y": np.zeros((7, 1))}, {}), "first axis"),
        (RowErrors(None, {}), "must return a mapping"),  # type: ignore[arg-type]
        (RowErrors({"y": np.zeros((3, 1))}, {-1: "no"}), "names row -1"),
        (RowErrors({"y": np.zeros((3, 1))}, {"0": "no"}), "names row '0'"),  # type: ignore[dict-item]
        (RowErrors({"y": np.zeros((3, 1))}, [0]), "takes a mapping"),  # type: ignore[arg-type]
    ],
)
def test_a_result_that_cannot_be_split_is_an_error_for_every_member(
    run: Run, operation_of: OperationOf, result: Any, text: str, members: int
) -> None:
    async def check() -> None:
        policy = BatchPolicy(max_rows=members, max_delay_ms=1, wait_when_idle=True)
        batcher = Batcher(operation_of(lambda value, context: result), policy, "node")
        outcomes = await asyncio.gather(
            *(batcher.submit(value_of(1), Context()) for _ in range(members)), return_exceptions=True
        )
        for outcome in outcomes:
            assert isinstance(outcome, StepFailed)
            assert text in str(outcome)
        assert 0 == batcher.running == batcher.queued

    run(check())


def test_an_operation_that_gives_nothing_to_await_is_an_error(run: Run) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=True), BatchPolicy(), "node")
        with pytest.raises(StepFailed, match="TypeError"):
            await batcher.submit(value_of(1), Context())

    run(check())


def test_row_errors_answer_each_row_for_itself(run: Run, operation_of: OperationOf) -> None:
    def picky(value: Any, context: Context) -> Any:
        bad: dict[Any, Any] = {}
        for row, number in enumerate(value["x"][:, 0]):
            if number < 0:
                bad[np.int64(row)] = ValueError("negative") if number == -1 else "very negative"
        return RowErrors(doubled(value, context), bad)

    async def check() -> None:
        batcher = Batcher(operation_of(picky), BatchPolicy(max_rows=5, max_delay_ms=1, wait_when_idle=True), "node")
        good, mixed, bad = (batcher.submit(value_of(*numbers), Context()) for numbers in ([1, 2], [3, -1], [-2]))
        assert [2.0, 4.0] == numbers_in(await good)
        with pytest.raises(StepFailed, match="row 1: ValueError: negative") as caught:
            await mixed
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(StepFailed, match="row 0: very negative"):
            await bad

    run(check())


def test_row_errors_in_padding_are_nobodys(run: Run) -> None:
    def picky(value: Any, context: Context) -> Any:
        return RowErrors(doubled(value, context), {3: "padding"})

    async def check() -> None:
        batcher = Batcher(Operation(picky, suspends=False), BatchPolicy(max_rows=4, pad_to=[4]), "node")
        assert [2.0, 4.0] == numbers_in(await batcher.submit(value_of(1, 2), Context()))

    run(check())


def test_a_batch_whose_task_is_cancelled_from_outside_is_run_again(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=2, max_delay_ms=1, wait_when_idle=True)
        waiting = [batcher.submit(value_of(number), Context()) for number in (1, 2)]
        await manual_clock.settle()
        (task,) = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        await manual_clock.settle()
        for _ in range(2):
            gate.open()
            await manual_clock.settle()
        assert [[2.0], [4.0]] == [numbers_in(await future) for future in waiting]
        lonely = batcher.submit(value_of(3), Context())
        await manual_clock.advance(0.001)
        (task,) = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        with pytest.raises(StepFailed, match="cancelled"):
            await lonely

    run(check())


# Contexts.


def test_a_batch_of_one_has_its_members_context_and_a_larger_one_its_own(run: Run, manual_clock: ManualClock) -> None:
    contexts: list[Context] = []

    def remember(value: Any, context: Context) -> Any:
        contexts.append(context)
        context.response_parameters["model"] = "m"
        return doubled(value, context)

    async def check() -> None:
        batcher = Batcher(
            Operation(remember, suspends=False), BatchPolicy(max_rows=2, max_delay_ms=1, wait_when_idle=True), "node"
        )
        one, two, three = Context("1", graph="g"), Context("2", graph="g"), Context("3", graph="g")
        alone = batcher.submit(value_of(1), one)
        await manual_clock.advance(0.001)
        await alone
        assert contexts == [one]
        await asyncio.gather(batcher.submit(value_of(2), two), batcher.submit(value_of(3), three))
        assert contexts[1] not in (two, three)
        assert "g" == contexts[1].graph
        assert [{"model": "m"}] * 3 == [context.response_parameters for context in (one, two, three)]

    run(check())


@pytest.mark.parametrize(("deadlines", "expected"), [((1.0, 2.0), 2.0), ((1.0, None), None), ((None, None), None)])
def test_a_batch_is_worthless_only_when_it_is_so_for_all_members(
    run: Run, manual_clock: ManualClock, deadlines: tuple[Any, ...], expected: Any
) -> None:
    seen: list[float | None] = []

    def remember(value: Any, context: Context) -> Any:
        seen.append(context.deadline)
        return doubled(value, context)

    async def check() -> None:
        start = manual_clock.time()
        batcher = Batcher(
            Operation(remember, suspends=False), BatchPolicy(max_rows=2, max_delay_ms=1, wait_when_idle=True), "node"
        )
        contexts = [Context(deadline=None if deadline is None else start + deadline) for deadline in deadlines]
        await asyncio.gather(*(batcher.submit(value_of(1), context) for context in contexts))
        assert [None if expected is None else start + expected] == seen

    run(check())


def test_a_cancelled_members_slot_is_free_only_when_its_batch_has_ended(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=2, max_delay_ms=1, wait_when_idle=True)
        contexts = [Context(), Context()]
        freed: list[int] = []
        leaving, staying = (batcher.submit(value_of(1), context) for context in contexts)
        await manual_clock.settle()
        leaving.cancel()
        contexts[0].when_idle(lambda: freed.append(0))
        await manual_clock.settle()
        assert [] == freed
        gate.open()
        await staying
        assert [0] == freed

    run(check())


def test_slots_are_held_while_a_thread_of_a_cancelled_batch_still_runs(run: Run, manual_clock: ManualClock) -> None:
    release, begun = threading.Event(), threading.Event()
    threads = WorkerThreads(1, "test")
    threads.start()

    def block(value: Any, context: Context) -> Any:
        begun.set()
        assert release.wait(30)
        return doubled(value, context)

    async def whole_graph(value: Any, context: Context) -> Any:
        return await threads.call(block, value, context)

    async def check() -> None:
        policy = BatchPolicy(max_rows=2, max_delay_ms=1, wait_when_idle=True)
        batcher = Batcher(Operation(whole_graph, suspends=True), policy, "graph")
        contexts = [Context(), Context()]
        freed: list[int] = []
        waiting = [batcher.submit(value_of(1), context) for context in contexts]
        await manual_clock.settle()
        assert begun.wait(30)
        for number, (future, context) in enumerate(zip(waiting, contexts, strict=True)):
            future.cancel()
            context.when_idle(lambda number=number: freed.append(number))
        await manual_clock.settle()
        assert 0 == batcher.running
        assert [] == freed
        release.set()
        await threads.call(lambda value, context: None, None, Context())  # behind the one that blocked
        assert [0, 1] == freed

    run(check())
    threads.stop()


# The end.


def test_close_lets_a_running_batch_end_and_refuses_what_waits(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher()
        running = await busy(batcher)
        waiting = batcher.submit(value_of(1), Context(deadline=manual_clock.time() + 100))
        closing = asyncio.ensure_future(batcher.close())
        await manual_clock.settle()
        with pytest.raises(Unavailable, match="shutting down"):
            waiting.result()
        assert not closing.done()
        gate.open()
        assert [200.0] == numbers_in(await running)
        await closing

    run(check())


def test_close_lets_members_of_a_failing_batch_run_again(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=2, max_delay_ms=1, wait_when_idle=True)
        waiting = [batcher.submit(value_of(number), Context()) for number in (1, 2)]
        await manual_clock.settle()
        closing = asyncio.ensure_future(batcher.close())
        await manual_clock.settle()
        gate.open(ValueError("together"))
        await manual_clock.settle()
        gate.open()
        await manual_clock.settle()
        gate.open(ValueError("alone"))
        assert [2.0] == numbers_in(await waiting[0])
        with pytest.raises(StepFailed, match="ValueError: alone"):
            await waiting[1]
        await closing

    run(check())


def test_close_refuses_the_rest_of_a_large_request(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=1)
        large = batcher.submit(value_of(*range(9)), Context())
        await manual_clock.settle()
        closing = asyncio.ensure_future(batcher.close())
        await manual_clock.settle()
        gate.open()
        with pytest.raises(Unavailable):
            await large
        await closing
        assert 1 == len(gate.batches)

    run(check())


def test_a_close_that_takes_too_long_answers_those_who_wait_all_the_same(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        batcher = gate.batcher(max_rows=2, max_delay_ms=1, wait_when_idle=True)
        waiting = [batcher.submit(value_of(number), Context()) for number in (1, 2)]
        large = batcher.submit(value_of(1, 2, 3), Context())
        await manual_clock.advance(0.001)
        closing = asyncio.ensure_future(batcher.close())
        await manual_clock.settle()
        closing.cancel()
        await manual_clock.settle()
        for future in (*waiting, large):
            with pytest.raises(Unavailable):
                future.result()
        assert 0 == batcher.running
        assert closing.cancelled()

    run(check())


def test_closing_an_idle_batcher_twice_is_fine(run: Run) -> None:
    async def check() -> None:
        batcher = Batcher(Operation(doubled, suspends=False), BatchPolicy(), "node")
        await batcher.submit(value_of(1), Context())
        await batcher.close()
        await batcher.close()

    run(check())


# With a real model.


def linear_model(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    shape = ["rows", 2]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        "doubles",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("mode", ["inline", "thread"])
def test_bad_company_does_not_touch_31_callers_of_an_onnx_model(run: Run, tmp_path: Path, mode: str) -> None:
    linear_model(tmp_path / "m.onnx")
    graph = Graph("g", inputs={"x": ("FP32", [-1, -1])})
    graph.to(lambda value: value, name="pass").to(
        steps.Onnx(str(tmp_path / "m.onnx"), run=mode), name="model", batch={"max_rows": 32}
    ).respond()

    async def check() -> None:
        async with graph.mock() as server:
            values = [np.full((1, 2), number, "f4") for number in range(32)]
            values[5] = np.full((1, 2), np.nan, "f4")
            values[9] = np.full((1, 3), 9, "f4")
            calls = [asyncio.ensure_future(server.infer(x=value)) for value in values]
            await asyncio.sleep(0)
            calls[11].cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for number, outcome in enumerate(outcomes):
                if number == 5:
                    assert np.isnan(outcome.outputs["y"]).all()
                elif number == 9:
                    assert isinstance(outcome, InvalidRequest)
                elif number == 11:
                    assert isinstance(outcome, asyncio.CancelledError)
                else:
                    np.testing.assert_array_equal(values[number] * 2, outcome.outputs["y"])
            assert 0 == server.in_flight

    run(check())
