"""Faces at lower resolutions."""

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate


def at_resolution(images: Tensor, pixels: int) -> Tensor:
    """Faces as a camera of fewer pixels would see them: averaged to ``pixels`` × ``pixels``, and back by OpenCV's bicubic.

    Works on the device of the images. 112 pixels change nothing.

    Args:
        images: float (B, 3, H, W) in [-1, 1].
        pixels: 1 to H.
    Returns:
        Of the same shape and dtype, in [-1, 1].
    """
    small = adaptive_avg_pool2d(images, pixels)  # (B, 3, pixels, pixels); means over whole pixels
    return interpolate(small, images.shape[2:], mode="bicubic", align_corners=False).clamp(-1, 1)
