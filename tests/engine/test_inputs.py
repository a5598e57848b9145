"""Augmentation and label noise."""

import pytest
import torch
from torch.nn import functional as F

from flwr_cloned_kd import CropAndFlip, crop_and_flip, shuffle_labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pad", [4, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_every_view_is_padding_slicing_and_flipping_by_hand(pad, flip):
    augment, side = CropAndFlip(pad, flip), 2 * pad + 1
    image = torch.arange(2 * 5 * 6).reshape(2, 5, 6) + 1.0
    padded = F.pad(image, (pad, pad, pad, pad))
    expected = [
        torch.flip(crop, (-1,)) if mirrored else crop
        for mirrored in ((False, True) if flip else (False,))
        for top in range(side)
        for left in range(side)
        for crop in [padded[:, top : top + 5, left : left + 6]]
    ]
    num_views = augment.num_views
    views = augment.view(image.expand(num_views, -1, -1, -1), torch.arange(num_views))
    assert num_views == len(expected)
    assert torch.equal(views, torch.stack(expected))


def test_the_usual_family_has_162_views_and_81_without_mirrors():
    assert crop_and_flip == CropAndFlip(pad=4, flip=True)
    assert crop_and_flip.num_views == 162
    assert CropAndFlip(flip=False).num_views == 81


def test_views_of_digits_are_never_mirrored():
    # Each pixel holds its column number, which rises from left to right in an unmirrored crop.
    images = (torch.arange(8.0) + 1).expand(500, 1, 8, 8)
    rows = CropAndFlip(2, flip=False)(images, seeded()).amax(2)[:, 0]
    inside = (rows[:, 1:] > 0) & (rows[:, :-1] > 0)
    assert inside.any(1).all()
    assert ((rows[:, 1:] > rows[:, :-1]) | ~inside).all()


def test_every_view_is_drawn_and_no_other():
    # 10,000 draws of 162 views: one is missed with probability 162 exp(-10000 / 162) < 1e-24.
    drawn = crop_and_flip.draw(10_000, seeded())
    assert drawn.unique().tolist() == list(range(162))


def test_augmenting_draws_one_view_per_image():
    images, state = torch.randn(9, 3, 6, 6), torch.get_rng_state()
    expected = crop_and_flip.view(images, crop_and_flip.draw(9, seeded(3)))
    assert torch.equal(crop_and_flip(images, seeded(3)), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_stay_where_the_noise_has_probability_zero():
    generator, labels = seeded(), torch.arange(10)
    assert all(torch.equal(shuffle_labels(labels, generator, p=0.0), labels) for _ in range(100))


def test_noisy_labels_are_those_of_the_batch_in_another_order():
    generator, labels = seeded(), torch.arange(12) % 4
    for _ in range(20):
        noisy = shuffle_labels(labels, generator)
        assert torch.equal(noisy.sort().values, labels.sort().values)
    assert not torch.equal(noisy, labels)
    assert torch.equal(labels, torch.arange(12) % 4)


def test_the_noise_permutes_the_given_fraction_of_batches():
    # 2,000 tries of probability 0.3: one sigma is sqrt(0.3 0.7 / 2000) = 0.01; 0.04 is four. A
    # permutation of 20 different labels is the identity once in 20!.
    generator, labels = seeded(), torch.arange(20)
    hits = sum(
        not torch.equal(shuffle_labels(labels, generator, p=0.3), labels) for _ in range(2_000)
    )
    assert hits / 2_000 == pytest.approx(0.3, abs=0.04)


def test_a_share_of_batches_is_a_fraction():
    with pytest.raises(ValueError, match="p: expected a fraction, 0 to 1, got 2"):
        shuffle_labels(torch.arange(3), torch.Generator(), p=2)
