"""Vessels and lesions on an eye's map. Run with `python -m pytest tests/test_eye_map.py`."""

import numpy as np
import pytest

from fundus.camera import Camera
from fundus.eye_map import (
    ARTERIES,
    LESION_KINDS,
    LESIONS,
    TEMPORAL_ARCADES,
    VEINS,
    grow_tree,
    outline_lesions,
    outline_vessels,
)
from fundus.manifest import GRADES

SEEDS = range(6)


def aim(seed: int) -> Camera:
    """A camera of the seed's, aimed by the seed."""
    return Camera(np.random.default_rng((1, seed)), np.random.default_rng(seed), 120, is_left=True)


def grow_veins(seed: int, camera: Camera):
    return grow_tree(np.random.default_rng((3, seed)), camera, VEINS)


@pytest.mark.parametrize("trunks", [ARTERIES, VEINS])
def test_trunks_leave_the_disc_and_arcades_run_about_the_macula(trunks):
    for seed in SEEDS:
        tree = grow_tree(np.random.default_rng(seed), aim(seed), trunks)
        roots = tree.places[:6, 0]
        assert (np.abs(roots) < 0.5).all()
        above, below = TEMPORAL_ARCADES
        assert tree.places[above, 30].real > 0.5 and tree.places[above, 30].imag > 0.5
        assert tree.places[below, 30].real > 0.5 and tree.places[below, 30].imag < -0.5


def test_branches_begin_on_their_parents_and_are_thinner():
    for seed in SEEDS:
        tree = grow_veins(seed, aim(seed))
        starts = tree.places[:, 0]
        assert len(starts) > 30
        for branch in range(6, len(starts)):
            # The first point is one step from the root, and steps are shorter than 0.2 DD.
            assert np.abs(tree.places[:branch] - starts[branch]).min() < 0.2
        widths = tree.widths[:, 0]
        assert widths[6:].max() <= 0.8 * widths[:6].max()


def test_no_vessel_enters_the_fovea():
    entered = 0
    for seed in range(20):
        camera = aim(seed)
        tree = grow_veins(seed, camera)
        is_near = np.abs(tree.places - camera.fovea) < 0.3
        entered += is_near.any()
        assert (tree.widths[is_near] == 0).all()
    assert entered > 5  # without the rule they would


def test_outlines_of_vessels_are_as_wide_and_thin_ones_come_first():
    tree = grow_veins(0, aim(0))
    outlines = outline_vessels(tree)
    width = []
    for outline in outlines:
        assert 0 < outline.strength <= 1
        width.append(np.abs(outline.corners[0] - outline.corners[-1]))  # across the root
    large = tree.widths[:, 0] > 0.045
    assert len(outlines) == len(large) + large.sum()
    whole = sorted(width)[-1]
    assert whole == pytest.approx(tree.widths[:, 0].max())
    assert width[0] == pytest.approx(tree.widths[:, 0].min())
    # The last is the glint in the middle of the largest.
    assert width[-1] == pytest.approx(0.3 * whole) and width[-2] == pytest.approx(whole)
    assert outlines[-1].strength < outlines[-2].strength


@pytest.mark.parametrize("grade", range(GRADES))
def test_lesions_are_as_many_as_their_kind_says(grade):
    most_drawn = dict.fromkeys(LESIONS, 0)
    for seed in range(12):
        camera = aim(seed)
        veins = grow_veins(seed, camera)
        outlines = outline_lesions(np.random.default_rng((4, seed)), camera, veins, grade)
        assert set(outlines) == set(LESIONS)
        for name in ("microaneurysm", "haemorrhage", "cotton_wool_spot", "preretinal_haemorrhage"):
            assert len(outlines[name]) <= LESION_KINDS[name].counts[grade][1]
        for name in LESIONS:
            most_drawn[name] = max(most_drawn[name], len(outlines[name]))
    for name, kind in LESION_KINDS.items():
        assert (most_drawn[name] > 0) == (kind.counts[grade][1] > 0), name
    fewest, _ = LESION_KINDS["microaneurysm"].counts[grade]
    assert most_drawn["microaneurysm"] >= fewest


def test_lesions_are_seen_however_small_the_photograph():
    """A microaneurysm of 0.02 DD would be half a pixel in a frame of 120."""
    for seed in SEEDS:
        camera = aim(seed)
        lesions = outline_lesions(
            np.random.default_rng(seed), camera, grow_veins(seed, camera), grade=3
        )
        for outline in lesions["microaneurysm"]:
            centre = outline.corners.mean()
            radius = np.abs(outline.corners - centre).mean() * camera.disc_diameter
            assert radius > 0.7 * LESION_KINDS["microaneurysm"].least_pixels


def test_beads_lie_on_temporal_veins():
    beaded = 0
    for seed in SEEDS:
        camera = aim(seed)
        veins = grow_veins(seed, camera)
        lesions = outline_lesions(np.random.default_rng(seed), camera, veins, grade=3)
        arcades = veins.places[list(TEMPORAL_ARCADES)]
        for outline in lesions["venous_beading"]:
            assert np.abs(arcades - outline.corners.mean()).min() < 0.03
            beaded += 1
    assert beaded >= 7 * len(SEEDS)


def test_pools_of_blood_are_level_at_the_top():
    pools = []
    for seed in range(20):
        camera = aim(seed)
        veins = grow_veins(seed, camera)
        lesions = outline_lesions(np.random.default_rng(seed), camera, veins, grade=4)
        pools += lesions["preretinal_haemorrhage"]
    assert len(pools) > 3
    for pool in pools:
        first, last = pool.corners[[0, -1]]
        assert first.imag == pytest.approx(last.imag)
        assert pool.corners.imag.max() == pytest.approx(first.imag)
        assert pool.corners.imag.min() < first.imag - 0.05
