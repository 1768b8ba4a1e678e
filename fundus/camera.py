"""The camera that looks at a drawn eye: which place of the eye's map each pixel shows.

Places on the map are complex numbers in disc diameters (DD): the optic disc at 0, temporal to the
right, up is up. The order in which random numbers are taken is part of every drawing.

Shapes: H and W are the frame's height and width, N a number of places.
"""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator


class FrameForm(NamedTuple):
    """What a camera's frame holds; lengths are shares of the frame's height."""

    frame_width: float
    fundus_diameter: float  # above 1 the frame cuts it off at top and bottom


# Some cut the fundus off, others show all of it; one has a square frame.
FRAME_FORMS = (
    FrameForm(frame_width=1.5, fundus_diameter=1.22),
    FrameForm(frame_width=1.5, fundus_diameter=1.2),
    FrameForm(frame_width=1.5, fundus_diameter=0.95),
    FrameForm(frame_width=1.33, fundus_diameter=0.96),
    FrameForm(frame_width=1.33, fundus_diameter=1.14),
    FrameForm(frame_width=1, fundus_diameter=0.97),
    FrameForm(frame_width=1.5, fundus_diameter=1.02),
)


class Camera:
    """Where a camera looks, and which place each pixel of its frame shows."""

    shape: tuple[int, int]  # H, W
    radius: float  # of the fundus, in pixels
    disc_diameter: float  # in pixels
    temporal_side: int  # 1 where the temple is to the right in the photograph, else -1
    fovea: complex  # its place
    gaze: complex  # the place in the middle of the fundus
    centre: np.ndarray  # x and y of that middle in the frame, in pixels
    places: np.ndarray  # complex64 (H, W), what the pixels show
    eccentricity: np.ndarray  # (H, W), distance from the middle of the fundus; 1 at its rim
    aperture: np.ndarray  # (H, W), 1 within the fundus, 0 outside

    def __init__(
        self, camera_rng: Generator, rng: Generator, height: int, *, is_left: bool
    ) -> None:
        """Choose a camera by `camera_rng`, and aim it at a left or a right eye by `rng`.

        `height` is that of the frame in pixels.
        """
        form = FRAME_FORMS[camera_rng.integers(len(FRAME_FORMS))]
        self.shape = (height, round(height * form.frame_width))

        # The usual field of 45 degrees is some 7.3 DD wide.
        self.radius = height * form.fundus_diameter * camera_rng.uniform(0.97, 1.03) / 2
        self.disc_diameter = self.radius / camera_rng.uniform(3.2, 4.1)
        self.temporal_side = 1
        if not is_left:
            self.temporal_side = -1

        # The fovea lies temporal of the disc and a little below. Photographers aim at it, or at a
        # place between it and the disc.
        self.fovea = complex(rng.uniform(2.35, 2.75), -rng.uniform(0, 0.5))
        self.gaze = self.fovea * float(rng.choice((1, 0.7, 0.7, 0.4)))
        self.gaze += complex(*rng.normal(0, 0.15, 2))
        self.centre = np.array(self.shape[::-1]) / 2 + rng.normal(0, 0.008, 2) * height

        y, x = np.indices(self.shape, np.float32) + np.float32(0.5)
        x = x - float(self.centre[0])
        y = y - float(self.centre[1])
        self.places = (x * self.temporal_side - 1j * y) / self.disc_diameter + self.gaze
        self.eccentricity = np.hypot(x, y) / self.radius
        self.aperture = self._open_aperture(camera_rng, x, y)

    def _open_aperture(self, camera_rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return `aperture`, given the pixels' offsets (H, W) from the middle of the fundus."""
        # Half of the cameras have a notch, up and to the right, by which one sees what is up: there
        # the fundus shows a little beyond the rim.
        outward = (0.73 * x - 0.68 * y) / self.radius
        across = (0.68 * x + 0.73 * y) / self.radius
        notch = (outward > 0.9) & (outward < 1.04) & (np.abs(across) < 0.04)
        notch &= camera_rng.random() < 0.5
        to_rim = 1 - np.where(notch, np.float32(0.9), self.eccentricity)

        blur = camera_rng.uniform(1, 3)  # pixels over which the rim fades
        return np.clip(to_rim * self.radius / blur + 0.5, 0, 1)

    def to_pixels(self, places: np.ndarray) -> np.ndarray:
        """Return where places (...) are in the frame: x and y in pixels, (..., 2)."""
        offset = (places - self.gaze) * self.disc_diameter
        return np.stack((offset.real * self.temporal_side, -offset.imag), axis=-1) + self.centre

    def find_places(
        self, rng: Generator, count: int, centres: np.ndarray | complex, spread: float
    ) -> np.ndarray:
        """Return up to `count` places on visible retina, scattered about the centres in turn.

        They are complex (N,). `spread` is the standard deviation of each coordinate, in DD.
        """
        # A centre may lie outside of the photograph, hence 60 candidates for each place.
        candidates = 60 * count
        scatter = rng.normal(0, spread, (candidates, 2))
        places = np.resize(centres, candidates) + scatter[:, 0] + 1j * scatter[:, 1]

        # A margin of 0.25 DD to the frame's edge and to the rim, so that lesions are seen whole.
        pixels = self.to_pixels(places)
        to_edge = np.minimum(pixels, self.shape[::-1] - pixels).min(axis=1)
        is_shown = to_edge > 0.25 * self.disc_diameter
        rim = 0.97 * self.radius / self.disc_diameter
        is_shown &= np.abs(places - self.gaze) < rim - 0.25

        is_retina = (np.abs(places) > 0.85) & (np.abs(places - self.fovea) > 0.15)
        return places[is_shown & is_retina][:count]
