"""The checks of a GPU: their order, their limits of time, their verdicts; and all of them, tiny."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import checks, engine, gpu
from benchmarks.checks import ROOT, Check, do_all
from flwr_cloned_kd import load_npz
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.paper.__main__ import base_settings
from flwr_cloned_kd.paper.__main__ import parser as paper_parser

WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"number\": 2.5}')"
SLEEP = "import time; time.sleep(60)"
# A command that starts another one and never ends by itself; it writes both process ids.
FAMILY = """
import os, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
child.wait()
"""


def check_of(folder, code, name="check", **options):
    output = folder / f"{name}.json"
    command = [sys.executable, "-c", code, str(output)]
    return Check(name, command, output, options.pop("read", gpu.read_numbers), **options)


def outcomes_of(folder, *all_checks, seconds=60):
    """Do checks; return the exit status and what was saved."""
    path = folder / "results.json"
    status = do_all([*all_checks], seconds, folder, path, {"data": "some"})
    saved = json.loads(path.read_text())
    assert saved["data"] == "some"
    return status, saved["checks"]


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("expected the condition within 30 s")


def test_a_failed_check_does_not_stop_the_next(tmp_path, capsys):
    status, outcomes = outcomes_of(
        tmp_path,
        check_of(tmp_path, "raise SystemExit('no such [/kernel]')", "first"),
        check_of(tmp_path, WRITE, "second"),
    )
    assert status == 1
    assert outcomes["first"]["verdict"] == "failed"
    assert outcomes["first"]["why"] == "exit status 1, first.log: no such [/kernel]"
    assert (outcomes["second"]["verdict"], outcomes["second"]["numbers"]) == (
        "passed",
        {"number": 2.5},
    )
    printed = capsys.readouterr().out
    assert "1 of 2: first" in printed
    assert "no such [/kernel]" in printed
    assert "number 2.5" in printed


def test_checks_that_pass_or_cannot_run_are_no_failure(tmp_path):
    status, outcomes = outcomes_of(
        tmp_path,
        check_of(tmp_path, WRITE, "first"),
        check_of(tmp_path, WRITE, "second", missing="needs ray"),
    )
    assert status == 0
    assert (outcomes["second"]["verdict"], outcomes["second"]["why"]) == ("skipped", "needs ray")
    assert not (tmp_path / "second.json").exists()


def test_results_are_saved_after_every_check(tmp_path):
    seen = []

    def read(output):
        results = tmp_path / "results.json"
        seen.append([*json.loads(results.read_text())["checks"]] if results.exists() else [])
        return {}

    names = ("first", "second", "third")
    outcomes_of(tmp_path, *(check_of(tmp_path, WRITE, name, read=read) for name in names))
    assert seen == [[], ["first"], ["first", "second"]]


def test_results_that_are_not_acceptable_or_old_are_a_failure(tmp_path):
    def refuse(output):
        raise ValueError("expected at least 1, got 0.5")

    (tmp_path / "second.json").write_text('{"number": 1}')
    status, outcomes = outcomes_of(
        tmp_path,
        check_of(tmp_path, WRITE, "first", read=refuse),
        check_of(tmp_path, "pass", "second"),
    )
    assert status == 1
    assert outcomes["first"]["why"] == "ValueError: expected at least 1, got 0.5"
    assert outcomes["second"]["why"].startswith("FileNotFoundError")


def test_a_check_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_SECONDS", 2)
    status, outcomes = outcomes_of(
        tmp_path,
        check_of(tmp_path, FAMILY, "first"),
        check_of(tmp_path, WRITE, "second"),
    )
    assert status == 1
    assert outcomes["first"]["why"] == "expected an end within 2 s"
    assert outcomes["second"]["verdict"] == "passed"
    pids = (tmp_path / "first.json").read_text().split()
    wait_for(lambda: not any(map(is_running, pids)))


def test_a_check_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_SECONDS", 2)
    monkeypatch.setattr(checks, "STOP_SECONDS", 0.5)
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    status, outcomes = outcomes_of(tmp_path, check_of(tmp_path, code))
    assert status == 1
    assert outcomes["check"]["seconds"] < 20


def test_when_the_time_is_over_checks_are_skipped(tmp_path):
    status, outcomes = outcomes_of(
        tmp_path,
        check_of(tmp_path, SLEEP, "first"),
        check_of(tmp_path, WRITE, "second"),
        seconds=1,
    )
    assert status == 0
    assert outcomes["first"]["verdict"] == outcomes["second"]["verdict"] == "skipped"
    assert outcomes["second"]["why"] == "no time is left"


def test_a_check_that_resumes_may_use_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_SECONDS", 0.1)
    status, outcomes = outcomes_of(tmp_path, check_of(tmp_path, SLEEP, resumes=True), seconds=1)
    assert status == 0
    assert outcomes["check"]["why"] == "not done in 1 s; the same command resumes"


def test_an_engine_slower_than_the_textbook_is_refused(tmp_path):
    path = tmp_path / "engine.json"
    results = {"ratios": {"phase1": 2.0, "phase2": 0.5, "round": 0.9}, "warm-up-seconds": 1.0}
    path.write_text(json.dumps(results))
    assert gpu.read_engine(path)["round"] == 0.9
    with pytest.raises(ValueError, match=r"expected at least 1, got 0\.90"):
        gpu.read_engine(path, least=1)


def test_a_noisy_plain_step_needs_no_recorded_one(tmp_path):
    """The time is a difference of two measurements, which may be negative for tiny sizes."""
    path = tmp_path / "steps.json"
    row = {"depth": 8, "clones": 1, "milliseconds": {"plain": -0.01}}
    path.write_text(json.dumps({"rows": [row]}))
    assert gpu.read_steps(path) == {"ResNet-8 x 1 plain": -0.01}


@pytest.mark.parametrize(("recorded", "accepted"), [(6.2, True), (40.0, False)])
def test_recorded_steps_must_not_be_slower_than_plain_ones(tmp_path, recorded, accepted):
    path = tmp_path / "steps.json"
    row = {"depth": 32, "clones": 3, "milliseconds": {"plain": 37.0, "recorded": recorded}}
    path.write_text(json.dumps({"rows": [row]}))
    if accepted:
        numbers = gpu.read_steps(path)
        assert numbers == {"ResNet-32 x 3 plain": 37.0, "ResNet-32 x 3 recorded": 6.2}
    else:
        with pytest.raises(ValueError, match=r"ResNet-32 x 3: expected at most 37\.00 ms"):
            gpu.read_steps(path)


@pytest.mark.parametrize(("skipped", "accepted"), [(1, True), (22, False)])
def test_tests_that_were_all_skipped_show_no_equality(tmp_path, skipped, accepted):
    path = tmp_path / "tests.xml"
    path.write_text(f'<testsuites><testsuite tests="22" skipped="{skipped}" /></testsuites>')
    if accepted:
        assert gpu.read_tests(path) == {"tests": 22, "skipped": 1}
    else:
        with pytest.raises(ValueError, match="expected a test that runs"):
            gpu.read_tests(path)


def test_synthetic_images_are_the_same_every_time_and_show_their_class(tmp_path):
    for name in ("one.npz", "two.npz"):
        gpu.write_synthetic(tmp_path / name, 40, 8, 4)
    (one, labels), (test, _) = load_npz(tmp_path / "one.npz")[:2]
    (two, _), _ = load_npz(tmp_path / "two.npz")
    assert torch.equal(one, two)
    assert (one.shape, test.shape) == ((40, 3, 8, 8), (8, 3, 8, 8))
    # Noise has a deviation of 37; over 10 images the mean of a pixel is off by 37 / sqrt(10) = 12.
    # Patterns have the same deviation, so two of them are 37 sqrt(2) = 52 apart.
    means = torch.stack([one[labels == label].float().mean(0).flatten() for label in range(4)])
    nearest = torch.cdist(one.float().flatten(1), means).argmin(1)
    assert (nearest == labels).all()


def test_the_checks_of_a_gpu_are_commands_that_the_programs_accept(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    archive = tmp_path / "an archive.npz"
    by_name = {check.name: check for check in gpu.all_checks("cuda", archive, tmp_path)}
    assert [*by_name][:3] == ["ceilings", "equality", "engine-auto"]
    assert [*by_name][-4:] == ["steps", "round", "flower", "full"]
    paper = base_settings(paper_parser().parse_args(by_name["full"].command[3:]))
    assert base_settings(paper_parser().parse_args(by_name["round"].command[4:])) == paper
    assert (paper.model, paper.edge_epochs, paper.num_edges) == ("resnet-32", 164, 9)
    assert (paper.device, paper.cuda_graphs, paper.bf16) == ("cuda", True, "auto")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import run

    flower = by_name["flower"].command
    config = run.parse([flower[flower.index("--run-config") + 1]])
    settings = run.check(ROOT / "examples" / "quickstart_digits", config)
    expected = Settings(
        dataset="npz",
        data_path=str(archive),
        model="resnet-8",
        augment="crop-and-flip",
        max_in_flight=4,
        core_epochs=2,
        edge_epochs=2,
        distill_epochs=2,
        device="cuda",
        client_device="cuda",
        cuda_graphs=True,
    )
    assert settings == expected


@pytest.mark.parametrize("name", gpu.SWITCHES)
def test_the_engine_benchmark_accepts_every_choice_of_switches(tmp_path, monkeypatch, name):
    parsed = []

    def build(options):
        parsed.append(options)
        raise InterruptedError

    monkeypatch.setattr(engine, "build", build)
    by_name = {check.name: check for check in gpu.all_checks("cuda", tmp_path, tmp_path)}
    with pytest.raises(InterruptedError):
        engine.main(by_name[f"engine-{name}"].command[3:])
    (options,) = parsed
    assert (options.device, options.samples) == ("cuda", 1280)
    assert options.cuda_graphs == ("recorded" in name)
    assert (options.compile == "on") == ("compiled" in name)


def test_an_unknown_check_or_a_missing_gpu_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--folder", str(tmp_path), "--only", "speed"])
    assert "expected some of ceilings, equality," in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--folder", str(tmp_path)])
        assert "expected a GPU, got none" in capsys.readouterr().err


@pytest.mark.simulation
def test_all_checks_run_on_a_cpu_with_tiny_sizes(tmp_path):
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "5"]
    command += ["--folder", str(tmp_path / "a folder"), "--json", str(saved)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    outcomes = json.loads(saved.read_text())["checks"]
    verdicts = {name: outcome["verdict"] for name, outcome in outcomes.items()}
    passed = {"ceilings", "engine-auto", "steps", "round", "full"}
    assert {name for name, verdict in verdicts.items() if verdict == "passed"} == passed
    needs_gpu = {name for name, outcome in outcomes.items() if outcome["why"] == "needs a GPU"}
    assert needs_gpu == verdicts.keys() - passed
    assert outcomes["round"]["numbers"]["phase2-seconds"] > 0
    assert len([*(tmp_path / "a folder" / "full" / "runs").glob("*.jsonl")]) == 1


@pytest.mark.simulation
def test_sigterm_ends_the_check_in_progress(tmp_path):
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks import gpu
from benchmarks.checks import Check
pids = Path({str(tmp_path / "pids")!r})
family = [sys.executable, "-c", {FAMILY!r}, str(pids)]
gpu.all_checks = lambda *_: [Check("family", family, pids, gpu.read_numbers)]
gpu.main(["--device", "cpu", "--folder", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not any(map(is_running, (tmp_path / "pids").read_text().split())))
