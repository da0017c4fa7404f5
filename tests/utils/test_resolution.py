"""Faces at lower resolutions, against OpenCV."""

import cv2
import numpy as np
import pytest
import torch

from f2c_plugin.utils.resolution import at_resolution


@pytest.mark.parametrize("pixels", [4, 7, 14, 28, 56])
def test_a_lower_resolution_is_opencvs_area_and_bicubic(pixels):
    images = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(pixels)) * 2 - 1
    images[:, :, :, :50] = images[:, :, :, :50].sign()  # edges, over which the bicubic would leave [-1, 1]
    found = at_resolution(images, pixels)
    for image, ours in zip(images, found, strict=True):
        small = cv2.resize(image.permute(1, 2, 0).numpy(), (pixels, pixels), interpolation=cv2.INTER_AREA)
        large = cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC).clip(-1, 1)
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), large, atol=1e-4)


@pytest.mark.parametrize("pixels", [1, 5, 17, 100])
def test_every_number_of_pixels_gives_faces_of_the_same_shape_and_range(pixels):
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)).half() * 2 - 1
    found = at_resolution(images, pixels)
    assert found.shape == images.shape and found.dtype == images.dtype and found.abs().max() <= 1
    assert not torch.equal(found, images)
    torch.testing.assert_close(at_resolution(torch.full_like(images, 0.25), pixels), torch.full_like(images, 0.25))
    torch.testing.assert_close(at_resolution(images.flip(3), pixels), found.flip(3), rtol=0, atol=2e-2)


def test_all_pixels_change_nothing():
    images = torch.rand(1, 3, 112, 112)
    torch.testing.assert_close(at_resolution(images, 112), images)
