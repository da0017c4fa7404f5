"""Face verification on ``lfw.bin``-style sets: are two images of the same person?"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.data.dataset import IMAGE_SIZE, OtherSize, Pixels, decode_face, normalize_faces
from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.accuracy import FOLDS, GEOMETRY, fold_accuracies, tar_at_far
from f2c_plugin.evaluation.resize import resize_short
from f2c_plugin.evaluation.safe_pickle import load_pickle
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.inputs import embeddings_in
from f2c_plugin.utils.resolution import at_resolution

MAX_SIZE = 2048  # pixels; a small file can announce a huge picture


@dataclass
class VerificationResult:
    """How well embeddings separate same from different pairs."""

    accuracy: float  # mean over 10 folds, each with the best threshold of the other nine; "Accuracy-Flip" in arcface_torch
    accuracy_std: float
    scores: np.ndarray  # cosines, float64 (pairs,)
    same: np.ndarray  # bool (pairs,)
    embedding_norm: float  # mean over the embeddings; "XNorm" in arcface_torch
    concentration: float  # mean squared distance of the normalised embeddings of an image and its mirror image

    def tar_at_far(self, far: float) -> float | None:
        """Share of same pairs accepted at the lowest threshold that accepts at most ``far`` of the different pairs.

        None if the pairs do not resolve it: there is no same pair, or one different pair is a larger share than ``far``.
        """
        return tar_at_far(self.scores, self.same, far)

    def scalars(self) -> dict[str, float]:
        """The metrics to draw as curves; those that are not resolved are left out."""
        scalars = {"accuracy": self.accuracy, "tar_at_far_1e-3": self.tar_at_far(1e-3)}
        return {name: value for name, value in scalars.items() if value is not None}

    def geometry(self) -> dict[str, float]:
        """Where embeddings f of norm 1 lie, after Huang et al., "Towards the Generalization of Contrastive Self-Supervised
        Learning", arXiv 2111.00743. Means over the set; what it has no pairs for, or what is not finite, is left out.

        - alignment: ‖f(x) − f(y)‖² of same pairs, the intra-class distance of their section 3; 0 if an identity is a point.
        - divergence: f(x) · f(y) of different pairs. Of pairs drawn at random, it estimates without bias the mean of
          μₖ · μₗ over the centres of identities, the left side of their condition (2); the lower, the further apart.
        - concentration: ‖f(x) − f(x')‖² of an image x and its mirror image x', their L_align, (4), for this augmentation.
          Their R_ε, the share of images that lie more than ε from their mirror image, is at most concentration / ε².
        """
        values = {"alignment": 2 - 2 * self.scores[self.same], "divergence": self.scores[~self.same],
                  "concentration": np.array(self.concentration)}
        return {name: mean for name, each in values.items() if each.size and np.isfinite(mean := float(each.mean()))}

    def summary(self) -> dict[str, float | None]:
        """The metrics that go into ``report.json``; None where the pairs do not resolve them."""
        geometry = self.geometry()
        return {"accuracy": self.accuracy, "accuracy_std": self.accuracy_std, "tar_at_far_1e-3": self.tar_at_far(1e-3),
                "tar_at_far_1e-4": self.tar_at_far(1e-4), **{name: geometry.get(name) for name in GEOMETRY},
                "pairs": len(self.same)}


class VerificationSet:
    """Labeled pairs of faces from a ``.bin`` file, whose pickle cannot run code here. Raises VerificationSetError.

    Square images of another size than 112 × 112 are resized as arcface_torch resizes them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        images, same = load_pickle(self.path)
        if len(same) < 2 or len(images) != 2 * len(same):
            raise VerificationSetError(f"{self.path}: {len(images)} images for {len(same)} answers; needs two images for each "
                                       "answer, and two answers or more")
        self.images, self.same = images, np.array(same, bool)

    def check(self) -> None:
        """Decode every image and keep none. Raises VerificationSetError with the number of the first that cannot be used."""
        out = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for i in range(len(self.images)):
            self._decode(i, out)

    def faces(self, count: int | None = None) -> Tensor:
        """The first ``count`` images, or all if None, uint8 (count, 112, 112, 3) RGB."""
        faces = np.empty((len(self.images[:count]), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for i, out in enumerate(faces):
            self._decode(i, out)
        return torch.from_numpy(faces)

    def _decode(self, i: int, out: Pixels) -> None:
        try:
            try:
                decode_face(self.images[i], out)
            except OtherSize as other:
                sides = other.height, other.width
                if max(sides) > MAX_SIZE or IMAGE_SIZE * max(sides) // min(sides) != IMAGE_SIZE:
                    raise ValueError(f"it has {other.width}×{other.height} pixels: only square images up to {MAX_SIZE} × "
                                     f"{MAX_SIZE} are resized to {IMAGE_SIZE} × {IMAGE_SIZE}") from None
                out[:] = resize_short(decode_face(self.images[i], np.empty((*sides, 3), np.uint8)))
        except ValueError as error:
            raise VerificationSetError(f"{self.path}: image {i} cannot be used: {error}") from error

    def evaluate(self, net: nn.Module) -> VerificationResult:
        """Verify a net that embeds images (B, 3, 112, 112). Keeps the mode of the net.

        As in arcface_torch, the embedding of a face is the sum of the embeddings of the image and its mirror image.
        """
        return self.compare(embed(net, self.faces()))

    def compare(self, embeddings: Tensor) -> VerificationResult:
        """As ``evaluate``, from what ``embed`` makes of ``faces()``, float64 (2n, 2, D)."""
        first, second = normalize(embeddings.sum(dim=1)).view(-1, 2, embeddings.size(2)).unbind(1)  # (n, D) each
        scores = (first * second).sum(1).numpy()
        accuracy = fold_accuracies(scores, self.same)
        norm = embeddings.norm(dim=2).mean()
        image, mirrored = normalize(embeddings, dim=2).unbind(1)  # (2n, D) each
        concentration = (image - mirrored).square().sum(1).mean()
        return VerificationResult(float(accuracy.mean()), float(accuracy.std()), scores, self.same, float(norm),
                                  float(concentration))


@torch.no_grad()
def embed(net: nn.Module, faces: Tensor, batch_size: int = 256, pixels: int | None = None) -> Tensor:
    """Embed faces, uint8 (n, 112, 112, 3) RGB, and their mirror images with the net in eval mode, float64 (n, 2, D).

    With ``pixels``, the faces as ``at_resolution`` shows them.
    """
    device = next(net.parameters(), torch.empty(0)).device
    was_training = net.training
    net.eval()
    embeddings = []
    for part in faces.split(batch_size):
        images = normalize_faces(part.to(device))
        if pixels:
            images = at_resolution(images, pixels)
        pair = embeddings_in(net(images)), embeddings_in(net(images.flip(3)))
        embeddings.append(torch.stack(pair, dim=1).double().cpu())
    net.train(was_training)
    return torch.cat(embeddings)


def embedding_size(net: nn.Module) -> int:
    """D of a net that embeds images (B, 3, 112, 112), found by embedding one."""
    return embed(net, torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)).size(2)


def load_bin(path: str | Path, image_size: Sequence[int] = (IMAGE_SIZE, IMAGE_SIZE)) -> tuple[list[Tensor], list[bool]]:
    """Replaces arcface_torch's: [images, mirrored images], each float32 (2n, 3, 112, 112) in [0, 255], and the labels.

    Raises VerificationSetError also for sets that arcface_torch's evaluation would fail on, hours later.
    """
    if tuple(image_size) != (IMAGE_SIZE, IMAGE_SIZE):
        raise VerificationSetError(f"image_size={image_size}: must be {(IMAGE_SIZE, IMAGE_SIZE)}")
    verification_set = VerificationSet(path)
    check_folds(path, verification_set.same)
    images = verification_set.faces().permute(0, 3, 1, 2).float()
    return [images, images.flip(3)], verification_set.same.tolist()


def check_folds(path: str | Path, same: Sequence[bool] | np.ndarray) -> None:
    """Raise VerificationSetError if a fold has not both kinds of pairs, without which arcface_torch's evaluation fails."""
    for number, fold in enumerate(np.array_split(np.asarray(same, bool), FOLDS)):
        if fold.all() or not fold.any():
            raise VerificationSetError(f"{path}: of its {FOLDS} parts, in each of which arcface_torch needs same and different "
                                       f"pairs, part {number} has {fold.sum()} and {(~fold).sum()}: mix them, and give more")


def save_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a verification set: 2n encoded images and n labels."""
    with written_whole(path) as file:
        pickle.dump((list(images), [bool(label) for label in same]), file, protocol=4)
