"""tools/report_curves.py against drawings worked out by hand.

Run with `python -m pytest tests/test_report_curves.py`.
"""

import math
from xml.etree import ElementTree

import pytest
from written_runs import write_training

from tools.report_curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    Series,
    chart,
    charts,
    dotted,
    fit_frame,
    path,
    read_points,
    thin,
    ticks,
)
from tools.report_runs import read_run

FRAME = Frame(0, 10, 0, 1)
DRAWING = f"{LEFT}.0 {HEIGHT - BOTTOM}.0"  # where (0, 0) lies


def test_corners_of_the_frame_lie_where_the_margins_say():
    assert FRAME.place(0, 0) == (LEFT, HEIGHT - BOTTOM)
    assert FRAME.place(10, 1) == (WIDTH - RIGHT, TOP)
    assert FRAME.place(5, 0.5) == ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)


def test_a_path_has_a_gap_where_a_value_is_undefined():
    points = [(0, 0), (10, 1), (5, None), (0, 0), (10, 0)]
    right = f"{WIDTH - RIGHT}.0"
    drawn = f"M{DRAWING}L{right} {TOP}.0M{DRAWING}L{right} {HEIGHT - BOTTOM}.0"
    assert path(points, FRAME) == drawn
    assert path([(0, None)], FRAME) == ""


def test_points_that_no_line_reaches_have_a_dot():
    many = [(x, 0.5) for x in range(50)]
    assert dotted(many) == []
    many[10] = many[12] = (0, None)
    assert dotted(many) == [(11, 0.5)]
    assert dotted(many[:5]) == many[:5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 0.62, [0.2, 0.3, 0.4, 0.5, 0.6]),
        (-3, 12, [0, 5, 10]),
        (1e-6, 8e-3, [0.002, 0.004, 0.006, 0.008]),
        (-0.02, 0.02, [-0.02, -0.01, 0, 0.01, 0.02]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1e-300, 5.0, -1e90, 1e99])
def test_a_constant_curve_has_a_frame_around_it(value):
    frame = fit_frame([(3.0, value)])
    assert frame.x_low < 3 < frame.x_high
    assert frame.y_low < value < frame.y_high
    assert all(math.isfinite(place) for place in frame.place(3, value))
    assert ticks(frame.y_low, frame.y_high)


def test_the_zero_line_is_in_its_frame():
    frame = fit_frame([(0, 0.5), (1, 0.6)], has_zero=True)
    assert frame.y_low < 0 < 0.6 < frame.y_high


def test_thinning_keeps_peaks_gaps_and_the_end():
    points = [(x, math.sin(x)) for x in range(10_000)]
    points[5_000] = (5_000, 99.0)
    points[7_000] = (7_000, None)
    kept = thin(points, 600)
    assert len(kept) <= 620
    assert (5_000, 99.0) in kept
    assert (7_000, None) in kept
    assert kept[-1] == points[-1]
    assert kept == sorted(kept, key=lambda point: point[0])
    assert thin(points[:600], 600) == points[:600]


def test_only_records_that_measured_a_value_are_points():
    log = [
        {"epoch": 0, "loss": 7.0},
        {"epoch": 1, "knn_qwk": None},
        {"epoch": 2, "knn_qwk": 0.25, "loss": float("nan")},
        {"epoch": 3, "loss": 1e200},
        {"epoch": None, "loss": 1.0},
        {"epoch": 1e300, "loss": 1.0},
        {"loss": 1.0},
    ]
    assert read_points(log, "loss") == [(0, 7.0), (2, None), (3, None)]
    assert read_points(log, "knn_qwk") == [(1, None), (2, 0.25)]


def test_a_chart_is_one_drawing_whose_text_says_the_last_values():
    series = [Series("a & b", [(0, 1.0), (1, 2.0)]), Series("other", [(0, 1.0), (1, None)])]
    html = chart("loss <x>", series)
    figure = ElementTree.fromstring(html)
    assert [child.tag for child in figure] == ["figcaption", "svg"]
    caption = "".join(figure[0].itertext())
    assert caption == "loss <x>a & b: 2 at epoch 1other: undefined at epoch 1"
    assert len(figure.findall(".//path[@class='curve c0']")) == 1
    assert len(figure.findall(".//circle")) == 3
    for number in (
        figure.find(".//path[@class='curve c0']").get("d").strip("M").replace("L", " ").split()
    ):
        assert 0 <= float(number) <= WIDTH


def test_the_charts_of_a_log(tmp_path):
    write_training(tmp_path, epochs=4)
    figures = charts(read_run(tmp_path).log)
    titles = [ElementTree.fromstring(one)[0][0].text for one in figures]
    assert titles == [
        "self-distillation loss",
        "learning rate",
        "k-NN on validation: accuracy",
        "k-NN on validation: QWK",
        "RankMe: effective rank of the embeddings",
    ]
    assert "No value was defined." in figures[3]
    assert charts([]) == []
