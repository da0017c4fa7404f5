"""Where arcface_torch expects the eyes, the nose and the corners of the mouth in an aligned face."""

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.complex128]  # x + iy

# Of the 112 × 112 pixels; 0 is the middle of the first one.
TEMPLATE = np.array([38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j])


def turn_from_template(points: Points) -> complex:
    """How the template is turned and scaled so that it comes nearest to ``points`` (5,) in least squares, about both means.

    The inverse of the similarity that aligns a face, as insightface's ``norm_crop`` finds it (S. Umeyama, Least-squares
    estimation of transformation parameters between two point patterns, 1991).
    """
    around = points - points.mean()
    return np.vdot(around, around) / np.vdot(around, TEMPLATE)  # pyright: ignore[reportUnknownVariableType]
