"""The objectives and their targets, and what keeps self-distillation from collapse.

The last are centring, Sinkhorn-Knopp and KoLeo. Shapes: B images of this process, T teacher views
(2), V student views, M masked patches, K prototypes, N patches of a crop, L kinds of lesions, S
local statistics. The student's first T views are the teacher's.
Everything is computed in fp32, whatever the networks compute in.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

LESION_PRIOR = 4.0  # patches with a lesion are rare
COUNT_SHARE = 0.2  # of the counts in the lesion objective

OCTAVES = 4  # of local statistics: what is about 1, 2, 4 and 8 pixels wide
LOCAL_STATISTICS = 3 * 3 * OCTAVES  # S: energy, brightest, darkest of RGB in each octave
DARK_LEVEL = 10  # grey levels added before logarithms, so that noise in the dark is no contrast
LEAST_ENERGY = 1e-6  # of squared logarithms; what JPEG leaves on an even area


def distillation_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Return the cross-entropy of student views against the teacher's other views, a scalar.

    `student_logits` is (V, B, K), `teacher_probs` (T, B, K) with rows summing to 1. The naive form:

        for i in range(T):
            for j in range(V):
                if i != j:
                    terms.append(-(P[i] * log_softmax(S[j] / student_temp)).sum(-1).mean())
        loss = mean(terms)                                       # arXiv 2104.14294, equation 3

    A teacher view meets the sum of all log-softmaxes but its own, so each is taken once.
    """
    # The sum over all pairs, less those of a view with itself.
    views, batch, _ = student_logits.shape
    teachers = len(teacher_probs)
    log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
    matched = (teacher_probs.sum(0) * log_probs.sum(0)).sum()
    matched = matched - (teacher_probs * log_probs[:teachers]).sum()
    return -matched / (batch * (teachers * views - teachers))


def patch_loss(
    student_logits: Tensor, teacher_probs: Tensor, weight: Tensor, student_temp: float
) -> Tensor:
    """Return the cross-entropy of the student's masked patches against the teacher's, a scalar.

    `student_logits` and `teacher_probs` (M, K) are of the same M patches: the student saw a mask
    token in their place, the teacher the patches. `weight` (M,) is 1 / (masked patches of the
    patch's crop x all crops). The naive form:

        for crop in crops:                                       # iBOT, arXiv 2111.07832, eq. 2
            of_crop = [-(P[m] * log_softmax(S[m] / student_temp)).sum() for m in masked(crop)]
            terms.append(mean(of_crop) if of_crop else 0)        # a crop without masks counts, too
        loss = mean(terms)
    """
    log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
    cross_entropy = -(teacher_probs * log_probs).sum(dim=-1)  # (M,)
    return (weight * cross_entropy).sum()


def lesion_loss(logits: Tensor, counts: Tensor, lesions: Tensor) -> Tensor:
    """Return how badly patch tokens find lesions, and [CLS] counts them: a scalar.

    `lesions` is bool (B, N, L), whether each patch holds each kind; `logits` (B, N, L) are of the
    patch tokens, `counts` (B, L) is what [CLS] takes for ln(1 + patches that hold it). That is

        binary cross-entropy, patches with a lesion LESION_PRIOR times as important as those without
        + COUNT_SHARE x smooth L1 between the counts and the truth

    each as a mean over all. The first keeps in the tokens what is small; the second brings it to
    [CLS], which otherwise nothing asks for it.
    """
    prior = torch.full(lesions.shape[-1:], LESION_PRIOR, device=logits.device)
    found = F.binary_cross_entropy_with_logits(logits.float(), lesions.float(), pos_weight=prior)
    counted = F.smooth_l1_loss(counts.float(), lesions.float().sum(dim=1).log1p())
    return found + COUNT_SHARE * counted


def local_statistics(crops: Tensor, grid: int) -> Tensor:
    """Return what small structure each patch of clean crops holds: float32 (B, N, S).

    `crops` is uint8 RGB (B, 3, G, G), `grid` the number of patches along G. The octaves are those
    of a Laplacian pyramid (Burt and Adelson, IEEE Trans. Commun. 31, 1983) of the logarithm of each
    colour, so that illumination drops out. Of each octave and colour there are the logarithm of the
    mean square over the patch, its brightest and its darkest value. MaskFeat (arXiv 2112.09133)
    predicts histograms of gradients instead, which know no dark from bright.
    """
    level = torch.log((crops.float() + DARK_LEVEL) / 255)
    found = []
    for octave in range(OCTAVES):
        if octave:
            level = F.avg_pool2d(level, 2, ceil_mode=True)
        band = level - _blur(level)
        energy = F.adaptive_avg_pool2d(band * band, grid)
        found.append((energy + LEAST_ENERGY).log())
        found.append(F.adaptive_max_pool2d(band, grid))
        found.append(-F.adaptive_max_pool2d(-band, grid))
    return torch.cat(found, dim=1).flatten(2).transpose(1, 2)


def _blur(planes: Tensor) -> Tensor:
    """Return planes (B, C, h, w) under a binomial kernel of five pixels, a Gaussian of sigma 1."""
    # By adding shifted planes: on a CPU that is 15 times as fast as convolving each by itself.
    for dim, pad in ((3, (2, 2, 0, 0)), (2, (0, 0, 2, 2))):
        padded = F.pad(planes, pad, mode="replicate")
        side = planes.shape[dim]
        planes = padded.narrow(dim, 2, side) * (6 / 16)
        planes.add_(padded.narrow(dim, 1, side) + padded.narrow(dim, 3, side), alpha=4 / 16)
        planes.add_(padded.narrow(dim, 0, side) + padded.narrow(dim, 4, side), alpha=1 / 16)
    return planes


def regression_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return the smooth L1 distance of predictions from standardised targets, a scalar.

    Both are (..., T). Each of the T targets is brought to mean 0 and deviation 1 over all else, so
    that each counts alike, and one that is constant counts nothing.
    """
    rows = targets.float().flatten(0, -2)
    deviation, mean = torch.std_mean(rows, dim=0, correction=0)
    standard = (rows - mean) / deviation.clamp(min=1e-4)
    return F.smooth_l1_loss(predicted.float().flatten(0, -2), standard)


def centered_probs(teacher_logits: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Return softmax((t - c) / temperature) of logits (..., K) and a centre (K,), in fp32."""
    return torch.softmax((teacher_logits.float() - center) / teacher_temp, dim=-1)


def batch_mean(teacher_logits: Tensor) -> Tensor:
    """Return the mean (K,) of logits (T, B, K) over views, images and processes.

    Where processes have different numbers of images, each process counts the same.
    """
    mean = teacher_logits.float().mean(dim=(0, 1))
    return all_reduce(mean) / _world()


def update_center(center: Tensor, mean: Tensor, momentum: float = 0.9) -> None:
    """Move the centre in place: c <- m c + (1 - m) mean. Call it for accepted steps only."""
    center.lerp_(mean, 1 - momentum)


def sinkhorn_probs(
    teacher_logits: Tensor, teacher_temp: float, iterations: int = 3, samples: float = 0
) -> Tensor:
    """Return targets (T, B, K) that use all prototypes equally, by Sinkhorn-Knopp, in fp32.

    Over the samples of all views and processes, in the naive form with Q (samples, K):

        Q = exp(t / teacher_temp)
        repeat: Q /= Q.sum(0) * K;  Q /= Q.sum(1) * samples      # prototypes, then samples
        Q *= samples                                             # rows sum to 1

    `samples` is their number over all processes, where they do not all have as many (0: they do).
    SwAV, arXiv 2006.09882, section 3; in place of DINO's centring since arXiv 2304.07193.
    """
    # Kept as logarithms, so that no temperature over- or underflows.
    log_q = teacher_logits.float().flatten(0, 1) / teacher_temp  # (samples, K)
    log_samples = math.log(samples or len(log_q) * _world())
    for _ in range(iterations):
        log_q = log_q - _log_sum_over_samples(log_q) - math.log(log_q.shape[1])
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True) - log_samples
    return (log_q + log_samples).exp().view_as(teacher_logits)


def _log_sum_over_samples(log_q: Tensor) -> Tensor:
    """Return log sum_samples exp(log_q) as (1, K), over all processes."""
    # The largest is taken out, over all processes alike, so that exp cannot overflow.
    top = log_q.amax(dim=0, keepdim=True)
    if _world() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top + all_reduce((log_q - top).exp().sum(dim=0, keepdim=True)).log()


def koleo_loss(embeddings: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the mean of -ln(distance to the nearest other), small where embeddings spread out.

    `embeddings` (B, D), B at least 2, are l2-normalised here, so that all lie on the unit sphere,
    and come from this process alone. The naive form, after Kozachenko and Leonenko's entropy:

        for i in range(B):
            terms.append(-log(min(norm(x[i] - x[j]) for j in range(B) if j != i) + eps))
        loss = mean(terms)                                       # arXiv 1806.03198, section 3

    Distillation asks only that views of one photograph agree. This asks that photographs differ,
    in every direction there is, and so keeps the [CLS] from shrinking onto a few (DINOv2, arXiv
    2304.07193, section 4).
    """
    # The nearest on the sphere has the largest cosine; -2 keeps each from being its own neighbour.
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)
    return -((unit - unit[nearest]).norm(dim=1) + eps).log().mean()


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy in nats over the last dimension; 0 log 0 counts as 0."""
    return torch.special.entr(probs).sum(dim=-1)


def target_entropies(targets: Tensor) -> dict[str, float]:
    """Return how targets (T, B, K) use the prototypes, as shares of ln K in 0-1.

    `teacher_entropy` of each target, on average: 1 is uniform, 0 one prototype. `marginal_entropy`
    of their mean: 0 when all images get the same one; at most teacher_entropy + ln(T B) / ln K.
    """
    top = math.log(targets.shape[-1])
    return {
        "teacher_entropy": float(entropy(targets).mean()) / top,
        "marginal_entropy": float(entropy(targets.mean(dim=(0, 1)))) / top,
    }


# ---------------------------------------------------------------------------------- bookkeeping
class History:
    """The losses of the steps since the last line of the log, term by term, on their device."""

    def __init__(self) -> None:
        self.terms: dict[str, list[Tensor]] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Note a step's losses (scalars)."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)

    def values(self) -> list[Tensor]:
        """Return the losses of all terms and steps."""
        return [value for values in self.terms.values() for value in values]

    def means(self) -> dict[str, float]:
        """Return each term's mean over the steps; waits for their device."""
        return {name: float(torch.stack(values).mean()) for name, values in self.terms.items()}

    def clear(self) -> None:
        """Begin a new interval."""
        self.terms.clear()

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the losses as dict and lists."""
        return dict(self.terms)

    def load_state_dict(self, saved: dict[str, list[Tensor]], device: torch.device) -> None:
        """Take over what `state_dict` returned."""
        self.terms = {}
        for name, values in saved.items():
            self.terms[name] = [value.to(device) for value in values]


def mean_by_name(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each named value over the parts; each counts the same."""
    means = {}
    for name in parts[0]:
        shares = [part[name] / len(parts) for part in parts]
        means[name] = sum(shares[1:], shares[0])
    return means


# ------------------------------------------------------------------------------- over processes
def mean_over_processes(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each term (scalars) over all processes, with one exchange."""
    means = all_reduce(torch.stack(list(terms.values()))) / _world()
    return dict(zip(terms, means.unbind(), strict=True))


def total_over_processes(count: int) -> float:
    """Return the sum of a count over all processes; the exchange waits for no GPU."""
    return float(all_reduce(torch.tensor(float(count), dtype=torch.float64)))


def _world() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(value: Tensor) -> Tensor:
    """Sum over processes, in place where there are several."""
    if _world() > 1:
        dist.all_reduce(value)
    return value
