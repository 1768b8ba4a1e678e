"""The map of a drawn eye: where its vessels run and where its lesions lie.

Places on the map are complex numbers in disc diameters (DD): the optic disc at 0, temporal to the
right, up is up. Headings are angles on the map in radians. The order in which random numbers are
taken is part of every drawing.

Shapes: N is a number of vessels or lesions, P the points along a vessel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from fundus.camera import Camera

# Radians of a whole turn. More digits of pi would draw other eyes.
WHOLE_TURN = 6.28

VESSEL_POINTS = 60


@dataclass(frozen=True)
class LesionKind:
    """How many of a lesion an eye has, and what one looks like."""

    counts: tuple[tuple[int, int], ...]  # fewest and most, for each grade
    radius: float = 0.0  # DD
    radius_spread: float = 0.0  # standard deviation of the radius' logarithm
    least_pixels: float = 0.0  # least radius in pixels, so that it is seen
    roughness: float = 0.0  # depth of the outline's bulges, as a share of the radius
    stretch: float = 0.0  # how much longer than wide: 0 is round
    soft_edge: float = 0.0  # sigma of a blur, DD


# Counts follow the ICDR scale: microaneurysms alone make grade 1, much bleeding and beaded veins
# grade 3, new vessels grade 4, which needs no more of the others than grade 3. Hard exudates are
# counted in clusters, beading in veins, new vessels in fronds.
LESION_KINDS = {
    "microaneurysm": LesionKind(
        counts=((0, 0), (2, 8), (6, 20), (10, 30), (8, 25)),
        radius=0.02,
        radius_spread=0.2,
        least_pixels=0.85,
        roughness=0.04,
        stretch=0.06,
    ),
    "haemorrhage": LesionKind(
        counts=((0, 0), (0, 0), (3, 15), (16, 40), (5, 28)),
        radius=0.055,
        radius_spread=0.5,
        least_pixels=1.5,
        roughness=0.12,
        stretch=0.25,
        soft_edge=0.02,
    ),
    "hard_exudate": LesionKind(
        counts=((0, 0), (0, 0), (0, 3), (0, 4), (0, 3)),
        radius=0.02,
        radius_spread=0.5,
        least_pixels=0.7,
        roughness=0.2,
        stretch=0.15,
    ),
    "cotton_wool_spot": LesionKind(
        counts=((0, 0), (0, 0), (0, 1), (2, 6), (0, 4)),
        radius=0.13,
        radius_spread=0.2,
        least_pixels=2,
        roughness=0.1,
        stretch=0.25,
        soft_edge=0.05,
    ),
    "venous_beading": LesionKind(
        counts=((0, 0), (0, 0), (0, 0), (1, 2), (0, 2)),
        radius=0.065,
        radius_spread=0.15,
        least_pixels=1,
        roughness=0.04,
        stretch=0.1,
    ),
    "new_vessel": LesionKind(counts=((0, 0), (0, 0), (0, 0), (0, 0), (1, 2))),
    "preretinal_haemorrhage": LesionKind(
        counts=((0, 0), (0, 0), (0, 0), (0, 0), (0, 1)), soft_edge=0.01
    ),
}
LESIONS = tuple(LESION_KINDS)


class Trunk(NamedTuple):
    """A large vessel above the macula."""

    heading: float  # at the disc, in degrees
    far_heading: float  # to which it bends, in degrees
    bend: float  # length over which it bends, DD
    length: float  # DD
    width: float  # at the disc, DD


# The temporal arcade, the nasal trunk and a small one that runs to the macula. Veins are wider.
ARTERIES = (
    Trunk(heading=82, far_heading=-4, bend=1.75, length=7.0, width=0.072),
    Trunk(heading=128, far_heading=152, bend=1.0, length=4.5, width=0.056),
    Trunk(heading=36, far_heading=2, bend=0.5, length=2.1, width=0.026),
)
VEINS = (
    Trunk(heading=98, far_heading=-6, bend=1.95, length=7.5, width=0.100),
    Trunk(heading=115, far_heading=135, bend=1.2, length=4.5, width=0.075),
    Trunk(heading=52, far_heading=-8, bend=0.6, length=2.0, width=0.030),
)

# Where a tree, which holds these trunks and then their mirror images, has its temporal arcades.
TEMPORAL_ARCADES = (0, 3)


class Shoots(NamedTuple):
    """How vessels begin and where they are to run."""

    root: np.ndarray  # places, complex (N,)
    heading: np.ndarray  # (N,), at the root
    far_heading: np.ndarray  # (N,), to which they bend
    bend: np.ndarray  # (N,), length over which they bend, DD
    length: np.ndarray  # (N,), DD
    width: np.ndarray  # (N,), at the root, DD


class Vessels(NamedTuple):
    """Vessels that have grown, point by point."""

    places: np.ndarray  # complex (N, P)
    headings: np.ndarray  # (N, P)
    widths: np.ndarray  # (N, P), DD


class Outline(NamedTuple):
    """A filled polygon on the map."""

    corners: np.ndarray  # places, complex
    strength: float  # 0 to 1


# ------------------------------------------------------------------------------------------ vessels


def grow_tree(rng: Generator, camera: Camera, trunks: tuple[Trunk, ...]) -> Vessels:
    """Return the trunks, their mirror images below the macula, and two generations of branches."""
    up = np.repeat((1, -1), len(trunks))  # -1: below
    heading, far_heading, bend, length, width = np.array(trunks + trunks).T  # Trunk's fields

    # No two trees are alike: angles differ by some 8 degrees, lengths by some 12 %. All trunks
    # leave the disc a little to the nose of its middle. Each row of the jitter is for one field.
    jitter = rng.normal(0, 1, (6, len(up)))
    heading_jitter = jitter[0]
    far_jitter = jitter[1]
    bend_factor = np.exp(0.12 * jitter[2])
    length_factor = np.exp(0.12 * jitter[3])
    width_factor = np.exp(0.12 * jitter[4])
    root_jitter = jitter[5]
    shoots = Shoots(
        root=0.03 * root_jitter - 0.1 + 0.02j * up,
        heading=np.radians(heading + 9 * heading_jitter) * up,
        far_heading=np.radians(far_heading + 7 * far_jitter) * up,
        bend=bend * bend_factor,
        length=length * length_factor,
        width=width * width_factor,
    )

    stems = _grow(rng, camera, shoots)
    branches = _branch(rng, camera, stems, children=9, curl=1.4)
    twigs = _branch(rng, camera, branches, children=4, curl=1.4)
    return Vessels(
        places=np.concatenate((stems.places, branches.places, twigs.places)),
        headings=np.concatenate((stems.headings, branches.headings, twigs.headings)),
        widths=np.concatenate((stems.widths, branches.widths, twigs.widths)),
    )


def _branch(
    rng: Generator,
    camera: Camera,
    parents: Vessels,
    *,
    children: int,
    curl: float,
    on_disc: bool = False,
) -> Vessels:
    """Return the branches of vessels, which turn away by up to `curl` radians.

    Up to `children` leave each parent; `on_disc` lets them do so on the optic disc.
    """
    # They leave one after the other along the parent, to its left and to its right in turn, but
    # none from its last 6 points: order + 1.2 is at most children + 0.2.
    size = (len(parents.places), children)
    order = np.arange(children)
    points = (order + rng.uniform(0.2, 1.2, size)) * (VESSEL_POINTS - 6) / (children + 0.3)
    at = points.astype(int)
    root = np.take_along_axis(parents.places, at, axis=1)
    parent_heading = np.take_along_axis(parents.headings, at, axis=1)
    parent_width = np.take_along_axis(parents.widths, at, axis=1)
    first_side = rng.integers(0, 2, (len(parents.places), 1))
    side = 1 - 2 * ((order + first_side) % 2)  # 1 is left, -1 right

    heading = parent_heading + side * rng.uniform(0.4, 1, size)
    far_heading = parent_heading + side * rng.uniform(0, curl, size)
    width = parent_width * rng.uniform(0.3, 0.8, size)
    length = rng.uniform(0.9, 2.2, size) * (width / 0.03) ** 0.7

    # Capillaries are too thin to be seen. On the disc only trunks and new vessels are.
    is_kept = width > 0.008
    is_off_disc = np.abs(root) > rng.uniform(0.5, 1.5, size)
    if not on_disc:
        is_kept &= is_off_disc
    bend = rng.uniform(0.3, 1.2, size)
    shoots = Shoots(root, heading, far_heading, bend, length, width)
    return _grow(rng, camera, Shoots(*(part[is_kept] for part in shoots)))


def _grow(rng: Generator, camera: Camera, shoots: Shoots) -> Vessels:
    """Return the vessels that the shoots become."""
    root, heading, far_heading, bend, length, width = (part[:, None] for part in shoots)  # (N, 1)
    share = np.linspace(0, 1, VESSEL_POINTS)  # of the length, (P,)
    distance = share * length  # from the root, (N, P)

    # From the heading at the root a vessel bends to the far one, and nears it within `bend`.
    headings = far_heading + (heading - far_heading) * np.exp(-((distance / bend) ** 1.5))

    # On the way it winds in waves of three lengths (DD), more so if it is thin. The second term of
    # `wave` takes it away at the root, where the heading is given.
    thinness = np.clip(0.05 / width, 0.5, 1.3) ** 0.7
    for wavelength, size in ((2.4, 0.16), (1.0, 0.2), (0.45, 0.24)):
        swing = size * rng.normal(0, 1, root.shape) * thinness
        phase = rng.uniform(0, WHOLE_TURN, root.shape)
        wave = np.sin(distance * WHOLE_TURN / wavelength + phase)
        wave -= np.sin(phase) * np.exp(-distance)
        headings = headings + swing * wave
    places = root + np.cumsum(np.exp(1j * headings), axis=1) * length / VESSEL_POINTS

    # The fovea has no vessels: one that comes near it thins out over 10 points and ends there.
    is_near = np.abs(places - camera.fovea) < 0.3
    end = np.where(is_near.any(axis=1), is_near.argmax(axis=1), VESSEL_POINTS)
    points_left = end[:, None] - np.arange(VESSEL_POINTS)
    widths = width * (1 - 0.6 * share) * np.clip(points_left / 10, 0, 1)
    return Vessels(places, headings, widths)


def outline_vessels(vessels: Vessels) -> list[Outline]:
    """Return the outlines of vessels, thin ones first, so that trunks are drawn on top of them."""
    outlines = []
    to_left = 0.5j * np.exp(1j * vessels.headings) * vessels.widths  # from the middle, (N, P)
    root_widths = vessels.widths[:, 0]
    for index in np.argsort(root_widths, kind="stable"):
        places = vessels.places[index]
        strength = min(1, 0.25 + 12 * root_widths[index])

        # Along the middle of large vessels the wall reflects light: a weaker outline, on top.
        parts = [1.0]
        if root_widths[index] > 0.045:
            parts.append(0.3)
        for part in parts:
            left = places + part * to_left[index]
            right = places - part * to_left[index]
            corners = np.concatenate((left, right[::-1]))
            outlines.append(Outline(corners, strength * (0.57 + 0.43 * part)))
    return outlines


# ------------------------------------------------------------------------------------------ lesions


def outline_lesions(
    rng: Generator, camera: Camera, veins: Vessels, grade: int
) -> dict[str, list[Outline]]:
    """Return the outlines of each kind of lesion by its name in LESIONS."""
    # Counts lean to the low end, so that neighbouring grades overlap as they do in life.
    counts = {}
    for name, kind in LESION_KINDS.items():
        fewest, most = kind.counts[grade]
        counts[name] = int(fewest + (most - fewest + 1) * rng.beta(1.2, 1.6))

    # A severe eye bleeds in all four quadrants about the macula, so haemorrhages go round them.
    # Cotton wool spots lie along the arcades, three places above and three below; some of the new
    # vessels grow there.
    quadrants = rng.permutation((1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j)) * 1.15 + 0.8 * camera.fovea
    upper = np.array((2.2 + 1.8j, 0.9 + 1.4j, -0.8 + 0.9j))
    arcades = rng.permutation(np.concatenate((upper, upper.conj())))

    outlines = {}
    scattered = (
        ("microaneurysm", camera.fovea, 1.1),
        ("haemorrhage", quadrants, 0.7),
        ("cotton_wool_spot", arcades, 0.25),
    )
    for name, centres, spread in scattered:
        places = camera.find_places(rng, counts[name], centres, spread)
        outlines[name] = outline_blobs(rng, camera.disc_diameter, places, LESION_KINDS[name])
    outlines["hard_exudate"] = _outline_exudates(rng, camera, counts["hard_exudate"])
    outlines["venous_beading"] = _outline_beads(rng, camera, veins, counts["venous_beading"])
    outlines["new_vessel"] = _outline_fronds(rng, camera, arcades, counts["new_vessel"])
    pools = _outline_pools(rng, camera, counts["preretinal_haemorrhage"])
    outlines["preretinal_haemorrhage"] = pools
    return outlines


def _outline_exudates(rng: Generator, camera: Camera, clusters: int) -> list[Outline]:
    """Return clusters of hard exudates, each of specks on an arc about a leak in the macula."""
    outlines = []
    for leak in camera.find_places(rng, clusters, camera.fovea, 0.8):
        start = rng.uniform(0, WHOLE_TURN)
        opening = rng.uniform(2, WHOLE_TURN)
        angles = start + rng.uniform(0, opening, rng.integers(5, 22))
        arc = leak + rng.uniform(0.1, 0.4) * np.exp(1j * angles)
        specks = camera.find_places(rng, len(arc), arc, 0.06)
        outlines += outline_blobs(rng, camera.disc_diameter, specks, LESION_KINDS["hard_exudate"])
    return outlines


def _outline_beads(rng: Generator, camera: Camera, veins: Vessels, count: int) -> list[Outline]:
    """Return beads on a stretch of `count` of the temporal arcades."""
    outlines = []
    for trunk in rng.permutation(TEMPORAL_ARCADES)[:count]:
        start = rng.integers(8, 18)
        beads = veins.places[trunk, start : start + 14 : 2]
        outlines += outline_blobs(rng, camera.disc_diameter, beads, LESION_KINDS["venous_beading"])
    return outlines


def _outline_fronds(
    rng: Generator, camera: Camera, arcades: np.ndarray, count: int
) -> list[Outline]:
    """Return fronds of new vessels: curling tufts that grow from the disc or from an arcade."""
    outlines = []
    stems = 11
    for _ in range(count):
        root = 0j
        if rng.random() > 0.6:
            # Where the photograph shows too little of the arcades the root stays on the disc.
            places = camera.find_places(rng, 1, arcades, 0.2)
            if len(places) > 0:
                root = places[0]

        heading = rng.uniform(0, WHOLE_TURN) + rng.uniform(-1.5, 1.5, stems)
        far_heading = heading + rng.normal(0, 2, stems)
        shoots = Shoots(
            root=np.full(stems, root),
            heading=heading,
            far_heading=far_heading,
            bend=np.full(stems, 0.3),
            length=rng.uniform(0.4, 1.1, stems),
            width=np.full(stems, 0.042),
        )
        vessels = _grow(rng, camera, shoots)
        branches = _branch(rng, camera, vessels, children=5, curl=5, on_disc=True)
        outlines += outline_vessels(vessels)
        outlines += outline_vessels(branches)
    return outlines


def _outline_pools(rng: Generator, camera: Camera, count: int) -> list[Outline]:
    """Return preretinal haemorrhages: pools of blood before the retina, all of one form."""
    # The blood settles in the shape of a boat: the lower half of an ellipse, level at the top.
    angles = np.linspace(0, np.pi, 24)
    half_width = rng.uniform(0.25, 0.7)
    depth = rng.uniform(0.4, 0.8)  # as a share of half the width
    boat = half_width * (np.cos(angles) - 1j * np.sin(angles) * depth)

    within_arcades = np.array((2.2 + 1.6j, 2.2 - 1.6j))
    places = camera.find_places(rng, count, within_arcades, 0.3)
    return [Outline(place + boat, 1.0) for place in places]


def outline_blobs(
    rng: Generator, disc_diameter: float, places: np.ndarray, kind: LesionKind
) -> list[Outline]:
    """Return an irregular round outline about each of the places (N,), in DD.

    `disc_diameter` is in pixels, and matters where a lesion would be too small to be seen.
    """
    size = (len(places), 1)
    angles = np.linspace(0, 2 * np.pi, 30, endpoint=False)  # one for each corner
    radius = kind.radius * np.exp(rng.normal(0, kind.radius_spread, size))
    radius = np.clip(radius, kind.least_pixels / disc_diameter, 0.17)

    # Waves of two to five bulges around the outline make it irregular.
    for bulges in (2, 3, 4, 5):
        depth = rng.normal(0, kind.roughness, size)
        phase = rng.uniform(0, WHOLE_TURN, size)
        radius = radius * np.exp(depth * np.cos(bulges * angles + phase))

    longer = np.exp(kind.stretch * np.abs(rng.normal(0, 1, size)))
    turn = rng.uniform(0, np.pi, size)
    outline = radius * (np.cos(angles) * longer + 1j * np.sin(angles) / longer)
    corners = places[:, None] + outline * np.exp(1j * turn)  # (N, corners)
    strengths = rng.uniform(0.65, 1, len(places))
    return [Outline(*pair) for pair in zip(corners, strengths, strict=True)]
