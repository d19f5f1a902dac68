"""Modules that belong to one load of one graph."""

from __future__ import annotations

import pickle
import sys

import pytest

from servinggraph.importing import ImportProblem, load_object
from servinggraph.scopes import ModuleScope


@pytest.fixture
def scope():
    made = []

    def make():
        made.append(ModuleScope("some graph.1"))
        return made[-1]

    yield make
    for one in made:
        one.drop()
    assert [] == [name for name in sys.modules if name.startswith("servinggraph_modules.some_graph")]


def write(folder, **files):
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def load(scope, folder, target):
    with scope():
        return load_object(target, folder)


def test_each_load_has_the_code_of_its_time_with_all_that_it_imports(tmp_path, scope):
    steps = "import helper\nimport package.inner as first\nimport package.inner\nfrom package import inner as second\nfrom package.inner import N as third\n\ndef f():\n    import late\n    return helper.N, first.N, package.inner.N, second.N, third, late.N\n"
    write(
        tmp_path,
        steps=steps,
        helper="N = 1\n",
        late="N = 1\n",
        package__init="",
        package__inner="from .deeper import N\n",
        package__deeper="import helper\nN = helper.N\n",
    )
    (tmp_path / "package" / "init.py").rename(tmp_path / "package" / "__init__.py")
    old = load(scope(), tmp_path, "steps:f")
    assert (1,) * 6 == old()
    write(tmp_path, helper="N = 2\n", late="N = 2\n")
    new = load(scope(), tmp_path, "steps:f")

    assert (2,) * 6 == new()
    assert (1,) * 6 == old()
    assert "steps" not in sys.modules
    assert str(tmp_path) not in sys.path
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_is_not_in_the_folder_is_shared(tmp_path, scope):
    write(tmp_path, steps="import json, xml.dom\nfrom collections import abc\n")
    (tmp_path / "json").mkdir()  # data; the module is found elsewhere
    (tmp_path / "json" / "data.json").write_text("{}")
    module = sys.modules[type(load(scope(), tmp_path, "steps:abc")).__module__]
    assert module is not None
    assert sys.modules["json"] is load(scope(), tmp_path, "steps:json")
    assert sys.modules["xml"] is load(scope(), tmp_path, "steps:xml")


def test_a_folder_without_init_is_a_package_where_no_other_is_called_so(tmp_path, scope):
    write(tmp_path, only_here__steps="N = 3\n")
    assert 3 == load(scope(), tmp_path, "only_here.steps:N")


def test_classes_can_be_pickled_and_dataclasses_work(tmp_path, scope):
    write(
        tmp_path,
        steps="from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n@dataclass\nclass A:\n    n: int\n    c: ClassVar[int] = 1\n",
    )
    first, second = load(scope(), tmp_path, "steps:A"), load(scope(), tmp_path, "steps:A")

    assert first is not second
    for kind in (first, second):
        again = pickle.loads(pickle.dumps(kind(3)))
        assert type(again) is kind
        assert kind(3) == again


def test_modules_that_import_each_other_meet(tmp_path, scope):
    write(
        tmp_path,
        steps="import other\ndef f():\n    return other.g()\nN = 4\n",
        other="import steps\ndef g():\n    return steps.N\n",
    )
    assert 4 == load(scope(), tmp_path, "steps:f")()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nope:f", "there is no module 'nope' in {folder} and the Python path"),
        ("steps.inner:f", "there is no module 'steps.inner' in {folder} and the Python path"),
        ("steps:nope", "module 'steps' has no 'nope'"),
        ("fails:f", "module 'fails' failed to import: {folder}/fails.py:2: ZeroDivisionError"),
        ("lacks:f", "module 'lacks' failed to import: ModuleNotFoundError: No module named 'no_such_library'"),
        ("broken:f", "module 'broken' failed to import: {folder}/broken.py:1: SyntaxError"),
    ],
)
def test_problems_are_told_with_the_names_that_the_author_knows(tmp_path, scope, target, text):
    write(tmp_path, steps="def f(): pass\n", fails="\n1/0\n", lacks="import no_such_library\n", broken="def f(:\n")
    with pytest.raises(ImportProblem) as caught:
        load(scope(), tmp_path, target)

    assert text.format(folder=tmp_path) in str(caught.value)


def test_a_dropped_scope_leaves_functions_usable_and_modules_gone(tmp_path, scope):
    write(tmp_path, steps="N = 5\ndef f():\n    return N\n")
    one = scope()
    function = load(one, tmp_path, "steps:f")
    assert function.__module__ in sys.modules
    one.drop()
    assert function.__module__ not in sys.modules
    assert 5 == function()
