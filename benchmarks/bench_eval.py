"""How fast are the evaluations on frozen features, against the published recipe?

    python -m benchmarks.bench_eval

The features are random and of EyePACS' size; each side runs in a process of its own, in turn.

k-NN at k = 10, 20, 100 and 200, exact: 35,126 x 384 in the bank and a tenth of the 53,576 queries.
DINO's way makes a search for each k, and counts votes by one-hot rows of 1,000 classes.

Linear probe: 35,126 x 1,536 features. Ours fits every weight decay in every fold and on all at
once, until all have converged; the other side is a single one of these fits by scikit-learn's
LogisticRegression.

The script also says how often a backbone is run for a linear probe of 100 epochs. It writes
benchmarks/results/eval.json.

Shapes: N rows of features, F features.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

import eval_linear
from benchmarks import measure
from benchmarks.measure import Call
from features import knn_predict
from fundus.manifest import GRADES

# Photographs of EyePACS' training and test set, and [CLS] of ViT-S, of which 4 blocks are probed.
TRAIN = 35_126
TEST = 53_576
WIDTH = 384
BLOCKS = 4

KS = (10, 20, 100, 200)
CLASSES = 1000  # of ImageNet, which DINO's k-NN makes room for
EPOCHS = 100  # of the published linear probe


def cloud(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features (N, F) of five overlapping clouds and their grades (N,).

    The middles of the clouds are the same for every seed.
    """
    # The clouds overlap: with clear ones all votes would go to one grade, on either side.
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(GRADES, width, generator=torch.Generator().manual_seed(0))
    grades = torch.randint(GRADES, (rows,), generator=generator)
    features = middles[grades] * 0.05 + torch.randn(rows, width, generator=generator)
    return features, grades


# ------------------------------------------------------------------------------------------- k-NN
# Each side prepares its features, which is not timed, and returns the call that is.


@torch.no_grad()
def plain_knn(bank: Tensor, grades: Tensor, queries: Tensor, k: int, classes: int) -> Tensor:
    """Return the votes (N, classes) of DINO's weighted k-NN, in chunks of a hundredth of TEST."""
    # As DINO goes about it: one-hot rows of 1,000 classes, however few grades there are.
    bank_t = F.normalize(bank, dim=1).t()
    queries = F.normalize(queries, dim=1)
    votes = []
    for chunk in queries.split(TEST // 100):
        similarity, nearest = torch.mm(chunk, bank_t).topk(k, largest=True, sorted=True)
        neighbours = torch.gather(grades.view(1, -1).expand(len(chunk), -1), 1, nearest)
        one_hot = torch.zeros(len(chunk) * k, classes).scatter_(1, neighbours.view(-1, 1), 1)
        weight = similarity.clone().div_(0.07).exp_()
        votes.append((one_hot.view(len(chunk), -1, classes) * weight.unsqueeze(2)).sum(1))
    return torch.cat(votes)


def our_knn(queries: int) -> Call:
    """Return the call that makes our k-NN at every k."""
    bank, grades = cloud(TRAIN, WIDTH, 1)
    asked, _ = cloud(queries, WIDTH, 2)
    measure.start_as_ours("cpu")
    return lambda: knn_predict(bank, grades, asked, KS)


def published_knn(queries: int, *, as_ours: bool = False) -> Call:
    """Return the call that makes DINO's k-NN at every k.

    `as_ours` gives it our choice of matrix products and memory.
    """
    bank, grades = cloud(TRAIN, WIDTH, 1)
    asked, _ = cloud(queries, WIDTH, 2)
    if as_ours:
        measure.start_as_ours("cpu")
    return lambda: [plain_knn(bank, grades, asked, k, CLASSES) for k in KS]


def disagreement(queries: int = 512) -> float:
    """Return the largest difference of the sides' shares of votes, over all k."""
    bank, grades = cloud(TRAIN, WIDTH, 1)
    asked, _ = cloud(queries, WIDTH, 2)
    ours = knn_predict(bank, grades, asked, KS)
    largest = 0.0
    for k in KS:
        # DINO's votes are sums of weights, ours are shares of their sum.
        votes = plain_knn(bank, grades, asked, k, CLASSES)[:, :GRADES]
        shares = votes / votes.sum(1, keepdim=True)
        largest = max(largest, float((ours[k] - shares).abs().max()))
    return largest


def compare_knn(rounds: int, threads: int) -> dict[str, Any]:
    """Return the times and the peak memory of all sides' k-NN."""
    # All queries would take minutes a round; a tenth shows the same ratio.
    queries = TEST // 10
    as_ours = "baseline, products and memory as ours"
    sides = {
        "baseline": partial(published_knn, queries),
        as_ours: partial(published_knn, queries, as_ours=True),
        "ours": partial(our_knn, queries),
    }
    times, memory = measure.alternate_apart(sides, rounds, threads)
    return {**measure.compare(times), "peak_MB": memory}


# ----------------------------------------------------------------------------------- linear probe
FOLDS = 5
DECAY = 0.1  # of the one probe that scikit-learn fits; ours has it among its decays


def our_linear() -> Call:
    """Return the call that fits the probes of all decays and folds, and chooses among them."""
    features, grades = cloud(TRAIN, BLOCKS * WIDTH, 1)
    fold_of = torch.arange(TRAIN) % FOLDS
    measure.start_as_ours("cpu")

    def call() -> None:
        rotation = eval_linear.Rotation([features])
        turned = rotation.turn(features)
        options = eval_linear.Options()
        eval_linear.fit(itertools.repeat(turned), turned, rotation.spread, grades, fold_of, options)

    return call


def scikit_linear() -> Call:
    """Return the call that fits one probe on all photographs with scikit-learn's default solver."""
    features, grades = cloud(TRAIN, BLOCKS * WIDTH, 1)
    scaled = (features - features.mean(dim=0)) / features.std(dim=0)
    model = LogisticRegression(C=1 / DECAY / TRAIN, max_iter=1000)
    return lambda: model.fit(scaled.numpy(), grades.numpy())


def compare_linear(threads: int) -> dict[str, Any]:
    """Return the times of both sides, and how many probes ours fits in its time."""
    sides = {"one probe by scikit-learn": scikit_linear, "ours": our_linear}
    times, memory = measure.alternate_apart(sides, 1, threads)
    probes = len(eval_linear.Options().weight_decay) * (FOLDS + 1)
    return {**measure.compare(times), "probes of ours": probes, "peak_MB": memory}


def backbone_runs() -> dict[str, float]:
    """Return how many photographs go through the backbone for a linear probe of 100 epochs."""
    # The published probe runs it on both splits in each epoch, ours once, or once for each view.
    published = EPOCHS * (TRAIN + TEST)
    cached = TRAIN + TEST
    with_views = 10 * TRAIN + cached
    return {
        "published": published,
        "ours": cached,
        "ratio": published / cached,
        "ours, --views 10": with_views,
        "ratio, --views 10": round(published / with_views, 1),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    results = {
        "knn, a tenth of the queries": compare_knn(options.rounds, options.threads),
        "knn, largest difference of shares": disagreement(),
        "linear probe": compare_linear(options.threads),
        "backbone runs, 100 epochs": backbone_runs(),
    }
    measure.write_result("eval", results)


if __name__ == "__main__":
    main()
