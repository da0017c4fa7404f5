"""Verification sets: reading them without running their code, and the accuracy that arcface_torch computes."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.verification import VerificationResult, VerificationSet, fold_accuracies, load_bin, save_bin


def jpeg(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return simplejpeg.encode_jpeg(picture, 90)


IMAGES, SAME = [jpeg(seed) for seed in (1, 1, 2, 3, 4, 4, 5, 6)], [True, False, True, False]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["bytes", "arrays", "array of labels", "numpy labels", "tuples"])
def test_sets_are_read_in_every_form_that_occurs(tmp_path, protocol, form):
    content = {"bytes": (IMAGES, SAME),
               "arrays": ([np.frombuffer(image, np.uint8).copy() for image in IMAGES], SAME),
               "array of labels": (IMAGES, np.array(SAME)),
               "numpy labels": (IMAGES, [np.bool_(label) for label in SAME]),
               "tuples": [tuple(IMAGES), tuple(SAME)]}[form]
    (tmp_path / "set.bin").write_bytes(pickle.dumps(content, protocol))
    verification_set = VerificationSet(tmp_path / "set.bin")
    assert verification_set.same.tolist() == SAME
    assert np.array_equal(verification_set.faces()[3], simplejpeg.decode_jpeg(IMAGES[3]))


def test_a_set_pickled_by_python_2_is_read(tmp_path):
    # Protocol 2 with Python 2's string opcode, as lfw.bin of the older packs has it.
    strings = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in IMAGES)
    content = b"\x80\x02(" + b"(" + strings + b"l" + b"(" + b"".join(b"\x88" if s else b"\x89" for s in SAME) + b"l" + b"t."
    (tmp_path / "set.bin").write_bytes(content)
    assert VerificationSet(tmp_path / "set.bin").faces().shape == (8, 112, 112, 3)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __repr__(self):  # the name of a test must not hold an address
        return f"{self.call[0].__name__}{self.call[1]}"


@pytest.mark.parametrize("attack", [
    Malicious(os.system, "touch pwned"), Malicious(eval, "open('pwned', 'w')"),
    Malicious(np.load, "pwned"), Malicious(getattr, "", "format"), Malicious(pickle.loads, b"N."),
    Malicious(np.fromfile, "/etc/passwd"), Malicious(io.open, "pwned", "w"), Malicious(np.dtype, "O"),
    np.array([{}], dtype=object), np.zeros(3), "text", {1: 2}, None], ids=repr)
@pytest.mark.parametrize("place", ["whole", "image", "label"])
def test_a_malicious_set_is_refused_and_does_nothing(tmp_path, monkeypatch, attack, place):
    monkeypatch.chdir(tmp_path)
    content = {"whole": attack, "image": ([*IMAGES[:7], attack], SAME), "label": (IMAGES, [*SAME[:3], attack])}[place]
    (tmp_path / "set.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(VerificationSetError, match="set.bin"):
        VerificationSet(tmp_path / "set.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["set.bin"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_a_damaged_set_is_refused_or_read_but_never_crashes(tmp_path_factory, garbage, position):
    content = bytearray(pickle.dumps((IMAGES[:2], SAME[:1]), 2))
    content[position:position + len(garbage)] = garbage
    path = tmp_path_factory.mktemp("set") / "set.bin"
    path.write_bytes(content)
    refusal = None
    try:
        VerificationSet(path).faces()
    except VerificationSetError as error:
        refusal = str(error)
    assert refusal is None or "set.bin" in refusal


def doubled_lists(depth):
    """Pickle opcodes for a list of 2**depth leaves in a few bytes a level."""
    opcodes = b"]q\x00K\x01a"
    for level in range(1, depth):
        opcodes += b"]q" + bytes([level]) + b"(h" + bytes([level - 1]) + b"h" + bytes([level - 1]) + b"e"
    return opcodes


@pytest.mark.parametrize("bomb", [
    b"\x80\x02cnumpy\ndtype\n" + doubled_lists(40) + b"\x85R.",
    b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + doubled_lists(40) + b"\x86R.",
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + doubled_lists(40)
    + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89U\x00tb.",
    b"\x80\x02Nr\xff\xff\xff\x7f.",
    b"\x80\x02cnumpy.core.multiarray\nscalar\nN}U\x0c__defaults__K\x01\x85s\x86b.",
    b"\x80\x05\x96" + (1 << 32).to_bytes(8, "little") + b"a.",
    b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b"a.",
    b"\x80\x05\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
], ids=["type", "encoding", "shape", "memo index", "state of a function", "bytearray", "bytes", "frame"])
def test_a_small_file_cannot_take_much_time_or_memory(tmp_path, bomb):
    (tmp_path / "set.bin").write_bytes(bomb)
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (20, 20));"
              "from f2c_plugin.errors import VerificationSetError\n"
              "from f2c_plugin.evaluation.safe_pickle import _scalar\n"
              "from f2c_plugin.evaluation.verification import VerificationSet\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "try: VerificationSet(sys.argv[1])\n"
              "except VerificationSetError: pass\n"
              "else: sys.exit('read')\n"
              "assert _scalar.__defaults__ is None\n"
              "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e5")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "set.bin")], check=True)


def test_malformed_sets_are_refused_with_the_value_found(tmp_path):
    path = tmp_path / "set.bin"
    with pytest.raises(VerificationSetError, match="no such file"):
        VerificationSet(path)
    save_bin(path, IMAGES[:7], SAME)
    with pytest.raises(VerificationSetError, match="7 images for 4 labels"):
        VerificationSet(path)
    save_bin(path, [*IMAGES[:7], b"no jpeg"], SAME)
    with pytest.raises(VerificationSetError, match="image 7 cannot be decoded"):
        VerificationSet(path).faces()


def slow_accuracies(scores, same):
    """arcface_torch's method: k-fold over consecutive pairs, best threshold on the rest, squared distances."""
    from sklearn.model_selection import KFold

    distance = 2 - 2 * scores
    accuracies = []
    for train, test in KFold(10).split(scores):
        best = max(np.arange(0, 4, 0.01), key=lambda threshold: ((distance[train] < threshold) == same[train]).mean())
        accuracies.append(((distance[test] < best) == same[test]).mean())
    return accuracies


@pytest.mark.parametrize("pairs", [600, 607])
def test_accuracy_equals_that_of_arcface_torch(pairs):
    rng = np.random.default_rng(0)
    same = rng.random(pairs) < 0.5
    scores = np.clip(rng.normal(0.4 * same, 0.25), -1, 1)
    assert fold_accuracies(scores, same).tolist() == slow_accuracies(scores, same)


def test_tar_at_far_is_the_share_of_same_pairs_above_the_threshold_that_lets_few_others_through():
    scores = np.array([0.9, 0.8, 0.5, 0.3, 0.7, 0.4, 0.2, 0.1])
    same = np.array([True] * 4 + [False] * 4)
    result = VerificationResult(0, 0, scores, same, 0)
    assert result.tar_at_far(0.0) == 0.5 and result.tar_at_far(0.25) == 0.75 and result.tar_at_far(1.0) == 1.0


class Colour(nn.Module):
    """Embeds a face by the colours of its quarters; mirror images embed differently."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert not self.training
        return (nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)) * self.scale


def test_a_net_that_sees_the_picture_verifies_it_and_stays_in_its_mode(tmp_path):
    save_bin(tmp_path / "set.bin", IMAGES * 10, SAME * 10)
    net = Colour().train()
    result = VerificationSet(tmp_path / "set.bin").evaluate(net)
    assert net.training and result.accuracy == 1.0 and result.tar_at_far(1e-3) == 1.0
    assert np.allclose(result.scores[result.same], 1)


def test_load_bin_returns_the_same_as_load_bin_of_arcface_torch(tmp_path):
    save_bin(tmp_path / "set.bin", IMAGES, SAME)
    (images, mirrored), same = load_bin(tmp_path / "set.bin", (112, 112))
    assert images.shape == (8, 3, 112, 112) and images.dtype == torch.float32 and same == SAME
    assert torch.equal(images[2], torch.from_numpy(simplejpeg.decode_jpeg(IMAGES[2])).permute(2, 0, 1).float())
    assert torch.equal(mirrored, images.flip(3))
