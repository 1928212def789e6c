"""Whole batches augmented at once are what image after image would be."""

import pytest
import torch

from lilliput.core.random import generator
from lilliput.data import ArrayBatches, Dataset, federate
from lilliput.data.augment import Augment, crop, cutout, flip, normalise


def images(n=13, channels=3, height=8, width=6, dtype=torch.uint8):
    return torch.randint(0, 256, (n, channels, height, width), generator=generator("images"), dtype=dtype)


def reflected(place, length):
    place = abs(place)
    return place if place < length else 2 * (length - 1) - place


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_equals_pixel_by_pixel(mode, dtype):
    x, padding = images(dtype=dtype), 3
    out = crop(x, generator("crop"), padding, mode)
    draws = generator("crop")
    down, right = (torch.randint(2 * padding + 1, (len(x),), generator=draws) for _ in range(2))
    expected = torch.zeros_like(x)
    for n in range(len(x)):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                i, j = row + int(down[n]) - padding, column + int(right[n]) - padding
                if mode == "reflect":
                    i, j = reflected(i, x.shape[2]), reflected(j, x.shape[3])
                if 0 <= i < x.shape[2] and 0 <= j < x.shape[3]:
                    expected[n, :, row, column] = x[n, :, i, j]
    assert torch.equal(out, expected) and out.dtype == dtype
    assert len(set(down.tolist())) > 3  # the images are cut at different places


def test_flip_mirrors_some_and_leaves_the_others():
    x = images(200)
    out = flip(x, generator("flip"))
    mirrored = torch.rand(200, generator=generator("flip")) < 0.5
    assert 60 < int(mirrored.sum()) < 140
    for before, after, turned in zip(x, out, mirrored, strict=True):
        assert torch.equal(after, before.flip(2) if turned else before)


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_cutout_clears_a_clipped_square(size):
    x = images() + 1.0
    out = cutout(x, generator("cut"), size)
    draws = generator("cut")
    rows, columns = (torch.randint(length, (len(x), 1), generator=draws) for length in x.shape[2:])
    for n in range(len(x)):
        top, left = int(rows[n]) - size // 2, int(columns[n]) - size // 2
        expected = x[n].clone()
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert torch.equal(out[n], expected)


def test_normalise_is_minus_mean_over_std_of_pixels_scaled_to_one():
    x, mean, std = images(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    torch.testing.assert_close(normalise(x, mean, std), (x / 255 - m) / s, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalise(x / 255, mean, std), (x / 255 - m) / s, rtol=1e-5, atol=1e-5)
    assert torch.equal(normalise(x, None, None), x / 255)
    before = x / 255
    kept = before.clone()
    normalise(before, mean, std)
    assert torch.equal(before, kept)  # the data set itself is never written to


def test_without_a_generator_nothing_is_drawn():
    x = images()
    assert torch.equal(Augment(("crop:2", "flip", "cutout:4"))(x, None), x / 255)


def test_cutout_comes_after_normalising():
    out = Augment(("cutout:100",), (0.5,) * 3, (0.5,) * 3)(images(), generator("a"))
    assert torch.equal(out, torch.zeros_like(out))  # the mean colour, where black would be -1


def test_training_is_augmented_and_evaluation_is_not():
    x, y = images(40), torch.arange(40) % 4
    dataset = Dataset("d", (x, y), (x, y), 4, augment=("crop:2", "flip"))
    f = federate(dataset, clients=1, batch_size=40)
    first, second = (next(f.train[0].epoch(generator("epoch", i))) for i in (0, 0))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], next(f.train[0].epoch(generator(1)))[0])
    order = torch.randperm(40, generator=generator("epoch", 0))
    assert torch.equal(first[1], y[order]) and not torch.equal(first[0], x[order] / 255)
    assert torch.equal(next(f.train[0].epoch(None))[0], x / 255)
    assert torch.equal(next(f.test.epoch(generator(0)))[0].sort(0).values, (x / 255).sort(0).values)
    plain = federate(dataset, clients=1, batch_size=40, augment=None)
    assert torch.equal(next(plain.train[0].epoch(generator("epoch", 0)))[0], x[order] / 255)
    assert ArrayBatches((x, y), 8).examples == 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flipp", "did you mean 'flip'"),
        ("crop:four", "padding is 'four'"),
        ("crop:4:mirror", "choose zero or reflect"),
        ("flip:2", "too many settings"),
    ],
)
def test_unknown_steps_are_refused_at_once(text, words):
    with pytest.raises(ValueError, match=words):
        Augment((text,))


def test_a_crop_wider_than_the_image_is_refused():
    with pytest.raises(ValueError, match="choose less than 6"):
        crop(images(), generator(0), 6)
