"""Loading, replacing and unloading graphs of a folder, in all three modes."""

from __future__ import annotations

import asyncio
import sys

import pytest

from servinggraph import Context
from servinggraph.errors import GraphInvalid, GraphNotFound, InvalidRequest, LoadFailed, RequestTooLarge, Unavailable

BLOCKED = """\
import asyncio, pathlib
go = asyncio.Event()
async def work(value):
    await go.wait()
    return {'y': value['x'] * 0 + NUMBER}
"""
GATED = """\
import pathlib, threading
here = pathlib.Path(__file__).parent
(here / "begun").touch()
while not (here / "go").exists():
    threading.Event().wait(0.001)
def work(value):
    return value
"""
BROKEN_LOAD = "class work:\n    def load(self):\n        raise OSError('no weights')\n    def __call__(self, value):\n        return value\n"


def go(check):
    asyncio.run(check())


def module_of(graph):
    """Return the module that a graph's step came from."""
    return sys.modules[graph.plan.nodes[0].work._target.__module__]


def test_at_start_everything_is_loaded_each_version_with_its_own_module_of_one_name(folder, opened):
    folder.write("a/1", 1)
    folder.write("a/2", 2)
    folder.write("b", 7)
    (folder.path / "a" / "config.yaml").write_text("versions: all\n")

    async def check():
        async with opened("none") as running:
            assert ("2", 2.0) == await running.ask("a")
            assert ("1", 1.0) == await running.ask("a", "1")
            assert ("1", 7.0) == await running.ask("b")
            assert {"a/1": "READY", "a/2": "READY", "b/1": "READY"} == await running.states()
            assert running.catalog.ready

    go(check)
    assert "steps" not in sys.modules


def test_at_start_one_broken_graph_ends_it_with_every_problem(folder, opened):
    folder.write("a", 1)
    folder.write("b", "def nothing(): pass\n")
    folder.write("c", "1/0\n")

    async def check():
        with pytest.raises(GraphInvalid, match="'steps' has no 'work'") as caught:
            async with opened("none"):
                pass
        assert 2 == len(caught.value.problems)
        assert "steps.py:1: ZeroDivisionError" in str(caught.value)

    go(check)


def test_a_load_serves_and_a_second_one_serves_what_the_files_are_now(folder, opened):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            with pytest.raises(GraphNotFound, match="'a' has no available versions"):
                running.catalog.get("a")
            assert running.catalog.ready
            assert {"a/": "UNAVAILABLE"} == await running.states()
            await running.repository.load("a")
            assert ("1", 1.0) == await running.ask("a")
            folder.write("a", 2)  # of the same size, within the same second: bytecode caches would not notice
            await running.repository.load("a")
            assert ("1", 2.0) == await running.ask("a")
            assert not list(folder.path.rglob("__pycache__"))

    go(check)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("def work(:\n", "steps.py:1: SyntaxError"),
        (BROKEN_LOAD, "failed to load: OSError: no weights"),
        ("x = 1\n", "has no 'work'"),
    ],
)
def test_a_load_that_fails_leaves_the_old_one_serving_and_says_why(folder, opened, broken, reason):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            folder.write("a", broken)
            with pytest.raises(LoadFailed, match="failed to load 'a', what was loaded before serves on: version 1: ") as caught:
                await running.repository.load("a")
            assert reason in str(caught.value)
            assert str(folder.path) not in str(caught.value)
            assert ("1", 1.0) == await running.ask("a")
            assert running.catalog.ready
            (line,) = await running.repository.index()
            assert "READY" == line.state
            assert reason in line.reason
            folder.write("a", 3)
            await running.repository.load("a")
            assert ("1", 3.0) == await running.ask("a")
            assert [("a", "1", "READY", "")] == await running.repository.index()

    go(check)


def test_a_first_load_serves_the_versions_that_load_and_fails_for_the_others(folder, opened):
    folder.write("a/1", 1)
    folder.write("a/2", BROKEN_LOAD)
    (folder.path / "a" / "config.yaml").write_text("versions: all\n")

    async def check():
        async with opened() as running:
            with pytest.raises(LoadFailed, match="^failed to load 'a', version 2: node 'n': failed to load: OSError"):
                await running.repository.load("a")
            assert ("1", 1.0) == await running.ask("a")
            assert {"a/1": "READY", "a/2": "UNAVAILABLE"} == await running.states()
            assert [("a", "1", "READY", "")] == await running.repository.index(ready=True)
            assert running.catalog.ready

    go(check)


def test_a_load_of_nothing_but_failures_says_that_no_version_is_available(folder, opened):
    folder.write("a", BROKEN_LOAD)

    async def check():
        async with opened() as running:
            with pytest.raises(LoadFailed, match="failed to load 'a', no version is available: version 1: "):
                await running.repository.load("a")
            assert {"a/1": "UNAVAILABLE"} == await running.states()
            assert running.catalog.ready

    go(check)


def test_the_policy_drops_the_old_version_in_the_step_in_which_the_new_one_comes(folder, opened):
    folder.write("a/1", 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            seen = []
            running.catalog.on_change(lambda: seen.append(running.catalog.versions("a")))
            folder.write("a/2", 2)
            await running.repository.load("a")
            assert [["1"], ["2"]] == seen
            assert ("2", 2.0) == await running.ask("a")
            await running.repository._residence.settled()
            assert {"a/2": "READY"} == await running.states()

    go(check)


def test_requests_in_flight_are_answered_by_the_version_that_they_began_with(folder, opened):
    folder.write("a", BLOCKED.replace("NUMBER", "1"))

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old = running.catalog.get("a")
            asking = [asyncio.ensure_future(running.ask("a")) for _ in range(5)]
            await asyncio.sleep(0)
            folder.write("a", 2)
            await running.repository.load("a")
            assert ("1", 2.0) == await running.ask("a")
            assert 5 == old.requests
            module_of(old).go.set()
            assert [("1", 1.0)] * 5 == await asyncio.gather(*asking)

    go(check)


def test_an_unload_returns_at_once_takes_no_more_requests_and_loses_none(folder, opened):
    folder.write("a", BLOCKED.replace("NUMBER", "1"))

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old = running.catalog.get("a")
            asking = asyncio.ensure_future(running.ask("a"))
            await asyncio.sleep(0)
            await running.repository.unload("a")
            assert {"a/1": "UNLOADING"} == await running.states()
            with pytest.raises(GraphNotFound, match="'a' has no available versions"):
                await running.ask("a")
            module_of(old).go.set()
            assert ("1", 1.0) == await asking
            await running.repository._residence.settled()
            assert [("a", "1", "UNAVAILABLE", "unloaded")] == await running.repository.index()
            assert running.catalog.ready
            await running.repository.unload("a")
            await running.repository.unload("never-there")

    go(check)


def test_a_request_on_its_way_in_while_its_graph_is_replaced_enters_the_old_one_or_once_that_is_closed_the_new_one(
    folder, opened
):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old, get = running.catalog.get("a"), running.catalog.get
            running.catalog.get = lambda name, version="": old if version == "old" else get(name, version)
            old.requests += 1  # it has something to finish
            folder.write("a", 2)
            await running.repository.load("a")
            assert ("1", 1.0) == await running.ask("a", "old")
            old.leave()
            await running.repository._residence.settled()
            assert ("1", 2.0) == await running.ask("a", "old")
            assert (0, 0) == (old.requests, running.catalog.get("a").requests)
            await running.repository.unload("a")
            await running.repository._residence.settled()
            with pytest.raises(GraphNotFound):
                await running.ask("a", "old")

    go(check)


def test_a_request_that_was_read_for_other_tensors_is_not_given_to_the_new_graph(folder, opened):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old = running.catalog.get("a")
            file = folder.write("a", 2) / "graph.yaml"
            file.write_text(file.read_text().replace("FP32", "FP64"))
            await running.repository.load("a")
            await running.repository._residence.settled()
            with pytest.raises(Unavailable, match="replaced by one with other tensors"):
                await old.door(old, Context())

    go(check)


def test_loads_and_unloads_of_one_graph_go_one_after_the_other(folder, opened):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            repository = running.repository
            await asyncio.gather(*(repository.unload("a") if i % 3 == 2 else repository.load("a") for i in range(11)))
            assert ("1", 1.0) == await running.ask("a")
            await asyncio.gather(repository.load("a"), repository.unload("a"))
            with pytest.raises(GraphNotFound):
                await running.ask("a")

    go(check)


def test_a_load_goes_on_when_its_caller_leaves(folder, opened):
    folder.write("a", 1)

    async def check():
        async with opened() as running:
            loading = asyncio.ensure_future(running.repository.load("a"))
            await asyncio.sleep(0)
            loading.cancel()
            await asyncio.wait([loading])
            await running.repository._residence.settled()
            assert ("1", 1.0) == await running.ask("a")

    go(check)


def test_a_stop_ends_a_load_that_is_under_way(folder, opened):
    place = folder.write("a", GATED)

    async def check():
        try:
            async with asyncio.timeout(120):
                async with opened() as running:
                    loading = asyncio.ensure_future(running.repository.load("a"))
                    while not (place / "begun").exists():
                        await asyncio.sleep(0.001)
                with pytest.raises(asyncio.CancelledError):
                    await loading
        finally:
            (place / "go").touch()  # the thread goes on, and the end of the event loop waits for it

    go(check)


def test_what_is_not_there_cannot_be_loaded(folder, opened):
    async def check():
        async with opened() as running:
            with pytest.raises(LoadFailed, match="^failed to load 'nope', failed to poll from model repository$"):
                await running.repository.load("nope")
            for name in ("..", "a/b", "a\\b", ".hidden", ""):
                with pytest.raises(InvalidRequest, match="must not contain path traversal characters"):
                    await running.repository.load(name)

    go(check)


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_loads_and_unloads_on_request_need_the_explicit_mode(folder, opened, mode):
    folder.write("a", 1)

    async def check():
        async with opened(mode) as running:
            for change in (running.repository.load, running.repository.unload):
                with pytest.raises(Unavailable, match="explicit model load / unload is not allowed if polling is enabled"):
                    await change("a")
            assert ("1", 1.0) == await running.ask("a")

    go(check)


def test_named_graphs_are_loaded_at_start_and_a_failure_is_no_end(folder, opened):
    folder.write("a", 1)
    folder.write("b", 2)
    folder.write("c", BROKEN_LOAD)

    async def check():
        async with opened(load=["a", "c", "nope"]) as running:
            assert {"a/1": "READY", "b/": "UNAVAILABLE", "c/1": "UNAVAILABLE"} == await running.states()
            assert running.catalog.ready
        async with opened(load=["*"]) as running:
            assert {"a/1": "READY", "b/1": "READY", "c/1": "UNAVAILABLE"} == await running.states()

    go(check)


def test_polling_follows_the_folder_once_a_change_has_settled(folder, opened):
    folder.write("a/1", 1)

    async def check():
        async with opened("poll", poll_s=1000) as running:
            assert ("1", 1.0) == await running.ask("a")
            unchanged = running.catalog.get("a")
            await running.repository.poll()
            await running.repository.poll()
            assert running.catalog.get("a") is unchanged

            folder.write("a/2", 2)
            folder.write("b", 5)
            await running.repository.poll()
            assert ("1", 1.0) == await running.ask("a")  # it may still be written to
            await running.repository.poll()
            assert ("2", 2.0) == await running.ask("a")
            assert ("1", 5.0) == await running.ask("b")

            (folder.path / "a" / "2" / "steps.py").write_text("def wor")
            await running.repository.poll()
            await running.repository.poll()
            assert ("2", 2.0) == await running.ask("a")
            line = (await running.repository.index())[0]
            assert ("a", "2", "READY") == line[:3]
            assert "steps.py:1: SyntaxError" in line.reason or "has no 'work'" in line.reason
            assert running.catalog.ready

            folder.write("a/2", 3)
            (folder.path / "b" / "graph.yaml").unlink()
            await running.repository.poll()
            await running.repository.poll()
            assert ("2", 3.0) == await running.ask("a")
            with pytest.raises(GraphNotFound, match="'b' is not found"):
                await running.ask("b")

    go(check)


def test_polling_leaves_versions_alone_that_did_not_change(folder, opened):
    folder.write("a/1", 1)
    folder.write("a/2", 2)
    (folder.path / "a" / "config.yaml").write_text("versions: all\n")

    async def check():
        async with opened("poll", poll_s=1000) as running:
            first, second = running.catalog.get("a", "1"), running.catalog.get("a", "2")
            folder.write("a/2", 4)
            await running.repository.poll()
            await running.repository.poll()
            assert running.catalog.get("a", "1") is first
            assert running.catalog.get("a", "2") is not second
            assert ("2", 4.0) == await running.ask("a")
            (folder.path / "a" / "config.yaml").write_text("versions: [1]\n")
            await running.repository.poll()
            await running.repository.poll()
            assert running.catalog.get("a") is first

    go(check)


def test_polling_looks_by_itself(folder, opened):
    folder.write("a", 1)

    async def check():
        async with opened("poll", poll_s=0.01) as running:
            folder.write("a", 2)
            async with asyncio.timeout(120):
                while (await running.ask("a"))[1] != 2.0:
                    await asyncio.sleep(0.005)

    go(check)


def test_a_plain_graph_file_that_is_half_written_is_not_taken_for_gone(folder, opened):
    folder.path.mkdir()
    file = folder.path / "some_file.yaml"
    text = "graph: g\ninputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'here:work'}\nanswer: n\n"
    (folder.path / "here.py").write_text("def work(value):\n    return {'y': value['x'] + 1}\n")
    file.write_text(text)

    async def check():
        async with opened("poll", poll_s=1000) as running:
            assert ("1", 1.0) == await running.ask("g")
            file.write_text("graph: [\n")
            for _ in range(3):
                await running.repository.poll()
            assert ("1", 1.0) == await running.ask("g")
            (folder.path / "here.py").write_text("def work(value):\n    return {'y': value['x'] + 2}\n")
            file.write_text(text)
            for _ in range(3):
                await running.repository.poll()
            assert ("1", 2.0) == await running.ask("g")
            file.unlink()
            for _ in range(3):
                await running.repository.poll()
            with pytest.raises(GraphNotFound):
                await running.ask("g")

    go(check)


DEFINITION = "graph: a\nversion: 1\ninputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'steps:other'}\nanswer: n\n"


def test_a_load_may_bring_another_definition_for_the_files_that_are_there(folder, opened):
    folder.write("a", "def work(value): return {'y': value['x'] + 1}\ndef other(value): return {'y': value['x'] + 2}\n")

    async def check():
        async with opened() as running:
            await running.repository.load("a", {"config": DEFINITION})
            assert ("1", 2.0) == await running.ask("a")
            await running.repository.load("a")
            assert ("1", 1.0) == await running.ask("a")
            for config, text in (
                (DEFINITION.replace("graph: a", "graph: b"), "the request is for 'a'"),
                (DEFINITION.replace("version: 1", "version: 2"), "the request loads version '1'"),
            ):
                with pytest.raises(LoadFailed, match=text):
                    await running.repository.load("a", {"config": config})
            assert ("1", 1.0) == await running.ask("a")

    go(check)


def test_a_load_may_bring_the_files_themselves(folder, opened, tmp_path, monkeypatch):
    folder.write("a", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files = {
        "file:3/steps.py": b"def other(value): return {'y': value['x'] + 9}\n",
        "file:3/graph.yaml": DEFINITION.replace("version: 1\n", "").encode(),
    }

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            await running.repository.load("a", {"config": "{}", **files})
            assert ("3", 9.0) == await running.ask("a")
            await running.repository._residence.settled()
            assert {"a/3": "READY"} == await running.states()
            await running.repository.load(
                "new", {"config": "{}", **{key: value.replace(b"graph: a", b"graph: new") for key, value in files.items()}}
            )
            assert ("3", 9.0) == await running.ask("new")
            assert 2 == len(list((tmp_path / "temporary").iterdir()))
            await running.repository.load("a")
            await running.repository.unload("new")
            await running.repository._residence.settled()
            assert ("1", 1.0) == await running.ask("a")
            assert [] == list((tmp_path / "temporary").iterdir())
            assert {"a/1": "READY"} == await running.states()

    go(check)


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"file:1/graph.yaml": b"x"}, InvalidRequest, "override files need the 'config' parameter"),
        ({"config": "{}", "file:1/../../etc/x": b"x"}, InvalidRequest, "path traversal"),
        ({"config": "{}", "file:1//etc/x": b"x"}, InvalidRequest, "path traversal"),
        ({"config": "{}", "file:1/.hidden": b"x"}, InvalidRequest, "path traversal"),
        ({"config": "{}", "file:../x": b"x"}, InvalidRequest, "expected 'file:<version>/<name>'"),
        ({"config": "{}", "file:01/x": b"x"}, InvalidRequest, "expected 'file:<version>/<name>'"),
        ({"config": "{}", "file:1/notes.txt": b"x"}, InvalidRequest, "neither a graph.yaml nor a model.onnx"),
        ({"config": "{}", "file:1/graph.yaml": b"x" * 2000}, RequestTooLarge, "exceed 1000 bytes .limit 'max_body_bytes'"),
        ({"config": "[1"}, InvalidRequest, "the 'config' parameter cannot be read"),
        ({"config": '{"instance_group": []}'}, InvalidRequest, "key 'instance_group' has no meaning here"),
        ({"config": '{"backend": "tensorflow"}'}, InvalidRequest, "backend 'tensorflow' is not here"),
        ({"config": '{"name": "b"}'}, InvalidRequest, "'name' is 'b', and the request is for 'a'"),
        ({"config": '{"max_batch_size": "many"}'}, InvalidRequest, "'max_batch_size' is a number"),
        (
            {"config": '{"dynamic_batching": {"preserve_ordering": true}}'},
            InvalidRequest,
            "'dynamic_batching.preserve_ordering'",
        ),
        ({"config": '{"version_policy": {"newest": 1}}'}, InvalidRequest, "'version_policy' is one of"),
        ({"config": '{"version_policy": {"specific": {"versions": [4]}}}'}, LoadFailed, "picks none"),
        ({"config": '{"max_batch_size": 4}'}, LoadFailed, "no node of this graph batches"),
        ({"colour": "red"}, InvalidRequest, "unrecognized load parameter 'colour'"),
        ({"config": b"{}"}, InvalidRequest, "'config' is text"),
    ],
)
def test_a_load_request_that_is_wrong_changes_nothing(folder, opened, tmp_path, monkeypatch, parameters, kind, text):
    folder.write("a", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    async def check():
        async with opened(max_file_bytes=1000) as running:
            await running.repository.load("a")
            with pytest.raises(kind, match=text):
                await running.repository.load("a", parameters)
            assert ("1", 1.0) == await running.ask("a")
            assert [] == list((tmp_path / "temporary").iterdir())

    go(check)


def test_keys_of_tritons_configuration_set_batching_and_the_policy(folder, opened):
    for version in (1, 2):
        file = folder.write(f"a/{version}", version) / "graph.yaml"
        file.write_text(file.read_text().replace("'steps:work'}", "'steps:work', batch: true}"))
    config = """{"max_batch_size": "16", "version_policy": {"all": {}}, "backend": "",
        "dynamic_batching": {"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 500,
        "default_queue_policy": {"max_queue_size": 5, "timeout_action": "DELAY", "default_timeout_microseconds": 2000}}}"""

    async def check():
        async with opened() as running:
            await running.repository.load("a", {"config": config})
            assert ["1", "2"] == running.catalog.versions("a")
            policy = running.catalog.get("a").plan.nodes[0].batch
            assert (16, [4, 8], 0.5, 5, "continue", 2.0) == (
                policy.max_rows, policy.preferred_rows, policy.max_delay_ms, policy.max_queue, policy.on_timeout, policy.queue_timeout_ms,
            )  # fmt: skip
            await running.repository.load("a", {"config": '{"max_batch_size": 0}'})
            assert ["2"] == running.catalog.versions("a")
            assert running.catalog.get("a").plan.nodes[0].batch is False

    go(check)


TOTAL = """\
import numpy as np

def work(value, state):
    state["n"] = state.get("n", 0) + 1
    return {"y": np.array([float(state["n"])])}
"""


def in_sequence(key, **flags):
    return Context(parameters={"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}})


def test_a_version_that_is_loaded_anew_begins_without_sequences(folder, opened):
    folder.write("a", TOTAL, "sequences: {idle_ms: 100000}\n")

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old = running.catalog.get("a").sequences
            assert ("1", 1.0) == await running.ask("a", context=in_sequence(7, start=True))
            assert ("1", 2.0) == await running.ask("a", context=in_sequence(7))
            await running.repository.load("a")
            with pytest.raises(InvalidRequest, match="must specify the START flag"):
                await running.ask("a", context=in_sequence(7))
            assert ("1", 1.0) == await running.ask("a", context=in_sequence(7, start=True))
            async with asyncio.timeout(120):
                while len(old):  # what was kept goes with the old one, once it is drained
                    await asyncio.sleep(0.001)

    go(check)


def test_a_version_with_sequences_under_way_is_the_last_to_make_room(folder, opened):
    folder.write("a", TOTAL, "sequences: {idle_ms: 100000}\n")
    for name in "bc":
        folder.write(name, 1)

    async def check():
        async with opened(max_loaded=2) as running:
            await running.repository.load("a")
            await running.ask("a", context=in_sequence(7, start=True))
            for name in "bc":
                await running.repository.load(name)
                await running.ask(name)
            assert ("1", 2.0) == await running.ask("a", context=in_sequence(7))

    go(check)
