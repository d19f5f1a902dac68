"""What deploy/ holds for compose, Kubernetes and systemd is valid, and names only what there is."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from servinggraph.cli import main
from servinggraph.server import ServerOptions

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "servinggraph.yaml").read_text()))
UNIT = (DEPLOY / "systemd" / "servinggraph.service").read_text()
GRACE_S = ServerOptions().grace_s


def patched(document: Any, patch: Any) -> Any:
    """Apply a patch as `kubectl patch` does: mappings are merged, lists of containers by their names, other lists replaced."""
    if not isinstance(patch, dict):
        return patch
    result = copy.deepcopy(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if key == "containers":
            by_name = {container["name"]: container for container in result[key]}
            result[key] = list(by_name.values())
            for container in value:
                result[key] = [patched(c, container) if c["name"] == container["name"] else c for c in result[key]]
        else:
            result[key] = patched(result.get(key), value)
    return result


GPU = patched(KUBERNETES[0], yaml.safe_load((DEPLOY / "kubernetes" / "gpu.yaml").read_text()))


@pytest.mark.parametrize("document", [*KUBERNETES, GPU], ids=["deployment", "service", "headless", "budget", "gpu"])
@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_kubernetes_takes_the_manifests(document: Any, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_would_be_found_out() -> None:
    wrong = copy.deepcopy(KUBERNETES[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


@pytest.mark.parametrize("deployment", [KUBERNETES[0], GPU], ids=["cpu", "gpu"])
def test_pods_are_probed_and_confined_and_have_time_to_end(deployment: Any) -> None:
    pod = deployment["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    (delay_s,) = (float(word.partition("=")[2]) for word in server["args"] if word.startswith("--shutdown-delay-s="))
    assert pod["terminationGracePeriodSeconds"] > delay_s + GRACE_S
    assert pod["securityContext"]["runAsNonRoot"]
    assert server["securityContext"]["readOnlyRootFilesystem"]
    assert {"cpu", "memory"} <= server["resources"]["requests"].keys()
    paths = {server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {"/v2/health/ready", "/v2/health/live"} == paths
    # A load balancer that asks for itself has to notice while the pod still accepts.
    ready = server["readinessProbe"]
    assert ready["failureThreshold"] > 1
    assert delay_s > ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"]
    _check_options(server["args"])


def test_the_gpu_patch_adds_a_gpu_and_keeps_the_rest() -> None:
    (server,) = GPU["spec"]["template"]["spec"]["containers"]
    (plain,) = KUBERNETES[0]["spec"]["template"]["spec"]["containers"]
    assert 1 == server["resources"]["limits"]["nvidia.com/gpu"]
    assert plain["securityContext"] == server["securityContext"]


def test_service_and_budget_are_for_the_deployments_pods() -> None:
    deployment, service, headless, budget = KUBERNETES
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        headless["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {port["targetPort"] for port in service["spec"]["ports"]}
    assert "None" == headless["spec"]["clusterIP"]
    assert ["grpc"] == [port["targetPort"] for port in headless["spec"]["ports"]]


def test_compose_takes_the_file() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose" / "compose.yaml")], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_what_compose_mounts_is_there() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            assert (DEPLOY / "compose" / volume.split(":")[0]).exists(), (name, volume)
    assert (
        DEPLOY / "compose" / COMPOSE["services"]["server"]["build"]["context"] / "deploy" / "docker" / "Dockerfile"
    ).is_file()


def test_the_server_of_compose_is_the_example_and_has_time_to_end() -> None:
    server = COMPOSE["services"]["server"]
    _check_options(server["command"])
    assert float(server["stop_grace_period"].removesuffix("s")) > GRACE_S
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in server["volumes"]}
    folder = (DEPLOY / "compose" / mounted["/models/transactions"]).resolve()
    assert 0 == CliRunner().invoke(main, ["check", str(folder / "graph.yaml")]).exit_code
    graph = (folder / "graph.yaml").read_text()
    assert all(f"${{{name}" in graph for name in server["environment"])
    (script,) = COMPOSE["services"]["topics"]["command"]
    topics = re.search(r"for topic in (.*); do", script)
    assert topics is not None
    assert all(topic in graph for topic in topics[1].split())


def test_prometheus_of_compose_scrapes_the_server_and_has_the_alerts() -> None:
    settings = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert "server:8080" == target
    mounted = {volume.split(":")[1] for volume in COMPOSE["services"]["prometheus"]["volumes"]}
    assert {"/etc/prometheus/prometheus.yml", *(f"/etc/prometheus/{file}" for file in settings["rule_files"])} == mounted


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    # Only a program that is there passes.
    unit = UNIT.replace("/opt/servinggraph/bin/servinggraph", str(Path(sys.executable).with_name("servinggraph")))
    (tmp_path / "servinggraph.service").write_text(unit.replace("WorkingDirectory=/srv/graph", f"WorkingDirectory={tmp_path}"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "servinggraph.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "servinggraph.service" in line]
    assert (0, []) == (done.returncode, ours), done.stderr


def test_the_unit_starts_the_server_and_has_time_to_end() -> None:
    values = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and not line.startswith("#"))
    _check_options(values["ExecStart"].split()[1:])
    assert float(values["TimeoutStopSec"]) > GRACE_S


def _check_options(command: list[str]) -> None:
    """Look that a command and its options are the command line's."""
    usage = CliRunner().invoke(main, [command[0], "--help"])
    assert 0 == usage.exit_code
    assert all(word.partition("=")[0] in usage.output for word in command if word.startswith("--"))
