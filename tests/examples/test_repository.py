"""The repository example as a user runs it: the commands of its README, on a copy of its folder."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "repository"
COMMAND = [Path(sys.executable).with_name("servinggraph")]


def commands():
    """Return the commands of the README, in order, without comments."""
    text = (EXAMPLE / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line]


@contextmanager
def serving(folder, *options):
    command = [*COMMAND, "serve", folder, "--http-port", "0", "--grpc-port", "off", "--log-level", "warning", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            banner = ""
            while "stop with Ctrl-C" not in banner:
                assert select.select([process.stdout], [], [], 60)[0], banner
                printed = os.read(process.stdout.fileno(), 1 << 16).decode()
                assert printed, banner
                banner += printed
            yield process, f"http://127.0.0.1:{re.search(r'HTTP on http://[^:]+:([0-9]+)', banner)[1]}/v2", banner
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EXAMPLE / "graphs", tmp_path / "graphs")


def curl(line, url):
    shown = line.replace("$V2", url)
    return json.loads(subprocess.run(shown, shell=True, cwd=ROOT, capture_output=True, check=True, text=True).stdout)


def outliers(answer):
    (found,) = [output["data"] for output in answer["outputs"] if output["name"] == "outlier"]
    return answer["model_version"], [index for index, wild in enumerate(found) if wild]


def test_the_commands_of_the_readme_do_what_it_says(folder):
    check, serve, variable, index, load, infer, first, latest, again, only_first, unload = commands()
    done = subprocess.run([*COMMAND, *check.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ["fahrenheit version 1", "outliers version 1", "outliers version 2"] == [
        line.partition(":")[0] for line in done.stdout.splitlines()
    ]
    with serving(folder, *serve.split()[3:]) as (process, url, banner):
        assert "V2=http://127.0.0.1:8080/v2" == variable
        assert "outliers  version 1" in banner
        assert "outliers  version 2" in banner
        assert "model control explicit, 2 versions loaded" in banner
        states = [(line["name"], line["version"], line["state"]) for line in curl(index, url)]
        assert [("fahrenheit", "", "UNAVAILABLE"), ("outliers", "1", "READY"), ("outliers", "2", "READY")] == states
        curl(load, url)
        assert [212.0] == curl(infer, url)["outputs"][0]["data"]
        assert ("1", []) == outliers(curl(first, url))
        assert ("2", [8, 9]) == outliers(curl(latest, url))

        steps = folder / "outliers" / "2" / "steps.py"
        good = steps.read_text()
        steps.write_text("def judge(:\n")
        assert "outliers/2/steps.py:1: SyntaxError" in curl(again, url)["error"]
        assert ("2", [8, 9]) == outliers(curl(latest, url))
        steps.write_text(good.replace("SCALE = 1.4826", "SCALE = 1000"))
        curl(again, url)
        assert ("2", []) == outliers(curl(latest, url))

        curl(only_first, url)
        assert ("1", []) == outliers(curl(latest, url))
        curl(unload, url)
        assert "has no available versions" in curl(latest, url)["error"]
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(60)


def test_polling_serves_what_is_written_into_the_folder(folder):
    latest = commands()[7]
    with serving(folder, "--model-control", "poll", "--repository-poll-s", "0.05") as (_, url, banner):
        assert "model control poll, 3 versions loaded" in banner
        shutil.copytree(folder / "outliers" / "1", folder / "outliers" / "3")
        end = time.monotonic() + 60
        while outliers(curl(latest, url)) != ("3", []):
            assert time.monotonic() < end
        assert {"ready": True} == curl("curl -s $V2/health/ready", url)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["examples/digits/graph.yaml", "--model-control", "poll"], "--model-control is for a folder of graphs"),
        (["examples/digits/graph.yaml", "--max-loaded", "2"], "--max-loaded is for a folder of graphs"),
        (["examples/repository/graphs", "--load-model", "outliers"], "--load-model goes with --model-control explicit"),
        (["examples/repository/graphs", "--model-control", "manual"], "--model-control manual: expected 'none', 'poll' or 'explicit'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(arguments, text):
    done = subprocess.run(
        [*COMMAND, "serve", *arguments, "--http-port", "0", "--grpc-port", "off"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 != done.returncode
    assert text in done.stderr
