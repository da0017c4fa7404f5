"""TinyFace, 1:N: is a person found among the nearest faces of a large gallery?"""

from collections.abc import Callable, Collection, Mapping
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
LISTS = {"probe": "probe_img_ID_pairs.mat", "gallery": "gallery_match_img_ID_pairs.mat"}
_FOLDERS = {"probe": "Probe", "gallery": "Gallery_Match", "distractor": "Gallery_Distractor"}
_IMAGES = {".jpg", ".jpeg", ".png"}
_NOBODY = -1  # the identity of distractors
_NEVER = np.iinfo(np.int64).max  # the rank of a probe that cannot be found
_CHUNK = 64  # probes compared at a time


@dataclass
class IdentificationResult:
    """At which rank probes find their identity in the gallery.

    Attributes:
        ranks: int64 (probes,), from 1; of the nearest image of the probe's identity. Larger than any number of images where no
            face was detected in the probe, or in any gallery image of its identity.
        gallery: images in it that are compared, with distractors.
        without_mate: probes whose identity the gallery lacks; they count nowhere else.
        without_face: (probes, gallery images with distractors) in which no face was detected.
    """

    protocol: str
    ranks: np.ndarray
    gallery: int
    without_mate: int
    without_face: tuple[int, int] = (0, 0)

    def rate(self, rank: int) -> float:
        """Share of probes whose identity is among the ``rank`` nearest images."""
        return float((self.ranks <= rank).mean())

    def summary(self) -> dict[str, object]:
        probes, gallery = self.without_face
        return {"protocol": self.protocol, "probes": len(self.ranks), "probes_without_mate": self.without_mate,
                "probes_without_face": probes, "gallery": self.gallery, "gallery_without_face": gallery,
                "identification_rate": {str(rank): self.rate(rank) for rank in RANKS}}


class IdentificationSet:
    """TinyFace in a folder that holds, or whose ``Testing_Set`` holds, the folders ``Probe``, ``Gallery_Match`` and
    ``Gallery_Distractor``, with aligned images of 112 × 112.

    Identities are those of the lists ``probe_img_ID_pairs.mat`` and ``gallery_match_img_ID_pairs.mat`` beside these folders,
    which may name the images by another suffix. Without both lists, every image is taken, and its name begins with the
    identity, ``12_3.jpg``, as CVLface reads it.

    Images in which no face was detected are not there. They count all the same: such a probe finds nobody, and such an image of
    the gallery is not found.

    Args:
        without_face: finds the images of a folder in which no face was detected, by name; suffixes do not matter.
    Raises:
        VerificationSetError: it is not so, or no probe's identity is in the gallery.
        F2CError: the lists need scipy and it is missing.
    """

    protocol = "TinyFace 1:N"

    def __init__(self, folder: str | Path, without_face: Callable[[Path], Collection[str]] = lambda folder: ()):
        self.path = Path(folder)
        folders = IdentificationSet.folders_in(folder)
        lists = {kind: folders["probe"].parent / name for kind, name in LISTS.items()}
        present = [path.is_file() for path in lists.values()]
        if any(present) != all(present):
            raise VerificationSetError(f"{lists['gallery' if present[0] else 'probe']} is missing: needs both lists, or none")
        found: dict[str, tuple[list[Path], list[int]]] = {}  # images, and the identities of theirs and of those without a face
        without: dict[str, int] = {}
        for kind, each in folders.items():
            images = _images_in(each)
            there = {path.stem: path for path in images}
            missing = {Path(name).stem: each / name for name in without_face(each) if Path(name).stem not in there}
            if kind in lists and all(present):
                entries = _listed(lists[kind], kind, {**missing, **there})
            else:
                entries = [(path, _identity(path) if kind in lists else _NOBODY) for path in (*images, *missing.values())]
            seen = [entry for entry in entries if entry[0].stem not in missing]
            lost = [identity for path, identity in entries if path.stem in missing]
            without[kind] = len(lost)
            found[kind] = [path for path, _ in seen], [*(identity for _, identity in seen), *lost]
        counts = {kind: len(paths) for kind, (paths, _) in found.items()}
        self._paths = [path for kind in _FOLDERS for path in found[kind][0]]
        self._identities = torch.tensor([identity for kind in _FOLDERS for identity in found[kind][1][:counts[kind]]])
        self._probes = counts["probe"]
        mates = {*found["gallery"][1]}
        unseen = found["probe"][1][self._probes:]
        self._lost = sum(identity in mates for identity in unseen)  # probes without a face that have a mate
        self._mates = torch.tensor(sorted(mates))
        self._without_face = without["probe"], without["gallery"] + without["distractor"]
        if mates.isdisjoint(found["probe"][1]):
            raise VerificationSetError(f"{self.path}: the gallery has no image of any probe's identity")

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

        An image as near as the nearest one of the probe's identity counts as nearer.
        """
        probes, gallery = normalize(embeddings).tensor_split([self._probes])
        identities = self._identities.to(embeddings.device)
        ranks: list[Tensor] = []
        for part, wanted in zip(probes.split(_CHUNK), identities[:self._probes].split(_CHUNK), strict=True):
            scores, mates = part @ gallery.T, wanted[:, None] == identities[self._probes:]  # (chunk, gallery) each
            nearest = scores.masked_fill(~mates, -torch.inf).amax(1, keepdim=True)
            rank = ((scores >= nearest) & ~mates).sum(1) + 1
            rank = rank.masked_fill(~mates.any(1), _NEVER)  # no face in the gallery images of its identity
            ranks.append(rank[torch.isin(wanted, self._mates.to(wanted.device))].cpu())
        all_ranks = np.append(torch.cat(ranks).numpy(), np.full(self._lost, _NEVER))
        without_mate = self._probes + self._without_face[0] - len(all_ranks)
        return IdentificationResult(self.protocol, all_ranks, len(gallery), without_mate, self._without_face)


def _images_in(folder: Path) -> list[Path]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if not images:
        raise VerificationSetError(f"{folder}: has no {', '.join(sorted(_IMAGES))}")
    return images


def _identity(path: Path) -> int:
    identity, _, _ = path.name.partition("_")
    if not identity.isdecimal() or int(identity) >= 1 << 63:
        raise VerificationSetError(f"{path}: its name must begin with the number of the identity and _; or else the folder "
                                   f"needs {' and '.join(LISTS.values())}")
    return int(identity)


def _listed(path: Path, kind: str, files: Mapping[str, Path]) -> list[tuple[Path, int]]:
    """The images that a list names, with their identities, of ``files`` by name without suffix."""
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
    missing = [(number, name) for number, name in enumerate(names, 1) if Path(name).stem not in files]
    if missing:
        number, name = missing[0]
        more = f", and {len(missing) - 1} more are not" if len(missing) > 1 else ""
        raise VerificationSetError(f"{path}, entry {number}: {name} is not in {path.parent / _FOLDERS[kind]}{more}: what "
                                   "f2c-plugin align found no face in must be named in its left_out.tsv, there or in a folder "
                                   "above; all else must be there")
    return [(files[Path(name).stem], identity) for name, identity in zip(names, identities, strict=True)]


def aligned_image(path: Path) -> Pixels:
    """An image of an aligned face, uint8 (112, 112, 3) RGB. Raises VerificationSetError if the file cannot be used."""
    try:
        return decode_face(path.read_bytes())
    except OtherSize as error:
        raise VerificationSetError(f"{path}: cannot be used: {error}: align the images first, with f2c-plugin align") from error
    except (OSError, ValueError) as error:
        raise VerificationSetError(f"{path}: cannot be used: {error}") from error
