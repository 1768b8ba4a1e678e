"""The published recipe as the fast one's oracle, and how benchmarks measure.

Run with `python -m pytest tests/test_benchmarks.py`.
"""

import functools
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import devices
import run_folder
import SSRL
import vision_transformer
from benchmarks import baseline, bench_eval, bench_step, measure
from data import StepSampler
from features import knn_predict
from fundus.synthetic import DrawnEye, draw_photograph

SMALL = {"arch": "vit_pico", "patch_size": 8, "global_crop_size": 48, "local_crop_size": 24}
SMALL |= {"out_dim": 96, "head_hidden_dim": 64, "batch_size": 4, "local_crops_number": 3}
FIXED = {"init": "none", "device": "cpu", "precision": "fp32", "warmup_epochs": 0}
FIXED |= {"freeze_last_layer": 0, "lr": 0.064, "clip_grad": 0.3, "log_every": 1000}


def both(**changed):
    """Ours and the baseline from the same weights, and crops."""
    o = SSRL.Options(**(FIXED | SMALL | changed))
    sampler = StepSampler(100 * o.batch_size, o.batch_size)
    one = devices.Processes(torch.device("cpu"))
    state, run = SSRL.build_run(o, one, run_folder.RunFolder(Path()), sampler)
    plain = bench_step.plain_training(o)
    plain.student.load_state_dict(state.student.state_dict())
    plain.teacher.load_state_dict(state.teacher.state_dict())
    generator, batch = torch.Generator().manual_seed(1), o.batch_size
    shapes = ((2, o.global_crop_size), (o.local_crops_number, o.local_crop_size))
    crops = [torch.randn(n * batch, 3, s, s, generator=generator) for n, s in shapes if n]
    return state, run, plain, crops


def same_step(state, run, plain, crops):
    """Take a step on both sides; return the losses and both sides' gradients before clipping."""
    grads = {"ours": {}, "baseline": {}}
    for side, network in (("ours", state.student), ("baseline", plain.student)):
        for name, p in network.named_parameters():
            if p.requires_grad:
                store = functools.partial(grads[side].__setitem__, name)
                p.register_post_accumulate_grad_hook(lambda p, store=store: store(p.grad.clone()))
    now = run.schedule(state.step)
    plain.lr, plain.weight_decay = now["lr"], now["weight_decay"]
    plain.momentum, plain.clip = now["momentum"], run.options.clip_grad
    seed = (run.options.seed * 1_000_003 + state.step) * 1024
    ours = SSRL.train_step(state, iter([crops]), run)["loss"].item()
    torch.manual_seed(seed)  # as train_step does, for stochastic depth
    theirs = plain.step([view for size in crops for view in size.split(run.options.batch_size)])
    return ours, theirs, grads


@pytest.mark.parametrize(
    "changed",
    [{}, {"drop_path": 0.4}, {"local_crops_number": 0}, {"checkpointing": True, "drop_path": 0.4}],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_loss_and_gradients_are_the_baselines(monkeypatch, changed, in_memory):
    if not in_memory:
        monkeypatch.setattr(vision_transformer, "MOST_WEIGHTS", 0)
    state, run, plain, crops = both(**changed)
    ours, theirs, grads = same_step(state, run, plain, crops)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert grads["ours"].keys() == grads["baseline"].keys()
    for name, grad in grads["baseline"].items():
        error = (grads["ours"][name] - grad).abs().max()
        assert error <= 1e-5 * max(1e-3, float(grad.abs().max())), name


def test_ten_steps_end_at_the_baselines_weights():
    """Clipping, AdamW, moving average and centre included; stochastic depth drops the same."""
    state, run, plain, crops = both(drop_path=0.3)
    start = {n: p.detach().clone() for n, p in state.student.named_parameters()}
    for _ in range(10):
        ours, theirs, _ = same_step(state, run, plain, crops)
        assert ours == pytest.approx(theirs, abs=1e-4)
    torch.testing.assert_close(state.center, plain.loss.center[0], rtol=1e-3, atol=1e-5)
    for mine, other in ((state.student, plain.student), (state.teacher, plain.teacher)):
        theirs = dict(other.named_parameters())
        for name, p in mine.named_parameters():
            assert (p - theirs[name]).abs().max() < 2e-4, name
    moved = [(p - start[n]).abs().max() for n, p in state.student.named_parameters()]
    assert max(moved) > 5e-3


@pytest.mark.parametrize("size", [224, 96])
def test_the_baselines_network_is_timms(size):
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=0).eval()
    plain = baseline.VisionTransformer(192, 12, 3, 16).eval()
    plain.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert (plain(images) - theirs(images)).abs().max() < 1e-4


@pytest.mark.parametrize("arch, patch", [("vit_pico", 8), ("vit_tiny", 16)])
def test_operations_are_those_that_torch_counts(arch, patch):
    """Its counter knows that nothing asks for the gradient of crops, which we do count."""
    sides = {"global_crop_size": 2 * patch * 3, "local_crop_size": 2 * patch}
    state, run, _, crops = both(arch=arch, patch_size=patch, **sides)
    o = run.options
    with FlopCounterMode(display=False) as counter:
        SSRL.train_step(state, iter([crops]), run)
    counted = counter.get_total_flops() / o.batch_size
    assert bench_step.flops_of(o) == pytest.approx(counted, rel=0.05)


def test_knn_of_the_baseline_agrees():
    (bank, grades), (asked, _) = bench_eval.cloud(500, 16, 1), bench_eval.cloud(40, 16, 2)
    found = knn_predict(bank, grades, asked, [10, 30])
    for k in (10, 30):
        plain = bench_eval.plain_knn(bank, grades, asked, k, 1000)
        assert (plain[:, 5:] == 0).all()
        plain = plain[:, :5] / plain.sum(1, keepdim=True)
        torch.testing.assert_close(found[k], plain, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------- measuring
def sleeper(seconds):
    held = bytearray(b"1" * 300_000_000) if seconds > 0.05 else b""
    return lambda: time.sleep(seconds + 0 * len(held))


def test_sides_in_processes_of_their_own_take_turns():
    sides = {name: functools.partial(sleeper, s) for name, s in (("slow", 0.2), ("fast", 0.02))}
    times, memory = measure.alternate_apart(sides, 3, 1)
    assert {name: len(seconds) for name, seconds in times.items()} == {"slow": 3, "fast": 3}
    assert min(times["slow"]) >= 0.2 > 0.15 > max(times["fast"]) >= 0.02
    assert memory["slow"] - memory["fast"] > 250 and memory["fast"] > 50


def test_ratios_by_hand():
    told = measure.compare({"a": [4.0, 2.0, 3.0], "b": [1.0, 2.0, 0.5]}, images=2)
    assert told["a"] == {"median_s": 1.5, "least_s": 1.0, "largest_s": 2.0}
    assert told["b"] == {"median_s": 0.5, "least_s": 0.25, "largest_s": 1.0} | {
        "ratio": 3.0,
        "spread": [1.0, 6.0],
    }


def test_a_broken_side_is_no_result():
    with pytest.raises(EOFError):
        measure.alternate_apart({"broken": functools.partial(sleeper, None)}, 1, 1)


def test_enlarged_photographs_cost_what_a_cameras_do(tmp_path):
    frame, _ = draw_photograph(DrawnEye("p", "left", 2, (0, 1)), height=400)
    Image.fromarray(frame).save(tmp_path / "small.jpg")
    large = measure.enlarge(tmp_path / "small.jpg", tmp_path / "large.jpg")
    with Image.open(large) as image:
        assert image.size == measure.EYEPACS
    assert 700_000 < large.stat().st_size <= 1_500_000
