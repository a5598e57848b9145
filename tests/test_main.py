"""`python -m flwr_cloned_kd` says what is installed and what can be run."""

import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flwr_cloned_kd import __main__ as command
from flwr_cloned_kd import __version__

ROOT = Path(__file__).parents[1]


def output(capsys):
    assert command.main([]) == 0
    return capsys.readouterr().out


def test_it_prints_versions_and_devices(capsys):
    words = [line.split() for line in output(capsys).splitlines()]
    assert ["flwr-cloned-kd", __version__] in words
    assert all([package, version(package)] in words for package in ("flwr", "torch", "numpy"))
    assert any(line[:1] == ["cpu"] for line in words)
    assert sum(line[:1][0].startswith("cuda") for line in words if line) == (
        torch.cuda.device_count()
    )


def test_every_extra_for_users_is_listed(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(command.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}
    assert "\n  digits       installed\n" in output(capsys)


def test_a_missing_extra_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: name != "matplotlib_venn" or None)
    text = output(capsys)
    assert 'plots        not installed: pip install "flwr-cloned-kd[plots]"' in text
    assert "\n  digits       installed\n" in text


def test_the_commands_of_a_checkout_exist(capsys):
    lines = [line.split() for line in output(capsys).splitlines()]
    scripts = [line[1] for line in lines if line[:1] == ["python"] and line[1].endswith(".py")]
    modules = [line[2] for line in lines if line[:2] == ["python", "-m"]]
    assert len(scripts) == 3
    assert all((ROOT / script).is_file() for script in scripts)
    assert {"flwr_cloned_kd.apps", "flwr_cloned_kd.paper", "benchmarks.engine"} <= set(modules)
    assert all(find_spec(f"{module}.__main__") for module in modules if "flwr" in module)


def test_without_a_checkout_only_the_commands_of_the_package_are_listed(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    text = output(capsys)
    assert "python -m flwr_cloned_kd.paper" in text
    assert "examples/" not in text
    assert "benchmarks." not in text


def test_help_works(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "usage: python -m flwr_cloned_kd" in capsys.readouterr().out
