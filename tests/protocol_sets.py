"""Small sets of synthetic faces in the layouts of IJB-C and TinyFace, and a net that tells their identities apart a little."""

from itertools import combinations, count, islice

import numpy as np
import simplejpeg
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.data.template import TEMPLATE
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.face import draw_face, draw_identity

IDENTITIES = 8


PEOPLE = [draw_identity(np.random.default_rng(identity)) for identity in range(IDENTITIES)]


def faces(seed):
    """(identity, face) without end, the identities in turn."""
    rng = np.random.default_rng(seed)
    return ((number % IDENTITIES, draw_face(PEOPLE[number % IDENTITIES], rng)) for number in count())


def write_net(path):
    """A net with random weights whose batch norms have seen faces: embeddings point into all directions."""
    torch.manual_seed(0)
    net = get_model("tiny", num_features=32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net(normalize_faces(torch.from_numpy(np.stack([face for _, face in islice(faces(9), 64)]))))
    torch.save(net.state_dict(), path)
    return net.eval()


def write_ijb(folder, target="ijbc", templates=32):
    """Templates of one to four images, some of which are frames of one media; all pairs of templates."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 5, templates)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    points, media, number = [], [], 0
    ids = rng.permutation(3 * templates)[:templates] + 1  # neither sorted nor without gaps
    for template, size in enumerate(sizes):
        for image in range(size):
            face = draw_face(PEOPLE[template % IDENTITIES], rng)
            width, height = rng.integers(120, 260, 2)
            turn = rng.uniform(0.6, 2.0) * np.exp(1j * rng.uniform(-0.5, 0.5))  # from the face to the crop
            shift = complex(*rng.uniform(-10, 40, 2))
            back, offset = 1 / turn, -shift / turn
            crop = Image.fromarray(face).transform((int(width), int(height)), Image.Transform.AFFINE,
                                                   (back.real, -back.imag, offset.real, back.imag, back.real, offset.imag),
                                                   Image.Resampling.BICUBIC)
            number += 1
            (folder / "loose_crop" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(np.array(crop), 95))
            at = turn * TEMPLATE + shift + rng.normal(0, 1, 5) + 1j * rng.normal(0, 1, 5)
            xy = " ".join(f"{value:.3f}" for point in at for value in (point.real, point.imag))
            points.append(f"{number}.jpg {xy} {rng.uniform(0.3, 1):.4f}\n")
            media.append(f"{number}.jpg {ids[template]} {100 * template + image // 2}\n")
    pairs = [f"{ids[a]} {ids[b]} {int(a % IDENTITIES == b % IDENTITIES)}\n" for a, b in combinations(range(templates), 2)]
    for name, lines in (("name_5pts_score", points), ("face_tid_mid", media), ("template_pair_label", pairs)):
        (folder / "meta" / f"{target}_{name}.txt").write_text("".join(lines))
    return folder


def cells(items):
    """A column of MATLAB's cells."""
    column = np.empty((len(items), 1), object)
    column[:, 0] = items
    return column


def write_tinyface(folder):
    """Two probes and three faces in the gallery for each identity, and 40 distractors."""
    images = faces(7)
    root = folder / "Testing_Set"
    for name in "Probe", "Gallery_Match", "Gallery_Distractor":
        (root / name).mkdir(parents=True)
    listed = {"probe": [], "gallery": []}
    for number in range(5):
        kind, name = ("probe", "Probe") if number < 2 else ("gallery", "Gallery_Match")
        for _ in range(IDENTITIES):
            identity, face = next(images)
            path = root / name / f"{identity + 1}_{number}.jpg"
            path.write_bytes(simplejpeg.encode_jpeg(face, 95))
            listed[kind].append((path.name, identity + 1))
    rng = np.random.default_rng(8)
    for number in range(40):
        face = draw_face(draw_identity(rng), rng)
        (root / "Gallery_Distractor" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(face, 95))
    for kind, name in (("probe", "probe"), ("gallery", "gallery_match")):
        names, identities = zip(*listed[kind], strict=True)
        savemat(root / f"{name}_img_ID_pairs.mat", {f"{kind}_set": cells(names),
                                                    f"{kind}_ids": np.array(identities, np.uint16)[:, None]})
    return folder
