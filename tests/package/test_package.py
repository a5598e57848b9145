"""The wheel and the sdist of `make dist`, in environments outside the source tree.

Each environment holds what pip would install: the package from its wheel, and links to the
installed packages that the wheel requires, without extras or with some. Nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks.extras import closure
from flwr_cloned_kd.__main__ import EXTRAS
from tests.helpers.environments import create

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"flwr_cloned_kd-{PROJECT['version']}"
FOR_USERS = sorted(set(PROJECT["optional-dependencies"]) - {"dev", "docs"})
IN_DEV = set(re.search(r"\[(.*)\]", PROJECT["optional-dependencies"]["dev"][0])[1].split(","))
"""Extras that CI installs."""
LACKING = {"flwr_cloned_kd.reading.figures": "plotly"}
"""Modules that only an extra can import, and the package that it lacks."""


def built(name):
    path = ROOT / "dist" / name
    assert path.is_file(), f"{path}: expected a file, got none; run `make dist` first"
    return path


@pytest.fixture(scope="session")
def wheel():
    return built(f"{STEM}-py3-none-any.whl")


@pytest.fixture(scope="session")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"{STEM}.dist-info/METADATA"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built(f"{STEM}.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / STEM


@pytest.fixture(scope="session")
def install(tmp_path_factory, wheel, metadata):
    """A function that returns the python of an environment with the wheel and these extras."""

    @cache
    def environment(*extras):
        folder = tmp_path_factory.mktemp("environment")
        python = create(folder, closure(metadata.get_all("Requires-Dist"), extras).values())
        pip_install(python, f"{wheel}[{','.join(extras)}]" if extras else wheel)
        return python

    return environment


def pip_install(python, *arguments):
    """Install without an index: pip's resolver must accept what the environment holds."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    completed = run([*command, "--no-index", *arguments])
    assert completed.returncode == 0, completed.stdout + completed.stderr


def run(command, **options):
    """Run a command that sees nothing of the source tree."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, **options
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    paths = (ROOT / "flwr_cloned_kd").rglob("*.*")
    files = {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files
    assert "flwr_cloned_kd/py.typed" in names


def test_the_metadata_says_what_an_index_shows(metadata):
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_the_sdist_holds_what_a_developer_needs(sources):
    for name in ("Makefile", "constraints.txt", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"):
        assert (sources / name).read_text() == (ROOT / name).read_text()
    for folder in ("docs", "examples", "tests", "benchmarks"):
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert files == {path.relative_to(sources) for path in (sources / folder).rglob("*.py")}


@pytest.mark.parametrize("extra", FOR_USERS)
def test_an_extra_brings_the_modules_that_the_command_lists_for_it(extra, metadata, tmp_path):
    try:
        distributions = closure(metadata.get_all("Requires-Dist"), [extra])
    except PackageNotFoundError as error:
        assert extra not in IN_DEV
        pytest.skip(f"not installed here: {error}")
    create(tmp_path, distributions.values())
    (site,) = tmp_path.glob("lib/python*/site-packages")
    missing = [name for name in EXTRAS[extra] if PathFinder.find_spec(name, [str(site)]) is None]
    assert not missing


def test_without_extras_everything_can_be_imported_and_the_algorithm_runs(install, tmp_path):
    python = install()
    script = shutil.copy(Path(__file__).with_name("without_extras.py"), tmp_path)
    completed = run([python, "-W", "error::ImportWarning", script], cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    report = json.loads(completed.stdout.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(python.parents[1])
    files = (ROOT / "flwr_cloned_kd").rglob("*.py")
    paths = [path.relative_to(ROOT).with_suffix("") for path in files]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    assert {*report["modules"], *report["lacking"]} == names - {"flwr_cloned_kd"}
    assert report["lacking"] == LACKING
    assert report["versions"] == [1, 2]
    extras = {"dirichlet": "datasets"}
    for name, message in report["messages"].items():
        assert f'pip install "flwr-cloned-kd[{extras.get(name, name)}]"' in message
    assert {"flwr_cloned_kd", "flwr_cloned_kd.apps", "flwr_cloned_kd.paper"} <= set(report["help"])
    for name, text in report["help"].items():
        assert text.startswith(f"usage: python -m {name}"), name


@pytest.mark.parametrize("name", PROJECT.get("scripts", {}))
def test_a_console_command_answers(name, install, tmp_path):
    completed = run([install().with_name(name), "--help"], cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("usage: ")


def test_an_example_without_its_extra_says_what_to_install(install, sources, tmp_path):
    examples = shutil.copytree(sources / "examples", tmp_path / "examples")
    completed = run([install(), examples / "run.py", "quickstart_digits"], cwd=tmp_path)
    assert completed.returncode == 1
    assert 'pip install "flwr-cloned-kd[launch]"' in completed.stderr
    assert "Traceback" not in completed.stderr


def test_an_example_of_the_sdist_runs_under_flower(install, sources, tmp_path):
    python = install("simulation", "digits", "plots")
    examples = shutil.copytree(sources / "examples", tmp_path / "examples")
    command = [python, examples / "run.py", "quickstart_digits", "--num-edges", 2]
    epochs = "core-epochs=1 edge-epochs=1 distill-epochs=1 baseline-rounds=1 num-clones=1"
    command += ["--results", tmp_path / "results", "--run-config", f"{epochs} variant='CPP'"]
    completed = run(command, cwd=tmp_path, timeout=300)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "Final core accuracy:" in completed.stdout
    (summary,) = (tmp_path / "results").glob("*/summary.json")
    assert summary.with_name("accuracy.png").is_file()


@pytest.fixture(scope="session")
def typed_project(tmp_path_factory, wheel):
    """A folder with a user's code, correct and wrong, and a python for which checkers resolve it.

    The dependencies come from the present environment by a .pth file and not by links: mypy finds
    them under the paths of its cache.
    """
    environment = tmp_path_factory.mktemp("typed")
    python = create(environment, [])
    (site,) = environment.glob("lib/python*/site-packages")
    present = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "present.pth").write_text("\n".join(present) + "\n")
    pip_install(python, "--no-deps", wheel)
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(Path(__file__).with_name("downstream.py"), folder)
    (folder / "wrong.py").write_text("from flwr_cloned_kd import Recipe\n\nRecipe(epochs='many')\n")
    return folder, python


def test_mypy_strict_accepts_the_code_of_a_user(typed_project, tmp_path):
    folder, python = typed_project
    cache = tmp_path / "cache"
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", cache)
    mypy = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    mypy += ["--python-executable", python, "--cache-dir", cache]
    completed = run([*mypy, "downstream.py", "wrong.py"], cwd=folder)
    (line, summary) = completed.stdout.splitlines()
    assert line.startswith('wrong.py:3: error: Argument "epochs" to "Recipe"')
    assert summary.startswith("Found 1 error in 1 file")


def test_pyright_strict_accepts_the_code_of_a_user(typed_project):
    folder, python = typed_project
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    pyright = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", python]
    completed = run([*pyright, "downstream.py", "wrong.py"], cwd=folder)
    (diagnostic,) = json.loads(completed.stdout)["generalDiagnostics"]
    assert Path(diagnostic["file"]).name == "wrong.py"
    assert diagnostic["rule"] == "reportArgumentType"
