import re
from contextlib import contextmanager, nullcontext
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    Runtime,
    resnet32,
)
from flwr_cloned_kd.engine import runtime as module
from flwr_cloned_kd.engine.runtime import Plan, count_flop, plan, samples_at_once, settings
from tests.helpers.reference import images, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = images(38)
ROW = torch.zeros(1, 249)


def small():
    """Make a small model: 249 x 199 + 199 = 49,750 parameters, fewer than 50,000."""
    return nn.Linear(249, 199)


def large():
    """Make a large model: 249 x 200 + 200 = 50,000 parameters, 2 x 249 x 200 = 99,600 FLOP."""
    return nn.Linear(249, 200)


# A compilation saves time above 1e14 / (3 x 99,600) = 334,672,021.4 training samples, and above
# 1e14 / 99,600 = 1,004,016,064.3 predictions.
LONG, SHORT = 334_672_022, 334_672_021
LONG_PREDICTION, SHORT_PREDICTION = 1_004_016_065, 1_004_016_064


@pytest.fixture
def machine(monkeypatch):
    """A machine with AMX and a compiler, unless `set_up` changes it."""

    def set_up(*, capabilities=("amx_bf16", "avx512_bf16"), compiler=True, cuda_bf16=True):
        names = {"amx_bf16", "avx512_bf16", *capabilities}
        units = {name: name in capabilities for name in names}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/g++" if compiler else None)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: cuda_bf16
        )
        return units

    set_up()
    return set_up


def planned(model, runtime=None, **options):
    options = {"num_clones": 3, "num_samples": LONG} | options
    runtime = {"device": "cpu", "bf16": None, "compile": None} | (runtime or {})
    return plan(model, ROW, Runtime(**runtime), **options)


@pytest.mark.parametrize(
    ("build", "asked", "num_clones", "expected"),
    [
        # Left open: clones of a small model are batched, a large model gets everything else.
        (small, {}, 3, Plan("cpu", False, False, True, False)),
        (large, {}, 3, Plan("cpu", True, True, False, False)),
        # One clone cannot be batched.
        (small, {}, 1, Plan("cpu", False, False, False, False)),
        (small, {"batch_clones": True}, 1, Plan("cpu", False, False, False, False)),
        # An option that is set is kept.
        (small, {"bf16": True}, 3, Plan("cpu", True, False, True, False)),
        (large, {"bf16": False}, 3, Plan("cpu", False, True, False, False)),
        (small, {"batch_clones": False}, 3, Plan("cpu", False, False, False, False)),
        (large, {"compile": False}, 3, Plan("cpu", True, False, False, False)),
        (small, {"compile": True}, 1, Plan("cpu", False, True, False, False)),
        # Batched clones are never compiled.
        (small, {"compile": True}, 3, Plan("cpu", False, False, True, False)),
        (large, {"batch_clones": True, "compile": True}, 3, Plan("cpu", True, False, True, False)),
        # A CPU has no CUDA graphs.
        (large, {"cuda_graphs": True}, 3, Plan("cpu", True, True, False, False)),
    ],
)
def test_open_options_follow_the_rule_and_set_options_are_kept(
    machine, build, asked, num_clones, expected
):
    assert planned(build(), asked, num_clones=num_clones) == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("build", [small, large])
def test_steps_are_recorded_on_a_gpu_only_and_only_in_training(machine, device, build):
    batched = build is small
    asked = {"device": device, "cuda_graphs": True}
    assert planned(build(), asked) == Plan(device, not batched, False, batched, True)
    assert not planned(build(), asked, training=False).cuda_graphs
    assert not planned(build(), {"device": device}).cuda_graphs
    assert not planned(build(), asked | {"device": "cpu"}).cuda_graphs


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_on_a_cpu_clones_with_convolutions_train_one_by_one(machine, convolution):
    model = nn.Sequential(convolution(1, 1, 1), small())
    assert not planned(model).batch_clones
    assert planned(model, {"batch_clones": True}).batch_clones
    assert planned(model, {"device": "cuda"}).batch_clones


def test_a_gpu_compiles_on_demand_only(machine):
    assert not planned(large(), {"device": "cuda"}).compile
    assert planned(large(), {"device": "cuda", "compile": True}).compile


@pytest.mark.parametrize(
    ("build", "asked", "expected"),
    [
        (small, {"bf16": True}, Plan("cuda", True, False, False, False)),
        (small, {"bf16": True, "batch_clones": True}, Plan("cuda", True, False, False, False)),
        (large, {"batch_clones": True}, Plan("cuda", False, False, True, False)),
        (small, {"bf16": True, "compile": True}, Plan("cuda", True, True, False, False)),
    ],
)
def test_on_a_gpu_one_pass_for_all_clones_is_in_float32(machine, build, asked, expected):
    assert planned(build(), {"device": "cuda"} | asked) == expected
    assert planned(build(), asked | {"device": "cpu"}).batch_clones


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(machine, supported):
    machine(cuda_bf16=supported)
    assert planned(large(), {"device": "cuda"}).bf16 == supported
    assert planned(large(), {"device": "cuda", "bf16": True}).bf16
    assert not planned(small(), {"device": "cuda"}).bf16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [((), False), (("amx_bf16",), True), (("avx512_bf16",), True), (("avx2",), False)],
)
def test_a_cpu_without_matrix_units_for_bfloat16_trains_in_float32(machine, capabilities, expected):
    machine(capabilities=capabilities)
    assert planned(large()).bf16 == expected
    assert planned(large(), {"bf16": True}).bf16


def test_a_pytorch_without_capabilities_trains_in_float32(machine, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not planned(large()).bf16


def test_without_a_compiler_nothing_is_compiled_by_rule(machine):
    machine(compiler=False)
    assert not planned(large()).compile
    assert planned(large(), {"compile": True}).compile


@pytest.mark.parametrize(
    ("num_samples", "training", "expected"),
    [
        (LONG, True, True),
        (SHORT, True, False),
        (LONG_PREDICTION, False, True),
        (SHORT_PREDICTION, False, False),
        (LONG, False, False),
        (0, True, False),
    ],
)
def test_a_phase_is_compiled_if_its_arithmetic_exceeds_the_threshold(
    machine, num_samples, training, expected
):
    assert planned(large(), num_samples=num_samples, training=training).compile == expected


def test_phases_of_the_paper_are_compiled_and_the_demo_is_not(machine):
    # ResNet-32 on 32x32: 69.1 million multiply-adds (He et al. 2016 count 0.069 GFLOP), twice that
    # in operations. Phase 1 of the paper: 3 clones, 5,000 images, 164 epochs, 3 passes.
    model, x = resnet32(), torch.zeros(1, 3, 32, 32)
    assert count_flop(model, x) == pytest.approx(2 * 69.1e6, rel=0.01)
    paper = plan(model, x, Runtime(device="cpu", compile=None), num_samples=3 * 5000 * 164)
    assert paper.compile
    short = plan(model, x, Runtime(device="cpu", compile=None), num_samples=3 * 500 * 40)
    assert not short.compile


def test_the_same_arguments_decide_the_same(machine):
    for build in (small, large):
        assert len({planned(build()) for _ in range(5)}) == 1


class Counts(nn.Module):
    """Changes a buffer in every forward pass and has a part in another mode."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(249, 200)
        self.norm = nn.BatchNorm1d(249)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(x))


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_the_model_as_it_was(machine, training):
    model = Counts().train(training)
    model.norm.train(not training)  # statistics that are frozen while the rest trains
    modes = [part.training for part in model.modules()]
    before = snapshot(model.state_dict())
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    assert planned(model).compile
    assert [part.training for part in model.modules()] == modes
    assert same_bits(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_that_fails_is_left_as_it_was(machine):
    model = large().train()
    with pytest.raises(RuntimeError):
        plan(model, torch.zeros(1, 7), Runtime(device="cpu", compile=None), num_samples=LONG)
    assert model.training


@pytest.mark.parametrize("num_samples", [0, 10, LONG])
def test_nothing_is_run_where_nothing_is_left_open(machine, num_samples):
    ran = []
    model = large()
    model.register_forward_hook(lambda *args: ran.append(args))
    planned(model, {"compile": False}, num_samples=num_samples)
    planned(model, {"compile": True}, num_samples=num_samples)
    planned(model, {"batch_clones": True}, num_samples=num_samples)
    planned(model, {"device": "cuda"}, num_samples=num_samples)
    machine(compiler=False)
    planned(model, num_samples=num_samples)
    assert ran == []


def test_nothing_is_run_for_a_phase_of_no_samples(machine):
    ran = []
    model = large()
    model.register_forward_hook(lambda *args: ran.append(args))
    assert not planned(model, num_samples=0).compile
    assert ran == []
    assert planned(model, num_samples=LONG).compile
    assert len(ran) == 1


def test_runtimes_are_compared_without_their_log():
    assert Runtime(log=print) == Runtime() == Runtime(device="auto", log=len)
    assert hash(Runtime(log=print)) == hash(Runtime())
    for change in (
        {"device": "cpu"},
        {"bf16": None},
        {"compile": None},
        {"batch_clones": True},
        {"cuda_graphs": True},
        {"target_bytes": 1},
    ):
        assert Runtime(**change) != Runtime()
    with pytest.raises(FrozenInstanceError):
        Runtime().bf16 = True


@pytest.mark.parametrize("device", ["abacus", "", "cpu:x"])
def test_an_unknown_device_is_refused(device):
    expected = f"device: expected auto, cpu, cuda, ..., got {device!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        Runtime(device=device)


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="target_bytes: expected at least 0, got -1"):
        Runtime(target_bytes=-1)
    assert Runtime(target_bytes=0).target_bytes == 0


@pytest.mark.parametrize(("seen", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_device_is_a_gpu_if_pytorch_sees_one(monkeypatch, seen, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    assert Runtime().target == torch.device(expected)
    assert Runtime(device="cpu").target == torch.device("cpu")
    assert Runtime(device="cuda:1").target == torch.device("cuda:1")


def test_settings_seed_the_block_and_restore_the_generator():
    torch.manual_seed(1)
    outside = torch.get_rng_state()
    with settings(Runtime(device="cpu"), 5):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(5)))

    @settings(Runtime(device="cpu"), 5)
    def fail():
        torch.rand(1)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), outside)


@pytest.fixture
def gpu(monkeypatch):
    """Imitate two GPUs: record the current one and the seeds that each one gets.

    Seeds, streams and graphs are those of the current GPU, which is the first by default.
    """
    current, seeded = [0], []

    @contextmanager
    def device(target):
        before, current[0] = current[0], target.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((current[0], seed)))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    return SimpleNamespace(current=current, seeded=seeded)


def test_the_gpu_that_trains_is_the_current_one_while_it_does(gpu):
    with settings(Runtime(device="cuda:1"), 5):
        assert gpu.current == [1]
    assert gpu.current == [0]
    assert gpu.seeded == [(1, 5)]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("allow_tf32", [True, False])
def test_cudnn_is_made_deterministic_and_left_alone_otherwise(gpu, enabled, allow_tf32):
    cudnn = torch.backends.cudnn

    def flags():
        return cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    with cudnn.flags(enabled=enabled, allow_tf32=allow_tf32, benchmark=True):
        with settings(Runtime(device="cuda"), 5):
            assert flags() == (enabled, allow_tf32, True, False)
        assert flags() == (enabled, allow_tf32, False, True)


@pytest.mark.parametrize(
    ("device", "shape", "minimum", "expected"),
    [
        ("cpu", (1, 3, 32, 32), 128, 128),
        ("cuda", (1, 3, 32, 32), 128, 2048),
        ("cuda", (1, 3, 32, 32), 100, 2000),
        # 2^25 bytes are 55 images of 3 x 224 x 224 as float32: fewer than the minimum.
        ("cuda", (1, 3, 224, 224), 128, 128),
        ("cuda", (1, 3, 224, 224), 16, 48),
        ("cuda", (1, 0), 128, 2048),
    ],
)
def test_a_gpu_handles_as_many_samples_at_once_as_are_small(device, shape, minimum, expected):
    actual = samples_at_once(torch.device(device), torch.zeros(shape), minimum)
    assert actual == expected
