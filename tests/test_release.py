"""The files that a release and the code host read: workflows, templates, citation, versions."""

import re
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flwr_cloned_kd

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.github-issue-forms": [
        path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml"
    ],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file_follows_its_published_schema(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    completed = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def commands_of(job):
    """Return the commands of a job, one for each entry of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for values in product(*matrix.values()):
        for step in job["steps"]:
            command = step.get("run", "")
            for key, value in zip(matrix, values, strict=True):
                command = command.replace(f"${{{{ matrix.{key} }}}}", value)
            yield command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_of_make_that_a_workflow_names_exists(path):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    named = {
        target
        for job in jobs
        for command in commands_of(job)
        for target in re.findall(r"^make ([\w.-]+)", command, re.M)
    }
    assert named or path.stem not in ("test", "docs", "publish")
    assert named <= targets


def test_the_matrix_holds_every_python_that_the_package_names():
    jobs = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text())["jobs"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs["matrix"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert flwr_cloned_kd.__version__ == PROJECT["version"] == citation["version"]
    assert released[:1] in ([], [PROJECT["version"]])
    assert released == sorted(released, key=Version, reverse=True)


def test_the_pinned_versions_satisfy_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    for requirement in map(Requirement, texts):
        if requirement.name != PROJECT["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_lowest_versions_are_resolved_for_every_extra_for_users():
    extras = set(re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text()))
    assert extras == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_the_page_on_installation_lists_every_extra_for_users():
    page = (ROOT / "docs" / "install.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert listed == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
