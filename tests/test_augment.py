"""Views of photographs. Run with `python -m pytest tests/test_augment.py`.

Oracles: Pillow, torchvision's functions and DINO's pipeline of them, naive loops in numpy.
"""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torch.utils.data import default_collate

import augment
from augment import (
    MultiCropOptions,
    apply_color,
    cut,
    draw_color,
    draw_window,
    gaussian_blur,
    resize,
)
from utils import InputError

ZERO, ONE = torch.zeros(3), torch.ones(3)
GREY = torch.tensor([0.299, 0.587, 0.114])


def multi_crop(whole=224, part=96, *, mask_grid=0, **changed):
    """Views of these sizes, not flipped upside down unless told."""
    sizes = {"global_crop_size": whole, "local_crop_size": part, "flip_vertical": False}
    return augment.MultiCrop(MultiCropOptions(**{**sizes, **changed}), mask_grid)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def gap(one, other):
    return (one.double() - other.double()).abs().max().item()


class Fixed:
    """A generator whose draws are given: jitter or not, grey or not, factors and order."""

    def __init__(self, jitter=True, grey=False, factors=(0, 0, 0), hue=0.0, order=(0, 1, 2, 3)):
        self.decisions = [0.0 if jitter else 0.99, 0.0 if grey else 0.99]
        self.factors, self.hue, self.order = np.array(factors), hue, order

    def random(self):
        return self.decisions.pop(0)

    def uniform(self, low, high, size=None):
        return self.hue if size is None else self.factors

    def permutation(self, count):
        return np.array(self.order)


def row(color=None, sigma=0.0, threshold=2.0, gamma=1.0):
    color = [*np.eye(3).ravel(), 0, 0, 0] if color is None else color
    return torch.tensor([[*color, sigma, threshold, gamma]], dtype=torch.float32)


@pytest.fixture
def middle():
    """An image of middle colours, which no change below clamps, uint8 (3, 20, 24)."""
    return torch.randint(95, 150, (3, 20, 24), generator=torch.Generator().manual_seed(3)).byte()


# --------------------------------------------------------------------------------------- multi-crop


@pytest.mark.parametrize(
    "crops",
    [
        multi_crop(),
        multi_crop(96, 64, global_crops_scale=(0.1, 1.0), local_crops_scale=(0.3, 0.5)),
        multi_crop(64, 64),
    ],
)
def test_no_crop_of_a_photograph_of_the_least_side_is_enlarged(monkeypatch, crops):
    """Windows as they are drawn; some of a photograph a tenth smaller are enlarged."""
    windows = []

    def noted(image, window, size, angle):
        windows.append(min(window[2:]) - size)
        return torch.zeros(3, size, size, dtype=torch.uint8)

    monkeypatch.setattr(augment, "cut", noted)
    for share, enlarged in ((1.0, False), (0.9, True)):
        side = int(crops.min_side * share)
        for key in range(400):
            crops(torch.zeros(3, side, side, dtype=torch.uint8), (key,))
        assert (min(windows) < -1) == enlarged, min(windows)  # windows are whole pixels
        windows.clear()


@pytest.mark.parametrize("number", [0, 1, 6])
def test_sizes_and_number_of_views(photograph, number):
    item = multi_crop(40, 24, local_crops_number=number)(photograph, (0, 0, 0))
    assert item["global"].shape == (2, 3, 40, 40) and item["global"].dtype == torch.uint8
    assert item["local"].shape == (number, 3, 24, 24) and item["local"].dtype == torch.uint8
    assert item["color"].shape == (2 + number, 15) and item["color"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 30, 90), (3, 90, 30), (3, 1, 1), (3, 600, 500)])
def test_photographs_of_any_shape(shape):
    item = multi_crop(32, 16, rotation=20.0)(torch.full(shape, 9, dtype=torch.uint8), (1,))
    assert item["global"].shape == (2, 3, 32, 32) and item["local"].shape == (6, 3, 16, 16)


def test_views_depend_on_the_key_alone(photograph):
    crops = multi_crop(32, 16, rotation=15.0, flip_vertical=True)
    first = crops(photograph, (1, 2, 3))
    torch.rand(1), np.random.random(1)
    again = crops(photograph, (1, 2, 3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for key in ((1, 2, 4), (1, 3, 3), (0, 2, 3)):
        other = crops(photograph, key)
        assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["global"][0], first["global"][1])


def test_windows_are_drawn_as_torchvision_draws_them():
    height, width, scale = 120, 150, (0.3, 0.9)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    ours = np.array([draw_window((height, width), scale, rng) for _ in range(4000)])
    theirs = np.array(
        [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    assert (ours[:, 0] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] >= 0).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    measures = [
        lambda w: w[:, 2] * w[:, 3] / (height * width),
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0] / np.maximum(1, height - w[:, 2]),
        lambda w: w[:, 1] / np.maximum(1, width - w[:, 3]),
    ]
    for measure in measures:
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    share = measures[0](ours)
    assert 0.29 < share.min() < 0.33 and 0.85 < share.max() < 0.91


def test_window_of_an_odd_photograph_is_its_middle():
    rng = np.random.default_rng(0)
    assert draw_window((10, 1000), (1.0, 1.0), rng) == (0, 493, 10, 13)
    assert draw_window((1000, 10), (1.0, 1.0), rng) == (493, 0, 13, 10)


def test_scales_and_angles_are_those_of_the_options(monkeypatch, photograph):
    scales, angles, real_window, real_cut = [], [], augment.draw_window, augment.cut

    def note_window(shape, scale, rng):
        scales.append(scale)
        return real_window(shape, scale, rng)

    def note_cut(image, window, size, angle):
        angles.append(angle)
        return real_cut(image, window, size, angle)

    monkeypatch.setattr(augment, "draw_window", note_window)
    monkeypatch.setattr(augment, "cut", note_cut)
    for key in range(20):
        scales_of = {"global_crops_scale": (0.5, 0.9), "local_crops_scale": (0.1, 0.2)}
        crops = multi_crop(16, 8, local_crops_number=3, rotation=20.0, **scales_of)
        crops(photograph, (key,))
    assert scales == ([(0.5, 0.9)] * 2 + [(0.1, 0.2)] * 3) * 20
    assert -20 <= min(angles) < -14 and 14 < max(angles) <= 20


def test_crops_hold_a_least_share_of_the_fundus():
    """A disc in a black square; a crop as large as a window is the window itself."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    disc = ((rows - 128) ** 2 + (columns - 128) ** 2 < 128**2).to(torch.uint8) * 100
    photograph = disc.expand(3, 256, 256)
    scale = (0.05, 0.1)
    shares = {}
    for least in (0.0, 0.8):
        crops = multi_crop(64, 32, global_crops_scale=scale, min_fundus=least)
        items = [crops(photograph, (key,))["global"] for key in range(300)]
        lit = (torch.cat(items)[:, 0] > 50).float()
        shares[least] = lit.mean(dim=(1, 2))
        on_fundus = lit[:, 32, 32].mean()
    assert shares[0.0].min() < 0.3
    assert shares[0.8].min() > 0.75  # every eighth pixel is asked
    assert on_fundus == 1


def test_a_photograph_without_fundus_has_crops_too():
    crops = multi_crop(32, 16, min_fundus=0.9)
    item = crops(torch.zeros(3, 64, 64, dtype=torch.uint8), (0,))
    assert item["global"].shape == (2, 3, 32, 32)


def test_what_shows_the_fundus_by_hand():
    photograph = torch.zeros(3, 64, 64, dtype=torch.uint8)
    photograph[1, :, 32:] = 17
    assert augment.shows_fundus(photograph, (0, 32, 64, 32), 1.0)
    assert augment.shows_fundus(photograph, (0, 0, 64, 64), 0.5)
    assert not augment.shows_fundus(photograph, (0, 0, 64, 64), 0.6)
    assert not augment.shows_fundus(photograph, (0, 0, 64, 48), 0.0)  # its middle is black
    photograph[1] = 16
    assert not augment.shows_fundus(photograph, (0, 32, 64, 32), 0.1)


def test_flips():
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    images = {"horizontal": ramp, "vertical": ramp.transpose(1, 2).contiguous()}

    def share(image, axis, vertical):
        crops = multi_crop(8, 8, local_crops_number=0, flip_vertical=vertical)
        turned = 0
        for key in range(300):
            view = crops(image, (key,))["global"].float()
            first, last = view.select(axis, 0).mean((1, 2)), view.select(axis, 7).mean((1, 2))
            turned += (first > last).sum().item()
        return turned / 600

    assert 0.44 < share(images["horizontal"], 3, False) < 0.56
    assert share(images["vertical"], 2, False) == 0
    assert 0.44 < share(images["vertical"], 2, True) < 0.56


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [(40, 40), (96, 50), (150, 130), (7, 96)])
def test_resize_equals_pillow(photograph, size):
    expected = from_pil(to_pil(photograph).resize(size[::-1], Image.Resampling.BICUBIC))
    found = resize(photograph, *size)
    assert found.dtype == torch.uint8 and gap(found, expected) <= 2


def test_cut_takes_the_window(photograph):
    expected = to_pil(photograph).crop((20, 10, 80, 50)).resize((32, 32), 3)
    assert gap(cut(photograph, (10, 20, 40, 60), 32), from_pil(expected)) <= 2


@pytest.mark.parametrize("angle", [90.0, -90.0, 180.0])
def test_quarter_turns(photograph, angle):
    found = cut(photograph, (0, 0, 96, 96), 96, angle)
    turns = [torch.rot90(photograph, k, (1, 2)) for k in ((2,) if angle == 180 else (1, -1))]
    assert min(gap(found, turn) for turn in turns) <= 3
    opposite = cut(photograph, (0, 0, 96, 96), 96, -angle)
    assert angle == 180 or gap(found, opposite) > 3


@pytest.mark.parametrize("angle", [12.0, 45.0])
def test_turns_as_pillow_does(photograph, angle):
    """About the middle; beyond the photograph it is black."""
    found = cut(photograph, (0, 0, 96, 96), 96, angle).float()
    turns = [to_pil(photograph).rotate(a, Image.Resampling.BILINEAR) for a in (angle, -angle)]
    assert min((found - from_pil(t).float()).abs().mean().item() for t in turns) < 1.5
    bright = torch.full((3, 80, 80), 200, dtype=torch.uint8)
    turned = cut(bright, (0, 0, 80, 80), 80, angle)
    assert (turned[:, 0, 0] == 0).all() and (turned[:, 30:50, 30:50] == 200).all()


@pytest.mark.parametrize("window", [(60, 60, 80, 80), (60, 70, 80, 60), (70, 60, 60, 80)])
def test_turned_window_inside_the_photograph_sees_no_border(window):
    bright = torch.full((3, 200, 200), 200, dtype=torch.uint8)
    angles = (10.0, 30.0, 45.0, -30.0)
    darkest = {angle: int(cut(bright, window, 48, angle).min()) for angle in angles}
    assert min(darkest.values()) >= 198, darkest


# ------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (1, 3, 0, 2)])
@pytest.mark.parametrize("grey", [False, True])
def test_colour_is_torchvisions_sequence(middle, order, grey):
    units = np.array([0.35, -0.4, 0.6])
    b, c, s = 1 + units * (0.4, 0.4, 0.2)
    expected = middle.float() / 255
    change = {0: ("brightness", b), 1: ("contrast", c), 2: ("saturation", s)}
    for name, factor in [change[number] for number in order if number in change]:
        expected = getattr(TF, f"adjust_{name}")(expected, factor)
    if grey:
        expected = TF.rgb_to_grayscale(expected, 3)
    mean = middle.float().mean((1, 2)).numpy() / 255
    color = draw_color(mean, 1.0, Fixed(True, grey, units, 0.0, order))
    assert color.shape == (12,) and color.dtype == np.float32
    assert gap(apply_color(middle[None], row(color), ZERO, ONE)[0], expected) < 2e-3


def test_no_jitter_changes_nothing(middle):
    mean = middle.float().mean((1, 2)).numpy() / 255
    color = draw_color(mean, 1.0, Fixed(jitter=False, factors=(1, 1, 1), hue=0.1))
    assert gap(apply_color(middle[None], row(color), ZERO, ONE)[0], middle / 255) < 1e-6


class Normals:
    """A generator whose draws from a normal distribution are given."""

    def __init__(self, *values):
        self.values = list(values)

    def normal(self, size=None):
        return self.values.pop(0) if size is None else np.array(self.values.pop(0))


def test_another_cameras_colours_are_torchvisions_sequence(middle):
    saturation, gamma, balance, exposure, contrast = -1.2, 0.9, (0.5, -1.0, 0.3), 0.4, -0.8
    expected = TF.adjust_gamma(middle.float() / 255, math.exp(0.25 * gamma))
    expected = TF.adjust_saturation(expected, math.exp(0.35 * saturation))
    expected = expected * torch.tensor(balance).mul(0.18).exp().view(3, 1, 1)
    expected = TF.adjust_brightness(expected, math.exp(0.15 * exposure))
    centre = expected.mean((1, 2), keepdim=True)
    expected = centre + math.exp(0.25 * contrast) * (expected - centre)

    mean = middle.float().mean((1, 2)).numpy() / 255
    rng = Normals(saturation, gamma, balance, exposure, contrast)
    color, power = augment.draw_camera(mean, 1.0, rng)
    assert color.shape == (12,) and color.dtype == np.float32
    found = apply_color(middle[None], row(color, gamma=power), ZERO, ONE)[0]
    assert gap(found, expected) < 2e-3  # the mean is raised to gamma, not what has that mean
    color, power = augment.draw_camera(mean, 0.0, np.random.default_rng(0))
    unchanged = apply_color(middle[None], row(color, gamma=power), ZERO, ONE)[0]
    assert gap(unchanged, middle / 255) < 1e-6


def test_another_camera_shows_both_views_alike_in_colour_and_blurs_half():
    photo, count = torch.randint(60, 200, (3, 12, 12)).byte(), 1500
    crops = multi_crop(8, 8, local_crops_number=1, jitter="camera")
    color = torch.stack([crops(photo, (key,))["color"] for key in range(count)]).double()
    for view in range(3):
        blurred = (color[:, view, 12] > 0).double().mean().item()
        assert abs(blurred - 0.5) <= 4 * math.sqrt(0.25 / count)
    assert (color[:, :, 13] == 2).all()  # nothing is solarized
    matrix = color[:, :, :9].view(count, 3, 3, 3)
    assert (matrix - matrix[:, :, :1]).abs().amax((2, 3)).min() > 1e-3  # nor grey
    tone = color[:, :2, 14].log()
    assert abs(tone.std().item() - 0.25) < 0.02 and abs(tone.mean().item()) < 0.02
    assert abs(np.corrcoef(tone.T.numpy())[0, 1]) < 4 / math.sqrt(count)  # each view has its own


def test_noise_is_as_strong_as_drawn_and_of_each_crop_its_own(photograph):
    flat = torch.full((3, 200, 200), 120, dtype=torch.uint8)
    noisy = augment.add_noise(flat, 0.02, np.random.default_rng(5)).float() - 120
    assert abs(noisy.mean().item()) < 0.1
    expected = math.sqrt((0.02 * 255) ** 2 + 1 / 12)  # and that of rounding
    assert abs(noisy.std().item() - expected) < 0.05
    crops = multi_crop(64, 32, noise=0.1, local_crops_number=1)
    item, again = crops(photograph, (3,)), crops(photograph, (3,))
    assert torch.equal(item["global"], again["global"])
    clean = multi_crop(64, 32, local_crops_number=1)(photograph, (3,))
    difference = item["global"][0].float() - clean["global"][0].float()
    assert 0 < difference.std() <= 0.1 * 255 * 1.1


@pytest.mark.parametrize("hue", [-0.1, 0.04, 0.1])
def test_hue_keeps_luma_and_grey_and_turns_chroma(middle, hue):
    color = draw_color(np.array([0.4, 0.4, 0.4]), 1.0, Fixed(hue=hue))
    before = middle.float() / 255
    after = apply_color(middle[None], row(color), ZERO, ONE)[0]
    luma = torch.einsum("c,chw->hw", GREY, before)
    assert gap(torch.einsum("c,chw->hw", GREY, after), luma) < 2e-3
    grey = torch.full((1, 3, 4, 4), 120, dtype=torch.uint8)
    assert gap(apply_color(grey, row(color), ZERO, ONE), grey / 255) < 2e-3
    yiq = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    old, new = (torch.view_as_complex((yiq @ v.flatten(1)).T.contiguous()) for v in (before, after))
    kept = old.abs() > 0.03
    turned = (new[kept] / old[kept]).angle()
    assert gap(turned, torch.full_like(turned, 2 * math.pi * hue)) < 0.02
    assert gap(new.abs(), old.abs()) < 2e-3


def test_colour_of_each_crop_is_its_own(middle):
    half = row([*np.eye(3).ravel() * 0.5, 0.1, 0.1, 0.1])
    rows = torch.cat([row(), half, row(threshold=0.5), row(sigma=1.0)])
    found = apply_color(middle.expand(4, 3, 20, 24), rows, ZERO, ONE)
    image = middle.float() / 255
    assert gap(found[0], image) < 1e-6 and gap(found[1], image * 0.5 + 0.1) < 1e-6
    assert gap(found[2], torch.where(image >= 0.5, 1 - image, image)) < 1e-6
    assert gap(found[3], gaussian_blur(image[None], torch.tensor([1.0]))[0]) < 1e-6


def test_colours_stay_in_range_before_blur_and_normalisation():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    found = apply_color(image, row([*np.eye(3).ravel() * 2, -0.5, -0.5, -0.5]), ZERO, ONE)
    assert torch.equal(found, image.float() / 255)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision_inside(photograph, sigma):
    image = photograph.float() / 255
    found = gaussian_blur(torch.stack([image.flip(1), image]), torch.tensor([1.3, sigma]))
    expected = TF.gaussian_blur(image, [13, 13], [sigma, sigma])
    assert gap(found[1, :, 6:-6, 6:-6], expected[:, 6:-6, 6:-6]) < 1e-5


@pytest.mark.parametrize("on_cuda", [False, True])
def test_blur_is_the_naive_convolution_with_edges_repeated(monkeypatch, on_cuda):
    if on_cuda:  # what a GPU takes, computed here
        monkeypatch.setattr(augment, "_add_shifted", lambda i, k, reach: augment._convolve(i, k))
    sigmas, rng = (0.1, 0.4, 1.5, 2.0), np.random.default_rng(0)
    images = rng.random((len(sigmas), 3, 9, 15))
    found = gaussian_blur(torch.tensor(images, dtype=torch.float32), torch.tensor(sigmas))
    for image, sigma, blurred in zip(images, sigmas, found, strict=True):
        reach = math.ceil(3 * sigma)
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-(offsets**2) / (2 * sigma**2))
        kernel /= kernel.sum()
        ends = ((0, 0), (reach, reach), (reach, reach))
        taps = list(zip(kernel, offsets + reach, strict=True))
        padded = np.pad(image, ends, mode="edge")
        rows = sum(w * padded[:, :, at : at + 15] for w, at in taps)
        expected = sum(w * rows[:, at : at + 9] for w, at in taps)
        assert gap(blurred, torch.tensor(expected)) < 1e-5


def test_colour_is_the_same_for_one_crop_and_for_many(photograph):
    """A CPU takes some crops at a time; how many must not show."""
    rng, many = np.random.default_rng(0), 9
    rows = torch.tensor(
        [
            [
                *draw_color(np.full(3, 0.4), 1.0, rng),
                rng.uniform(0.1, 2) * (i % 2),
                0.5 + i % 3,
                1 + 0.5 * (i % 2),
            ]
            for i in range(many)
        ],
        dtype=torch.float32,
    )
    crops = torch.from_numpy(rng.integers(0, 256, (many, 3, 224, 224), dtype=np.uint8))
    whole = apply_color(crops, rows, ZERO, ONE)
    single = [apply_color(c[None], r[None], ZERO, ONE) for c, r in zip(crops, rows, strict=True)]
    assert whole.shape == crops.shape and gap(whole, torch.cat(single)) < 1e-6


def test_solarize_equals_pillow():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    expected = from_pil(ImageOps.solarize(to_pil(image)))
    assert gap(apply_color(image[None], row(threshold=0.5), ZERO, ONE)[0] * 255, expected) < 0.01


def test_normalisation_equals_torchvision(middle):
    mean, std = [0.4, 0.3, 0.2], [0.3, 0.2, 0.1]
    expected = TF.normalize(middle.float() / 255, mean, std)
    found = apply_color(middle[None], row(), torch.tensor(mean), torch.tensor(std))
    assert gap(found[0], expected) < 1e-5


def test_probabilities_are_those_of_dino():
    """Blur 1, 0.1, 0.5; solarize 0, 0.2, 0; grey 0.2; jitter 0.8, each within 4 deviations."""
    photo, count = torch.randint(0, 255, (3, 12, 12)).byte(), 2500
    crops = multi_crop(8, 8, local_crops_number=1)
    color = torch.stack([crops(photo, (key,))["color"] for key in range(count)]).double()
    blurred, solarized = color[:, :, 12] > 0, color[:, :, 13] <= 1
    matrix = color[:, :, :9].view(count, 3, 3, 3)
    grey = (matrix - matrix[:, :, :1]).abs().amax((2, 3)) < 1e-5
    plain = (matrix - torch.eye(3)).abs().amax((2, 3)) < 1e-6
    pairs = (blurred, (1.0, 0.1, 0.5)), (solarized, (0.0, 0.2, 0.0)), (grey, (0.2,) * 3)
    for found, expected in (*pairs, (plain, (0.16,) * 3)):
        for view, p in enumerate(expected):
            allowed = 4 * math.sqrt(p * (1 - p) / count)
            assert abs(found[:, view].double().mean().item() - p) <= allowed
    sigma = color[:, 0, 12]
    assert ks_2samp(sigma.numpy(), np.linspace(0.1, 2.0, 5000)).pvalue > 1e-3
    assert set(color[:, 1, 13].unique().tolist()) == {0.5, 2.0}


def test_jitter_spreads_as_torchvisions(middle):
    """Brightness and contrast of DINO's jitter and grey over many draws, two samples compared."""
    count, rng = 1200, np.random.default_rng(0)
    torch.manual_seed(0)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    theirs = T.Compose([jitter, T.RandomGrayscale(0.2), T.ToTensor()])
    image = to_pil(middle)
    expected = torch.stack([theirs(image) for _ in range(count)])
    mean = middle.float().mean((1, 2)).numpy() / 255
    rows = torch.cat([row(draw_color(mean, 1.0, rng)) for _ in range(count)])
    found = apply_color(middle.expand(count, -1, -1, -1), rows, ZERO, ONE)
    for measure in (lambda x: x.mean((1, 2)), lambda x: x.std((1, 2))):
        pair = [measure(torch.einsum("c,bchw->bhw", GREY, x)).numpy() for x in (found, expected)]
        changed = [v[abs(v - np.median(v)) > 2e-3] for v in pair]  # rounding moves the unchanged
        assert ks_2samp(*changed).pvalue > 1e-3


# ----------------------------------------------------------------------------------- masked patches


@pytest.mark.parametrize("grid", [1, 2, 6, 14, 28])
def test_masks_hide_what_is_asked(grid):
    """Of the 2 global crops one, either one, with 10 to 50 % of its patches."""
    hidden = np.stack([augment.draw_masks(grid, (7, key)) for key in range(400)])
    per_crop = hidden.sum(axis=2)
    assert hidden.shape == (400, 2, grid * grid) and hidden.dtype == bool
    assert ((per_crop > 0).sum(axis=1) == 1).all()
    assert 0.4 < (per_crop[:, 0] > 0).mean() < 0.6
    counts = per_crop.max(axis=1)
    least, most = max(1, round(0.1 * grid**2)), max(1, round(0.5 * grid**2))
    assert counts.min() >= least and counts.max() <= most
    if grid >= 14:
        assert ks_2samp(counts / grid**2, np.linspace(0.1, 0.5, 5000)).pvalue > 1e-3
        assert (hidden.any(axis=(0, 1))).all(), "every place is hidden at times"


def test_masked_patches_lie_in_blocks():
    """More neighbours are hidden together than by chance."""
    rng = np.random.default_rng(0)
    together = []
    for _ in range(200):
        mask = augment.draw_block_mask(14, 50, rng)
        assert mask.sum() == 50
        together.append((mask[:, 1:] & mask[:, :-1]).sum() / 50)
    by_chance = 50 / 196 * 13 / 14
    assert np.mean(together) > 2 * by_chance


def test_masks_change_no_view(photograph):
    plain = multi_crop(32, 16)(photograph, (1, 2, 3))
    masked = multi_crop(32, 16, mask_grid=4)(photograph, (1, 2, 3))
    hidden = masked.pop("mask")
    assert hidden.shape == (2, 16) and hidden.dtype == torch.bool
    assert plain.keys() == masked.keys()
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


def test_masks_of_a_batch_by_hand():
    """Places view by view; a crop's patches share its weight, the weights sum to 1."""
    hidden = torch.zeros(2, 2, 4, dtype=torch.bool)  # photographs, crops, patches
    hidden[0, 1, 2] = True
    hidden[1, 0, [0, 1, 3]] = True
    batch = {
        "global": torch.zeros(2, 2, 3, 4, 4, dtype=torch.uint8),
        "local": torch.zeros(2, 0, 3, 2, 2, dtype=torch.uint8),
        "color": torch.from_numpy(
            np.stack(
                [
                    np.stack(
                        [row(draw_color(np.zeros(3), 0.0, np.random.default_rng(0)))[0].numpy()] * 2
                    )
                ]
                * 2
            )
        ),
        "mask": hidden,
    }
    crops, masks, _, _ = augment.color_views(batch, torch.device("cpu"), [0.5] * 3, [0.5] * 3)
    assert len(crops) == 1 and crops[0].shape == (4, 3, 4, 4)
    # Crops in order: first of photograph 0 and 1, second of photograph 0 and 1.
    assert masks.hidden.tolist() == [
        [False] * 4,
        [True, True, False, True],
        [False, False, True, False],
        [False] * 4,
    ]
    assert masks.index.tolist() == [4, 5, 7, 10]
    assert masks.weight.tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, 1 / 4])


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_crops_scale": (0.9, 0.4)}, "--global-crops-scale 0.9 0.4: expected the smaller"),
        ({"blur_sigma": (1.0, 0.5)}, "--blur-sigma 1.0 0.5: expected the smaller"),
        ({"local_crop_size": 100}, "--local-crop-size 100: .* patch size 16, such as 96"),
        ({"global_crop_size": 4}, "--global-crop-size 4: .* such as 16"),
    ],
)
def test_views_that_cannot_be_are_refused(changed, message):
    MultiCropOptions().check_views(16)
    with pytest.raises(InputError, match=message):
        MultiCropOptions(**changed).check_views(16)


# ------------------------------------------------------------------------------------ other views


def test_views_of_evaluation(photograph):
    whole = augment.WholeView(48)(photograph, (0,))["image"]
    assert gap(whole, from_pil(to_pil(photograph).resize((48, 48), 3))) <= 2
    paper = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224)])
    found = augment.PaperView()(photograph, (0,))["image"]
    assert found.shape == (3, 224, 224) and gap(found, from_pil(paper(to_pil(photograph)))) <= 2
    probe = augment.ProbeView()
    first = probe(photograph, (1, 2))["image"]
    assert first.shape == (3, 224, 224) and torch.equal(first, probe(photograph, (1, 2))["image"])
    assert not torch.equal(first, probe(photograph, (1, 3))["image"])


def test_contact_sheet_lays_a_photograph_a_row():
    keep = row()[0]
    items = [
        {
            "global": torch.full((2, 3, 8, 8), value, dtype=torch.uint8),
            "local": torch.full((1, 3, 4, 4), value + 50, dtype=torch.uint8),
            "color": keep.expand(3, -1),
        }
        for value in (51, 102)
    ]
    sheet = augment.contact_sheet(items)
    assert sheet.shape == (16, 24, 3) and sheet.dtype == np.uint8
    assert sheet[0, ::8, 0].tolist() == [51, 51, 101] and sheet[8, ::8, 0].tolist() == [
        102,
        102,
        152,
    ]
    assert sheet[4, 16, 0] == 0  # local crops are padded


# ---------------------------------------------------------------------------------------- lesions


def test_lesions_of_patches_are_the_naive_loop():
    masks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks[0, 5, 9] = 255
    masks[1, 20:30, 3:14] = 80  # more than 30 % of 255
    masks[2, 0:8, 0:8] = 76  # less
    found = augment.find_lesions(masks, 4)
    assert found.shape == (16, 3) and found.dtype == torch.bool
    for patch in range(16):
        top, left = 8 * (patch // 4), 8 * (patch % 4)
        for kind in range(3):
            strongest = int(masks[kind, top : top + 8, left : left + 8].max())
            assert bool(found[patch, kind]) == (strongest > 0.3 * 255)


@pytest.mark.parametrize("rotation", [0.0, 40.0])
def test_lesions_go_the_way_of_the_photograph(rotation):
    """A mask that is the red channel again shows where its crop is red."""
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 2, (1, 12, 12)) * 255).to(torch.uint8)
    red = blocks.repeat_interleave(10, 1).repeat_interleave(10, 2)
    photograph = torch.cat([red, red * 0, red * 0, red])  # RGB and one kind of lesion
    options = multi_crop(64, 32, rotation=rotation, flip_vertical=True).options
    crops = augment.MultiCrop(options, lesion_grid=8)
    for key in range(8):
        item = crops(photograph, (key,))
        assert item["global"].shape == (2, 3, 64, 64) and item["local"].shape[1] == 3
        assert item["lesions"].shape == (2, 64, 1)
        for crop, lesions in zip(item["global"], item["lesions"], strict=True):
            assert torch.equal(lesions, augment.find_lesions(crop[:1], 8))


def test_masks_of_lesions_change_no_view(photograph):
    masks = torch.full((4, *photograph.shape[1:]), 255, dtype=torch.uint8)
    plain = multi_crop(32, 16)(photograph, (1, 2))
    crops = augment.MultiCrop(multi_crop(32, 16).options, lesion_grid=2)
    with_masks = crops(torch.cat([photograph, masks]), (1, 2))
    for name in plain:
        assert torch.equal(plain[name], with_masks[name])
    assert with_masks["lesions"].all()


def test_lesions_of_a_batch_are_laid_out_view_by_view(photograph):
    items = []
    for kind in range(3):
        masks = torch.zeros((3, *photograph.shape[1:]), dtype=torch.uint8)
        masks[kind] = 255
        crops = augment.MultiCrop(multi_crop(32, 16).options, lesion_grid=2)
        items.append(crops(torch.cat([photograph, masks]), (kind,)))
    batch = augment.color_views(default_collate(items), ZERO.device, [0, 0, 0], [1, 1, 1])
    assert batch.lesions.shape == (6, 4, 3)
    for row, kinds in enumerate(batch.lesions.all(dim=1)):
        assert kinds.nonzero().flatten().tolist() == [row % 3]  # first views first
