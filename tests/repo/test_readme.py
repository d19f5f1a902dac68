"""The README is true: its Python runs, its YAML compiles, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from servinggraph.cli import main
from servinggraph.compiler import compile_source
from servinggraph.spec import read_text

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        line = README[: match.start()].count("\n") + 2
        found.append(pytest.param(match[1], id=f"line-{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "block.py"
    program.write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(DIGITS))
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"], cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert 0 == done.returncode, done.stderr


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_compiles(text):
    compile_source(read_text(text, "README.md", DIGITS))


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist(block):
    targets = (ROOT / "Makefile").read_text()
    for line in block.splitlines():
        words = line.split("#")[0].split()
        if words[0] == "make":
            assert f"\n{words[1]}:" in targets
        else:
            assert words[0] == "servinggraph"
            options = [word for word in words[2:] if word.startswith("-")]
            command = words[1:3] if words[1] == "kafka" else words[1:2]  # a group has commands of its own
            usage = CliRunner().invoke(main, [*command, "--help"])
            assert 0 == usage.exit_code
            assert all(option in usage.output for option in options)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (ROOT / target).exists(), target


def test_anchors_are_headings():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line[:1] == "#"
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_picture_is_what_plot_draws(tmp_path):
    drawn = tmp_path / "digits.svg"
    assert 0 == CliRunner().invoke(main, ["plot", str(DIGITS / "graph.yaml"), "-o", str(drawn)]).exit_code
    texts = [sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())) for svg in (drawn, ROOT / "docs" / "digits.svg")]
    assert texts[0] == texts[1]


def test_the_reference_is_fresh():
    import runpy

    page = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["page"]()
    assert page == (ROOT / "docs" / "reference.md").read_text(), "run scripts/reference.py"
