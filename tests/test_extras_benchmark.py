"""`benchmarks.extras` adds up what pip would install."""

from importlib.metadata import distribution
from types import SimpleNamespace

import pytest

from benchmarks import extras


def test_a_closure_follows_requirements_of_requirements_and_extras():
    plain = extras.closure(["scikit-learn>=1.5", "ray; extra == 'simulation'"], [])
    assert {"scikit-learn", "scipy", "numpy", "joblib"} <= plain.keys()
    assert "ray" not in plain
    assert "ray" in extras.closure(["ray; extra == 'simulation'"], ["simulation"])
    assert "ray" in extras.closure(["flwr[simulation]"], [])
    assert "ray" not in extras.closure(["flwr"], [])


def test_a_version_that_a_requirement_excludes_is_an_error():
    installed = distribution("numpy").version
    with pytest.raises(ValueError, match=f"numpy: expected <1, got {installed}"):
        extras.closure(["numpy<1"], [])


def test_the_sizes_of_all_files_add_up():
    files = [SimpleNamespace(size=3_000_000), SimpleNamespace(size=None)]
    packages = [SimpleNamespace(files=files), SimpleNamespace(files=None)]
    assert extras.megabytes(packages) == 3


def test_the_table_has_a_row_for_the_package_and_for_each_extra(monkeypatch, capsys):
    monkeypatch.setattr(extras, "import_seconds", lambda modules, repeats: 0.5)
    monkeypatch.setattr(extras, "megabytes", lambda packages: 3.0)
    extras.main([])
    names = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()]
    assert names == ["extra", "---", "none", *extras.EXTRAS]
