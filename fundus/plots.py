"""The pictures of an evaluation: confusion, ROC, reliability, curves, embedding, neighbours.

Each picture has two functions: `draw_NAME` returns the Figure, whose artists hold the numbers that
were given, and `plot_NAME` writes it as PNG, whole or not at all. Colours are those of Okabe and
Ito and of viridis, which all kinds of colour vision tell apart; lines differ in their markers, too.
Shapes: N images, D width of features, G grades.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fundus.manifest import GRADES
from utils import write_atomic

if TYPE_CHECKING:
    # matplotlib is slow to import, so each function does so late: --help needs none of it.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERABLE = 2  # the first referable grade
DPI = 120  # 5 inches are 600 pixels
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#595959"
SHOWN = 2000  # photographs in an embedding: more hide one another, and t-SNE takes minutes
TICK, CROSS = "\u2713", "\u2717"  # both are in the font that matplotlib brings along


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, that makes room for its labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(figure: Figure, place: Any = 111, **options: Any) -> Axes:
    """Return a panel of a figure in the look that all share: a faint grid, no box.

    `place` is what add_subplot takes: 121 is the left one of two, or an item of a grid.
    """
    axes = figure.add_subplot(place, **options)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=DPI, format="png"))


# ---------------------------------------------------------------------------------------- confusion
def draw_confusion(confusion: Sequence[Sequence[int]]) -> Figure:
    """Return a confusion matrix (G, G), truth in rows: counts, and shares of the row as shades."""
    table = np.asarray(confusion)
    totals = table.sum(axis=1)
    share = table / np.maximum(totals, 1)[:, None]
    figure = _figure(5, 4.4)
    axes = figure.add_subplot(xlabel="predicted grade", ylabel="grade (photographs)")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(table)))
    axes.set_yticks(range(len(table)), [f"{grade} ({total})" for grade, total in enumerate(totals)])
    axes.tick_params(length=0)

    for row, column in np.ndindex(table.shape):
        text = str(table[row, column])
        if totals[row]:
            text += f"\n{100 * share[row, column]:.0f} %"
        color = "black"
        if share[row, column] > 0.55:  # dark blue
            color = "white"
        axes.text(column, row, text, ha="center", va="center", color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the row")
    return figure


def plot_confusion(confusion: Sequence[Sequence[int]], path: Path) -> None:
    """Write draw_confusion as PNG."""
    _save(draw_confusion(confusion), path)


# ---------------------------------------------------------------------------------------------- ROC
def draw_roc(
    grades: np.ndarray, score: np.ndarray, operating_points: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Return the ROC curve of referable DR, grade 2 and above, with operating points on it.

    `grades` (N,) int, `score` (N,) is higher where DR is more likely referable. `operating_points`
    are entries of metrics by name, as in results.json. Of `referable_auroc` the interval is shown;
    of `sensitivity_at_90_specificity` and its kind the value, its interval, and the specificity
    (or sensitivity) that the threshold, chosen elsewhere, achieves here. All else is left out.
    """
    from sklearn.metrics import auc, roc_curve

    figure = _figure(5, 5)
    axes = _axes(
        figure,
        xlabel="1 - specificity",
        ylabel="sensitivity",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
        title="referable DR (grade 2 and above)",
    )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    referable = np.asarray(grades) >= REFERABLE
    if referable.all() or not referable.any():
        axes.text(
            0.5,
            0.5,
            "no curve: all photographs on one side of grade 2",
            ha="center",
            va="center",
            backgroundcolor="white",
        )
        return figure

    false_alarms, found, _ = roc_curve(referable, score)
    label = f"AUROC {auc(false_alarms, found):.3f}"
    interval = operating_points.get("referable_auroc", {}).get("ci95")
    if interval:
        label += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    axes.plot(false_alarms, found, color=BLUE, label=label)
    markers = iter("os^Dv")
    for name, entry in operating_points.items():
        kind = re.fullmatch(r"(sensitivity|specificity)_at_(\d+)_(sensitivity|specificity)", name)
        if kind and entry["value"] is not None:
            _mark_operating_point(axes, kind, entry, next(markers, "o"))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _mark_operating_point(
    axes: Axes, kind: re.Match[str], entry: Mapping[str, Any], marker: str
) -> None:
    """Mark where on the curve a threshold lies, with the interval of what is reported there."""
    reported, aim, fixed = kind.groups()
    value = entry["value"]
    achieved = entry["achieved"]
    lengths = None
    if entry.get("ci95"):
        low, high = entry["ci95"]
        # matplotlib wants lengths; rounding may put an end a little beyond the value.
        lengths = [[max(0, value - low)], [max(0, high - value)]]
    if reported == "sensitivity":
        place = {"x": 1 - achieved, "y": value, "yerr": lengths}
    else:
        if lengths:
            lengths = lengths[::-1]  # the axis shows 1 - specificity
        place = {"x": 1 - value, "y": achieved, "xerr": lengths}
    label = f"{reported} {value:.2f} at {fixed} {achieved:.2f} (aim {int(aim) / 100:.2f})"
    axes.errorbar(
        **place, fmt=marker, color=ORANGE, markeredgecolor="black", capsize=3, label=label
    )


def plot_roc(
    grades: np.ndarray,
    score: np.ndarray,
    path: Path,
    operating_points: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write draw_roc as PNG."""
    _save(draw_roc(grades, score, operating_points), path)


# -------------------------------------------------------------------------------------- reliability
def draw_reliability(reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Return both reliability curves of results.json, with how many photographs are in each bin.

    `reliability` has bins {low, high, images, predicted, observed} of `confidence` and of
    `referable`; empty bins are left out.
    """
    words = {
        "confidence": ("probability of the predicted grade", "share that is right"),
        "referable": ("probability of referable DR", "share that is referable"),
    }
    figure = _figure(7.2, 4.6)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    for column, (name, (predicted, observed)) in enumerate(words.items()):
        bins = [row for row in reliability[name] if row["images"]]
        upper = _axes(figure, grid[0, column], ylabel=observed)
        lower = _axes(figure, grid[1, column], sharex=upper, xlabel=predicted, ylabel="photographs")
        # On a logarithmic axis, since one bin mostly holds nearly all, and the curve jumps where
        # there are few. It begins below 1, for a bar of one photograph to be seen.
        lower.set_yscale("log")
        upper.set_xlim(-0.02, 1.02)
        upper.set_ylim(-0.02, 1.02)
        upper.tick_params(labelbottom=False)
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfectly calibrated")
        upper.plot(
            [row["predicted"] for row in bins],
            [row["observed"] for row in bins],
            color=BLUE,
            marker="o",
            markersize=4,
            label="observed",
        )
        lower.bar(
            [row["low"] for row in bins],
            [row["images"] for row in bins],
            width=[row["high"] - row["low"] for row in bins],
            align="edge",
            color=BLUE,
            edgecolor="white",
        )
        lower.set_ylim(bottom=0.5)
    figure.align_ylabels()
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=9)
    return figure


def plot_reliability(reliability: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write draw_reliability as PNG."""
    _save(draw_reliability(reliability), path)


# ------------------------------------------------------------------------------------------- curves
def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Return values as floats, with NaN for None: lines have gaps there."""
    return np.array(values, np.float64)


def _log_ticks(axes: Axes, places: Sequence[float], labels: Sequence[str], width: float) -> None:
    """Make the x axis logarithmic, with ticks at these places alone.

    A label takes `width` of the axis; ticks whose labels would touch others are left out.
    """
    axes.set_xscale("log")
    low = min(places)
    high = max(places)
    gap = width * np.log(high / low)
    shown = []
    last = np.log(high)
    for place, label in zip(places, labels, strict=True):
        position = np.log(place)
        free = not shown or position - shown[-1][0] >= gap
        # The last one stays, as it says where the axis ends.
        if place == high or (free and last - position >= gap):
            shown.append((position, place, label))
    axes.set_xticks([place for _, place, _ in shown], [label for _, _, label in shown])
    axes.minorticks_off()
    axes.set_xlim(low / 1.15, high * 1.15)


def draw_k(by_k: Sequence[Mapping[str, Any]], majority: Mapping[str, Any]) -> Figure:
    """Return what k-NN scores against k: QWK, accuracy beside its majority line, referable AUROC.

    `by_k` has a row {k, METRIC: value or None} a k, `majority` is that of results.json. Values that
    are None are gaps.
    """
    rows = sorted(by_k, key=lambda row: row["k"])
    places = [row["k"] for row in rows]
    figure = _figure(5, 4)
    axes = _axes(figure, xlabel="neighbours k", ylabel="score on the test photographs")
    lines = (
        ("referable_auroc", "referable AUROC", GREEN, "^"),
        ("accuracy", "accuracy", ORANGE, "s"),
        ("qwk", "QWK", BLUE, "o"),
    )
    for name, title, color, marker in lines:
        values = _numbers([row[name] for row in rows])
        axes.plot(places, values, color=color, marker=marker, label=title)
    axes.axhline(
        majority["accuracy"],
        color=ORANGE,
        linestyle="--",
        label=f"accuracy of always grade {majority['grade']}",
    )
    _log_ticks(axes, places, [str(k) for k in places], width=0.1)
    low, _ = axes.get_ylim()
    axes.set_ylim(min(-0.02, low), 1.02)  # QWK and referable AUROC may be as low as -1 and 0
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    return figure


def plot_k(by_k: Sequence[Mapping[str, Any]], path: Path, majority: Mapping[str, Any]) -> None:
    """Write draw_k as PNG."""
    _save(draw_k(by_k, majority), path)


def draw_fractions(by_fraction: Sequence[Mapping[str, Any]]) -> Figure:
    """Return QWK and referable AUROC against the fraction of patients that a probe learns from.

    `by_fraction` has a row {fraction, patients, METRIC: {mean, sd, values}} a fraction, with a
    value a seed. Short lines are the seeds, the curve is their mean with the standard deviation to
    either side. What is None is left out.
    """
    rows = sorted(by_fraction, key=lambda row: row["fraction"])
    places = [100 * row["fraction"] for row in rows]
    labels = []
    for place, row in zip(places, rows, strict=True):
        labels.append(f"{place:g} %\n{row['patients']}")
    figure = _figure(7.2, 3.8)
    lines = (("qwk", "QWK", BLUE, "o"), ("referable_auroc", "referable AUROC", GREEN, "^"))
    for number, (name, title, color, marker) in enumerate(lines, start=1):
        axes = _axes(figure, 120 + number, ylabel=title)
        axes.set_xlabel("patients learnt from: share, number")
        for place, row in zip(places, rows, strict=True):
            values = _numbers([value for value in row[name]["values"] if value is not None])
            axes.plot(
                np.full(len(values), place),
                values,
                linestyle="",
                marker="_",
                color="black",
                zorder=3,  # above the mean's line
            )
        axes.errorbar(
            places,
            _numbers([row[name]["mean"] for row in rows]),
            yerr=_numbers([row[name]["sd"] for row in rows]),
            color=color,
            marker=marker,
            markersize=4,
            capsize=4,
            label="mean and sd; lines: each seed",
        )
        _log_ticks(axes, places, labels, width=0.2)
        axes.legend(loc="best", fontsize=8)
    return figure


def plot_fractions(by_fraction: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write draw_fractions as PNG."""
    _save(draw_fractions(by_fraction), path)


# ---------------------------------------------------------------------------------------- embedding
def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components of features (N, D), (N, 2), and their shares.

    The shares (2,) are those of the variance. A component without variance is 0. Signs make the
    weight of largest size positive, hence are the same on all machines.
    """
    centered = np.asarray(features, np.float64)
    centered = centered - centered.mean(axis=0)
    left, sizes, right = np.linalg.svd(centered, full_matrices=False)
    components = np.zeros((len(centered), 2))
    shares = np.zeros(2)
    total = (sizes**2).sum()
    for number in range(min(2, len(sizes))):
        if sizes[number] <= 1e-9 * np.sqrt(total):
            continue  # nothing but rounding, which would be drawn as large as any other
        weights = right[number]
        sign = np.sign(weights[np.abs(weights).argmax()])
        components[:, number] = sign * sizes[number] * left[:, number]
        shares[number] = sizes[number] ** 2 / total
    return components, shares


def draw_embedding(features: np.ndarray, grades: np.ndarray, seed: int = 0) -> Figure:
    """Return photographs by the first two principal components and by t-SNE of their features.

    `features` (N, D), `grades` (N,) int. Of more than 2,000 photographs as many are drawn by
    `seed`. Fewer than 5 leave t-SNE out. Raises ValueError for none and for features that are not
    finite.
    """
    from sklearn.manifold import TSNE

    features = np.asarray(features, np.float64)
    grades = np.asarray(grades)
    if not len(features) or not np.isfinite(features).all():
        raise ValueError("features: expected finite ones of at least one photograph")
    # Also where all are shown: in a random order no grade is hidden below those that come later.
    count = min(SHOWN, len(features))
    chosen = np.random.default_rng(seed).permutation(len(features))[:count]
    figure = _figure(7.2, 4.2)
    title = f"photographs: {count}"
    if count < len(features):
        title += f", drawn from {len(features)} with seed {seed}"
    figure.suptitle(title, fontsize=11)

    features = features[chosen]
    grades = grades[chosen]
    components, shares = principal_components(features)
    axes = _axes(figure, 121, title="PCA")
    axes.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of variance)")
    axes.set_ylabel(f"component 2 ({100 * shares[1]:.0f} % of variance)")
    _scatter_grades(axes, components, grades)

    axes = _axes(figure, 122, xticks=[], yticks=[])
    if count < 5:
        axes.set_title("t-SNE")
        axes.spines[:].set_visible(False)
        axes.text(0.5, 0.5, "left out: fewer than 5 photographs", ha="center")
    else:
        perplexity = min(30, (count - 1) / 3)  # of which t-SNE wants three times as many neighbours
        # Begun at the components, as scikit-learn does, which fails where they have no variance.
        start = 1e-4 * components / (components[:, 0].std() or 1)
        search = TSNE(perplexity=perplexity, init=start.astype(np.float32), random_state=seed)
        places = search.fit_transform(features)
        axes.set_title(f"t-SNE, perplexity {perplexity:.0f}")
        axes.set_xlabel("only who is near whom has a meaning")
        _scatter_grades(axes, places, grades)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=GRADES,
        fontsize=9,
        columnspacing=1,
        handletextpad=0.1,
    )
    return figure


def _scatter_grades(axes: Axes, places: np.ndarray, grades: np.ndarray) -> None:
    """Draw photographs at places (N, 2) in the colours of their grades, in the order given."""
    from matplotlib import colormaps

    # Up to 0.93, since the brightest yellow is hardly seen on white.
    colors = colormaps["viridis"](np.linspace(0, 0.93, GRADES))
    size = np.clip(4000 / len(places), 8, 40)
    axes.scatter(
        places[:, 0], places[:, 1], s=size, c=colors[grades], edgecolors="black", linewidths=0.2
    )
    counts = np.bincount(grades, minlength=GRADES)
    for grade in range(GRADES):
        # An empty line, for the legend alone.
        label = f"grade {grade} ({counts[grade]})"
        axes.plot([], [], linestyle="", marker="o", color=colors[grade], label=label)


def plot_embedding(features: np.ndarray, grades: np.ndarray, path: Path, seed: int = 0) -> None:
    """Write draw_embedding as PNG."""
    _save(draw_embedding(features, grades, seed), path)


# --------------------------------------------------------------------------------------- neighbours
@dataclass(frozen=True)
class Neighbour:
    """A photograph that votes on another."""

    picture: np.ndarray  # (H, W, 3) uint8
    grade: int
    similarity: float  # cosine


@dataclass(frozen=True)
class Query:
    """A photograph that is graded by its nearest neighbours, the nearest first."""

    picture: np.ndarray  # (H, W, 3) uint8
    grade: int
    title: str
    neighbours: Sequence[Neighbour]


def draw_neighbours(queries: Sequence[Query]) -> Figure:
    """Return a row of pictures a query: itself, then its neighbours with their votes.

    A vote for the query's grade has a tick and a solid frame, any other a cross and a dashed one of
    another colour. Raises ValueError without a query.
    """
    if not queries:
        raise ValueError("queries: expected at least one")
    columns = 1 + max(len(query.neighbours) for query in queries)
    figure = _figure(1.35 * columns + 0.2, 1.75 * len(queries) + 0.2)
    for row, query in enumerate(queries):
        first = row * columns + 1
        axes = figure.add_subplot(len(queries), columns, first)
        _show_picture(axes, query.picture, f"{query.title}\ngrade {query.grade}")
        axes.spines[:].set_visible(False)
        for number, neighbour in enumerate(query.neighbours, start=1):
            axes = figure.add_subplot(len(queries), columns, first + number)
            if neighbour.grade == query.grade:
                mark, color, style = TICK, BLUE, "-"
            else:
                mark, color, style = CROSS, ORANGE, "--"
            title = f"{mark} grade {neighbour.grade}\ncosine {neighbour.similarity:.3f}"
            _show_picture(axes, neighbour.picture, title)
            axes.spines[:].set(color=color, linestyle=style, linewidth=2.5)
    return figure


def _show_picture(axes: Axes, picture: np.ndarray, title: str) -> None:
    """Show a picture below its title, without ticks."""
    axes.imshow(picture)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def plot_neighbours(queries: Sequence[Query], path: Path) -> None:
    """Write draw_neighbours as PNG."""
    _save(draw_neighbours(queries), path)
