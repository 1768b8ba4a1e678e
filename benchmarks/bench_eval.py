"""How fast are the evaluations on frozen features, against the published recipe?

    python -m benchmarks.bench_eval

On random features of EyePACS' size, each side in a process of its own, in turn: k-NN at k = 10, 20,
100 and 200, 35,126 x 384 in the bank and a tenth of the 53,576 queries, exact, against DINO's way
(a search for each k, votes by one-hot rows of 1,000 classes); the linear probe's 24 settings on
35,126 x 1,536 features, an epoch of all at once against an epoch of each. Also how often a backbone
is run for a linear probe of 100 epochs. Writes benchmarks/results/eval.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import devices
import eval_linear
from benchmarks import measure
from features import knn_predict
from utils import keep_freed_memory

TRAIN, TEST, WIDTH, BLOCKS, KS = 35_126, 53_576, 384, 4, (10, 20, 100, 200)
VAL = TRAIN // 10
Call = Callable[[], object]


def cloud(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features (N, F) of five overlapping clouds and their grades (N,)."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    grades = torch.randint(5, (rows,), generator=generator)
    return middles[grades] * 0.05 + torch.randn(rows, width, generator=generator), grades


@torch.no_grad()
def plain_knn(bank: Tensor, grades: Tensor, queries: Tensor, k: int, classes: int) -> Tensor:
    """Return the votes (N, classes) of DINO's weighted k-NN, in chunks of a hundredth of TEST."""
    bank_t, votes = F.normalize(bank, dim=1).t(), []
    queries = F.normalize(queries, dim=1)
    for chunk in queries.split(TEST // 100):
        similarity, nearest = torch.mm(chunk, bank_t).topk(k, largest=True, sorted=True)
        found = torch.gather(grades.view(1, -1).expand(len(chunk), -1), 1, nearest)
        one_hot = torch.zeros(len(chunk) * k, classes).scatter_(1, found.view(-1, 1), 1)
        weight = similarity.clone().div_(0.07).exp_()
        votes.append((one_hot.view(len(chunk), -1, classes) * weight.unsqueeze(2)).sum(1))
    return torch.cat(votes)


def knn_side(side: str, queries: int) -> Call:
    """Return a side's k-NN at every k."""
    bank, grades = cloud(TRAIN, WIDTH, 1)
    asked, _ = cloud(queries, WIDTH, 2)
    if side != "baseline":
        keep_freed_memory()
        devices.pick_device("cpu")
    if side == "ours":
        return lambda: knn_predict(bank, grades, asked, KS)
    return lambda: [plain_knn(bank, grades, asked, k, 1000) for k in KS]


def disagreement(queries: int = 512) -> float:
    """Return the largest difference of the sides' shares of votes, over all k."""
    (bank, grades), (asked, _) = cloud(TRAIN, WIDTH, 1), cloud(queries, WIDTH, 2)
    found = knn_predict(bank, grades, asked, KS)
    plain = {k: plain_knn(bank, grades, asked, k, 1000)[:, :5] for k in KS}
    return max(float((found[k] - v / v.sum(1, keepdim=True)).abs().max()) for k, v in plain.items())


def linear_side(side: str) -> Call:
    """Return an epoch of the 24 settings, val scored after it."""
    o = eval_linear.Options(epochs=1)
    settings = [(lr, decay) for lr in o.lr for decay in o.weight_decay]
    (x, grades), (held, truth) = cloud(TRAIN, BLOCKS * WIDTH, 1), cloud(VAL, BLOCKS * WIDTH, 2)
    if side == "ours":
        keep_freed_memory()
        devices.pick_device("cpu")
        return lambda: eval_linear.fit(iter([x]), grades, held, truth.numpy(), o, settings)
    return lambda: [plain_linear(x, grades, held, truth, o, setting) for setting in settings]


def plain_linear(
    x: Tensor, grades: Tensor, held: Tensor, truth: Tensor, o: Any, setting: tuple[float, float]
) -> float:
    """Train one classifier for an epoch, as a loop over batches of torch's modules does."""
    layer = nn.Linear(x.shape[1], 5)
    optimizer = torch.optim.SGD(layer.parameters(), setting[0], 0.9, weight_decay=setting[1])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    for rows in order.split(o.batch_size):
        loss = F.cross_entropy(layer(x[rows]), grades[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((layer(held).argmax(1) == truth).float().mean())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    queries = TEST // 10
    sides = ("baseline", "ours")
    also = "baseline, products and memory as ours"
    knn = {side: partial(knn_side, side, queries) for side in ("baseline", also, "ours")}
    times, memory = measure.alternate_apart(knn, a.rounds, a.threads)
    results: dict[str, Any] = {"knn, a tenth of the queries": measure.compare(times)}
    results["knn, a tenth of the queries"]["peak_MB"] = memory
    results["knn, largest difference of shares"] = disagreement()
    linear = {side: partial(linear_side, side) for side in sides}
    times, _ = measure.alternate_apart(linear, a.rounds, a.threads)
    results["linear, 24 settings, an epoch"] = found = measure.compare(times)
    found["100_epochs_s"] = round(100 * found["ours"]["median_s"], 1)
    published, cached = 100 * (TRAIN + TEST), TRAIN + TEST
    results["backbone runs, 100 epochs"] = {
        "published": published,
        "ours": cached,
        "ratio": published / cached,
        "ours, --views 10": 10 * TRAIN + cached,
        "ratio, --views 10": round(published / (10 * TRAIN + cached), 1),
    }
    measure.write_result("eval", results)


if __name__ == "__main__":
    main()
