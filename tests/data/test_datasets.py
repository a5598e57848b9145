import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import (
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    partition,
    partition_with,
    take,
)
from flwr_cloned_kd.data.datasets import moments, standardise
from tests.helpers.reference import few


def assert_standardised(inputs):
    # Float32 sums of some thousand numbers have an error of about 1e-6.
    deviation, centre = torch.std_mean(inputs, dim=(0, 2, 3))
    assert centre.abs().max() < 1e-5
    assert (deviation - 1).abs().max() < 1e-5


@few
@given(num_parts=st.integers(1, 12), more=st.integers(0, 60), seed=st.integers(0, 9))
def test_parts_are_disjoint_cover_everything_and_are_even(num_parts, more, seed):
    num_samples = num_parts + more
    parts = partition(num_samples, num_parts, seed=seed)
    sizes = [len(part) for part in parts]
    assert len(parts) == num_parts
    assert torch.cat(parts).sort().values.tolist() == list(range(num_samples))
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_alone_determines_the_parts():
    first = partition(50, 5, seed=1)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, partition(50, 5, seed=1)))
    assert not torch.equal(first[0], partition(50, 5, seed=2)[0])


def test_class_counts_of_ten_cifar_parts_deviate_by_6_7():
    # Drawing n = 5,000 of N = 50,000 of which K = 500 are of a class: the hypergeometric variance
    # n K/N (1 - K/N) (N - n)/(N - 1) = 50 0.99 45000/49999 = 44.6, so 6.67. A sample deviation of
    # 1,000 counts is off by 6.67 / sqrt(2 1000) = 0.15 (one sigma); 0.5 is more than three.
    labels = torch.arange(50_000) % 100
    counts = torch.stack([labels[part].bincount(minlength=100) for part in partition(50_000, 10)])
    deviation = (counts - 50.0).square().mean().sqrt().item()
    assert deviation == pytest.approx((50 * 0.99 * 45_000 / 49_999) ** 0.5, abs=0.5)


@pytest.mark.parametrize("num_parts", [0, 4])
def test_more_parts_than_samples_or_none_are_refused(num_parts):
    with pytest.raises(ValueError, match=f"num_parts: expected 1 to 3, got {num_parts}"):
        partition(3, num_parts)


def test_take_copies_the_named_rows():
    inputs, labels = torch.arange(5.0)[:, None], torch.arange(5)
    x, y = take((inputs, labels), [3, 1])
    x[0] = -1
    assert y.tolist() == [3, 1]
    assert x.tolist() == [[-1], [1]]
    assert inputs[3] == 3


@pytest.mark.parametrize("rows", [[], (), torch.tensor([]), torch.tensor([], dtype=torch.int64)])
def test_no_rows_are_an_empty_dataset(rows):
    x, y = take((torch.zeros(3, 1, 2, 2), torch.arange(3)), rows)
    assert (x.shape, y.shape) == ((0, 1, 2, 2), (0,))


def test_digits_are_standardised_and_their_split_is_fixed():
    pytest.importorskip("sklearn")
    (x, y), (x_test, y_test) = load_digits()
    assert (x.shape, y.shape) == ((1437, 1, 8, 8), (1437,))
    assert (x_test.shape, y_test.shape) == ((360, 1, 8, 8), (360,))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert_standardised(x)
    again = load_digits()
    assert torch.equal(again[0][0], x)
    assert torch.equal(again[1][1], y_test)


def test_digits_are_split_alike_in_every_class():
    pytest.importorskip("sklearn")
    (_, y), (_, y_test) = load_digits(test_size=100)
    counts, held_out = y.bincount(), y_test.bincount()
    assert held_out.sum() == 100
    assert ((counts + held_out) * 100 / 1797 - held_out).abs().max() <= 1


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"flwr-cloned-kd\[digits\]\""):
        load_digits()


def tensors(images, labels):
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def test_moments_are_those_of_each_channel_by_hand():
    # (1 + 3) / 2 = 2, sqrt((1 + 1) / 1); (0 + 255) / 2, sqrt(2 * 127.5^2 / 1).
    images = torch.tensor([[[[1, 3]], [[0, 255]]]], dtype=torch.uint8)
    mean, deviation = moments(images)
    assert mean.tolist() == [2, 127.5]
    assert deviation.tolist() == pytest.approx([2**0.5, 2**0.5 * 127.5])


def test_an_archive_of_floats_is_standardised(tmp_path):
    floats = {"x_train": PIXELS[:4] / 255, "x_test": PIXELS[4:] / 255}
    (x, _), _ = load_npz(save_npz(tmp_path / "a.npz", **floats))
    assert_standardised(x)


def test_standardising_by_hand():
    # Train pixels 1 and 3: mean 2, sample deviation sqrt((1 + 1) / 1) = sqrt 2; the test pixel 4
    # is scaled with the same moments.
    train = (np.array([[[1, 3]]], np.uint8), np.array([0]))
    test = (np.array([[[4, 2]]], np.uint8), np.array([1], np.int32))
    (x, _), (x_test, y_test) = standardise(tensors(*train), tensors(*test))
    assert x.flatten().tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert x_test.flatten().tolist() == pytest.approx([2**0.5, 0])
    assert (y_test.dtype, y_test.tolist()) == (torch.int64, [1])


def test_a_channel_of_one_value_becomes_zero():
    train = (np.full((2, 3, 3), 7, np.uint8), np.zeros(2))
    (x, _), _ = standardise(tensors(*train), tensors(*train))
    assert not x.any()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


def save_npz(path, **arrays):
    defaults = {
        "x_train": PIXELS[:4],
        "y_train": np.arange(4, dtype=np.uint8),
        "x_test": PIXELS[4:],
        "y_test": np.arange(2, dtype=np.uint8),
    }
    np.savez(path, **{name: a for name, a in (defaults | arrays).items() if a is not None})
    return path


def by_hand(pixels, reference):
    pixels, reference = (torch.tensor(a).permute(0, 3, 1, 2).double() for a in (pixels, reference))
    deviation, centre = torch.std_mean(reference, dim=(0, 2, 3), keepdim=True)
    return (pixels - centre) / deviation


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: x[..., :1],
        lambda x: x[..., :1].transpose(0, 3, 1, 2),
        lambda x: x[..., 0],
        lambda x: x[..., [0, 1, 2, 0]],
    ],
    ids=["HWC", "CHW", "HW1", "1HW", "HW", "four channels"],
)
def test_an_archive_is_read_with_any_order_of_axes(tmp_path, arrange):
    path = save_npz(tmp_path / "a.npz", x_train=arrange(PIXELS[:4]), x_test=arrange(PIXELS[4:]))
    (x, y), (x_test, y_test) = raw = load_npz(path)
    assert x.dtype == x_test.dtype == torch.uint8
    (x, _), (x_test, _) = standardise(*raw)
    channels = [0, 1, 2, 0][: x.shape[1]]
    assert x.shape[2:] == x_test.shape[2:] == (5, 7)
    # Float32 against float64 of numbers around 1, moments over 140 pixels.
    expected = by_hand(PIXELS[:4, ..., channels], PIXELS[:4, ..., channels])
    assert torch.allclose(x.double(), expected, atol=1e-5)
    expected = by_hand(PIXELS[4:, ..., channels], PIXELS[:4, ..., channels])
    assert torch.allclose(x_test.double(), expected, atol=1e-5)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (y.tolist(), y_test.tolist()) == ([0, 1, 2, 3], [0, 1])


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_an_archive_without_an_array_is_refused_by_name(tmp_path, name):
    path = save_npz(tmp_path / "short.npz", **{name: None})
    with pytest.raises(ValueError, match=rf"short\.npz: expected .*, missing {name}$"):
        load_npz(path)


@pytest.mark.parametrize(
    ("part", "arrays", "actual"),
    [
        ("train", {"x_train": PIXELS[:4, 0, 0]}, "(4, 3) and (4,)"),
        ("test", {"x_test": PIXELS[:1]}, "(1, 5, 7, 3) and (2,)"),
        ("test", {"y_test": np.zeros((2, 1))}, "(2, 5, 7, 3) and (2, 1)"),
        ("train", {"x_train": PIXELS[:0], "y_train": np.zeros(0)}, "(0, 5, 7, 3) and (0,)"),
    ],
    ids=["images without rows", "lengths that differ", "labels in columns", "nothing"],
)
def test_an_archive_of_misshaped_arrays_is_refused_by_name(tmp_path, part, arrays, actual):
    path = save_npz(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd\.npz: expected") as refusal:
        load_npz(path)
    assert f"x_{part} [N, H, W(, C)] and y_{part} [N], got {actual}" in str(refusal.value)


def test_an_archive_that_holds_a_pickle_is_refused_unopened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    path = save_npz(tmp_path / "trap.npz", x_train=np.array([Trap()] * 4, dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_npz(path)


def test_cifar100_is_read_through_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    contents = {
        "train": {"data": rows[:4], "fine_labels": [0, 99, 5, 5]},
        "test": {"data": rows[4:], "fine_labels": [7, 0]},
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)

    (x, y), (x_test, y_test) = raw = load_cifar100(tmp_path, download=False)
    assert x.dtype == x_test.dtype == torch.uint8
    (x, _), (x_test, _) = standardise(*raw)

    assert (x.shape, x_test.shape) == ((4, 3, 32, 32), (2, 3, 32, 32))
    assert (y.tolist(), y_test.tolist()) == ([0, 99, 5, 5], [7, 0])
    assert_standardised(x)
    # CIFAR stores each channel plane after the other, rows first.
    planes = rows.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1)
    assert torch.allclose(x_test.double(), by_hand(planes[4:], planes[:4]), atol=1e-5)


def test_a_missing_cifar100_is_not_downloaded_without_download(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(RuntimeError, match="not found"):
        load_cifar100(tmp_path, download=False)


def test_a_dirichlet_partitioner_gives_disjoint_complete_parts():
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    labels = torch.arange(200) % 5
    partitioner = partitioners.DirichletPartitioner(
        4, partition_by="label", alpha=0.3, min_partition_size=1, seed=0
    )
    parts = partition_with(partitioner, labels)
    assert len(parts) == 4
    assert torch.cat(parts).sort().values.tolist() == list(range(200))
    assert all(part.dtype == torch.int64 for part in parts)
    # Even parts would hold 10 of every class; alpha = 0.3 is far from even.
    counts = torch.stack([labels[part].bincount(minlength=5) for part in parts])
    assert (counts - 10).abs().max() > 10


@pytest.fixture
def image_folder(tmp_path, monkeypatch):
    """Write a dataset whose images have the grey value 10 (label + 1) everywhere."""
    pytest.importorskip("flwr_datasets")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("flwr_datasets.federated_dataset.event", lambda *details: None)
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=9)}
    )
    folder = tmp_path / "greys"
    folder.mkdir()
    for split, labels in {"train": [0, 8, 3, 3], "test": [2, 1]}.items():
        pixels = [np.full((4, 5, 3), 10 * (label + 1), np.uint8) for label in labels]
        table = {"img": pixels, "fine_label": labels}
        rows = datasets.Dataset.from_dict(table, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_a_local_huggingface_dataset_keeps_pairs_together(image_folder):
    (x, y), (x_test, y_test) = raw = load_huggingface(str(image_folder))
    assert x.dtype == x_test.dtype == torch.uint8
    (x, _), (x_test, _) = standardise(*raw)
    assert (x.shape, x_test.shape) == ((4, 3, 4, 5), (2, 3, 4, 5))
    assert sorted(y.tolist()) == [0, 3, 3, 8]
    assert sorted(y_test.tolist()) == [1, 2]
    # The grey values 10, 40, 40, 90 on 20 pixels each: mean 45, variance 80 / 79 (35^2 + 5^2 +
    # 5^2 + 45^2) / 4.
    deviation = (80 / 79 * (35**2 + 5**2 + 5**2 + 45**2) / 4) ** 0.5
    for inputs, labels in ((x, y), (x_test, y_test)):
        expected = (10.0 * (labels + 1) - 45) / deviation
        assert torch.allclose(inputs, expected[:, None, None, None].expand_as(inputs), atol=1e-5)


def test_without_flwr_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ImportError, match=r"flwr-cloned-kd\[datasets\]"):
        load_huggingface("uoft-cs/cifar100")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.array([0.5, 1, 2, 3])}, "integers in y_train, got uint8 and float64"),
        ({"y_test": np.array(["a", "b"])}, "integers in y_test, got uint8 and <U1"),
        ({"x_test": np.zeros((2, 5, 5, 3))}, "images of one shape, got x_train"),
        ({"x_train": np.full((4, 6, 6, 3), np.nan)}, "finite pixels in x_train"),
    ],
)
def test_an_archive_of_unusable_values_is_refused_by_name(tmp_path, arrays, message):
    path = save_npz(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd\.npz: expected") as refusal:
        load_npz(path)
    assert message in str(refusal.value)


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npy: expected an \.npz archive of .*a single array"):
        load_npz(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "content", [b"", b"image,label\n0,1\n", b"\x80\x04.", b"\x93NUMPY", b"PK\x03\x04"]
)
def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path, content):
    path = tmp_path / "odd.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.npz: expected an \.npz archive of numbers, got"):
        load_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_that_is_cut_or_altered_is_refused_by_name(tmp_path, save):
    path, labels = tmp_path / "odd.npz", np.arange(2)
    pixels = PIXELS[:2, :2, :2]
    save(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    whole = path.read_bytes()
    expected = load_npz(path)
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"odd\.npz: expected"):
            load_npz(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 129]) + whole[place + 1 :])
        actual, refusal = expected, f"{path}: expected"
        try:
            actual = load_npz(path)
        except ValueError as error:
            refusal = str(error)
        assert "odd.npz: expected" in refusal
        # Some bytes, such as a time, are not read; the bytes of the arrays have a checksum.
        for part, same in zip(actual, expected):
            assert all(torch.equal(tensor, other) for tensor, other in zip(part, same))


def test_an_archive_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")


def test_a_huggingface_dataset_without_the_column_is_refused(image_folder):
    with pytest.raises(ValueError, match="expected a column 'label', got"):
        load_huggingface(str(image_folder), label_key="label")
