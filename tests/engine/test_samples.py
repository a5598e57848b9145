"""Every form of data becomes the same two tensors, and what does not fit is refused by name."""

import logging
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from flwr_cloned_kd import Core, EdgeClient, Recipe, as_dataset, clone, fit, predict, train_edge
from flwr_cloned_kd.engine import samples
from flwr_cloned_kd.engine.progress import log_once
from flwr_cloned_kd.engine.tasks import Classification, Regression, classification
from tests.helpers.reference import images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS, LABELS = DATA = images(12)
RECIPE = Recipe(epochs=1, batch_size=4)
STRAIGHT = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Rows:
    """A dataset of a user: it has a length and returns one sample for each number."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Frame:
    """Something that NumPy converts, as it does a table of pandas."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def rows_of(**columns):
    return Rows([dict(zip(columns, row)) for row in zip(*columns.values())])


def huggingface_rows():
    datasets = pytest.importorskip("datasets")
    columns = {"image": INPUTS.tolist(), "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


FORMS = {
    "arrays": lambda: (INPUTS.numpy(), LABELS.numpy()),
    "a tensor and an array": lambda: (INPUTS, LABELS.numpy()),
    "32-bit labels": lambda: (INPUTS, LABELS.int()),
    "a read-only array": lambda: (read_only(INPUTS.numpy()), LABELS),
    "a view with negative strides": lambda: (INPUTS.flip(0).numpy()[::-1], LABELS),
    "big-endian arrays": lambda: (INPUTS.numpy().astype(">f4"), LABELS.numpy().astype(">i8")),
    "lists": lambda: (INPUTS.tolist(), LABELS.tolist()),
    "columns": lambda: {"pixels": INPUTS, "labels": LABELS},
    "columns of arrays": lambda: {"label": LABELS.numpy(), "pixels": INPUTS.numpy()},
    "TensorDataset": lambda: TensorDataset(INPUTS, LABELS),
    "Subset": lambda: Subset(TensorDataset(INPUTS, LABELS), range(12)),
    "pairs of a tensor and a number": lambda: Rows(list(zip(INPUTS, LABELS.tolist()))),
    "a list of samples": lambda: list(zip(INPUTS.numpy(), LABELS.numpy())),
    "dicts": lambda: rows_of(image=INPUTS, label=LABELS),
    "objects that become arrays": lambda: (Frame(INPUTS.numpy()), Frame(LABELS.numpy())),
    "HuggingFace": huggingface_rows,
}


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
def test_every_form_becomes_the_same_two_tensors(form):
    inputs, labels = as_dataset(form())
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(labels, LABELS)


@forms
def test_a_core_and_an_edge_train_to_the_same_bits_with_every_form(form):
    core = Core(model=mlp(), dataset=DATA, held_out=DATA, recipe=RECIPE)
    other = Core(model=mlp(), dataset=form(), held_out=form(), recipe=RECIPE)
    start = core.pretrain()
    assert same_bits(other.pretrain(), start)
    assert other.held_out_accuracy(start) == core.held_out_accuracy(start)
    arrays = [tensor.numpy() for tensor in start.values()]
    replies = [EdgeClient(mlp(), data, RECIPE).fit(arrays, {}) for data in (DATA, form())]
    assert all(np.array_equal(*pair) for pair in zip(replies[0][0], replies[1][0]))
    assert replies[0][1] == replies[1][1] == 12


@forms
def test_the_functions_below_the_core_accept_every_form_too(form):
    model = mlp()
    start = clone(model.state_dict(), 2)
    expected = fit(model, start, DATA, RECIPE)
    assert same_bits(fit(model, start, form(), RECIPE), expected)
    edge = train_edge(model, model.state_dict(), form(), RECIPE, num_clones=2)
    assert same_bits(edge, expected)


def test_predictions_accept_arrays():
    start = clone(mlp().state_dict(), 2)
    expected = predict(mlp(), start, INPUTS)
    assert torch.equal(predict(mlp(), start, INPUTS.numpy()), expected)
    assert torch.equal(predict(mlp(), start, INPUTS.double().numpy()), expected)


def test_a_pair_of_tensors_stays_the_same_object():
    assert as_dataset(DATA) is DATA
    core = Core(model=mlp(), dataset=DATA, held_out=DATA, recipe=RECIPE)
    assert core.dataset is core.held_out is DATA
    raw = (INPUTS.to(torch.uint8), LABELS)
    assert as_dataset(raw) is raw
    nested = ({"a": INPUTS, "b": (INPUTS, INPUTS)}, LABELS)
    assert as_dataset(nested) is nested


def test_a_dict_of_inputs_is_read_from_rows_and_from_columns():
    ids, mask = torch.randint(5, (4, 3)), torch.ones(4, 3, dtype=torch.bool)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": LABELS[:4]}
    for data in (
        columns,
        rows_of(**columns),
        ({"input_ids": ids, "attention_mask": mask}, LABELS[:4]),
    ):
        inputs, labels = as_dataset(data)
        assert list(inputs) == ["input_ids", "attention_mask"]
        assert torch.equal(inputs["input_ids"], ids)
        assert torch.equal(inputs["attention_mask"], mask)
        assert inputs["attention_mask"].dtype == torch.bool
        assert torch.equal(labels, LABELS[:4])


def test_the_key_of_the_labels_can_be_given():
    data = {"pixels": INPUTS, "label": torch.zeros(12), "coarse": LABELS}
    inputs, labels = as_dataset(data, label_key="coarse")
    assert list(inputs) == ["pixels", "label"]
    assert torch.equal(labels, LABELS)


def test_of_three_tensors_the_last_one_holds_the_labels():
    for data in (TensorDataset(INPUTS, LABELS, LABELS), Rows([*zip(INPUTS, LABELS, LABELS)])):
        inputs, labels = as_dataset(data)
        assert isinstance(inputs, tuple)
        assert torch.equal(inputs[0], INPUTS)
        assert torch.equal(inputs[1], LABELS)
        assert torch.equal(labels, LABELS)


def test_an_image_folder_with_a_transform_is_a_dataset(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for value in (0, 255):
            Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / label / f"{value}.png")
    inputs, labels = as_dataset(ImageFolder(str(tmp_path), ToTensor()))
    assert inputs.shape == (4, 3, 4, 4)
    assert inputs.amax((1, 2, 3)).tolist() == [0, 1, 0, 1]
    assert labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"sample 0: inputs: expected numbers .*, got Image"):
        as_dataset(ImageFolder(str(tmp_path)))


def test_every_sample_is_read_once_and_the_first_one_twice():
    read = []

    class Recording(Rows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    as_dataset(Recording(list(zip(INPUTS, LABELS))))
    assert read == [0, *range(12)]


def test_float64_inputs_are_cast_and_one_line_says_so(caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            core = Core(model=mlp(), dataset=(INPUTS.double(), LABELS), recipe=RECIPE)
    assert core.dataset[0].dtype == torch.float32
    assert torch.equal(core.dataset[0], INPUTS)
    line = "inputs: cast from float64 to float32, the type of the model's weights"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_model_with_float64_weights_gets_float64_inputs():
    data = (INPUTS.double(), LABELS)
    core = Core(model=mlp().double(), dataset=data, recipe=RECIPE)
    assert core.dataset[0].dtype == torch.float64
    assert core.pretrain()["1.weight"].dtype == torch.float64
    assert predict(core.model, clone(core.model.state_dict(), 1), data[0]).shape == (1, 12, 3)


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[5] = value
    return tensor


class Named(nn.Module):
    def forward(self, x):
        return {"scores": STRAIGHT(x), "loss": x.mean()}


REFUSED = {
    "labels above the outputs": (
        (INPUTS, with_value(LABELS, 3)),
        r"labels: expected 0 to 2, as the model has 3 outputs, got 3",
    ),
    "labels below 0": (
        (INPUTS, with_value(LABELS, -100)),
        r"labels: expected 0 to 2, as the model has 3 outputs, got -100",
    ),
    "labels of a wrong type": (
        (INPUTS, LABELS.float()),
        r"labels: expected integers, got torch.float32",
    ),
    "labels of a wrong shape": (
        (INPUTS, torch.zeros(12, 3, dtype=torch.int64)),
        r"model: expected outputs \[B, 3, classes\] for labels \[N, 3\], got \[B, 3\]",
    ),
    "NaN": (
        (with_value(INPUTS, torch.nan), LABELS),
        r"inputs: expected finite values, got nan",
    ),
    "infinity": (
        (with_value(INPUTS, -torch.inf), LABELS),
        r"inputs: expected finite values, got -inf",
    ),
    "NaN in a dict": (
        ({"a": INPUTS, "b": with_value(INPUTS, torch.nan)}, LABELS),
        r"inputs\['b'\]: expected finite values, got nan",
    ),
    "unequal lengths": (
        (INPUTS[:11], LABELS),
        r"expected inputs and labels of one length above 0, got 11 and 12",
    ),
    "unequal lengths in a dict": (
        ({"a": INPUTS, "b": INPUTS[:7]}, LABELS),
        r"expected inputs and labels of one length above 0, got 12 and 7 and 12",
    ),
    "no sample": (
        (INPUTS[:0], LABELS[:0]),
        r"expected inputs and labels of one length above 0, got 0 and 0",
    ),
    "no sample in a dataset": (Rows([]), r"expected at least one sample, got none"),
    "no input": (({}, LABELS), r"inputs: expected at least one tensor, got none"),
    "a single number": (
        (INPUTS, torch.tensor(1)),
        r"labels: expected one row per sample, got a single number",
    ),
    "inputs of another shape": (
        (INPUTS[:, :, :4], LABELS),
        r"model: expected to run on inputs \[2, 1, 4, 8\] torch.float32, got: mat1",
    ),
    "a dict for a model of one input": (
        ({"a": INPUTS, "b": INPUTS}, LABELS),
        r"model: expected to run on inputs \[2, 1, 8, 8\] .*, got: .*unexpected keyword",
    ),
    "strings": (
        (np.array(["a"] * 12), LABELS),
        r"inputs: expected numbers in a tensor or an array, got dtype <U1",
    ),
    "objects": (
        (np.array([None] * 12), LABELS),
        r"inputs: expected numbers in a tensor or an array, got dtype object",
    ),
    "text in rows": (
        rows_of(text=["a", "b"], label=[0, 1]),
        r"sample 0: inputs: expected numbers in a tensor or an array, got str",
    ),
    "rows without a label": (
        rows_of(image=INPUTS, target=LABELS),
        r"sample 0: expected a key 'labels' or 'label' for the labels, got \['image', 'target'\]",
    ),
    "rows without inputs": (
        rows_of(label=LABELS),
        r"sample 0: expected inputs beside the labels 'label', got none",
    ),
    "samples of two sizes": (
        Rows([(torch.zeros(5), 0), (torch.zeros(7), 1)]),
        r"sample 1: expected the shapes of sample 0, \[\[5\], \[\]\], got \[\[7\], \[\]\]",
    ),
    "samples without a label": (
        Rows([torch.zeros(5)]),
        r"sample 0: expected \(input, label\) or a dict, got Tensor",
    ),
    "a table": (
        type("Table", (Rows,), {"__getitem__": lambda self, key: {}[key]})([1, 2]),
        r"sample 0: expected a dataset with samples 0 to 1, got Table without 0",
    ),
    "a loader": (
        DataLoader(TensorDataset(INPUTS, LABELS)),
        r"expected \(inputs, labels\), a dict of columns or a dataset with a length, "
        r"got DataLoader; pass its \.dataset",
    ),
    "a path": ("digits.csv", r"expected \(inputs, labels\), .* got str"),
    "a stream": (
        type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})(),
        r"expected \(inputs, labels\), .* got Stream",
    ),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["dataset", "held_out"])
def test_a_core_and_an_edge_refuse_data_by_name(data, message, name):
    options = {"dataset": DATA, name: data}
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        Core(model=STRAIGHT, recipe=RECIPE, **options)
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        EdgeClient(STRAIGHT, recipe=RECIPE, **options)


class Fixed(nn.Module):
    """Returns outputs of a given shape for any inputs."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return self.weight


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (Fixed(2, 3, 4), classification, r"expected outputs \[B, classes\] for .*got \[B, 3, 4\]"),
        (Fixed(2), classification, r"expected outputs \[B, classes\] for labels \[N\], got \[B\]"),
        (Fixed(3), classification, r"expected outputs \[B, ...\] for B samples, got \[3\] for 2"),
        (Fixed(), classification, r"expected outputs \[B, ...\] for B samples, got \[\] for 2"),
        (Named(), classification, r"expected a tensor or \"logits\".*\['scores', 'loss'\]"),
        (
            Fixed(2, 1),
            Regression(tolerance=1),
            r"expected outputs \[B\], shaped as the labels, got",
        ),
    ],
    ids=["too many axes", "too few", "no batch", "a scalar", "a dict", "regression"],
)
def test_outputs_of_a_wrong_form_are_refused(model, task, message):
    labels = LABELS.float() if isinstance(task, Regression) else LABELS
    with pytest.raises(ValueError, match=f"dataset: model: {message}"):
        Core(model=model, dataset=(INPUTS, labels), task=task, recipe=RECIPE)


@pytest.mark.parametrize("options", [{"model": nn.Flatten}, {"task": Regression}])
def test_a_class_in_the_place_of_an_object_is_refused_by_name(options):
    ((name, value),) = options.items()
    message = f"dataset: {name}: expected an object, got the class {value.__name__}"
    with pytest.raises(ValueError, match=message):
        Core(**{"model": STRAIGHT, "dataset": DATA, "recipe": RECIPE} | options)


def test_a_class_axis_that_the_labels_do_not_have_is_refused():
    task = Classification(class_axis=-3)
    with pytest.raises(ValueError, match=r"class_axis: expected -1 to -1 for labels \[N\], got -3"):
        Core(model=STRAIGHT, dataset=DATA, task=task, recipe=RECIPE)


def test_the_check_changes_neither_the_model_nor_the_generator():
    model = mlp(nn.Dropout(0.5)).train()
    model[4].forward = partial(torch.nn.functional.dropout, p=0.5, training=True)
    before, state = snapshot(model.state_dict()), torch.get_rng_state()
    Core(model=model, dataset=DATA, recipe=RECIPE)
    EdgeClient(model, DATA, RECIPE)
    assert same_bits(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_dataset_larger_than_the_free_memory_is_refused(monkeypatch):
    # 3 samples of 4 x 10^8 bytes, and their labels of 8 bytes.
    monkeypatch.setattr(samples, "available_bytes", lambda: 10**9)
    large = Rows([(torch.zeros(1).expand(10**8), 0)] * 3)
    with pytest.raises(ValueError, match=r"at most the 1.0 GB of free memory, got 1.2 GB of"):
        as_dataset(large)
    assert as_dataset(Rows([(torch.zeros(4), 0)] * 3))[0].shape == (3, 4)


def test_predictions_larger_than_the_free_memory_are_refused(monkeypatch):
    # 3 clones, 12 samples of 64 numbers, 4 bytes each: 9,216 bytes.
    model = nn.Flatten()
    model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    start = clone(model.state_dict(), 3)
    monkeypatch.setattr(samples, "available_bytes", lambda: 9_215)
    with pytest.raises(ValueError, match=r"free memory, got 0.0 GB of predictions"):
        predict(model, start, INPUTS, batch_size=5)
    monkeypatch.setattr(samples, "available_bytes", lambda: 9_216)
    assert predict(model, start, INPUTS, batch_size=5).shape == (3, 12, 64)


def test_an_error_of_the_model_keeps_its_cause():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("my own mistake")

    with pytest.raises(ValueError, match=r"model: expected to run on .*my own mistake") as raised:
        Core(model=Broken(), dataset=DATA, recipe=RECIPE)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("installed", [True, False])
def test_the_free_memory_is_known_with_and_without_psutil(installed, monkeypatch):
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=123))
    monkeypatch.setitem(sys.modules, "psutil", memory if installed else None)
    assert samples.available_bytes() == 123 if installed else samples.available_bytes() > 2**20
