"""Where routers keep what survives a restart."""

from __future__ import annotations

import subprocess
import sys

import pytest
import redis

from servinggraph.state import FileStore, StateFailed, open_store


@pytest.fixture(params=["file", "redis"])
def place(request, tmp_path):
    return str(tmp_path / "deep" / "state.json") if request.param == "file" else request.getfixturevalue("redis_url")


def test_what_was_saved_last_is_loaded_by_key(place, tmp_path):
    store = open_store(place, tmp_path)
    assert None is store.load(f"{tmp_path}/g/1/a")
    for number in (1, 2):
        store.save(f"{tmp_path}/g/1/a", {"weights": {"x": number}})
    store.save(f"{tmp_path}/g/1/b", {})

    again = open_store(place, tmp_path)
    assert ({"weights": {"x": 2}}, {}) == (again.load(f"{tmp_path}/g/1/a"), again.load(f"{tmp_path}/g/1/b"))
    store.close()
    again.close()


def test_a_relative_path_starts_from_the_graphs_folder(tmp_path):
    open_store("state.json", tmp_path).save("k", {"a": 1})
    assert {"a": 1} == FileStore(tmp_path / "state.json").load("k")


def test_several_processes_share_a_file_without_losing_each_others_keys(tmp_path):
    program = (
        "import sys, pathlib; from servinggraph.state import FileStore\n"
        "for n in range(40): FileStore(pathlib.Path(sys.argv[1])).save(sys.argv[2] + str(n), {'n': n})"
    )
    path = tmp_path / "state.json"
    running = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "ab"]
    assert [0, 0] == [process.wait(150) for process in running]
    assert all({"n": n} == FileStore(path).load(f"{name}{n}") for name in "ab" for n in range(40))
    assert [] == [p.name for p in tmp_path.iterdir() if p.name not in ("state.json", ".state.json.lock")]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff"])
def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text)
    for call in (lambda store: store.load("k"), lambda store: store.save("k", {})):
        with pytest.raises(StateFailed, match="move it away to begin anew"):
            call(FileStore(path))
    assert text == path.read_bytes()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateFailed, match="cannot write state"):
        FileStore(tmp_path / "file" / "state.json").save("k", {})


def test_a_redis_that_does_not_answer_is_said(tmp_path):
    store = open_store(f"unix://{tmp_path}/nobody", tmp_path)
    with pytest.raises(StateFailed, match="cannot read state 'k' in Redis"):
        store.load("k")
    with pytest.raises(StateFailed, match="cannot write state 'k' to Redis"):
        store.save("k", {})


def test_an_address_that_is_none_is_said_without_its_password(tmp_path):
    with pytest.raises(StateFailed, match="'state' is not an address of a Redis.*special characters of a password") as caught:
        open_store("redis://:hun/ter@localhost:6379/0", tmp_path)
    assert "hun" not in str(caught.value)


def test_a_document_in_redis_that_is_something_else_is_said(redis_url, tmp_path):
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"servinggraph:state:{tmp_path}", b"{")
    store = open_store(redis_url, tmp_path)
    with pytest.raises(StateFailed, match="is not JSON.*delete it to begin anew"):
        store.load(str(tmp_path))
    store.close()
