"""TinyFace, 1:N: is a person found among the nearest faces of a large gallery?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.data.dataset import OtherSize, Pixels, decode_face
from f2c_plugin.errors import F2CError, VerificationSetError
from f2c_plugin.evaluation.pooling import pooled
from f2c_plugin.utils.extras import require

RANKS = 1, 5, 20
_LISTS = {"probe": "probe_img_ID_pairs.mat", "gallery": "gallery_match_img_ID_pairs.mat"}
_FOLDERS = {"probe": "Probe", "gallery": "Gallery_Match", "distractor": "Gallery_Distractor"}
_IMAGES = {".jpg", ".jpeg", ".png"}
_NOBODY = -1  # the identity of distractors
_CHUNK = 64  # probes compared at a time


@dataclass
class IdentificationResult:
    """At which rank probes find their identity in the gallery."""

    protocol: str
    ranks: np.ndarray  # int64 (probes,), from 1; of the nearest image of the probe's identity
    gallery: int  # images in it, with distractors
    without_mate: int  # probes whose identity the gallery lacks; they count nowhere else

    def rate(self, rank: int) -> float:
        """Share of probes whose identity is among the ``rank`` nearest images."""
        return float((self.ranks <= rank).mean())

    def summary(self) -> dict[str, object]:
        return {"protocol": self.protocol, "probes": len(self.ranks), "probes_without_mate": self.without_mate,
                "gallery": self.gallery, "identification_rate": {str(rank): self.rate(rank) for rank in RANKS}}


class IdentificationSet:
    """TinyFace in a folder that holds, or whose ``Testing_Set`` holds, the folders ``Probe``, ``Gallery_Match`` and
    ``Gallery_Distractor``, with aligned images of 112 × 112.

    Identities are those of the lists ``probe_img_ID_pairs.mat`` and ``gallery_match_img_ID_pairs.mat`` beside these folders,
    which may name the images by another suffix. Without both lists, every image is taken, and its name begins with the
    identity, ``12_3.jpg``, as CVLface reads it.

    Raises VerificationSetError if it is not so; F2CError if the lists need scipy and it is missing.
    """

    protocol = "TinyFace 1:N"

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        folders = IdentificationSet.folders_in(folder)
        lists = {kind: folders["probe"].parent / name for kind, name in _LISTS.items()}
        present = [path.is_file() for path in lists.values()]
        if any(present) != all(present):
            raise VerificationSetError(f"{lists['gallery' if present[0] else 'probe']} is missing: needs both lists, or none")
        files = {kind: _images_in(each) for kind, each in folders.items()}
        found: dict[str, tuple[list[Path], list[int]]] = {"distractor": (files["distractor"],
                                                                         [_NOBODY] * len(files["distractor"]))}
        for kind, path in lists.items():
            found[kind] = _listed(path, kind, files[kind]) if all(present) else (files[kind], [*map(_identity, files[kind])])
        ordered = [found[kind] for kind in _FOLDERS]
        self._paths = [path for paths, _ in ordered for path in paths]
        self._identities = torch.tensor([identity for _, identities in ordered for identity in identities])
        self._probes = len(found["probe"][0])

    @staticmethod
    def folders_in(folder: str | Path) -> dict[str, Path]:
        """The three folders of images. Raises VerificationSetError if one is missing."""
        root = Path(folder, "Testing_Set") if Path(folder, "Testing_Set").is_dir() else Path(folder)
        for name in _FOLDERS.values():
            if not (root / name).is_dir():
                raise VerificationSetError(f"{root / name} is missing: TinyFace has {', '.join(_FOLDERS.values())}; "
                                           "IJB-B has meta/ijbb_face_tid_mid.txt, IJB-C meta/ijbc_face_tid_mid.txt")
        return {kind: root / name for kind, name in _FOLDERS.items()}

    def embed(self, net: nn.Module) -> Tensor:
        """Embed all images with a net that embeds images (B, 3, 112, 112), on all ranks together; float64 (images, D).

        An embedding is the sum of the image's and its mirror image's, as in CVLface.
        Raises VerificationSetError if an image cannot be used; F2CError if embeddings are not finite.
        """
        number = len(self._paths)
        return pooled(net, aligned_image, self._paths, torch.arange(number), torch.ones(number).double(), self.path)

    def score(self, embeddings: Tensor) -> IdentificationResult:
        """Rank the gallery for each probe by cosine, from the embeddings of all images (images, D).

        An image as near as the nearest one of the probe's identity counts as nearer. Raises VerificationSetError if no
        probe's identity is in the gallery.
        """
        probes, gallery = normalize(embeddings).tensor_split([self._probes])
        identities = self._identities.to(embeddings.device)
        ranks: list[Tensor] = []
        for part, wanted in zip(probes.split(_CHUNK), identities[:self._probes].split(_CHUNK), strict=True):
            scores, mates = part @ gallery.T, wanted[:, None] == identities[self._probes:]  # (chunk, gallery) each
            nearest = scores.masked_fill(~mates, -torch.inf).amax(1, keepdim=True)
            rank = ((scores >= nearest) & ~mates).sum(1) + 1
            ranks.append(rank[mates.any(1)].cpu())
        all_ranks = torch.cat(ranks).numpy()
        if not len(all_ranks):
            raise VerificationSetError(f"{self.path}: the gallery has no image of any probe's identity")
        return IdentificationResult(self.protocol, all_ranks, len(gallery), self._probes - len(all_ranks))


def _images_in(folder: Path) -> list[Path]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if not images:
        raise VerificationSetError(f"{folder}: has no {', '.join(sorted(_IMAGES))}")
    return images


def _identity(path: Path) -> int:
    identity, _, _ = path.name.partition("_")
    if not identity.isdecimal() or int(identity) >= 1 << 63:
        raise VerificationSetError(f"{path}: its name must begin with the number of the identity and _; or else the folder "
                                   f"needs {' and '.join(_LISTS.values())}")
    return int(identity)


def _listed(path: Path, kind: str, files: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """The images that a list names, and their identities."""
    try:
        content = require("scipy.io", extra="tinyface").loadmat(path)
        names = [str(np.ravel(name)[0]).strip() for name in np.ravel(content[f"{kind}_set"])]
        identities: list[int] = np.ravel(content[f"{kind}_ids"]).astype(np.int64).tolist()
    except F2CError:
        raise
    except Exception as error:  # it raises almost anything for damaged files
        raise VerificationSetError(f"{path}: must be TinyFace's list, with {kind}_set and {kind}_ids: {error!r}") from error
    if len(names) != len(identities) or min(identities, default=_NOBODY) < 0:
        raise VerificationSetError(f"{path}: has {len(names)} images and {len(identities)} identities, the smallest of them "
                                   f"{min(identities, default=None)}: needs as many, numbered from 0 or more")
    by_stem = {each.stem: each for each in files}
    for number, name in enumerate(names, 1):
        if Path(name).stem not in by_stem:
            raise VerificationSetError(f"{path}, entry {number}: {name} is not in {files[0].parent}")
    return [by_stem[Path(name).stem] for name in names], identities


def aligned_image(path: Path) -> Pixels:
    """An image of an aligned face, uint8 (112, 112, 3) RGB. Raises VerificationSetError if the file cannot be used."""
    try:
        return decode_face(path.read_bytes())
    except OtherSize as error:
        raise VerificationSetError(f"{path}: cannot be used: {error}: align the images first, with f2c-plugin align") from error
    except (OSError, ValueError) as error:
        raise VerificationSetError(f"{path}: cannot be used: {error}") from error
