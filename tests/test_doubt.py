"""doubt.py against a table worked by hand and a naive loop.

Run it with `python -m pytest tests/test_doubt.py`.
"""

import numpy as np
import pytest

from fundus.doubt import Doubt, class_confidence, doubtful_labels

# Mean confidences: grade 0 (0.9 + 0.8 + 0.1) / 3 = 0.6, grade 2 (0.7 + 0.3) / 2 = 0.5,
# grade 4 (0.45 + 0.15) / 2 = 0.3.
GRADES = np.array([0, 0, 0, 2, 2, 4, 4])
SHARES = np.array(
    [
        [0.90, 0.00, 0.05, 0.00, 0.05],  # sure of its own grade
        [0.80, 0.00, 0.20, 0.00, 0.00],
        [0.10, 0.00, 0.60, 0.00, 0.30],  # confidently 2 and 4, more of 2
        [0.10, 0.00, 0.70, 0.20, 0.00],
        [0.35, 0.00, 0.30, 0.00, 0.35],  # 0 is as probable as 4, but below its class' 0.6
        [0.00, 0.00, 0.55, 0.00, 0.45],  # confidently 2, by a little
        [0.15, 0.70, 0.00, 0.00, 0.15],  # likely 1, of which nothing is known
    ]
)
PATHS = [f"{letter}.png" for letter in "abcdefg"]
PATIENTS = [str(number) for number in range(7)]


def test_table_by_hand():
    means = class_confidence(GRADES, SHARES)
    assert means == pytest.approx([0.6, np.inf, 0.5, np.inf, 0.3])
    assert doubtful_labels(GRADES, SHARES, PATHS, PATIENTS) == [
        Doubt("c.png", "2", grade=0, likely=2, confidence=0.6, share=0.1),
        Doubt("f.png", "5", grade=4, likely=2, confidence=0.55, share=0.45),
        Doubt("e.png", "4", grade=2, likely=4, confidence=0.35, share=0.3),
    ]


def naive(grades, shares):
    """Return {row: (likely, margin)} by loops over photographs and grades."""
    found = {}
    for row in range(len(grades)):
        best = None
        for grade in range(shares.shape[1]):
            given = [shares[i, grade] for i in range(len(grades)) if grades[i] == grade]
            if not given or shares[row, grade] < np.mean(given):
                continue
            if best is None or shares[row, grade] > shares[row, best]:
                best = grade
        if best is not None and shares[row, best] > shares[row, grades[row]]:
            found[row] = (best, shares[row, grades[row]] - shares[row, best])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_naive_loop_finds_the_same(seed):
    rng = np.random.default_rng(seed)
    grades = rng.choice(4, 200)  # grade 4 does not occur
    shares = rng.dirichlet(np.full(5, 0.5), 200)
    expected = naive(grades, shares)
    paths = [str(row) for row in range(200)]
    doubts = doubtful_labels(grades, shares, paths, paths)
    assert {int(doubt.path) for doubt in doubts} == set(expected)
    assert 20 < len(doubts) < 200
    margins = []
    for doubt in doubts:
        likely, margin = expected[int(doubt.path)]
        assert doubt.likely == likely
        assert doubt.share - doubt.confidence == pytest.approx(margin)
        margins.append(margin)
    assert margins == sorted(margins)


def test_planted_errors_come_first():
    rng = np.random.default_rng(0)
    truth = rng.choice(5, 300)
    given = truth.copy()
    wrong = rng.choice(300, 15, replace=False)
    given[wrong] = (truth[wrong] + 2) % 5
    shares = 0.8 * np.eye(5)[truth] + 0.2 * rng.dirichlet(np.ones(5), 300)
    paths = [str(row) for row in range(300)]
    doubts = doubtful_labels(given, shares, paths, paths)
    # As many as were planted at least, less those just below their class' mean.
    assert {int(doubt.path) for doubt in doubts} <= set(wrong.tolist())
    assert len(doubts) >= 8
    for doubt in doubts:
        assert doubt.likely == truth[int(doubt.path)]


def test_equal_doubts_are_in_the_order_of_their_paths():
    grades = np.array([0, 0, 1, 1, 1])
    shares = np.eye(2)[[1, 1, 1, 1, 1]]
    doubts = doubtful_labels(grades, shares, ["z", "b", "c", "d", "e"], list("abcde"))
    assert [doubt.path for doubt in doubts] == ["b", "z"]


def test_nothing_to_doubt():
    assert doubtful_labels(GRADES, np.eye(5)[GRADES], PATHS, PATIENTS) == []
    assert doubtful_labels(np.zeros(0, int), np.zeros((0, 5)), [], []) == []


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="one length"):
        doubtful_labels(GRADES, SHARES, PATHS[1:], PATIENTS)
    with pytest.raises(ValueError, match="finite"):
        doubtful_labels(GRADES, np.where(SHARES > 0.85, np.nan, SHARES), PATHS, PATIENTS)
