"""plots.py: that the artists hold the numbers given, against scikit-learn and by hand.

Run it with `python -m pytest tests/test_plots.py`.
"""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import auc, roc_auc_score

from fundus import plots

CONFUSION = [[40, 5, 3, 1, 1], [4, 3, 3, 0, 0], [2, 1, 6, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 2]]
MAJORITY = {"grade": 0, "accuracy": 0.7, "qwk": 0.0, "referable_auroc": 0.5}
BY_K = [
    {"k": 20, "accuracy": 0.72, "qwk": 0.4, "referable_auroc": 0.8},
    {"k": 1, "accuracy": 0.6, "qwk": -0.1, "referable_auroc": 0.7},
    {"k": 5, "accuracy": 0.65, "qwk": None, "referable_auroc": 0.75},
]


def draw_scores(count=120, seed=0):
    """Return grades and a score that tells referable ones from others more often than not."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(5, count)
    return grades, 1 / (1 + np.exp(-rng.normal(size=count) - 1.2 * (grades >= 2)))


def make_points(grades, score):
    """Return entries of the three operating points, at thresholds that are arbitrary."""
    referable = grades >= 2
    points = {
        "accuracy": {"value": 0.5, "ci95": [0.4, 0.6]},
        "referable_auroc": {"value": 0.8, "ci95": [0.71, 0.88]},
    }
    for name, threshold in (
        ("sensitivity_at_90_specificity", 0.6),
        ("specificity_at_90_sensitivity", 0.3),
    ):
        shares = (
            float((score[referable] >= threshold).mean()),
            float((score[~referable] < threshold).mean()),
        )
        if name.startswith("specificity"):
            shares = shares[::-1]
        interval = [shares[0] - 0.1, shares[0] + 0.05]
        points[name] = dict(value=shares[0], achieved=shares[1], ci95=interval, threshold=threshold)
    points["sensitivity_at_95_specificity"] = {"value": None, "ci95": None, "reason": "none"}
    return points


def make_bins():
    """Return 15 bins of which the first is empty and the others are made up."""
    bins = []
    for number in range(15):
        row = {"low": number / 15, "high": (number + 1) / 15, "images": 3 * number}
        row["predicted"] = (number + 0.5) / 15 if number else None
        row["observed"] = (number / 15) ** 2 if number else None
        bins.append(row)
    return bins


def make_fractions():
    """Return two fractions with three seeds and a last one with a single seed."""
    rows = []
    for fraction, patients, values in (
        (1.0, 400, [0.6]),
        (0.01, 4, [0.1, 0.2, 0.3]),
        (0.1, 40, [0.3, 0.5, None]),
    ):
        known = [value for value in values if value is not None]
        entry = {"mean": np.mean(known), "sd": None, "values": values}
        if len(known) > 1:
            entry["sd"] = np.std(known, ddof=1)
        row = {"fraction": fraction, "patients": patients, "images": 2 * patients, "seeds": 3}
        rows.append({**row, "qwk": entry, "referable_auroc": entry})
    return rows


def make_queries():
    """Return two queries of other sizes, with two neighbours and with one."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(256, size=(size, size, 3), dtype=np.uint8) for size in (8, 9, 10)]
    first = [plots.Neighbour(pictures[1], 2, 0.987), plots.Neighbour(pictures[2], 0, 0.5)]
    second = [plots.Neighbour(pictures[0], 1, 0.25)]
    return [plots.Query(pictures[0], 2, "a", first), plots.Query(pictures[1], 1, "b", second)]


def texts(axes):
    """Return the texts within a panel."""
    return [text.get_text() for text in axes.texts]


def line(axes, label):
    """Return the line of a panel whose label begins so."""
    found = [item for item in axes.lines if str(item.get_label()).startswith(label)]
    assert len(found) == 1
    return found[0]


# ------------------------------------------------------------------------------- pictures as files
PICTURES = {
    "confusion": (plots.plot_confusion, (CONFUSION,), ()),
    "roc": (plots.plot_roc, draw_scores(), (make_points(*draw_scores()),)),
    "reliability": (
        plots.plot_reliability,
        ({"confidence": make_bins(), "referable": make_bins()},),
        (),
    ),
    "k": (plots.plot_k, (BY_K,), (MAJORITY,)),
    "fractions": (plots.plot_fractions, (make_fractions(),), ()),
    "embedding": (plots.plot_embedding, (np.eye(12, 7), np.arange(12) % 5), ()),
    "neighbours": (plots.plot_neighbours, (make_queries(),), ()),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, of what it cannot draw
def test_picture_is_a_png_of_sane_size(name, tmp_path):
    plot, before, after = PICTURES[name]
    path = tmp_path / "new" / f"{name}.png"
    plot(*before, path, *after)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 300 <= picture.width <= 1200
        assert 300 <= picture.height <= 1200
        shades = np.asarray(picture.convert("L"))
    assert 20 < shades.mean() < 254  # neither black nor blank
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_off_or_covers_another_label(name):
    _, before, after = PICTURES[name]
    figure = getattr(plots, f"draw_{name}")(*before, *after)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= width + 1 and box.y1 <= height + 1
        labels = [item.get_window_extent(renderer) for item in axes.get_xticklabels()]
        shown = [box for box in labels if box.width > 1]
        for left, right in zip(shown, shown[1:], strict=False):
            assert left.x1 <= right.x0


# ------------------------------------------------------------------------------ what the plots hold
def test_confusion_has_counts_and_shares():
    axes = plots.draw_confusion(CONFUSION).axes[0]
    shown = texts(axes)
    assert shown[0] == "40\n80 %"  # of 50
    assert shown[12] == "6\n60 %"
    assert shown[15] == "0"  # of none
    shades = axes.images[0].get_array()
    assert shades[0].tolist() == [0.8, 0.1, 0.06, 0.02, 0.02]
    assert shades[3].tolist() == [0] * 5
    assert [label.get_text() for label in axes.get_yticklabels()][3:] == ["3 (0)", "4 (4)"]


def test_roc_is_that_of_scikit_with_points_on_it():
    grades, score = draw_scores()
    points = make_points(grades, score)
    axes = plots.draw_roc(grades, score, points).axes[0]
    auroc = roc_auc_score(grades >= 2, score)
    curve = line(axes, "AUROC")
    assert curve.get_label() == f"AUROC {auroc:.3f} (0.710 to 0.880)"
    assert auc(curve.get_xdata(), curve.get_ydata()) == pytest.approx(auroc)

    assert len(axes.containers) == 2  # the one without a value is left out
    for container, name in zip(axes.containers, list(points)[2:4], strict=True):
        entry = points[name]
        place = container.lines[0].get_xydata()[0]
        bar = container.lines[2][0].get_segments()[0]
        if name.startswith("sensitivity"):
            assert place == pytest.approx([1 - entry["achieved"], entry["value"]])
            assert bar[:, 1] == pytest.approx(entry["ci95"])
        else:
            assert place == pytest.approx([1 - entry["value"], entry["achieved"]])
            assert sorted(1 - bar[:, 0]) == pytest.approx(entry["ci95"])
        # On the curve: right above or right of it in steps.
        assert np.interp(place[0], curve.get_xdata(), curve.get_ydata()) == pytest.approx(
            place[1], abs=0.05
        )
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    entry = points["sensitivity_at_90_specificity"]
    words = f"sensitivity {entry['value']:.2f} at specificity {entry['achieved']:.2f} (aim 0.90)"
    assert words in shown


@pytest.mark.parametrize("grades", [[0, 1, 1], [2, 3, 4]])
def test_roc_of_one_side_says_so(grades):
    axes = plots.draw_roc(np.array(grades), np.array([0.1, 0.2, 0.3]), {}).axes[0]
    assert texts(axes) == ["no curve: all photographs on one side of grade 2"]
    assert len(axes.lines) == 1


def test_reliability_leaves_empty_bins_out():
    bins = make_bins()
    bins[7].update(images=0, predicted=None, observed=None)
    figure = plots.draw_reliability({"confidence": make_bins(), "referable": bins})
    assert len(line(figure.axes[0], "observed").get_xdata()) == 14
    full = [row for row in bins if row["images"]]
    drawn = line(figure.axes[2], "observed").get_xydata()
    assert drawn.tolist() == [[row["predicted"], row["observed"]] for row in full]
    bars = figure.axes[3].patches
    assert [bar.get_height() for bar in bars] == [row["images"] for row in full]
    assert [bar.get_x() for bar in bars] == [row["low"] for row in full]


def test_k_is_sorted_with_gaps_and_the_majority_line():
    axes = plots.draw_k(BY_K, MAJORITY).axes[0]
    assert axes.get_xscale() == "log"
    for title, values in (
        ("QWK", [-0.1, np.nan, 0.4]),
        ("referable AUROC", [0.7, 0.75, 0.8]),
        ("accuracy", [0.6, 0.65, 0.72]),
    ):
        found = [item for item in axes.lines if item.get_label() == title]
        assert found[0].get_xdata().tolist() == [1, 5, 20]
        assert np.array_equal(found[0].get_ydata(), values, equal_nan=True)
    assert line(axes, "accuracy of always grade 0").get_ydata()[0] == 0.7
    assert axes.get_ylim()[0] < -0.1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "20"]


def test_many_k_keep_first_and_last_label():
    rows = [{**MAJORITY, "k": k} for k in range(1, 101)]
    axes = plots.draw_k(rows, MAJORITY).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (labels[0], labels[-1]) == ("1", "100")
    assert 5 <= len(labels) <= 11


def test_fractions_have_means_spreads_and_seeds():
    figure = plots.draw_fractions(make_fractions())
    assert [axes.get_ylabel() for axes in figure.axes] == ["QWK", "referable AUROC"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        mean = axes.containers[0].lines[0]
        assert mean.get_xdata().tolist() == [1, 10, 100]
        assert mean.get_ydata() == pytest.approx([0.2, 0.4, 0.6])
        first, second, last = axes.containers[0].lines[2][0].get_segments()
        assert first[:, 1] == pytest.approx([0.1, 0.3])
        assert second[:, 1] == pytest.approx([0.4 - 0.02**0.5, 0.4 + 0.02**0.5])
        assert not len(last)  # one seed has no spread
        seeds = [item.get_ydata().tolist() for item in axes.lines if item.get_marker() == "_"]
        assert seeds[:3] == [[0.1, 0.2, 0.3], [0.3, 0.5], [0.6]]
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["1 %\n4", "10 %\n40", "100 %\n400"]


# ---------------------------------------------------------------------------------------- embedding
def test_principal_components_are_those_of_scikit():
    features = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1] + 2
    components, shares = plots.principal_components(features)
    theirs = PCA(2)
    places = theirs.fit_transform(features)
    assert np.abs(components) == pytest.approx(np.abs(places))
    assert shares == pytest.approx(theirs.explained_variance_ratio_)
    assert plots.principal_components(-features)[0] == pytest.approx(-components)


def test_embedding_shows_each_photograph_in_its_colour():
    rng = np.random.default_rng(0)
    grades = np.arange(40) % 5
    features = rng.normal(size=(40, 8)) + 20 * np.eye(8)[grades]
    figure = plots.draw_embedding(features, grades)
    left, right = figure.axes
    components, _ = plots.principal_components(features)
    points = left.collections[0]
    colors = {}
    for place, color in zip(points.get_offsets(), points.get_facecolors(), strict=True):
        row = np.abs(components - place).sum(axis=1).argmin()
        assert components[row] == pytest.approx(place)
        colors.setdefault(int(grades[row]), set()).add(tuple(color))
    assert sorted(map(len, colors.values())) == [1] * 5
    brightness = [sum(next(iter(colors[grade]))[:3]) for grade in range(5)]
    assert brightness == sorted(brightness)

    # Grades that lie far apart are islands of t-SNE: the nearest is of one's own grade.
    places = np.asarray(right.collections[0].get_offsets())
    theirs = [tuple(color) for color in right.collections[0].get_facecolors()]
    distances = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(40)
    same = [theirs[row] == theirs[near] for row, near in enumerate(distances.argmin(axis=1))]
    assert np.mean(same) > 0.9
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [f"grade {grade} (8)" for grade in range(5)]


def test_large_embedding_is_drawn_by_seed(monkeypatch):
    monkeypatch.setattr(plots, "SHOWN", 10)
    features = np.random.default_rng(0).normal(size=(30, 4))
    grades = np.arange(30) % 5
    offsets = []
    for seed in (3, 3, 4):
        figure = plots.draw_embedding(features, grades, seed)
        offsets.append(np.asarray(figure.axes[0].collections[0].get_offsets()))
        assert len(offsets[-1]) == 10
        assert figure.get_suptitle() == f"photographs: 10, drawn from 30 with seed {seed}"
    assert np.array_equal(offsets[0], offsets[1])
    assert not np.array_equal(offsets[0], offsets[2])


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_small_embedding_works(count, width):
    features = np.random.default_rng(1).normal(size=(count, width))
    left, right = plots.draw_embedding(features, np.zeros(count, int)).axes
    assert len(left.collections[0].get_offsets()) == count
    if count < 5:
        assert texts(right) == ["left out: fewer than 5 photographs"]
    else:
        assert np.isfinite(right.collections[0].get_offsets()).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_collapsed_features_are_one_point():
    left, right = plots.draw_embedding(np.ones((12, 4)), np.arange(12) % 5).axes
    assert np.asarray(left.collections[0].get_offsets()).tolist() == [[0, 0]] * 12
    assert np.isfinite(right.collections[0].get_offsets()).all()


def test_embedding_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="finite"):
        plots.draw_embedding(np.array([[1.0, np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="at least one"):
        plots.draw_embedding(np.zeros((0, 2)), np.zeros(0, int))


# --------------------------------------------------------------------------------------- neighbours
def test_neighbours_tell_votes_by_mark_frame_and_colour():
    queries = make_queries()
    panels = plots.draw_neighbours(queries).axes
    assert [axes.get_title() for axes in panels] == [
        "a\ngrade 2",
        f"{plots.TICK} grade 2\ncosine 0.987",
        f"{plots.CROSS} grade 0\ncosine 0.500",
        "b\ngrade 1",
        f"{plots.TICK} grade 1\ncosine 0.250",
    ]
    right, wrong = panels[1].spines["left"], panels[2].spines["left"]
    assert right.get_linestyle() != wrong.get_linestyle()
    assert right.get_edgecolor() != wrong.get_edgecolor()
    assert np.array_equal(panels[2].images[0].get_array(), queries[0].neighbours[1].picture)
    # The rows are below one another although the second one is shorter.
    assert panels[3].get_position().x0 == pytest.approx(panels[0].get_position().x0)
    assert panels[3].get_position().y1 < panels[0].get_position().y0


def test_no_query_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        plots.draw_neighbours([])
