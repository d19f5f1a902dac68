"""What a folder is taken to hold."""

from __future__ import annotations

import pytest

from servinggraph.errors import GraphInvalid
from servinggraph.lifecycle import read_graphs
from servinggraph.lifecycle.layout import Layout, chosen

GRAPH = "inputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'copy:copy'}\nanswer: n\n"


def write(path, text=GRAPH):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def versions_of(folder, name):
    entry = Layout(folder).scan()[name]
    assert () == entry.problems
    return [found.version for found in chosen(entry)]


def test_versions_are_positive_integers_without_leading_zeros(tmp_path):
    for name in ("1", "2", "10", "01", "0", "-3", "x", "1.5", ".4", "5"):
        write(tmp_path / "a" / name / ("notes.txt" if name == "5" else "graph.yaml"))
    write(tmp_path / "a" / "config.yaml", "versions: all\n")
    write(tmp_path / ".hidden" / "1" / "graph.yaml")

    assert ["1", "2", "10"] == versions_of(tmp_path, "a")
    assert {"a"} == set(Layout(tmp_path).scan())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ["10"]),
        ("versions: {latest: 2}", ["2", "10"]),
        ("versions: all", ["1", "2", "10"]),
        ("versions: [1, 10, 99]", ["1", "10"]),
    ],
)
def test_the_policy_picks_versions(tmp_path, config, expected):
    for name in ("1", "2", "10"):
        write(tmp_path / "a" / name / "graph.yaml")
    if config:
        write(tmp_path / "a" / "config.yaml", config)

    assert expected == versions_of(tmp_path, "a")
    assert expected == [plan.version for plan in read_graphs(tmp_path)]


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("a/config.yaml", "versons: all\n", "a/config.yaml:1: unknown key 'versons'; did you mean 'versions'?"),
        ("a/config.yaml", "versions: {latest: 0}\n", "config.yaml:1: 'versions' is 'all', '{latest: 2}' or a list"),
        ("a/config.yaml", "versions: [1, true]\n", "or a list of version numbers, got"),
        ("a/config.yaml", "versions: [\n", "config.yaml:2: not valid YAML"),
        ("a/1/graph.yaml", "graph: b\n" + GRAPH, "1: 'graph: b', but a graph is called like its folder, 'a': change one, or leave 'graph' out"),
        ("a/1/graph.yaml", "version: 2\n" + GRAPH, "1: 'version: 2', but a version has its folder's number, '1': change one"),
        ("a/graph.yaml", GRAPH, "beside it are version folders (1): keep one form"),
        ("x.yaml", "graph: a\n" + GRAPH, "graph 'a' version 1 is in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_its_place(tmp_path, path, text, problem):
    write(tmp_path / "a" / "1" / "graph.yaml")
    write(tmp_path / path, text)
    with pytest.raises(GraphInvalid) as caught:
        read_graphs(tmp_path)

    assert problem in str(caught.value)


def test_names_and_numbers_that_agree_with_their_folders_may_stand_in_the_file(tmp_path):
    write(tmp_path / "a" / "3" / "graph.yaml", "graph: a\nversion: 3\n" + GRAPH)
    write(tmp_path / "b" / "graph.yaml", "graph: b\nversion: 4\n" + GRAPH)
    write(tmp_path / "c.yaml", "graph: other\n" + GRAPH)

    assert [("a", "3"), ("b", "4"), ("other", "1")] == [(plan.name, plan.version) for plan in read_graphs(tmp_path)]


def test_two_files_may_be_two_versions_of_one_graph(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"a{number}.yaml", f"graph: a\nversion: {number}\n" + GRAPH)

    assert ["1", "2"] == versions_of(tmp_path, "a")


def test_the_state_changes_with_any_file_of_a_version_and_with_nothing_else(tmp_path):
    write(tmp_path / "a" / "1" / "graph.yaml")
    write(tmp_path / "a" / "1" / "deep" / "weights.bin", "1")
    layout = Layout(tmp_path)
    before = layout.scan()["a"].state
    write(tmp_path / "a" / "1" / ".swp", "x")
    write(tmp_path / "a" / "1" / "__pycache__" / "steps.pyc", "x")
    write(tmp_path / "b" / "1" / "graph.yaml")
    assert before == layout.scan()["a"].state
    write(tmp_path / "a" / "1" / "deep" / "weights.bin", "23")
    assert before != layout.scan()["a"].state
