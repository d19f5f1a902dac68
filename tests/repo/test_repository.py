"""What the repository promises of itself: links, exports, sizes, import cost, no machine's traces."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "servinggraph").rglob("*.py"))


@pytest.mark.parametrize("name", ["steps", "routers", "protocols"])
def test_the_links_at_the_top_lead_into_the_package(name):
    assert (ROOT / "servinggraph" / name).resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_outgrows_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_says_what_it_is_and_exports_what_it_says(path):
    text = path.read_text()
    assert text.startswith('"""')
    if path.name == "__main__.py":
        return
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ names {public}"


def test_import_is_lazy():
    code = "import sys, servinggraph; print([m for m in ('numpy', 'pydantic', 'yaml', 'uvicorn') if m in sys.modules])"
    assert "[]" == subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_the_base_installation_needs_no_model_runtime():
    code = "import sys; sys.modules['onnxruntime'] = None; from servinggraph import Graph, steps, routers; import servinggraph.server"
    subprocess.check_call([sys.executable, "-c", code])


def test_no_path_of_a_machine_is_in_a_tracked_file():
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
    pattern = re.compile(r"(?:^|[\s\"'(=:])/(?:work|root|home)/")
    found = [
        f"{name}:{number}"
        for name in files
        if name and Path(ROOT, name).is_file() and Path(name).suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ""}
        for number, line in enumerate(Path(ROOT, name).read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert [] == found


def test_a_third_party_kind_is_found_by_its_entry_point(monkeypatch):
    import importlib.metadata

    from servinggraph import registry

    point = importlib.metadata.EntryPoint("twice", "some_package.steps:Twice", "servinggraph.steps")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "servinggraph.steps" else [])
    registry.kinds.cache_clear()
    try:
        assert "some_package.steps:Twice" == registry.kinds("steps")["twice"]
        assert "python" in registry.kinds("steps")
    finally:
        registry.kinds.cache_clear()
