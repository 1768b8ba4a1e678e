"""Student, teacher and one step of training, held against formulas written out one by one.

Run with `python -m pytest tests/test_ssrl.py`; whole runs are in test_ssrl_runs.py.
"""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

import losses
import SSRL
import utils
from augment import MultiCrop, apply_color, color_views
from data import PhotographDataset, StepSampler, open_manifest
from devices import Processes
from fundus.painting import PAINTED
from run_folder import RunFolder
from utils import Diverged, InputError
from vision_transformer import IMAGENET_MEAN, IMAGENET_STD
from weights import save_backbone

ONE = Processes(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("handlers")


def build(o):
    """State, run and the dataset, without training."""
    manifest = open_manifest(o.data)
    records = manifest.split("train")
    sampler = StepSampler(len(records), o.batch_size, o.accumulate, ONE, o.seed)
    state, run = SSRL.build_run(o, ONE, RunFolder(Path("run")), sampler)
    o.flip_vertical = False
    crops = MultiCrop(o, o.mask_grid, o.lesion_grid)
    dataset = PhotographDataset(manifest, records, crops, o.seed, paint=o.lesion_weight > 0)
    return state, run, dataset


def collate(dataset, indices):
    return default_collate([dataset[(0, index)] for index in indices])


def crops_of(run, batch):
    return color_views(batch, ONE.device, IMAGENET_MEAN, IMAGENET_STD)


def copy_of(state):
    return {k: v.clone() for k, v in flat(state.state_dict()).items() if hasattr(v, "clone")}


def flat(value, name=""):
    """Leaves of nested dicts and lists by their path."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in pairs for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---------------------------------------------------------------------------------- parts of a step


def test_clip_gradients_by_hand():
    values = {(3.0, 4.0): (0.6, 0.8), (0.3, 0.4): (0.3, 0.4), (0.0, 0.0): (0.0, 0.0)}
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for parameter, grad in zip(parameters, values, strict=False):
        parameter.grad = torch.tensor(grad)
    SSRL.clip_gradients(parameters, 1.0)
    for parameter, expected in zip(parameters, values.values(), strict=False):
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert parameters[3].grad is None


def test_update_teacher_by_hand():
    teacher, student = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    networks = []
    with torch.no_grad():
        for module, value in ((teacher, 1.0), (student, 3.0)):
            module.weight.fill_(value)
            module.bias.fill_(-value)
            parts = {"backbone": module, "head": copy.deepcopy(module)}
            networks.append(torch.nn.ModuleDict(parts))
            networks[-1].backbone = module
            networks[-1].head = parts["head"]
    SSRL.update_teacher(*networks, 0.75)
    for part in (networks[0].backbone, networks[0].head):
        assert part.weight.tolist() == [[1.5, 1.5]] and part.bias.tolist() == [-1.5]
    assert student.weight.tolist() == [[3.0, 3.0]]


def test_the_teacher_takes_the_statistics_of_batch_norm(tiny):
    o = tiny(stem="conv", lesion_weight=1.0)
    state, run, dataset = build(o)
    SSRL.train_step(state, iter([crops_of(run, collate(dataset, range(8)))]), run)
    theirs = dict(state.student.backbone.named_buffers())
    moved = [name for name in theirs if name.endswith("running_mean")]
    assert moved and all(theirs[name].abs().max() > 0 for name in moved)
    for name, value in state.teacher.backbone.named_buffers():
        assert torch.equal(value, theirs[name])


def test_student_and_teacher_start_equal(tiny):
    state, _, _ = build(tiny(drop_path=0.1))
    assert same(state.student.state_dict(), state.teacher.state_dict())
    names = [[n for n, _ in net.named_parameters()] for net in (state.student, state.teacher)]
    assert names[0] == names[1]  # update_teacher pairs them by their order
    assert not any(p.requires_grad for p in state.teacher.parameters())


def test_weight_decay_groups_are_those_of_dino(tiny):
    for norm_last_layer in (True, False):
        state, _, _ = build(tiny(norm_last_layer=norm_last_layer))
        regularized, others = set(), set()
        for name, p in state.student.named_parameters():  # dino/utils.py, get_params_groups
            if p.requires_grad:
                (others if name.endswith(".bias") or p.dim() == 1 else regularized).add(id(p))
        groups = [{id(p) for p in group["params"]} for group in state.optimizer.param_groups]
        assert groups == [regularized, others] and regularized and others


def test_schedules(tiny):
    o = tiny(lr=0.4, min_lr=1e-3, warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=1)
    _, run, _ = build(o)
    assert (run.sampler.steps_per_epoch, run.total_steps, run.sampler.global_batch) == (5, 10, 8)
    at = [run.schedules(step)._asdict() for step in range(11)]
    peak = 0.4 * 8 / 256
    assert [s["lr"] for s in at[:6]] == pytest.approx([peak * i / 5 for i in range(6)])
    assert at[10]["lr"] == pytest.approx(1e-3)
    assert at[9]["lr"] == pytest.approx(1e-3 + (peak - 1e-3) * (1 + math.cos(0.8 * math.pi)) / 2)
    assert [at[i]["weight_decay"] for i in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    assert [at[i]["momentum"] for i in (0, 5, 10)] == pytest.approx([0.996, 0.998, 1.0])
    temps = [at[i]["teacher_temp"] for i in (0, 2, 5, 10)]
    assert temps == pytest.approx([0.02, 0.028, 0.04, 0.04])


def test_views_are_laid_out_view_by_view(tiny):
    _, run, dataset = build(tiny())
    batch = collate(dataset, [4, 9, 2])
    large, small = crops_of(run, batch).crops
    assert large.shape == (6, 3, 32, 32) and small.shape == (6, 3, 16, 16)
    mean = torch.tensor(IMAGENET_MEAN)
    std = torch.tensor(IMAGENET_STD)
    for image, view in itertools.product(range(3), range(4)):
        crop = batch["global"][image, view] if view < 2 else batch["local"][image, view - 2]
        expected = apply_color(crop[None], batch["color"][image, view][None], mean, std)[0]
        found = large[view * 3 + image] if view < 2 else small[(view - 2) * 3 + image]
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("koleo_weight", [0.0, 0.3])
def test_step_is_the_naive_one(tiny, koleo_weight):
    """One step with SGD, from the published formulas, every term by itself."""
    o = tiny(optimizer="sgd", warmup_epochs=0, freeze_last_layer=0, lr=3.2, clip_grad=0.05)
    o.koleo_weight = koleo_weight
    state, run, dataset = build(o)
    torch.manual_seed(0)
    state.center.normal_(std=0.1)
    other, _, _ = build(o)
    batch = crops_of(run, collate(dataset, range(8)))
    large, small = batch.crops
    center = state.center.clone()
    result = SSRL.train_step(state, iter([batch]), run)

    embedded = [other.student([v]) for v in (large[:8], large[8:], small[:8], small[8:])]
    student = [outputs.cls_logits for outputs in embedded]
    logits = [other.teacher([v]).cls_logits.detach() for v in (large[:8], large[8:])]
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    terms = [
        -(torch.softmax((logits[i] - center) / 0.04, 1) * torch.log_softmax(student[j] / 0.1, 1))
        for i, j in pairs
    ]
    loss = sum(term.sum(1).mean() for term in terms) / 6
    assert result.terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    koleo = sum(SSRL.losses.koleo_loss(outputs.cls_tokens) for outputs in embedded[:2])
    if koleo_weight:
        assert result.terms["koleo"].item() == pytest.approx(koleo.item(), rel=1e-5)
    else:
        assert "koleo" not in result.terms
    (loss + koleo_weight * koleo).backward()
    rate = 3.2 * 8 / 256
    teacher = dict(other.teacher.named_parameters())
    updated = dict(state.student.named_parameters()), dict(state.teacher.named_parameters())
    for name, p in other.student.named_parameters():
        if p.requires_grad:
            norm = p.grad.norm()
            grad = p.grad * min(1.0, 0.05 / norm) + (0.04 * p.detach() if p.dim() > 1 else 0)
            expected = p.detach() - rate * grad
            torch.testing.assert_close(updated[0][name], expected, atol=2e-6, rtol=1e-4)
            moved = 0.996 * teacher[name] + 0.004 * updated[0][name].detach()
            torch.testing.assert_close(updated[1][name], moved, atol=1e-7, rtol=1e-6)
    expected = 0.9 * center + 0.1 * torch.cat(logits).mean(0)
    torch.testing.assert_close(state.center, expected)
    assert all(p.grad is None for p in state.teacher.parameters()) and state.step == 1


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_patch_objective_is_the_naive_one(tiny, centering):
    """Its term, its gradients on the mask token, and its centre, from crops one by one."""
    o = tiny(optimizer="sgd", warmup_epochs=0, lr=3.2, clip_grad=0, patch_weight=0.7)
    o.centering = centering
    state, run, dataset = build(o)
    torch.manual_seed(0)
    state.patch_center.normal_(std=0.1)
    center = state.patch_center.clone()
    with torch.no_grad():
        state.student.mask_token.normal_(std=0.1)
    other, _, _ = build(o)
    other.student.load_state_dict(state.student.state_dict())
    batch = crops_of(run, collate(dataset, range(8)))
    whole, hidden = batch.crops[0], batch.masks.hidden
    assert hidden.shape == (16, 16) and (hidden.sum(dim=1) > 0).sum() == 8
    result = SSRL.train_step(state, iter([batch]), run)

    student, teacher = [], []
    for crop, mask in zip(whole, hidden, strict=True):
        seen = other.student.backbone.all_tokens(crop[None], mask[None], other.student.mask_token)
        student.append(other.student.head(seen.patches[0, mask]))
        plain = other.teacher.backbone.all_tokens(crop[None])
        teacher.append(other.teacher.head(plain.patches[0, mask]).detach())
    logits = torch.cat(teacher)
    if centering == "mean":
        targets = torch.softmax((logits - center) / 0.04, dim=1)
        expected = 0.9 * center + 0.1 * logits.mean(dim=0)
        torch.testing.assert_close(state.patch_center, expected)
    else:
        targets = SSRL.losses.sinkhorn_probs(logits[None], 0.04)[0]
        assert torch.equal(state.patch_center, center)
    of_crops = []
    parts = targets.split([len(part) for part in student])
    for prediction, target in zip(student, parts, strict=True):
        if len(target):
            cross = -(target * torch.log_softmax(prediction / 0.1, dim=1)).sum(dim=1)
            of_crops.append(cross.mean())
    loss = sum(of_crops) / 16
    assert len(of_crops) == 8, "half of the crops have hidden patches; the others count, too"
    assert result.terms["patch"].item() == pytest.approx(loss.item(), rel=1e-5)

    # Self-distillation sees the mask token, too.
    outputs = other.student(batch.crops, batch.masks.index, hidden)
    with torch.no_grad():
        known = other.teacher(batch.crops[:1]).cls_logits.unflatten(0, (2, -1))
    if centering == "mean":
        probs = SSRL.losses.centered_probs(known, torch.zeros(64), 0.04)
    else:
        probs = SSRL.losses.sinkhorn_probs(known, 0.04)
    views = outputs.cls_logits.unflatten(0, (4, -1))
    total = SSRL.losses.distillation_loss(views, probs, 0.1) + 0.7 * loss
    (slope,) = torch.autograd.grad(total, other.student.mask_token)
    moved = other.student.mask_token.detach() - 3.2 * 8 / 256 * slope
    torch.testing.assert_close(state.student.mask_token.detach(), moved, atol=1e-6, rtol=1e-4)
    assert slope.abs().max() > 0


def test_mask_token_is_not_the_backbones(tiny):
    state, _, _ = build(tiny(patch_weight=1.0))
    names = {name for name, _ in state.student.named_parameters() if "mask" in name}
    assert names == {"mask_token"}
    assert not [name for name in state.teacher.state_dict() if "mask" in name]
    assert not [name for name in state.student.backbone.state_dict() if "mask" in name]
    off, _, _ = build(tiny())
    assert not [name for name in off.student.state_dict() if "mask" in name]


@pytest.mark.parametrize("distillation_weight", [0.0, 0.5])
def test_lesion_objective_is_the_naive_one(tiny, distillation_weight):
    """Its term, and where it moves the layers that find and count, from crops one by one."""
    o = tiny(optimizer="sgd", warmup_epochs=0, lr=3.2, clip_grad=0, lesion_weight=0.7)
    o.distillation_weight = distillation_weight
    if not distillation_weight:
        o.local_crops_number = 0
    state, run, dataset = build(o)
    other, _, _ = build(o)
    other.student.load_state_dict(state.student.state_dict())
    batch = crops_of(run, collate(dataset, range(8)))
    assert batch.lesions.shape == (16, 16, len(PAINTED)) and batch.lesions.any()
    result = SSRL.train_step(state, iter([batch]), run)
    assert set(result.terms) == ({"loss", "lesion"} if distillation_weight else {"lesion"})

    found, counted = [], []
    for crop, lesions in zip(batch.crops[0], batch.lesions, strict=True):
        seen = other.student.backbone.all_tokens(crop[None])
        logits = other.student.patch_readers["lesion"](seen.patches[0])
        p = torch.sigmoid(logits)
        cross = torch.where(lesions, -4 * torch.log(p), -torch.log(1 - p))
        found.append(cross.mean())
        counts = other.student.cls_readers["lesion"](seen.embedding[0])
        truth = torch.log(1 + lesions.sum(dim=0))
        counted.append(torch.nn.functional.smooth_l1_loss(counts, truth))
    loss = sum(found) / 16 + 0.2 * sum(counted) / 16
    assert result.terms["lesion"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name in ("patch_readers", "cls_readers"):
        layer = getattr(other.student, name)["lesion"]
        (slope,) = torch.autograd.grad(0.7 * loss, layer.weight, retain_graph=True)
        decayed = slope + o.weight_decay * layer.weight.detach()
        moved = layer.weight.detach() - 3.2 * 8 / 256 * decayed
        found_weight = getattr(state.student, name)["lesion"].weight.detach()
        torch.testing.assert_close(found_weight, moved, atol=1e-6, rtol=1e-4)
    # Without self-distillation, too, the teacher follows.
    assert not same(state.teacher.state_dict(), other.teacher.state_dict())


def test_what_finds_lesions_is_the_students_alone(tiny):
    state, _, _ = build(tiny(lesion_weight=1.0))
    names = {name for name, _ in state.student.named_parameters() if "lesion" in name}
    assert {name.partition(".")[0] for name in names} == {"patch_readers", "cls_readers"}
    assert not [name for name in state.teacher.state_dict() if "lesion" in name]
    assert not [name for name in state.student.backbone.state_dict() if "lesion" in name]
    off, _, _ = build(tiny())
    assert not [name for name in off.student.state_dict() if "lesion" in name]


def test_tokens_tell_local_statistics_and_a_frozen_network_says(tiny):
    """Both terms, from what the step's networks make of the clean crops."""
    other = SSRL.build_networks(tiny(arch="vit_nano", patch_size=16))[1].backbone
    save_backbone(other, Path("other.safetensors"), {})
    o = tiny(local_weight=0.5, distill="other.safetensors", distill_weight=0.3, warmup_epochs=0)
    state, run, dataset = build(o)
    before = copy.deepcopy(state.student)
    batch = crops_of(run, collate(dataset, range(8)))
    result = SSRL.train_step(state, iter([batch]), run)
    assert set(result.terms) == {"loss", "local", "distill"}

    seen = before.backbone.all_tokens(batch.crops[0])
    told = before.patch_readers["local"](seen.patches).flatten(0, 1)
    statistics = losses.local_statistics(batch.clean, 4).flatten(0, 1)
    expected = torch.nn.functional.smooth_l1_loss(told, by_columns(statistics))
    assert result.terms["local"].item() == pytest.approx(expected.item(), rel=1e-4)

    # A network with patches of 16 pixels looks at crops of 64, for it to have 4 x 4 of them.
    enlarged = torch.nn.functional.interpolate(
        other.normalize(batch.clean), 64, mode="bicubic", antialias=True
    )
    with torch.no_grad():
        says = other.eval().all_tokens(enlarged)
    expected = 0
    for readers, tokens, targets in (
        (before.patch_readers, seen.patches.flatten(0, 1), says.patches.flatten(0, 1)),
        (before.cls_readers, seen.embedding, says.embedding),
    ):
        told = readers["distill"](tokens)
        expected += torch.nn.functional.smooth_l1_loss(told, by_columns(targets))
    assert result.terms["distill"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert not [name for name in state.state_dict()["student"] if "frozen" in name]


def by_columns(rows):
    """Columns of mean 0 and deviation 1."""
    return (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny):
    changed = {"koleo_weight": 0.1, "patch_weight": 0.5, "lesion_weight": 2.0, "local_weight": 3.0}
    o = tiny(distill="drawn", distill_weight=0.25, distillation_weight=0.75, **changed)
    state, run, dataset = build(o)
    o.flip_vertical = False
    batch = crops_of(run, collate(dataset, range(8)))
    teacher = state.teacher(batch.crops[:1], batch.masks.index)
    student = state.student(batch.crops, batch.masks.index, batch.masks.hidden)
    frozen = run.frozen(batch.clean)
    loss = SSRL.compute_loss(student, teacher, frozen, batch, state, 0.04, o)
    weights = {"loss": 0.75, "koleo": 0.1, "patch": 0.5, "lesion": 2.0, "local": 3.0}
    weights["distill"] = 0.25
    assert loss.terms.keys() == weights.keys()
    total = sum(weights[name] * value.item() for name, value in loss.terms.items())
    assert loss.total.item() == pytest.approx(total, rel=1e-5)


def test_without_self_distillation_the_head_stays(tiny):
    o = tiny(lesion_weight=1.0, distillation_weight=0.0, local_crops_number=0, warmup_epochs=0)
    state, run, dataset = build(o)
    before = copy.deepcopy(state.student.head.state_dict())
    result = SSRL.train_step(state, iter([crops_of(run, collate(dataset, range(8)))]), run)
    assert same(state.student.head.state_dict(), before)
    assert result.targets is None
    assert not same(state.student.backbone.state_dict(), build(o)[0].student.backbone.state_dict())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "expected --lesion-weight or --local-weight above 0, or --distill"),
        ({"distill": "drawn", "distill_weight": 0.0}, "expected --lesion-weight"),
        ({"lesion_weight": 1.0}, "--local-crops-number 2: expected 0"),
        ({"lesion_weight": 1.0, "local_crops_number": 0, "koleo_weight": 0.1}, "--koleo-weight"),
        ({"lesion_weight": 1.0, "local_crops_number": 0, "patch_weight": 0.1}, "--patch-weight"),
    ],
)
def test_objectives_that_cannot_be_are_refused(tiny, changed, message):
    with pytest.raises(InputError, match=message):
        tiny(distillation_weight=0.0, **changed)


def test_the_position_embedding_is_laid_out_for_whole_photographs(tiny):
    state, run, dataset = build(tiny(image_size=128))
    assert state.teacher.backbone.spec.image_size == 128
    assert state.student.backbone.vit.pos_embed.shape[1] == 1 + (128 // run.options.patch_size) ** 2
    SSRL.train_step(state, iter([crops_of(run, collate(dataset, range(8)))]), run)


ANY_VIT = [
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_224",
    "vit_small_h12",
]


@pytest.mark.parametrize("arch", ANY_VIT)
def test_any_vit_of_timm_trains(tiny, arch):
    """One step with every objective; the teacher follows, the exported names are timm's."""
    patch = SSRL.vit.default_patch_size(arch)
    sizes = {"global_crop_size": 2 * patch, "local_crop_size": patch, "batch_size": 2}
    o = tiny(arch=arch, patch_size=0, patch_weight=1.0, koleo_weight=0.1, drop_path=0.1, **sizes)
    o.warmup_epochs = 0
    assert o.patch_size == patch
    state, run, dataset = build(o)
    before = copy_of(state)
    result = SSRL.train_step(state, iter([crops_of(run, collate(dataset, range(2)))]), run)
    assert result.terms.keys() == {"loss", "koleo", "patch"}
    assert all(value.isfinite() for value in result.terms.values())
    now = copy_of(state)
    for network in ("student", "teacher"):
        name = f"/{network}/backbone.patch_embed.proj.weight"
        assert not torch.equal(before[name], now[name])


def test_the_default_arch_does_not_say_how_many_heads_an_init_has(tmp_path):
    """Widths of 6 and 12 heads are the same: whoever names bare weights has to say which it is."""
    path = tmp_path / "bare.pth"
    spec = SSRL.vit.BackboneSpec("vit_small_h12", 16, 32)
    torch.save(SSRL.vit.Backbone(spec).vit.state_dict(), path)
    config = tmp_path / "recipe.yaml"
    config.write_text(f"arch: vit_small\ninit: {path}\n")

    def initialise(*argv):
        options, _ = utils.parse(SSRL.Options, ["--data", "d", *argv])
        return SSRL.build_networks(options)[0].backbone.spec.arch

    bare = ["--init", str(path)]
    asked = r"expected --arch vit_small \(6 heads\) or vit_small_h12 \(12 heads\)"
    for argv in (bare, ["--config", "configs/eyepacs_vits16.yaml", *bare]):
        with pytest.raises(InputError, match=asked):
            initialise(*argv)
    assert initialise(*bare, "--arch", "vit_small_h12") == "vit_small_h12"
    assert initialise(*bare, "--arch=vit_small") == "vit_small"
    assert initialise("--config", str(config)) == "vit_small", "a file may choose both"


def test_koleo_wants_a_neighbour(tiny):
    with pytest.raises(ValueError, match="batch-size 1: expected 2 or more with --koleo-weight"):
        tiny(koleo_weight=0.1, batch_size=1)
    with pytest.raises(ValueError, match="batch-size 1: expected 2 or more"):
        tiny(patch_weight=1.0, use_bn_in_head=True, batch_size=1)


def test_logged_loss_is_the_mean_since_the_last_one_whenever_it_stopped(tiny):
    """Of each term; also where a checkpoint lies between the two."""
    o = tiny(log_every=3, koleo_weight=0.1)
    state, run, dataset = build(o)
    starts = (8 * (i % 5) for i in range(6))
    batches = [crops_of(run, collate(dataset, range(i, i + 8))) for i in starts]
    terms, logged = [], []
    for batch in batches:
        result = SSRL.train_step(state, iter([batch]), run)
        terms.append(result.terms)
        if state.step % 3 == 0:
            logged.append(SSRL.summarize_steps(state, run, result))
    for name in ("loss", "koleo"):
        values = torch.stack([of_step[name] for of_step in terms])
        assert logged[0][name] == values[:3].mean() and logged[1][name] == values[3:].mean()
    assert not state.history.values()

    state, run, _ = build(o)
    for batch in batches[:3]:
        result = SSRL.train_step(state, iter([batch]), run)
    SSRL.summarize_steps(state, run, result)
    SSRL.train_step(state, iter(batches[3:4]), run)
    saved = copy.deepcopy(state.state_dict())
    state, run, _ = build(o)
    state.load_state_dict(saved)
    for batch in batches[4:]:
        result = SSRL.train_step(state, iter([batch]), run)
    assert SSRL.summarize_steps(state, run, result) == logged[1] | {
        "memory_gb": pytest.approx(logged[1]["memory_gb"], rel=0.5)
    }


def test_a_checkpoint_of_one_term_is_taken_over(tiny):
    """As runs before the patch objective wrote it."""
    state, run, dataset = build(tiny())
    batch = crops_of(run, collate(dataset, range(8)))
    SSRL.train_step(state, iter([batch]), run)
    saved = copy.deepcopy(state.state_dict())
    saved["losses"] = saved.pop("history")["loss"]
    del saved["patch_center"]
    other, _, _ = build(tiny())
    other.load_state_dict(saved)
    assert same(copy_of(other), copy_of(state)) and other.step == 1
    assert len(other.history.values()) == 1


def test_accumulated_micro_batches_are_one_batch(tiny):
    common = {"optimizer": "sgd", "warmup_epochs": 0, "lr": 3.2, "freeze_last_layer": 0}
    found = []
    for size, accumulate in ((8, 1), (4, 2), (2, 4)):
        state, run, dataset = build(tiny(batch_size=size, accumulate=accumulate, **common))
        starts = range(0, 24, size)
        batches = iter([crops_of(run, collate(dataset, range(i, i + size))) for i in starts])
        losses = [SSRL.train_step(state, batches, run).terms["loss"].item() for _ in range(3)]
        found.append((losses, copy_of(state)))
    for losses, tensors in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, value in tensors.items():
            torch.testing.assert_close(value, found[0][1][name], atol=2e-6, rtol=1e-4)


def test_last_layer_waits(tiny):
    state, run, dataset = build(tiny(warmup_epochs=0, freeze_last_layer=1, lr=0.1))
    batch = crops_of(run, collate(dataset, range(8)))
    names = [n for n, p in state.student.named_parameters() if p.requires_grad]
    for step in range(6):
        before = {n: p.detach().clone() for n, p in state.student.named_parameters()}
        SSRL.train_step(state, iter([batch]), run)
        now = dict(state.student.named_parameters())
        still = {n for n in names if torch.equal(before[n], now[n])}
        last = {n for n in names if "last_layer" in n}
        assert last and still == (last if step < 5 else set())
    decay = [group["weight_decay"] for group in state.optimizer.param_groups]
    assert decay == [pytest.approx(run.schedules(5).weight_decay), 0]


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_student_comes_to_match_a_teacher_that_stays(tiny, centering):
    """On four images: the loss less the targets' entropy, its least value, falls."""
    changed = {"momentum_teacher": 1.0, "warmup_epochs": 0, "freeze_last_layer": 0, "epochs": 20}
    o = tiny(lr=0.02, batch_size=4, centering=centering, **changed)
    state, run, dataset = build(o)
    batches = itertools.repeat(crops_of(run, collate(dataset, range(4))))
    excess = []
    for _ in range(30):
        result = SSRL.train_step(state, batches, run)
        entropy = SSRL.losses.target_entropies(result.targets)["teacher_entropy"] * math.log(64)
        excess.append(result.terms["loss"].item() - entropy)
    assert all(map(math.isfinite, excess)) and 0 < excess[-1] < excess[0] / 2


def test_diverged_leaves_all_as_it_was(tiny, monkeypatch):
    state, run, dataset = build(tiny(warmup_epochs=0, lr=0.1))
    batch = crops_of(run, collate(dataset, range(8)))
    SSRL.train_step(state, iter([batch]), run)
    before, real = copy_of(state), SSRL.losses.distillation_loss
    for bad in (math.nan, math.inf):
        monkeypatch.setattr(SSRL.losses, "distillation_loss", lambda *a, b=bad: real(*a) * b)
        with pytest.raises(Diverged, match="step 1"):
            SSRL.train_step(state, iter([batch]), run)
        assert same(before, copy_of(state)) and state.step == 1


def test_sinkhorn_wants_the_whole_batch_at_once():
    with pytest.raises(ValueError, match="--accumulate: expected 1 with --centering sinkhorn"):
        SSRL.Options(centering="sinkhorn", accumulate=2)


def test_the_best_checkpoint_is_not_chosen_by_an_undefined_qwk(tiny, monkeypatch):
    state, run, _ = build(tiny())
    saved = []
    monkeypatch.setattr(SSRL, "save", lambda *_, name: saved.append(name))
    for record in ({"rankme": 3.0}, {"knn_qwk": None}):
        SSRL.save_best(state, run, record)
    assert saved == []
    assert state.best_qwk == -1.0
    SSRL.save_best(state, run, {"knn_qwk": -0.5})
    assert saved == ["checkpoint-best.pth", "checkpoint.pth"]
    SSRL.save_best(state, run, {"knn_qwk": None})
    assert state.best_qwk == -0.5
