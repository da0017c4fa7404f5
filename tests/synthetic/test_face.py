"""Synthetic faces keep their bytes: packs, benchmarks and documented accuracies depend on them."""

import hashlib

import numpy as np

from f2c_plugin.synthetic.face import IDENTITY_DIM, SIZE, draw_face, draw_identity


def test_the_bytes_of_faces_never_change():
    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    for _ in range(30):  # the first 27 take every branch of every layer
        digest.update(draw_face(draw_identity(rng), rng).tobytes())
    assert digest.hexdigest() == "0d7339671e318d85cc5d4cc47089f1d4841d6551e3ed866a0e53bf9652210cff"


def test_shapes_and_types():
    rng = np.random.default_rng(0)
    identity = draw_identity(rng)
    assert identity.shape == (IDENTITY_DIM,) and identity.dtype == np.float64
    face = draw_face(identity, rng)
    assert face.shape == (SIZE, SIZE, 3) and face.dtype == np.uint8 and face.flags.c_contiguous


def test_the_ends_of_every_trait_can_be_drawn():
    for value in (0.0, np.nextafter(1.0, 0.0)):
        face = draw_face(np.full(IDENTITY_DIM, value), np.random.default_rng(0))
        assert face.std() > 10
