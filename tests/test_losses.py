"""losses.py against naive double loops in float64, numbers worked by hand, and two processes.

Run it with `python -m pytest tests/test_losses.py`.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from scipy import ndimage

from losses import (
    LOCAL_STATISTICS,
    History,
    batch_mean,
    centered_probs,
    distillation_loss,
    entropy,
    koleo_loss,
    lesion_loss,
    local_statistics,
    mean_by_name,
    mean_over_processes,
    patch_loss,
    regression_loss,
    sinkhorn_probs,
    target_entropies,
    total_over_processes,
    update_center,
)

TEACHERS = 2


def random_logits(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_loss(student, teacher_probs, temp):
    """Go through views, images and prototypes one by one, in float64."""
    student, teacher_probs = student.double(), teacher_probs.double()
    total, pairs = 0.0, 0
    for i, teacher in enumerate(teacher_probs):
        for j, view in enumerate(student):
            if i == j:
                continue
            pairs += 1
            for target, logits in zip(teacher, view, strict=True):
                scaled = logits / temp
                shifted = scaled - scaled.max()
                log_probs = shifted - shifted.exp().sum().log()
                total = total - (target * log_probs).sum() / len(teacher)
    return total / pairs


def naive_sinkhorn(logits, temp, iterations):
    """Normalise columns and rows in turn, in float64, with loops over both."""
    q = (logits.double().flatten(0, 1) / temp).exp()
    samples, prototypes = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] /= q[:, k].sum() * prototypes
        for n in range(samples):
            q[n] /= q[n].sum() * samples
    return (q * samples).view(logits.shape)


# ----------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("local", [0, 1, 6])
@pytest.mark.parametrize("student_temp, teacher_temp", [(0.1, 0.04), (0.1, 0.07), (1.0, 1.0)])
def test_loss_is_the_naive_double_loop(batch, local, student_temp, teacher_temp):
    student = random_logits(TEACHERS + local, batch, 65, seed=batch)
    teacher = random_logits(TEACHERS, batch, 65, seed=local + 100)
    targets = torch.softmax(teacher / teacher_temp, dim=-1)
    student.requires_grad_()
    loss = distillation_loss(student, targets, student_temp)
    (slope,) = torch.autograd.grad(loss, student)
    reference = student.detach().double().requires_grad_()
    expected = naive_loss(reference, targets, student_temp)
    (expected_slope,) = torch.autograd.grad(expected, reference)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    largest = expected_slope.abs().max()
    assert (slope - expected_slope).abs().max() < 1e-6 * largest


def test_loss_leaves_a_view_and_itself_out():
    # Teacher and student agree on each view, and the two views are of different prototypes.
    student = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]])
    targets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert distillation_loss(student, targets, 1.0).item() == pytest.approx(
        4 + math.log1p(math.exp(-4))
    )


def test_loss_counts_each_of_the_pairs_once():
    # Uniform students: each pair gives ln K, whatever the targets, so their mean is ln K.
    targets = torch.softmax(random_logits(2, 4, 10), dim=-1)
    for views in (2, 3, 8):
        loss = distillation_loss(torch.zeros(views, 4, 10), targets, 0.1)
        assert loss.item() == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_computed_in_fp32(dtype):
    student = random_logits(4, 8, 64).to(dtype)
    targets = torch.softmax(random_logits(2, 8, 64, seed=1), dim=-1)
    loss = distillation_loss(student, targets, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_loss(student, targets, 0.1).item(), rel=1e-6)


def test_loss_of_far_apart_logits_is_finite():
    student = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]], requires_grad=True)
    targets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    loss = distillation_loss(student, targets, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(2e5) and student.grad.isfinite().all()


# ---------------------------------------------------------------------------------------- centring


def test_centered_probs_by_hand():
    logits, center = torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([0.5, 1.5, 2.5])
    # (t - c) / 0.5 = 1, 3, -1
    weights = [math.exp(1), math.exp(3), math.exp(-1)]
    expected = [w / sum(weights) for w in weights]
    assert centered_probs(logits, center, 0.5)[0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    half = centered_probs(logits.half(), center, 0.5)
    assert half.dtype == torch.float32


def test_center_follows_the_batch_mean_by_hand():
    # Two views of two images, two prototypes: means are (1 + 3 + 5 + 7) / 4 and (2 + 2 + 2 - 2) / 4
    logits = torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[5.0, 2.0], [7.0, -2.0]]])
    mean = batch_mean(logits)
    assert mean.tolist() == [4.0, 1.0]
    center = torch.tensor([10.0, 0.0])
    same = center
    update_center(center, mean, momentum=0.9)
    assert center.tolist() == pytest.approx([9.4, 0.1])
    update_center(center, mean)  # 0.9 is the default
    assert center.tolist() == pytest.approx([8.86, 0.19])
    assert same is center, "the centre moves in place"


# ---------------------------------------------------------------------------------------- Sinkhorn


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("batch, prototypes", [(1, 5), (4, 16), (8, 3)])
@pytest.mark.parametrize("temp", [0.07, 1.0])
def test_sinkhorn_is_the_naive_loop(iterations, batch, prototypes, temp):
    logits = random_logits(2, batch, prototypes, seed=iterations)
    found = sinkhorn_probs(logits, temp, iterations)
    expected = naive_sinkhorn(logits, temp, iterations)
    assert found.dtype == torch.float32 and found.shape == logits.shape
    torch.testing.assert_close(found.double(), expected, rtol=5e-5, atol=1e-7)


def test_sinkhorn_takes_three_iterations_unless_told():
    logits = random_logits(2, 6, 9)
    assert torch.equal(sinkhorn_probs(logits, 0.05), sinkhorn_probs(logits, 0.05, 3))
    assert not torch.allclose(sinkhorn_probs(logits, 0.05), sinkhorn_probs(logits, 0.05, 2))


@pytest.mark.parametrize("temp", [1e-4, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_sinkhorn_rows_sum_to_one_at_any_temperature(temp, scale):
    targets = sinkhorn_probs(random_logits(2, 16, 32, scale=scale), temp)
    assert targets.isfinite().all() and (targets >= 0).all()
    assert (targets.sum(dim=-1) - 1).abs().max() < 1e-5


def test_sinkhorn_uses_prototypes_nearly_equally():
    logits = random_logits(2, 64, 8, scale=0.1)
    logits[..., 0] += 2  # softmax would give everything to the first prototype
    use = sinkhorn_probs(logits, 0.1).mean(dim=(0, 1))
    assert torch.softmax(logits / 0.1, dim=-1).mean(dim=(0, 1))[0] > 0.99
    assert (use - 1 / 8).abs().max() < 0.02 / 8


# ------------------------------------------------------------------------------- what is watched


@pytest.mark.parametrize(("batch", "width"), [(2, 3), (7, 4), (64, 32)])
def test_koleo_is_the_naive_loop(batch, width):
    x = random_logits(batch, width, seed=batch).requires_grad_()
    unit = [row / row.norm() for row in x.double()]
    nearest = [
        min((unit[i] - unit[j]).norm() for j in range(batch) if j != i) for i in range(batch)
    ]
    expected = -sum(d.log() for d in nearest) / batch
    found = koleo_loss(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (slope,), (expected_slope,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-3, atol=1e-5)
    assert koleo_loss(x.bfloat16()).item() == koleo_loss(x.bfloat16().float()).item()


def test_koleo_falls_as_embeddings_spread():
    """Its gradient drives points on a circle to even distances: 2 sin(pi / B) to the next."""
    x = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, -0.3], [0.5, 0.8]]))
    optimizer = torch.optim.SGD([x], lr=0.02)
    for _ in range(2000):
        optimizer.zero_grad()
        koleo_loss(x).backward()
        optimizer.step()
    even = -math.log(2 * math.sin(math.pi / 4))
    assert koleo_loss(x).item() == pytest.approx(even, abs=0.05)


def test_koleo_of_equal_embeddings_is_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-3) and torch.isfinite(x.grad).all()


def test_entropy_by_hand():
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]])
    expected = [2 * math.log(2), 0.0, math.log(2), 1.5 * math.log(2)]
    assert entropy(probs).tolist() == pytest.approx(expected, rel=1e-6)


def test_target_entropies_by_hand():
    uniform, one, own = torch.full((2, 2, 4), 0.25), torch.zeros(2, 2, 4), torch.eye(4)
    one[..., 2] = 1
    assert target_entropies(uniform) == pytest.approx(
        {"teacher_entropy": 1.0, "marginal_entropy": 1.0}
    )
    assert target_entropies(one) == {"teacher_entropy": 0.0, "marginal_entropy": 0.0}
    found = target_entropies(own.view(2, 2, 4))  # each sample its own prototype
    assert found == pytest.approx({"teacher_entropy": 0.0, "marginal_entropy": 1.0})
    half = torch.tensor([[[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]])  # mean 3/4 and 1/4
    marginal = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)
    expected = {"teacher_entropy": 0.25, "marginal_entropy": marginal}
    assert target_entropies(half) == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------- masked patches


def naive_patch_loss(student, teacher_probs, crop_of_patch, crops, temp):
    """Go through crops, their masked patches and prototypes one by one, in float64."""
    terms = []
    for crop in range(crops):
        of_crop = []
        for patch, its_crop in enumerate(crop_of_patch):
            if its_crop == crop:
                scaled = student[patch].double() / temp
                log_probs = scaled - scaled.exp().sum().log()
                of_crop.append(-(teacher_probs[patch].double() * log_probs).sum())
        if of_crop:
            terms.append(sum(of_crop) / len(of_crop))
    return sum(terms) / crops


@pytest.mark.parametrize("crop_of_patch", [[0], [0, 0, 2, 2, 2, 5], [1, 3, 3, 3, 3]])
@pytest.mark.parametrize("temp", [0.1, 1.0])
def test_patch_loss_is_the_naive_loop(crop_of_patch, temp):
    count = len(crop_of_patch)
    student = random_logits(count, 12, seed=1).requires_grad_()
    targets = random_logits(count, 12, seed=2, scale=3.0).softmax(dim=1)
    crops = torch.tensor(crop_of_patch)
    per_crop = torch.bincount(crops)
    weight = 1 / (per_crop[crops] * 6)
    found = patch_loss(student, targets, weight, temp)
    expected = naive_patch_loss(student, targets, crop_of_patch, 6, temp)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


def test_patch_loss_is_computed_in_fp32():
    student = random_logits(4, 1000, scale=20.0).bfloat16()
    targets = random_logits(4, 1000, seed=5).softmax(dim=1)
    weight = torch.full((4,), 0.25)
    found = patch_loss(student, targets, weight, 0.1)
    assert found.dtype == torch.float32
    assert found == patch_loss(student.float(), targets, weight, 0.1)


# ---------------------------------------------------------------------------------------- lesions


def naive_lesion_loss(logits, counts, lesions):
    """A loop over crops, patches and kinds in float64; the second part over crops and kinds."""
    found, counted = [], []
    for crop in range(len(lesions)):
        for patch in range(lesions.shape[1]):
            for kind in range(lesions.shape[2]):
                p = torch.sigmoid(logits[crop, patch, kind].double())
                holds = bool(lesions[crop, patch, kind])
                found.append(-4 * torch.log(p) if holds else -torch.log(1 - p))
        for kind in range(lesions.shape[2]):
            off = counts[crop, kind].double() - math.log(1 + int(lesions[crop, :, kind].sum()))
            counted.append(0.5 * off**2 if abs(off) < 1 else abs(off) - 0.5)
    return sum(found) / len(found) + 0.2 * sum(counted) / len(counted)


def test_lesion_loss_is_the_naive_loop():
    logits = random_logits(2, 9, 3, seed=1).requires_grad_()
    counts = random_logits(2, 3, seed=2, scale=2.0).requires_grad_()
    lesions = random_logits(2, 9, 3, seed=3) > 0.8
    found = lesion_loss(logits, counts, lesions)
    expected = naive_lesion_loss(logits, counts, lesions)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for asked in (logits, counts):
        slopes = [
            torch.autograd.grad(loss, asked, retain_graph=True)[0] for loss in (found, expected)
        ]
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-7)


def test_lesion_loss_is_computed_in_fp32():
    logits, counts = random_logits(2, 50, 4, scale=20.0).bfloat16(), torch.zeros(2, 4).bfloat16()
    lesions = random_logits(2, 50, 4, seed=3) > 0
    found = lesion_loss(logits, counts, lesions)
    assert found.dtype == torch.float32
    assert found == lesion_loss(logits.float(), counts.float(), lesions)


# ------------------------------------------------------------------- local statistics, regression


def naive_statistics(crop, grid):
    """Patch by patch in float64, by scipy's convolution: (grid * grid, S)."""
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    level = np.log((crop.numpy().astype(float) + 10) / 255)
    rows = [[] for _ in range(grid * grid)]
    for octave in range(4):
        if octave:
            halves = level.reshape(3, level.shape[1] // 2, 2, level.shape[2] // 2, 2)
            level = halves.mean(axis=(2, 4))
        smooth = ndimage.convolve1d(level, kernel, axis=1, mode="nearest")
        band = level - ndimage.convolve1d(smooth, kernel, axis=2, mode="nearest")
        side = band.shape[1] // grid
        for place in range(grid * grid):
            top, left = (side * number for number in divmod(place, grid))
            patch = band[:, top : top + side, left : left + side].reshape(3, -1)
            rows[place] += [*np.log((patch**2).mean(axis=1) + 1e-6)]
            rows[place] += [*patch.max(axis=1), *patch.min(axis=1)]
    return np.array(rows)


def test_local_statistics_are_the_naive_ones():
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    found = local_statistics(crops, 4)
    assert found.shape == (2, 16, LOCAL_STATISTICS) and found.dtype == torch.float32
    for crop, statistics in zip(crops, found, strict=True):
        expected = naive_statistics(crop, 4)
        np.testing.assert_allclose(statistics.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_local_statistics_tell_dark_from_bright_and_one_patch_from_another():
    """A dark dot changes the first octave of its patch alone, its darkest value most."""
    crop = torch.full((1, 3, 64, 64), 120, dtype=torch.uint8)
    even = local_statistics(crop, 4)
    crop[..., 24:26, 40:42] = 60
    dotted = local_statistics(crop, 4)
    changed = (dotted - even)[0, :, :9].abs().amax(dim=1) > 0.05
    assert changed.nonzero().flatten().tolist() == [6]  # row 1, column 2
    brightest, darkest = dotted[0, 6, 3:6], dotted[0, 6, 6:9]  # of red, green and blue, 1 pixel
    assert (darkest < -3 * brightest.abs()).all()


def test_local_statistics_take_patches_finer_than_an_octave():
    crops = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    assert local_statistics(crops, 8).isfinite().all()  # of 8 pixels, one is 4 x 4 pixels large


def test_regression_loss_by_hand():
    """Targets 1 and 3 are -1 and 1 when standardised; a constant one is 0, and so is huge noise."""
    targets = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])
    predicted = torch.tensor([[[-1.0, 0.0], [3.0, 0.4]]])
    # Distances 0, 2 and 0, 0.4: smooth L1 makes them 0, 1.5 and 0, 0.08.
    assert regression_loss(predicted, targets).item() == pytest.approx((1.5 + 0.08) / 4)
    shifted = 1000 * targets + 7
    assert regression_loss(predicted, shifted).item() == pytest.approx((1.5 + 0.08) / 4)
    half = regression_loss(predicted.bfloat16(), targets)
    assert half.dtype == torch.float32


# -------------------------------------------------------------------------------------- bookkeeping


def test_history_by_hand():
    history = History()
    history.add({"loss": torch.tensor(1.0), "koleo": torch.tensor(-2.0)})
    history.add({"loss": torch.tensor(4.0), "koleo": torch.tensor(-1.0)})
    assert history.means() == {"loss": 2.5, "koleo": -1.5}
    assert [float(value) for value in history.values()] == [1.0, 4.0, -2.0, -1.0]
    other = History()
    other.load_state_dict(history.state_dict(), torch.device("cpu"))
    history.clear()
    assert history.values() == [] and other.means() == {"loss": 2.5, "koleo": -1.5}


def test_mean_by_name_by_hand():
    parts = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    assert mean_by_name(parts)["a"].tolist() == [2.0, 4.0]
    assert mean_by_name([{}]) == {}


# ----------------------------------------------------------------------------------- two processes


def shard_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logits = torch.load(f"{folder}/logits.pt")[:, 4 * rank : 4 * rank + 4]
    found = {"mean": batch_mean(logits), "sharp": sinkhorn_probs(logits, 0.05)}
    found["soft"] = sinkhorn_probs(logits, 1.0)
    # Masked patches: 5 in one process, 3 in the other.
    patches = torch.load(f"{folder}/patches.pt")
    patches = patches[:, :5] if rank == 0 else patches[:, 5:]
    samples = total_over_processes(patches.shape[1])
    found["uneven"] = sinkhorn_probs(patches, 0.1, samples=samples)
    terms = {"loss": torch.tensor(1.0 + rank), "patch": torch.tensor(5.0 * rank)}
    found["terms"] = mean_over_processes(terms)
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_do_as_one_on_the_whole_batch(tmp_path: Path):
    logits = random_logits(2, 8, 16)
    logits[:, 4:] += 1.5  # the processes see different photographs
    torch.save(logits, tmp_path / "logits.pt")
    patches = random_logits(1, 8, 16, seed=3)
    torch.save(patches, tmp_path / "patches.pt")
    torch.multiprocessing.spawn(shard_worker, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["mean"], batch_mean(logits), rtol=1e-6, atol=1e-6)
        assert part["terms"] == {"loss": 1.5, "patch": 2.5}
    joined = torch.cat([part["uneven"] for part in parts], dim=1)
    torch.testing.assert_close(joined, sinkhorn_probs(patches, 0.1), rtol=1e-5, atol=1e-7)
    for name, temp in (("sharp", 0.05), ("soft", 1.0)):
        joined = torch.cat([part[name] for part in parts], dim=1)
        torch.testing.assert_close(joined, sinkhorn_probs(logits, temp), rtol=1e-5, atol=1e-7)
        alone = torch.cat([sinkhorn_probs(half, temp) for half in logits.split(4, dim=1)], dim=1)
        assert not torch.allclose(joined, alone, atol=1e-3), "each shard alone gives other targets"
