"""Face verification on ``lfw.bin``-style sets: are two images of the same person?"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.data.dataset import IMAGE_SIZE, decode_face, normalize_faces
from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.safe_pickle import load_pickle
from f2c_plugin.utils.atomic import written_whole

FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)  # on squared distances of unit vectors, as in arcface_torch


@dataclass
class VerificationResult:
    """How well embeddings separate same from different pairs."""

    accuracy: float  # mean over 10 folds, each with the best threshold of the other nine; "Accuracy-Flip" in arcface_torch
    accuracy_std: float
    scores: np.ndarray  # cosines, float64 (pairs,)
    same: np.ndarray  # bool (pairs,)
    embedding_norm: float  # mean over the embeddings; "XNorm" in arcface_torch

    def tar_at_far(self, far: float) -> float:
        """Share of same pairs accepted at the lowest threshold that accepts at most ``far`` of the different pairs."""
        return tar_at_far(self.scores, self.same, far)

    def summary(self) -> dict[str, float]:
        """The metrics that go into ``report.json``."""
        return {"accuracy": self.accuracy, "accuracy_std": self.accuracy_std, "tar_at_far_1e-3": self.tar_at_far(1e-3),
                "tar_at_far_1e-4": self.tar_at_far(1e-4), "pairs": len(self.same)}


class VerificationSet:
    """Labeled pairs of faces from a ``.bin`` file, whose pickle cannot run code here. Raises VerificationSetError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        images, same = load_pickle(self.path)
        if not len(same) or len(images) != 2 * len(same):
            raise VerificationSetError(f"{self.path}: {len(images)} images for {len(same)} labels; needs two images per label")
        self.images, self.same = images, np.array(same, bool)

    def faces(self, count: int | None = None) -> Tensor:
        """The first ``count`` images, or all if None, uint8 (count, 112, 112, 3) RGB."""
        images = self.images[:count]
        faces = np.empty((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for i, (out, image) in enumerate(zip(faces, images, strict=True)):
            try:
                decode_face(image, out)
            except ValueError as error:
                raise VerificationSetError(f"{self.path}: image {i} cannot be decoded: {error}") from error
        return torch.from_numpy(faces)

    def evaluate(self, net: nn.Module) -> VerificationResult:
        """Verify a net that embeds images (B, 3, 112, 112). Keeps the mode of the net.

        As in arcface_torch, the embedding of a face is the sum of the embeddings of the image and its mirror image.
        """
        embeddings = embed(net, self.faces())  # (2n, 2, D)
        first, second = normalize(embeddings.sum(dim=1)).view(-1, 2, embeddings.size(2)).unbind(1)  # (n, D) each
        scores = (first * second).sum(1).numpy()
        accuracy = fold_accuracies(scores, self.same)
        norm = embeddings.norm(dim=2).mean()
        return VerificationResult(float(accuracy.mean()), float(accuracy.std()), scores, self.same, float(norm))


@torch.no_grad()
def embed(net: nn.Module, faces: Tensor, batch_size: int = 256) -> Tensor:
    """Embed faces, uint8 (n, 112, 112, 3) RGB, and their mirror images with the net in eval mode, float64 (n, 2, D)."""
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
    """As ``VerificationResult.tar_at_far``, from cosines (n,) and labels, bool (n,)."""
    different = np.sort(scores[~same])[::-1]
    allowed = int(far * len(different))
    threshold = different[allowed] if allowed < len(different) else -np.inf
    return float((scores[same] > threshold).mean())


def fold_accuracies(scores: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Accuracy of each of 10 consecutive folds at the best threshold of the other nine, from cosines (n,) and labels (n,)."""
    correct = ((2 - 2 * scores)[:, None] < THRESHOLDS) == same[:, None]  # (n, thresholds)
    total = correct.sum(0)
    folds = [(fold.sum(0), len(fold)) for fold in np.array_split(correct, min(FOLDS, len(same)))]
    return np.array([inside[np.argmax(total - inside)] / size for inside, size in folds])


def load_bin(path: str | Path, image_size: Sequence[int] = (IMAGE_SIZE, IMAGE_SIZE)) -> tuple[list[Tensor], list[bool]]:
    """Replaces arcface_torch's: [images, mirrored images], each float32 (2n, 3, 112, 112) in [0, 255], and the labels."""
    if tuple(image_size) != (IMAGE_SIZE, IMAGE_SIZE):
        raise VerificationSetError(f"image_size={image_size}: must be {(IMAGE_SIZE, IMAGE_SIZE)}")
    verification_set = VerificationSet(path)
    images = verification_set.faces().permute(0, 3, 1, 2).float()
    return [images, images.flip(3)], verification_set.same.tolist()


def save_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a verification set: 2n encoded images and n labels."""
    with written_whole(path) as file:
        pickle.dump((list(images), [bool(label) for label in same]), file, protocol=4)
