"""A GPU gives the results of the CPU, and recorded steps give the results of plain steps.

Not part of CI, which has no GPU: `python -m pytest -m gpu tests/engine`.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    Core,
    CropAndFlip,
    Recipe,
    Runtime,
    clone,
    cross_entropy,
    fit,
    practical,
    predict,
    resnet,
    train_edge,
)
from flwr_cloned_kd.engine.losses import Batch
from flwr_cloned_kd.method.targets import TargetBank
from tests.helpers.reference import cnn, distance, images, mlp, same_bits, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# The GPU adds in another order than the CPU: float32 rounds to 6e-8, and some hundred steps
# amplify that. A wrong step is off by 1e-3 or more.
ROUNDING = 1e-4
CPU, GPU = Runtime(device="cpu"), Runtime(device="cuda")
RECIPE = Recipe(epochs=4, batch_size=8, lr=0.05, augment=CropAndFlip(1))
# Four batches of 8 and one of 6 in every epoch, so that plain and recorded steps alternate.
DATA = images(38)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Switch TF32 off, whose rounding is a thousand times coarser than float32's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


RECORDED = replace(GPU, batch_clones=False, cuda_graphs=True)
PLAIN = replace(RECORDED, cuda_graphs=False)


def trained(model, runtime, *, num_clones=3, recipe=RECIPE, data=DATA, **options):
    start = clone(model.state_dict(), num_clones)
    return fit(model, start, data, recipe, seed=6, runtime=runtime, **options)


def test_a_core_with_data_and_model_on_a_gpu_has_the_bits_of_one_with_both_on_the_cpu():
    there = tuple(tensor.cuda() for tensor in DATA)
    states = []
    for model, data in ((cnn(), DATA), (cnn().cuda(), there)):
        core = Core(
            model=model,
            dataset=data,
            held_out=data,
            recipe=RECIPE,
            distillation=practical(RECIPE),
            runtime=GPU,
        )
        state = core.state(core.pretrain())
        edge = train_edge(core.model, state.params, data, RECIPE, runtime=GPU)
        state, metrics = core.distill(state, edge)
        assert metrics["accepted"]
        states.append(state)
    assert same_bits(states[0].params, states[1].params)


@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "together"])
def test_training_on_a_gpu_equals_training_on_the_cpu(build, batched):
    there = trained(build(), replace(GPU, batch_clones=batched))
    here = trained(build(), replace(CPU, batch_clones=batched))
    assert distance(there, here) < ROUNDING


@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("change", [{}, {"proximal_mu": 0.5}, {"momentum": 0.0}], ids=str)
def test_a_recorded_step_equals_a_plain_one_to_the_last_bit(build, batched, change):
    runtime, recipe = replace(GPU, batch_clones=batched), replace(RECIPE, **change)
    plain = trained(build(), runtime, recipe=recipe)
    recorded = trained(build(), replace(runtime, cuda_graphs=True), recipe=recipe)
    assert same_bits(plain, recorded)


@pytest.mark.parametrize("num_images", [32, 33, 38, 5, 16])
def test_batches_of_every_last_size_are_the_same_when_recorded(num_images):
    # By batches of 8: no smaller last batch, one image that is left out, a last batch of 6, less
    # than one batch, and with one epoch fewer steps than the warm-up has.
    data = images(num_images)
    recipe = replace(RECIPE, epochs=1 if num_images == 16 else 6)
    plain = trained(cnn(), PLAIN, recipe=recipe, data=data)
    assert same_bits(trained(cnn(), RECORDED, recipe=recipe, data=data), plain)


def test_dropout_draws_the_same_numbers_when_recorded():
    model = mlp(nn.Dropout(0.5))
    plain = trained(model, PLAIN)
    assert same_bits(trained(model, RECORDED), plain)
    assert distance(plain, trained(mlp(), PLAIN)) > ROUNDING


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of PyTorch's own doing
def test_compiled_clones_give_the_same_bits_when_recorded():
    compiled = replace(PLAIN, compile=True)
    plain = trained(cnn(), compiled)
    assert same_bits(trained(cnn(), replace(compiled, cuda_graphs=True)), plain)
    assert distance(plain, trained(cnn(), PLAIN)) < 10 * ROUNDING


@pytest.mark.parametrize("runtime", [PLAIN, RECORDED], ids=["plain", "recorded"])
def test_an_outer_autocast_changes_nothing(runtime):
    expected = trained(cnn(), runtime)
    with torch.autocast("cuda", torch.bfloat16):
        assert same_bits(trained(cnn(), runtime), expected)


def test_two_threads_may_record_at_the_same_time():
    models = [cnn(seed=seed) for seed in range(2)]
    alone = [trained(model, RECORDED) for model in models]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda model: trained(model, RECORDED), models))
    assert all(map(same_bits, together, alone))


def test_a_loss_that_waits_for_the_gpu_cannot_be_recorded():
    def loss(logits, batch):
        value = cross_entropy(logits, batch)
        return value if value.item() > 0 else 2 * value

    expected = trained(cnn(), RECORDED)
    with pytest.raises(RuntimeError, match=r"cuda_graphs: .*cuda_graphs=False trains"):
        trained(cnn(), RECORDED, loss=loss)
    assert same_bits(trained(cnn(), RECORDED), expected)
    trained(cnn(), PLAIN, loss=loss)


@pytest.mark.parametrize("batched", [None, True])
def test_clones_in_bfloat16_train_one_by_one_on_a_gpu(batched):
    bf16 = replace(GPU, bf16=True)
    expected = trained(cnn(), replace(bf16, batch_clones=False))
    assert same_bits(trained(cnn(), replace(bf16, batch_clones=batched)), expected)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(graphs):
    model, runtime = resnet(8, 3, channels=1), replace(GPU, bf16=True, cuda_graphs=graphs)
    assert same_bits(trained(model, runtime), trained(model, runtime))


def test_predictions_on_a_gpu_equal_those_on_the_cpu():
    model = cnn()
    edge = trained(model, CPU)
    there, here = (predict(model, edge, DATA[0], runtime=runtime) for runtime in (GPU, CPU))
    assert (there - here).abs().max() < ROUNDING


def test_the_targets_of_a_gpu_equal_those_of_the_cpu():
    model = cnn()
    edge, rows = trained(model, CPU), torch.arange(16, 24)
    targets = []
    for runtime in (GPU, CPU):
        bank = TargetBank(
            model,
            edge,
            DATA,
            RECIPE,
            view_seed=1,
            temperature=4.0,
            max_bytes=2**20,
            runtime=runtime,
        )
        device = runtime.target
        batch = Batch(DATA[0][rows].to(device), DATA[1][rows].to(device), rows.to(device), 2)
        targets.append(bank(batch).cpu())
    assert (targets[0] - targets[1]).abs().max() < ROUNDING


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_processor_does_not_wait_for_the_targets_of_a_batch():
    model = cnn()
    bank = TargetBank(
        model,
        trained(model, CPU),
        DATA,
        RECIPE,
        view_seed=1,
        temperature=4.0,
        max_bytes=0,
        runtime=GPU,
    )
    rows = torch.arange(8).cuda()
    batch = Batch(DATA[0].cuda()[rows], DATA[1].cuda()[rows], rows, 2)
    expected = bank(batch)  # the models are put on the GPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        target = bank(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(target, expected)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])
def test_two_rounds_on_a_gpu_equal_two_rounds_on_the_cpu(graphs):
    cores = []
    for runtime in (replace(GPU, cuda_graphs=graphs), CPU):
        core = Core(
            model=cnn(),
            dataset=DATA,
            held_out=images(31, seed=1),
            recipe=RECIPE,
            distillation=practical(RECIPE),
            runtime=runtime,
        )
        state = core.state(core.pretrain())
        for index in range(2):
            data = images(24, seed=10 + index)
            edge = train_edge(
                core.model, state.params, data, RECIPE, num_clones=2, seed=index, runtime=runtime
            )
            state, _ = core.distill(state, edge)
        cores.append(snapshot(state.params))
    assert distance(*cores) < 10 * ROUNDING
