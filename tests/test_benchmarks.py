"""The published recipe as the fast one's oracle, and how benchmarks measure.

Run with `python -m pytest tests/test_benchmarks.py`.
"""

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import written_runs
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import SSRL
import vision_transformer
from augment import CropBatch, PatchMasks
from benchmarks import (
    baseline,
    bench_data,
    bench_eval,
    bench_step,
    check_loss,
    measure,
    study_quality,
    study_scratch,
)
from data import StepSampler
from features import knn_predict
from fundus.synthetic import DrawnEye, draw_photograph

# A network and a step that take milliseconds.
SMALL = {
    "arch": "vit_pico",
    "patch_size": 8,
    "global_crop_size": 48,
    "local_crop_size": 24,
    "out_dim": 96,
    "head_hidden_dim": 64,
    "batch_size": 4,
    "local_crops_number": 3,
}
FIXED = {
    "init": "none",
    "device": "cpu",
    "precision": "fp32",
    "warmup_epochs": 0,
    "freeze_last_layer": 0,
    "lr": 0.064,
    "clip_grad": 0.3,
    "log_every": 1000,
}


# --------------------------------------------------------------------------- the same on both sides
def both_sides(**changed):
    """Return our training, the baseline's from the same weights, and a batch of crops."""
    options = SSRL.Options(**{**FIXED, **SMALL, **changed})
    batch_size = options.batch_size
    state, run = bench_step.our_training(options, StepSampler(100 * batch_size, batch_size))
    plain = bench_step.plain_training(options)
    plain.student.load_state_dict(state.student.state_dict())
    plain.teacher.load_state_dict(state.teacher.state_dict())
    return state, run, plain, random_crops(options)


def random_crops(options):
    """Return a batch of random numbers in the place of crops."""
    generator = torch.Generator().manual_seed(1)
    crops = []
    for views, side in (
        (2, options.global_crop_size),
        (options.local_crops_number, options.local_crop_size),
    ):
        if views:
            shape = (views * options.batch_size, 3, side, side)
            crops.append(torch.randn(shape, generator=generator))
    return CropBatch(crops, PatchMasks())


def weights_of(network):
    """Return a network's parameters by the names that both sides share."""
    weights = {}
    for name, parameter in network.named_parameters():
        # Our backbone holds timm's network, and its files leave that level out.
        weights[name.replace("backbone.vit.", "backbone.")] = parameter
    return weights


def note_gradients(network):
    """Return a dict that gets each parameter's gradient, as the backward pass leaves it."""
    gradients = {}
    for name, parameter in weights_of(network).items():
        if parameter.requires_grad:

            def note(parameter, name=name):
                gradients[name] = parameter.grad.clone()

            parameter.register_post_accumulate_grad_hook(note)
    return gradients


def take_same_step(state, run, plain, crops):
    """Take a step on both sides and return both losses."""
    check_loss.follow_schedules(plain, run, state.step)
    plain.clip = run.options.clip_grad
    seed = check_loss.seed_of_step(run.options, state.step)
    ours = SSRL.train_step(state, iter([crops]), run).terms["loss"].item()
    torch.manual_seed(seed)
    theirs = plain.step(bench_step.split_views(crops, run.options.batch_size))
    return ours, theirs


@pytest.mark.parametrize(
    "changed",
    [{}, {"drop_path": 0.4}, {"local_crops_number": 0}, {"checkpointing": True, "drop_path": 0.4}],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_loss_and_gradients_are_the_baselines(monkeypatch, changed, in_memory):
    if not in_memory:
        monkeypatch.setattr(vision_transformer, "MAX_ATTENTION_WEIGHTS", 0)
    state, run, plain, crops = both_sides(**changed)
    our_gradients = note_gradients(state.student)
    their_gradients = note_gradients(plain.student)
    ours, theirs = take_same_step(state, run, plain, crops)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert their_gradients
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        error = (our_gradients[name] - gradient).abs().max()
        assert error <= 1e-5 * max(1e-3, float(gradient.abs().max())), name


def test_ten_steps_end_at_the_baselines_weights():
    """Clipping, AdamW, moving average and centre included; stochastic depth drops the same."""
    state, run, plain, crops = both_sides(drop_path=0.3)
    start = {name: weight.detach().clone() for name, weight in weights_of(state.student).items()}
    for _ in range(10):
        ours, theirs = take_same_step(state, run, plain, crops)
        assert ours == pytest.approx(theirs, abs=1e-4)
    torch.testing.assert_close(state.center, plain.loss.center[0], rtol=1e-3, atol=1e-5)

    for our_network, their_network in (
        (state.student, plain.student),
        (state.teacher, plain.teacher),
    ):
        their_weights = weights_of(their_network)
        for name, weight in weights_of(our_network).items():
            assert (weight - their_weights[name]).abs().max() < 2e-4, name
    moved = [
        (weight - start[name]).abs().max() for name, weight in weights_of(state.student).items()
    ]
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
    state, run, _, crops = both_sides(
        arch=arch, patch_size=patch, global_crop_size=6 * patch, local_crop_size=2 * patch
    )
    with FlopCounterMode(display=False) as counter:
        SSRL.train_step(state, iter([crops]), run)
    counted = counter.get_total_flops() / run.options.batch_size
    assert bench_step.flops_of(run.options) == pytest.approx(counted, rel=0.05)


def test_knn_of_the_baseline_agrees():
    bank, grades = bench_eval.cloud(500, 16, 1)
    queries, _ = bench_eval.cloud(40, 16, 2)
    ours = knn_predict(bank, grades, queries, [10, 30])
    for k in (10, 30):
        votes = bench_eval.plain_knn(bank, grades, queries, k, 1000)
        assert (votes[:, 5:] == 0).all()
        shares = votes[:, :5] / votes.sum(1, keepdim=True)
        torch.testing.assert_close(ours[k].float(), shares, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------- measuring
def test_crops_are_of_the_sizes_that_the_options_name(tmp_path):
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(tmp_path / "photograph.jpg")
    options = SSRL.Options(**{**FIXED, **SMALL})
    batch = bench_step.batch_of_crops(tmp_path, options)
    assert [tuple(crops.shape) for crops in batch.crops] == [(8, 3, 48, 48), (12, 3, 24, 24)]
    views = bench_step.split_views(batch, 4)
    assert len(views) == 5
    assert all(len(view) == 4 for view in views)
    default = bench_data.dataset_of([tmp_path / "photograph.jpg"], prepared=True)
    assert default[0, 0]["global"].shape == (2, 3, 224, 224)


def sleeper(seconds):
    """A side that sleeps; a slow one holds 300 MB."""
    held = b""
    if seconds > 0.05:
        held = bytearray(b"1" * 300_000_000)
    return lambda: time.sleep(seconds + 0 * len(held))


def test_sides_in_processes_of_their_own_take_turns():
    sides = {"slow": functools.partial(sleeper, 0.2), "fast": functools.partial(sleeper, 0.02)}
    times, memory = measure.alternate_apart(sides, 3, 1)
    assert len(times["slow"]) == len(times["fast"]) == 3
    assert min(times["slow"]) >= 0.2 > 0.15 > max(times["fast"]) >= 0.02
    assert memory["slow"] - memory["fast"] > 250
    assert memory["fast"] > 50


def test_ratios_by_hand():
    results = measure.compare({"a": [4.0, 2.0, 3.0], "b": [1.0, 2.0, 0.5]}, images=2)
    assert results["a"] == {"median_s": 1.5, "least_s": 1.0, "largest_s": 2.0}
    assert results["b"] == {
        "median_s": 0.5,
        "least_s": 0.25,
        "largest_s": 1.0,
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


# ------------------------------------------------------------------------------------ from scratch
def test_a_run_is_judged_by_the_last_half_of_its_epochs():
    epoch = np.arange(5.0)
    values = {
        "loss": [9.0, 9.0, 0.9, 0.8, 0.7],
        "teacher_entropy": [1.0, 1.0, 0.9, 0.9, 0.9],
        "marginal_entropy": [0.0, 0.0, 0.6, 0.6, 0.6],
        "rankme": [3.0, 1.0, 4.0, 5.0, 6.0],
    }
    curves = {name: np.stack([epoch, numbers], axis=1) for name, numbers in values.items()}
    verdict = study_scratch.judge(curves, 1.0)
    assert verdict["held"]
    assert (verdict["rankme_start"], verdict["rankme_lowest"], verdict["rankme_end"]) == (3, 1, 6)
    assert (verdict["loss_end"], verdict["ln_K"]) == (0.7, 1.0)

    for name, spoiled, broken in (
        ("loss", [0, 0, 0.9, 0.9, 1.1], ["loss below ln K", "loss falling"]),
        ("teacher_entropy", [0.5, 0.5, 0.5, 0.99, 0.5], ["teacher entropy in 0.02-0.98"]),
        ("teacher_entropy", [0.5, 0.5, 0.5, 0.01, 0.5], ["teacher entropy in 0.02-0.98"]),
        ("marginal_entropy", [1, 1, 1, 1, 0.4], ["marginal entropy above 0.5"]),
        ("rankme", [3, 9, 2, 4, 5], ["RankMe above the start's"]),
        ("rankme", [3, 9, 6, 5, 4], ["RankMe rising"]),
    ):
        changed = {**curves, name: np.stack([epoch, np.array(spoiled)], axis=1)}
        verdict = study_scratch.judge(changed, 1.0)
        failed = [check for check, passed in verdict["checks"].items() if not passed]
        assert failed == broken
        assert not verdict["held"]


# -------------------------------------------------------------------------------------- how well
@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of one recipe and two seeds, whose programs write what is made up at once."""
    monkeypatch.setattr(study_quality, "ROOT", tmp_path)
    asked = []
    skills = {"knn-end": 0.6, "linear-end": 0.9, "knn-handmade": 0.3, "linear-handmade": 0.5}

    def call(script, *options):
        asked.append([script, *options])
        folder = Path(options[options.index("--output-dir") + 1])
        if script == "SSRL.py":
            written_runs.write_training(folder, epochs=1)
            first, *others = (folder / "log.jsonl").read_text().splitlines()
            line = json.loads(first)
            line["options"] |= {"accumulate": 1, "processes": 1}
            (folder / "log.jsonl").write_text("\n".join([json.dumps(line), *others]) + "\n")
            for name in ("backbone.safetensors", "checkpoint-0000.pth", "checkpoint-0006.pth"):
                (folder / name).touch()
            return
        seed = len(asked)
        skill = skills.get(folder.name.removesuffix("-by-graded").rpartition("-")[0], 0.0)
        inside = "other" if "--test-data" in options else ""
        written_runs.write_evaluation(folder / inside, seed, skill=skill)

    monkeypatch.setattr(study_quality, "call", call)
    (tmp_path / "recipe.yaml").write_text("arch: vit_nano\n")
    test_sets = study_quality.list_test_sets(
        "sets/graded", folds=True, also=[], test_data=["sets/other"]
    )
    found = study_quality.Study("x", "sets/graded", 1.0, test_sets, ("--lr", "1"))
    return found, asked


def test_recipes_of_a_study_train_for_the_same_minutes(study, tmp_path):
    found, asked = study
    (recipe,) = study_quality.list_recipes([tmp_path / "recipe.yaml"], [])
    run = study_quality.train(found, recipe, 7)
    assert run == tmp_path / "runs" / "quality-x" / "recipe-7"
    trial, whole = asked
    assert trial[trial.index("--epochs") + 1] == "1"
    # An epoch of 10 steps of 32 photographs at 160 a second takes 2 seconds: 30 in a minute.
    assert whole[whole.index("--epochs") + 1] == "30"
    assert whole[whole.index("--keep-every") + 1] == "6"
    assert whole[whole.index("--seed") + 1] == "7"
    for command in asked:
        assert command[command.index("--data") + 1] == "sets/graded"
        assert command[command.index("--lr") + 1] == "1"

    (tmp_path / "recipe.yaml").write_text("data: synthetic\n")
    study_quality.train(found, recipe, 8)
    assert asked[-1][asked[-1].index("--data") + 1] == "synthetic"
    # The trial that is there says that it is finished, and is measured again.
    assert asked[2][asked[2].index("--output-dir") + 1] == trial[trial.index("--output-dir") + 1]


def test_a_study_varies_an_option(study, tmp_path):
    found, asked = study
    vary = ["data", "synthetic:250@512", "synthetic:500@512"]
    small, large = study_quality.list_recipes([tmp_path / "recipe.yaml"], vary)
    assert small.name == "recipe, data synthetic:250@512"
    assert large.data(found) == "synthetic:500@512"
    run = study_quality.train(found, small, 0)
    assert run.name == "recipe-data-synthetic-250-512-0"
    assert "synthetic:250@512" in asked[-1] and "sets/graded" not in asked[-1]


def test_a_study_compares_all_seeds_with_hand_made_statistics(study, tmp_path, capsys):
    found, asked = study
    recipe = study_quality.Recipe(tmp_path / "recipe.yaml", "recipe")
    runs = [study_quality.train(found, recipe, seed) for seed in (0, 1)]
    rows = []
    for test_set in found.test_sets:
        lines = study_quality.list_lines(found, test_set, {"recipe": runs})
        study_quality.evaluate_all(found, lines)
        rows += study_quality.tabulate(lines)
    methods = ["recipe", "recipe, untrained"] * 2 + ["hand-made"] * 2 + ["mean colours"]
    assert [row["method"] for row in rows] == methods * 2
    titles = ["graded, all by folds", "other, fitted on graded"]
    assert [row["test"] for row in rows] == titles[:1] * 7 + titles[1:] * 7
    linear = next(r for r in rows if r["method"] == "recipe" and r["evaluation"] == "linear")
    assert len(linear["referable_auroc"]) == 2
    handmade = rows[5]["referable_auroc"]
    gain = linear["referable_auroc_beyond_handmade"]
    assert gain["value"] == pytest.approx(np.mean(linear["referable_auroc"]) - handmade[0])
    assert gain["ci95"][0] < gain["value"] < gain["ci95"][1]
    assert rows[5]["referable_auroc_beyond_handmade"]["value"] == 0
    study_quality.print_table(rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows) and f"{gain['value']:+.3f} [" in table[4]

    before = len(asked)
    study_quality.evaluate_all(found, lines)
    assert len(asked) == before, "nothing is evaluated twice"
    curve = study_quality.read_curve(found, runs[0])
    assert [point["minutes"] for point in curve] == pytest.approx([0, 6 * 2 / 60])
    assert set(curve[0]) == {"minutes", "qwk", "referable_auroc"}
    study_quality.draw(found, {"recipe": [curve]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
