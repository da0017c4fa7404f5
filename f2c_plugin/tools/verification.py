"""Face verification on ``lfw.bin``-style sets: are two images of the same person?"""

import math
import pickle
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.data.dataset import IMAGE_SIZE, decode_face, normalize_faces

FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)  # on squared distances of unit vectors, as the host has them


class VerificationSetError(ValueError):
    """A verification set that cannot be read, or holds what no such set needs."""


@dataclass
class VerificationResult:
    """How well embeddings tell same from different.

    Attributes:
        accuracy, accuracy_std: over 10 folds, each with the threshold that is best on the other
            nine; the host's "Accuracy-Flip".
        scores: float64 (pairs,) cosines.
        same: bool (pairs,).
        embedding_norm: mean length of the embeddings, the host's "XNorm".
    """

    accuracy: float
    accuracy_std: float
    scores: np.ndarray
    same: np.ndarray
    embedding_norm: float

    def tar_at_far(self, far: float) -> float:
        """Share of same pairs accepted by the lowest threshold that accepts at most ``far`` of the different."""
        return tar_at_far(self.scores, self.same, far)

    def summary(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "accuracy_std": self.accuracy_std,
                "tar_at_far_1e-3": self.tar_at_far(1e-3), "tar_at_far_1e-4": self.tar_at_far(1e-4),
                "pairs": len(self.same)}


class VerificationSet:
    """Pairs of faces with the answers, from a ``.bin`` file.

    Args:
        path: a pickle of (2n encoded images, n answers); read without running code from it.
    Raises:
        VerificationSetError: the file is no such set.
    """

    def __init__(self, path):
        self.path = Path(path)
        images, same = _load_pickle(self.path)
        if not len(same) or len(images) != 2 * len(same):
            raise VerificationSetError(f"{self.path}: {len(images)} images for {len(same)} answers; needs two for each")
        self.images, self.same = images, np.array(same, bool)

    def faces(self, count: int | None = None) -> Tensor:
        """The first ``count`` images, uint8 (count, 112, 112, 3) RGB; None is all of them."""
        images = self.images[:count]
        faces = np.empty((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for i, (out, image) in enumerate(zip(faces, images)):
            try:
                decode_face(image, out)
            except ValueError as error:
                raise VerificationSetError(f"{self.path}: image {i} cannot be decoded: {error}") from error
        return torch.from_numpy(faces)

    def evaluate(self, net: nn.Module) -> VerificationResult:
        """Verify with a net that embeds images (B, 3, 112, 112); it is left in the mode it was in.

        As in the host, the embedding of a face is the sum of those of the image and its mirror image.
        """
        embeddings = embed(net, self.faces())  # (2n, 2, D)
        first, second = normalize(embeddings.sum(dim=1)).view(-1, 2, embeddings.size(2)).unbind(1)  # (n, D) each
        scores = (first * second).sum(1).numpy()
        accuracy = fold_accuracies(scores, self.same)
        return VerificationResult(float(accuracy.mean()), float(accuracy.std()), scores, self.same,
                                  float(embeddings.norm(dim=2).mean()))


@torch.no_grad()
def embed(net: nn.Module, faces: Tensor, batch_size: int = 256) -> Tensor:
    """Embeddings, float64 (n, 2, D), of faces uint8 (n, 112, 112, 3) RGB and of their mirror images, by a net in eval mode."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    embeddings = []
    for part in faces.split(batch_size):
        images = normalize_faces(part.to(device))
        embeddings.append(torch.stack([net(images), net(images.flip(3))], dim=1).double().cpu())
    net.train(was_training)
    return torch.cat(embeddings)


def tar_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float:
    """As ``VerificationResult.tar_at_far``, of cosines (n,) and answers, bool (n,)."""
    different = np.sort(scores[~same])[::-1]
    allowed = int(far * len(different))
    threshold = different[allowed] if allowed < len(different) else -np.inf
    return float((scores[same] > threshold).mean())


def fold_accuracies(scores: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Accuracy of each of 10 consecutive folds at the threshold that is best on the other nine.

    Args:
        scores: cosines (n,).
        same: bool (n,).
    Returns:
        float64 (10,); fewer if there are fewer pairs.
    """
    distance = 2 - 2 * scores
    right = (distance[:, None] < THRESHOLDS) == same[:, None]  # (n, thresholds)
    folds = np.array_split(np.arange(len(same)), min(FOLDS, len(same)))
    everywhere = right.sum(0)
    accuracies = []
    for fold in folds:
        inside = right[fold].sum(0)
        accuracies.append(inside[np.argmax(everywhere - inside)] / len(fold))
    return np.array(accuracies)


def load_bin(path, image_size=(IMAGE_SIZE, IMAGE_SIZE)):
    """A verification set in the form of arcface_torch's ``eval.verification.load_bin``.

    Returns:
        ([images, mirrored images], answers): float32 (2n, 3, 112, 112) in [0, 255] each, list of bool.
    """
    if tuple(image_size) != (IMAGE_SIZE, IMAGE_SIZE):
        raise VerificationSetError(f"image_size={image_size}: faces are {IMAGE_SIZE}×{IMAGE_SIZE}")
    verification_set = VerificationSet(path)
    images = verification_set.faces().permute(0, 3, 1, 2).float()
    return [images, images.flip(3)], verification_set.same.tolist()


def save_bin(path, images: list[bytes], same: list[bool]):
    """Write a verification set: 2n encoded images and n answers."""
    Path(path).write_bytes(pickle.dumps((list(images), [bool(answer) for answer in same]), protocol=4))


class _PlainUnpickler(pickle._Unpickler):
    """Lists, tuples, bytes, bools, numbers, and NumPy arrays of bytes or bools. Nothing is imported.

    Built on pickle's Python implementation: the one in C takes gigabytes for a memo index of 2**31
    in a file of nine bytes, and lets a file set attributes of whatever it can name.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        if not isinstance(self.stack[-2], (_PickledArray, _PickledDtype)):
            raise VerificationSetError("it sets the state of something that is no NumPy array")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self):  # pickle's own takes as much memory as the file says before it reads any of it
        size, = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module, name):
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            pass
        raise VerificationSetError(f"it asks for {module}.{name}; a verification set needs only lists of images and "
                                   "answers, so the file is damaged or malicious")


class _PickledDtype:
    def __init__(self, code, *_):
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in ("u1", "b1", "|u1", "|b1"):
            found = repr(code[:20]) if isinstance(code, str) else type(code).__name__
            raise VerificationSetError(f"it holds a NumPy array of type {found}; images are uint8, answers bool")

    def __setstate__(self, state):
        pass  # byte order and alignment, of no meaning for single bytes


class _PickledArray:
    """Stands for an array until its state comes; never hands the state to NumPy unseen."""

    def __init__(self, *_):
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state):
        _, shape, dtype, _, content = state
        plain = isinstance(dtype, _PickledDtype) and isinstance(content, (bytes, bytearray))
        plain = plain and isinstance(shape, tuple) and len(shape) <= 4 and all(isinstance(each, int) for each in shape)
        if not plain or len(content) != math.prod(shape):
            raise VerificationSetError("it holds a NumPy array whose content does not match its shape")
        self.array = np.frombuffer(content, np.uint8)


def _array_from_buffer(content, dtype, shape, order):  # protocol 5
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order, content))
    return array


def _scalar(_, content):
    return bool(content[0])


def _encode_latin1(text, encoding):
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise VerificationSetError("it holds bytes in an encoding that pickle does not write")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, of no meaning here
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode_latin1,  # how protocol 2 writes bytes
}


def _load_pickle(path):
    if not path.is_file():
        raise VerificationSetError(f"{path}: no such file")
    try:
        # From memory, where reading what is not there takes no more than what is.
        images, same = _PlainUnpickler(BytesIO(path.read_bytes()), encoding="bytes").load()
        images, same = ([item.array if isinstance(item, _PickledArray) else item for item in part]
                        for part in (_as_list(images), _as_list(same)))
        if not all(isinstance(image, (bytes, np.ndarray)) for image in images):
            raise VerificationSetError("its images are not byte strings")
        if not all(isinstance(answer, (bool, int, np.integer)) for answer in same):
            raise VerificationSetError("its answers are not true or false")
        return images, [bool(answer) for answer in same]
    except VerificationSetError as error:
        raise VerificationSetError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise VerificationSetError(f"{path}: not a verification set, a pickle of images and answers: {type(error).__name__}") from error


def _as_list(part):
    if isinstance(part, _PickledArray):
        part = part.array
    if not isinstance(part, (list, tuple, np.ndarray)):
        raise VerificationSetError(f"found a {type(part).__name__} where a list should be")
    return part
