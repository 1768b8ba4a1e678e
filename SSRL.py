"""Train a vision transformer on fundus photographs without labels, by self-distillation.

    python3 -m torch.distributed.launch SSRL.py     # a demonstration, minutes on a laptop
    python SSRL.py --data DIR                       # your photographs, the default recipe
    torchrun --nproc-per-node=4 SSRL.py --config configs/eyepacs_vits8.yaml --data DIR

A student sees 2 global and V local crops of every photograph, a teacher the global ones; the
student learns to match the teacher, which is the moving average of the student (DINO, arXiv
2104.14294; for diabetic retinopathy arXiv 2410.00779). Writes runs/NAME/: config.yaml, log.jsonl,
checkpoint*.pth, backbone.safetensors, crops.png. Shapes: B batch, V local views, K prototypes.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import timm.optim
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

import data
import devices
import features
import losses
import run_folder
import utils
import vision_transformer as vit
from augment import MultiCrop, color_views, contact_sheet
from data import PhotographDataset as Dataset
from features import Watched
from fundus import metrics
from run_folder import save_torch
from utils import Diverged, RunOptions, Stopped, log
from weights import load_weights, read_weights, save_backbone

DEMO = utils.HERE / "configs" / "demo.yaml"
HINT = "lower --lr or --clip-grad or use --precision fp32, in a new --output-dir"
RESUMABLE = ["workers", "device", "checkpointing", "compile"]  # may differ when a run is resumed
RESUMABLE += ["log_every", "save_minutes", "keep_every", "knn_every"]  # and --epochs may grow


@dataclass
class Options(data.DataOptions, RunOptions):
    """Self-supervised training; the defaults are configs/eyepacs_vits16.yaml."""

    arch: vit.Arch = "vit_small"  # Backbone.
    patch_size: int = 16  # Side of a patch in pixels; the paper uses 8 and 16.
    init: str = "timm:vit_small_patch16_224.dino"  # Weights to start from, or none (from scratch).
    checkpoint_key: Literal["teacher", "student"] = "teacher"  # Which network of an --init file.
    epochs: int = 100  # Passes over the training photographs.
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--batch-size-per-gpu",))] = 64
    """Photographs of a micro-batch, for each process."""
    accumulate: int = 1  # Micro-batches whose gradients make one step.
    checkpointing: bool = False  # Keep less for gradients: slower, in less memory.
    compile: bool = False  # Let torch.compile fuse the networks' small operations, on CUDA.
    resume: Literal["auto", "never"] = "auto"  # Continue an unfinished run, or refuse to.
    global_crop_size: int = 224  # Side of the 2 global crops in pixels.
    local_crop_size: int = 96  # Side of the local crops in pixels.
    global_crops_scale: tuple[float, float] = (0.4, 1.0)  # Least and largest share of the area.
    local_crops_scale: tuple[float, float] = (0.05, 0.4)  # The same of local crops.
    local_crops_number: int = 6  # Local crops of each photograph.
    flip_vertical: bool = True  # Flip crops upside down half the time.
    rotation: float = 0.0  # Turn crops by up to this many degrees either way.
    color_strength: float = 1.0  # Multiplies DINO's colour jitter (0.4, 0.4, 0.2, 0.1).
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # Least and largest blur in pixels of a crop.
    mean: tuple[float, float, float] = vit.IMAGENET_MEAN  # RGB mean of inputs, 0 to 1.
    std: tuple[float, float, float] = vit.IMAGENET_STD  # RGB standard deviation of inputs.
    out_dim: int = 65536  # Prototypes.
    head_hidden_dim: int = 2048  # Width of the projection head's hidden layers.
    use_bn_in_head: bool = False  # Batch norm after the projection head's hidden layers.
    norm_last_layer: bool = True  # Keep the prototypes at length 1.
    centering: Literal["mean", "sinkhorn"] = "mean"  # What balances the teacher's targets.
    koleo_weight: float = 0.0  # Of the KoLeo term, which spreads the [CLS]; DINOv2 takes 0.1.
    student_temp: float = 0.1  # Softmax temperature of the student.
    teacher_temp: float = 0.04  # The teacher's, after its warm-up.
    warmup_teacher_temp: float = 0.04  # The teacher's at the start.
    warmup_teacher_temp_epochs: int = 0  # Epochs over which it goes from one to the other.
    momentum_teacher: float = 0.996  # Of the teacher's moving average at the start; cosine to 1.
    drop_path: float = 0.1  # Stochastic depth of the student's last block; from 0 at the first.
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"  # Optimizer.
    lr: float = 5e-4  # Peak learning rate at a global batch of 256; scaled linearly with it.
    min_lr: float = 1e-6  # Learning rate at the end, not scaled.
    warmup_epochs: int = 10  # Epochs of linear warm-up of the learning rate.
    weight_decay: float = 0.04  # At the start; none on biases and norms.
    weight_decay_end: float = 0.4  # At the end, on a cosine.
    clip_grad: float = 3.0  # Largest gradient norm of each parameter; 0 does not clip.
    freeze_last_layer: int = 1  # Epochs at the start in which the prototypes stay as they are.
    max_bad: float = 0.001  # Share of photographs that may be unreadable; others take their place.
    knn_every: int = 10  # Epochs between k-NN scores on val, where grades exist; 0: none.
    log_every: int = 10  # Steps between lines of the log.
    save_minutes: float = 15.0  # Most minutes between saves; an epoch's end saves too.
    keep_every: Annotated[int, tyro.conf.arg(aliases=("--saveckp-freq",))] = 20
    """Epochs between checkpoints that are kept, the untrained one first; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        patch, last, many = self.patch_size, self.epochs, self.batch_size > 1
        crops, scales = "global_crop_size local_crop_size", "global_crops_scale local_crops_scale"
        spans = "warmup_epochs warmup_teacher_temp_epochs freeze_last_layer"
        for names, fits, expected in (
            ("patch_size epochs batch_size accumulate log_every", lambda v: v >= 1, "1 or more"),
            ("out_dim head_hidden_dim", lambda v: v >= 2, "2 or more"),
            ("koleo_weight", lambda v: v == 0 or v > 0 and many, "0, or a batch above 1"),
            ("accumulate", lambda v: v == 1 or self.centering == "mean", "1 with sinkhorn"),
            ("lr min_lr weight_decay weight_decay_end", lambda v: 0 <= v < 1e9, "0 or more"),
            ("color_strength save_minutes", lambda v: v >= 0, "0 or more"),
            ("local_crops_number knn_every keep_every clip_grad", lambda v: v >= 0, "0 or more"),
            (crops, lambda v: v > 0 == v % patch, f"a multiple of --patch-size {patch}"),
            (spans, lambda v: 0 <= v <= last, f"0 to --epochs {last}"),
            (scales, lambda v: 0 < v[0] <= v[1] <= 1, "0 < least <= largest <= 1"),
            ("student_temp teacher_temp warmup_teacher_temp", lambda v: v > 0, "above 0"),
            ("blur_sigma", lambda v: 0 < v[0] <= v[1] <= 2, "0 < least <= largest <= 2"),
            ("rotation", lambda v: 0 <= v <= 180, "0 to 180 degrees"),
            ("std", lambda v: min(v) > 0, "numbers above 0"),
            ("momentum_teacher drop_path max_bad", lambda v: 0 <= v <= 1, "0 to 1"),
        ):
            utils.check_options(self, names, fits, expected)


# ----------------------------------------------------------------------------- student and teacher
class Network(nn.Module):
    """Backbone and projection head; student and teacher are one each."""

    def __init__(self, backbone: vit.Backbone, head: vit.ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops: Tensor) -> tuple[Tensor, Tensor]:
        """Map crops (V_i B, 3, h, w) to logits (sum V_i B, K) and [CLS] of the first (V_0 B, D)."""
        cls_tokens = [self.backbone(batch) for batch in crops]
        return self.head(torch.cat(cls_tokens)), cls_tokens[0]


@dataclass
class State:
    """All that training changes."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    center: Tensor  # (K,)
    step: int = 0
    skipped: int = 0  # steps that overflowed in fp16
    best_qwk: float = -1.0  # of the k-NN on val
    losses: list[Tensor] = field(default_factory=list)  # since the last line of the log

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, lists and dicts alone."""
        return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in vars(self).items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in ("student", "teacher", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])
        self.center.copy_(saved["center"])
        self.losses = [loss.to(self.center) for loss in saved["losses"]]
        self.step, self.skipped, self.best_qwk = (saved[k] for k in ("step", "skipped", "best_qwk"))


def build_networks(o: Options) -> tuple[Network, Network]:
    """Return student and teacher with equal weights, from `--init` or from scratch, on the CPU."""
    torch.manual_seed(o.seed)
    spec = vit.BackboneSpec(o.arch, o.patch_size, o.global_crop_size, o.mean, o.std)
    backbone = vit.Backbone(spec, o.drop_path)
    if o.init != "none":
        weights = read_weights(o.init, o.checkpoint_key)
        load_weights(backbone, weights)
        if (weights.spec.mean, weights.spec.std) != (spec.mean, spec.std):
            log.warning("--init was trained with other --mean and --std: %s", weights.spec)
    log.info("backbone: %s, init %s; projection head: from scratch", o.arch, o.init)
    widths = (backbone.embed_dim, o.out_dim, o.head_hidden_dim)
    use_bn, fixed = o.use_bn_in_head, o.norm_last_layer
    head = vit.ProjectionHead(*widths, use_bn=use_bn, norm_last_layer=fixed)
    teacher = Network(vit.Backbone(spec), copy.deepcopy(head))
    teacher.backbone.load_state_dict(backbone.state_dict())
    return Network(backbone, head), teacher.requires_grad_(False)


def build_optimizer(student: Network, name: str) -> torch.optim.Optimizer:
    """Return the optimizer over two groups: decayed weights, then biases and norms."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == many]} for many in (True, False)]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return timm.optim.Lars(groups, lr=0.0, momentum=0.9)


@dataclass(frozen=True)
class Run:
    """What stays the same throughout training."""

    options: Options
    processes: devices.Processes
    folder: run_folder.RunFolder
    dtype: torch.dtype | None  # of autocast
    student: nn.Module  # the state's, wrapped where there are several processes
    steps_per_epoch: int
    total_steps: int
    global_batch: int

    def schedule(self, step: int) -> dict[str, float]:
        """Return lr, weight_decay, momentum and teacher_temp: pure functions of the step."""
        o, epoch, total = self.options, self.steps_per_epoch, self.total_steps
        peak, warmup = o.lr * self.global_batch / 256, o.warmup_epochs * epoch
        heating = (o.warmup_teacher_temp_epochs * epoch, o.warmup_teacher_temp, o.teacher_temp)
        return {
            "lr": utils.cosine_schedule(step, total, peak, o.min_lr, warmup),
            "weight_decay": utils.cosine_schedule(step, total, o.weight_decay, o.weight_decay_end),
            "momentum": utils.cosine_schedule(step, total, o.momentum_teacher, 1.0),
            "teacher_temp": utils.linear_schedule(step, *heating),
        }


def train_step(state: State, batches: Iterator[list[Tensor]], run: Run) -> dict[str, Any]:
    """Take one step over `accumulate` micro-batches and return its measurements.

    `batches` gives the crops of each, as `augment.color_views` does. May raise Diverged.
    """
    o, now, device = run.options, run.schedule(state.step), run.processes.device
    for group, decays in zip(state.optimizer.param_groups, (1, 0), strict=True):
        group.update(lr=now["lr"], weight_decay=now["weight_decay"] * decays)
    # what is dropped depends on the step and the process, not on what was drawn before
    torch.manual_seed((o.seed * 1_000_003 + state.step) * 1024 + run.processes.rank)
    total, mean, waited = torch.zeros((), device=device), torch.zeros_like(state.center), 0.0
    for micro in range(o.accumulate):
        started = time.perf_counter()
        crops = next(batches)
        waited += time.perf_counter() - started
        quiet = run.processes.world > 1 and micro < o.accumulate - 1  # reduce gradients once
        with run.student.no_sync() if quiet else contextlib.nullcontext():
            with torch.autocast(device.type, run.dtype, enabled=run.dtype is not None):
                with torch.no_grad():
                    teacher_logits = state.teacher(crops[0])[0].unflatten(0, (2, -1))  # (2, B, K)
                student_logits, cls_tokens = run.student(*crops)
            student_logits = student_logits.unflatten(0, (2 + o.local_crops_number, -1))
            if o.centering == "sinkhorn":
                targets = losses.sinkhorn_probs(teacher_logits, now["teacher_temp"])
            else:
                targets = losses.centered_probs(teacher_logits, state.center, now["teacher_temp"])
                mean += losses.batch_mean(teacher_logits) / o.accumulate
            loss = losses.distillation_loss(student_logits, targets, o.student_temp) / o.accumulate
            total += loss.detach()
            for view in cls_tokens.chunk(2) if o.koleo_weight else ():
                loss = loss + o.koleo_weight / o.accumulate * losses.koleo_loss(view)
            state.scaler.scale(loss).backward()
    if apply_gradients(state, run, losses.all_reduce(total) / run.processes.world):
        update_teacher(state.teacher, state.student, now["momentum"])
        if o.centering == "mean":
            losses.update_center(state.center, mean)
    state.step += 1
    now |= {"step": state.step, "loss": state.losses[-1], "waited": waited}
    if state.step % o.log_every == 0:
        check_finite(state.losses, state.step)
        now |= losses.spread(targets) | {"loss": torch.stack(state.losses).mean()}
        now |= {"skipped": state.skipped, "memory_gb": devices.peak_memory(device)}
        state.losses.clear()
    return now


def check_finite(values: list[Tensor], step: int) -> None:
    """Raise Diverged if one of the losses (scalars) is not finite; waits for their device."""
    if values and not torch.stack(values).isfinite().all():
        raise Diverged(f"loss or gradient not finite by step {step}, none of it kept: {HINT}")


def apply_gradients(state: State, run: Run, loss: Tensor) -> bool:
    """Clip and step; False, with nothing changed, when fp16 overflowed. Notes the step's loss.

    On a CPU raises Diverged with nothing changed if loss or gradients are not finite. A GPU would
    be waited for: it is asked before anything is logged or saved.
    """
    o, last_layer = run.options, state.student.head.last_layer
    state.scaler.unscale_(state.optimizer)
    norm = clip_gradients(list(state.student.parameters()), o.clip_grad)
    if not state.scaler.is_enabled():
        loss = loss + 0 * norm  # not finite if any gradient is not
    if loss.device.type == "cpu":
        check_finite([loss], state.step)
    state.losses.append(loss)
    if state.step < o.freeze_last_layer * run.steps_per_epoch:
        for parameter in last_layer.parameters():
            parameter.grad = None
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    overflowed = state.scaler.get_scale() < scale
    if state.scaler.is_enabled() and scale < 2.0**-24:
        raise Diverged(f"fp16 overflowed at every scale by step {state.step}: {HINT}")
    state.skipped += overflowed
    return not overflowed


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale down, in place, each parameter's gradient to a norm of at most `limit` (0: any).

    Each on its own, as DINO does, not all together. Returns the largest norm before, a scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        torch._foreach_mul_(grads, (limit / (norms + 1e-6)).clamp(max=1.0).unbind())
    return norms.amax()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher: t <- m t + (1 - m) s, for every parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------ epochs
def train(state: State, run: Run, dataset: Dataset, sampler: data.StepSampler) -> None:
    """Train from the state's step to the last one, saving as it goes; a signal raises Stopped."""
    o, per_epoch = run.options, run.steps_per_epoch
    stop, seen = devices.StopSignal(run.processes), Watched(dataset.manifest, run.dtype, o.workers)
    sampler.set_range(state.step, run.total_steps)
    main, device, saved = run.processes.is_main, run.processes.device, time.monotonic()
    loader = data.training_loader(dataset, sampler, o.workers, device)
    batches = data.ahead((color_views(b, device, o.mean, o.std) for b in loader), device)
    progress = run_folder.Progress(
        run.folder.path, state.step, run.total_steps, run.global_batch, main
    )
    if state.step == 0 and main:
        picture = Image.fromarray(contact_sheet([dataset[k] for k in next(iter(sampler))[:8]]))
        utils.write_atomic(run.folder.path / "crops.png", lambda path: picture.save(path, "PNG"))
        progress.record(watch(state, run, seen, 0, {}))
        save(state, run, 0)
    while state.step < run.total_steps:
        progress.update(train_step(state, batches, run), state.step / per_epoch)
        epoch, within = divmod(state.step, per_epoch)
        began, stopped = time.monotonic(), stop.agreed()
        if within == 0 or stopped:
            check_finite(state.losses, state.step)  # on all processes
        if main and (within == 0 or stopped or began - saved > 60 * o.save_minutes):
            save(state, run, epoch if within == 0 else None)
            saved = time.monotonic()
        if main and within == 0:  # saved before, since it may take longer than a stop leaves
            progress.record(watch(state, run, seen, epoch, progress.latest))
        progress.since += time.monotonic() - began  # throughput is that of steps
        if stopped:
            raise Stopped(f"step {state.step} saved; goes on with --output-dir {run.folder.path}")
    progress.close()


def save(state: State, run: Run, epoch: int | None = None, name: str = "checkpoint.pth") -> None:
    """Write a checkpoint; at the end of an epoch the backbone too, and a copy that is kept.

    Raises Diverged, and writes nothing, when a loss since the last line of the log is not finite.
    """
    check_finite(state.losses, state.step)
    folder, spec = run.folder, asdict(state.student.backbone.spec)
    content = state.state_dict() | {"spec": spec, "options": folder.options, "data": folder.data}
    if epoch is not None:  # checkpoint.pth last: once it is there, all of its epoch is
        file = folder.path / "backbone.safetensors"
        save_backbone(state.teacher.backbone, file, folder.options)
        if run.options.keep_every and epoch % run.options.keep_every == 0:
            save_torch(content, folder.path / f"checkpoint-{epoch:04d}.pth")
    save_torch(content, folder.path / name)


def watch(
    state: State, run: Run, seen: Watched, epoch: int, latest: dict[str, Any]
) -> dict[str, Any]:
    """Return RankMe and the like, k-NN scores when due; warn of collapse, keep the best on val."""
    o, backbone = run.options, state.teacher.backbone
    fixed = seen.embeddings(backbone, seen.fixed)
    record: dict[str, Any] = {"epoch": epoch, "rankme": features.rankme(fixed)}
    record["embedding_std"] = features.embedding_std(fixed)
    collapse = losses.collapse(latest | record, o.out_dim) if latest else ""
    if collapse:
        log.warning("epoch %d: collapse, %s", epoch, collapse)
        record["collapse"] = collapse
    if all(seen.graded) and o.knn_every and (epoch % o.knn_every == 0 or epoch == o.epochs):
        scores = metrics.brief(*seen.knn(backbone))
        record |= {f"knn_{name}": value for name, value in scores.items()}
        if epoch and record["knn_qwk"] > state.best_qwk:
            state.best_qwk = record["knn_qwk"]
            for name in ("checkpoint-best.pth", "checkpoint.pth"):  # both know of the best
                save(state, run, name=name)
    return record


def build_run(
    o: Options,
    processes: devices.Processes,
    folder: run_folder.RunFolder,
    sampler: data.StepSampler,
) -> tuple[State, Run]:
    """Return the untrained state and the run's constants."""
    student, teacher = wrapped, _ = [net.to(processes.device) for net in build_networks(o)]
    student.backbone.checkpointing = o.checkpointing
    for network in (student, teacher) if o.compile else ():
        network.compile()
    if processes.world > 1:
        cuda = processes.device.type == "cuda"
        if o.use_bn_in_head and cuda:  # batch norm over all processes; gloo has no kernel for it
            student, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student, teacher))
        wrapped = devices.distribute(student)
    dtype = devices.autocast_dtype(o.precision, processes.device)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype is torch.float16)
    center = torch.zeros(o.out_dim, device=processes.device)
    state = State(student, teacher, build_optimizer(student, o.optimizer), scaler, center)
    per_epoch = sampler.steps_per_epoch
    size = (per_epoch, o.epochs * per_epoch, sampler.global_batch)
    return state, Run(o, processes, folder, dtype, wrapped, *size)


def main(o: Options, config: Path | None) -> None:
    """Train, or continue, or say that the run is finished."""
    folder = run_folder.RunFolder.of(o, config, "eyepacs_vits16")
    with devices.process_group(o.device) as processes:
        hint = "; for EyePACS: python SSRL.py --data FOLDER" if config == DEMO else ""
        if o.compile and processes.device.type != "cuda":
            raise utils.InputError("--compile: gains something on CUDA alone; leave it out")
        log.info("recipe: %s%s", config or "the defaults, configs/eyepacs_vits16.yaml", hint)
        with processes.main_first():  # draws synthetic photographs once
            manifest = data.open_manifest(o.data)
        records = manifest.split("train")
        sampler = data.StepSampler(len(records), o.batch_size, o.accumulate, processes, o.seed)
        checkpoint = folder.open(o, manifest.fingerprint, RESUMABLE, processes)
        start = replace(o, init="none") if checkpoint else o  # the checkpoint has the weights
        crops = MultiCrop(**{name: getattr(o, name) for name in MultiCrop.__dataclass_fields__})
        dataset = Dataset(manifest, records, crops, o.seed, o.max_bad)
        with devices.memory_advice(o):
            state, run = build_run(start, processes, folder, sampler)
            if checkpoint:
                state.load_state_dict(checkpoint)
                log.info("resumed at step %d of %d", state.step, run.total_steps)
            if state.step < run.total_steps:
                train(state, run, dataset, sampler)
            else:
                log.info("%s is finished; --overwrite starts anew", folder.path)


if __name__ == "__main__":
    utils.run_main(main, Options, default_config=DEMO)
