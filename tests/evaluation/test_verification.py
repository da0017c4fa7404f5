"""Verification sets: reading them without running their code, and the accuracy that arcface_torch computes."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.accuracy import fold_accuracies, tar_at_far
from f2c_plugin.evaluation.model_selection import select_net, verify
from f2c_plugin.evaluation.resize import resize_short
from f2c_plugin.evaluation.verification import VerificationResult, VerificationSet, embed, load_bin, save_bin
from f2c_plugin.tools.report import Run
from tests.runs import refusal


def jpeg(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return simplejpeg.encode_jpeg(picture, 90)


IMAGES, SAME = [jpeg(seed) for seed in (1, 1, 2, 3, 4, 4, 5, 6)], [True, False, True, False]


def objects(items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


ARRAYS = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
FORMS = {
    "bytes": (IMAGES, SAME), "tuples": [tuple(IMAGES), tuple(SAME)], "bytearrays": ([*map(bytearray, IMAGES)], SAME),
    "arrays": (ARRAYS, SAME), "array of objects": (objects(IMAGES), objects(SAME)), "array of arrays": (objects(ARRAYS), SAME),
    "array of bytes": (np.array(IMAGES), SAME), "ints": (IMAGES, [1, 0, 1, 0]), "floats": (IMAGES, [1.0, 0.0, 1.0, 0.0]),
    **{f"array of {dtype}": (IMAGES, np.array(SAME, dtype)) for dtype in ("bool", "int64", ">i4", "uint8", "float32")},
    **{f"list of {kind.__name__}": (IMAGES, [*map(kind, SAME)]) for kind in (np.bool_, np.int64, np.float32, np.uint8)},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", FORMS)
def test_sets_are_read_in_every_form_that_occurs(tmp_path, protocol, form):
    (tmp_path / "set.bin").write_bytes(pickle.dumps(FORMS[form], protocol))
    verification_set = VerificationSet(tmp_path / "set.bin")
    assert verification_set.same.tolist() == SAME and verification_set.images == IMAGES
    assert np.array_equal(verification_set.faces()[3], simplejpeg.decode_jpeg(IMAGES[3]))


ARRAY_OF_PYTHON_2 = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\4\x85"
                     b"cnumpy\ndtype\nU\2%sK\0K\1\x87R(K\3U\1%sNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U%c%stb")


@pytest.mark.parametrize("answers", [
    b"(" + b"".join(b"\x88" if same else b"\x89" for same in SAME) + b"l", b"(I01\nI00\nI01\nI00\nl",
    ARRAY_OF_PYTHON_2 % (b"b1", b"|", 4, b"\1\0\1\0"),
    ARRAY_OF_PYTHON_2 % (b"i8", b"<", 32, np.array(SAME, "<i8").tobytes()),
    ARRAY_OF_PYTHON_2 % (b"i2", b">", 8, np.array(SAME, ">i2").tobytes())], ids=["bools", "ints", "b1", "i8", "big-endian"])
def test_a_set_pickled_by_python_2_is_read(tmp_path, answers):
    # Protocol 2 with Python 2's string opcode, as lfw.bin of the older packs has it.
    strings = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in IMAGES)
    (tmp_path / "set.bin").write_bytes(b"\x80\x02((" + strings + b"l" + answers + b"t.")
    verification_set = VerificationSet(tmp_path / "set.bin")
    assert verification_set.faces().shape == (8, 112, 112, 3) and verification_set.same.tolist() == SAME


@pytest.mark.parametrize("answer, found", [
    (2, "2"), (0.5, "0.5"), (float("nan"), "nan"), (-1, "-1"), (np.int64(3), "3"), (None, "a NoneType"), ("yes", "a str"),
    ([1], "a list"), (b"\1", "a bytes")], ids=repr)
def test_answers_other_than_true_and_false_are_refused_with_their_number(tmp_path, answer, found):
    (tmp_path / "set.bin").write_bytes(pickle.dumps((IMAGES, [*SAME[:2], answer, False])))
    with pytest.raises(VerificationSetError, match=rf"set.bin: the answer for pair 2 is {found}, not true or false"):
        VerificationSet(tmp_path / "set.bin")


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
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(VerificationSetError, match="set.bin: a Git-LFS pointer"):
        VerificationSet(path)
    for images, same, message in (IMAGES[:7], SAME, "7 images for 4 answers"), (IMAGES[:2], [True], "two answers or more"):
        save_bin(path, images, same)
        with pytest.raises(VerificationSetError, match=message):
            VerificationSet(path)


def test_arrays_whose_items_do_not_stand_in_a_row_are_refused(tmp_path):
    path = tmp_path / "set.bin"
    for shape in (4, 2), (2, 4):  # pairs in rows or in columns: which, the file does not show
        path.write_bytes(pickle.dumps((objects(IMAGES).reshape(shape), SAME)))
        with pytest.raises(VerificationSetError, match=rf"of shape \({shape[0]}, {shape[1]}\), but images and answers stand"):
            VerificationSet(path)
    path.write_bytes(pickle.dumps((objects(IMAGES)[:, None], np.array(SAME)[None])))
    assert VerificationSet(path).same.tolist() == SAME and VerificationSet(path).images == IMAGES


def png(width, height):
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


BAD_IMAGES = {
    "no jpeg": (b"no jpeg", "neither a JPEG nor a PNG"), "empty": (b"", "it is empty"), "cut": (IMAGES[7][:-200], ""),
    "flat": (simplejpeg.encode_jpeg(np.zeros((112, 160, 3), np.uint8)), "it has 160×112 pixels: only square images"),
    "high": (simplejpeg.encode_jpeg(np.zeros((113, 112, 3), np.uint8)), "it has 112×113 pixels: only square images"),
    "png": (png(100, 50), "it has 100×50 pixels"), "huge": (png(2049, 2049), "only square images up to 2048"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_used_are_found_before_training_with_their_number(config, tmp_path, name):
    image, message = BAD_IMAGES[name]
    save_bin(tmp_path / "set.bin", [*IMAGES[:7], image], SAME)
    refused = refusal(config(val_targets=[str(tmp_path / "set")]))
    assert "set.bin: image 7 cannot be used: " in refused and message in refused and not (tmp_path / "out").exists()
    with pytest.raises(VerificationSetError, match="image 7 cannot be used"):
        VerificationSet(tmp_path / "set.bin").faces()


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def test_pictures_of_another_size_are_resized_as_mxnet_does(tmp_path):
    # The digest is that of mxnet 1.9.1's mx.image.resize_short(picture(160), 112).
    assert hashlib.sha256(resize_short(picture(160)).tobytes()).hexdigest()[:16] == "effea4571a617f2e"
    large = simplejpeg.encode_jpeg(picture(10).repeat(16, 0).repeat(16, 1), 95)
    save_bin(tmp_path / "set.bin", [large] * 4, [True, False])
    verification_set = VerificationSet(tmp_path / "set.bin")
    verification_set.check()
    assert np.array_equal(verification_set.faces()[3], resize_short(simplejpeg.decode_jpeg(large)))


@pytest.mark.mxnet
def test_mxnet_itself_resizes_so(mxnet_python, tmp_path):
    sizes = [(50, 50), (96, 96), (111, 111), (113, 113), (128, 128), (160, 160), (224, 224), (250, 250), (120, 119), (119, 120)]
    pictures = {f"{h}_{w}": np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes}
    np.savez(tmp_path / "pictures.npz", **pictures)
    script = ("import mxnet as mx, numpy as np; given = np.load('pictures.npz');"
              "np.savez('resized.npz', **{name: mx.image.resize_short(mx.nd.array(each, dtype='uint8'), 112).asnumpy()"
              " for name, each in given.items()})")
    subprocess.run([mxnet_python, "-c", script], check=True, cwd=tmp_path)
    with np.load(tmp_path / "resized.npz") as expected:
        for name, each in pictures.items():
            difference = np.abs(resize_short(each).astype(int) - expected[name])
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-4, name


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
    result = VerificationResult(0, 0, scores, same, 0, 0)
    assert result.tar_at_far(0.25) == 0.75 and result.tar_at_far(0.49) == 0.75 and result.tar_at_far(1.0) == 1.0


def test_a_tar_that_the_pairs_do_not_resolve_is_none_everywhere(tmp_path, caplog):
    one_in = {count: np.arange(count + 1) < 1 for count in (0, 1, 3, 999, 1000)}  # one same pair, and so many different ones
    assert [tar_at_far(np.linspace(1, 0, len(same)), same, 1e-3) for same in one_in.values()] == [None] * 4 + [1.0]
    assert tar_at_far(np.zeros(2000), np.zeros(2000, bool), 1e-3) is None  # no same pair
    for same in (SAME, [True] * 4, [False] * 4):
        save_bin(tmp_path / "set.bin", IMAGES, same)
        with caplog.at_level("INFO"):
            sets = {"set": VerificationSet(tmp_path / "set.bin")}
            results = verify({"probe": Colour(), "gallery": Colour()}, sets, 5, tmp_path)
        result = results["probe"]["set"]
        assert json.loads(json.dumps(result.summary(), allow_nan=False))["tar_at_far_1e-3"] is None
        assert list(result.scalars()) == ["accuracy"] and select_net("best", results) == "probe"
        assert "TAR at FAR 1e-3: not resolved" in caplog.text
    (tmp_path / "training.log").write_text("")
    (tmp_path / "history.jsonl").write_text('{"step": 5, "images": 60, "loss": 1.0}\n')
    facts = Run.read(tmp_path).facts
    assert facts["set: TAR at FAR 0.001"] == "not resolved" and "nan" not in str(facts)


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
    assert net.training and result.accuracy == 1.0 and result.tar_at_far(0.1) == 1.0
    assert np.allclose(result.scores[result.same], 1)


def test_the_geometry_is_that_of_a_slow_count(tmp_path):
    save_bin(tmp_path / "set.bin", IMAGES, [True, False, False, True])
    verification_set = VerificationSet(tmp_path / "set.bin")
    found = verification_set.evaluate(Colour())
    embeddings = embed(Colour(), verification_set.faces()).numpy()

    def unit(vector):
        return vector / np.sqrt((vector ** 2).sum())
    faces = [unit(image + mirrored) for image, mirrored in embeddings]
    pairs = list(zip(faces[::2], faces[1::2], strict=True))
    expected = {"alignment": np.mean([((pairs[i][0] - pairs[i][1]) ** 2).sum() for i in (0, 3)]),
                "divergence": np.mean([pairs[i][0] @ pairs[i][1] for i in (1, 2)]),
                "concentration": np.mean([((unit(image) - unit(mirrored)) ** 2).sum() for image, mirrored in embeddings])}
    assert found.geometry() == pytest.approx(expected) and found.summary().items() >= found.geometry().items()
    assert all(abs(value) > 1e-3 for value in expected.values())
    for same, lacking in (True, "divergence"), (False, "alignment"):
        save_bin(tmp_path / "set.bin", IMAGES, [same] * 4)
        result = VerificationSet(tmp_path / "set.bin").evaluate(Colour())
        assert lacking not in result.geometry() and len(result.geometry()) == 2 and result.summary()[lacking] is None
    broken = VerificationResult(0, 0, np.full(4, np.nan), np.array(SAME), 0, np.nan)
    assert broken.geometry() == {}


def test_load_bin_returns_the_same_as_load_bin_of_arcface_torch(tmp_path):
    save_bin(tmp_path / "set.bin", IMAGES * 5, SAME * 5)
    (images, mirrored), same = load_bin(tmp_path / "set.bin", (112, 112))
    assert images.shape == (40, 3, 112, 112) and images.dtype == torch.float32 and same == SAME * 5
    assert torch.equal(images[2], torch.from_numpy(simplejpeg.decode_jpeg(IMAGES[2])).permute(2, 0, 1).float())
    assert torch.equal(mirrored, images.flip(3))


@pytest.mark.parametrize("same, message", [
    (SAME, "part 0 has 1 and 0"), ([True] * 20 + [False] * 20, "part 0 has 4 and 0"),
    (SAME * 9 + [False] * 4, "part 9 has 0 and 4")], ids=["too few", "sorted", "unmixed at the end"])
def test_sets_that_arcface_torch_cannot_evaluate_are_refused_when_it_loads_them(tmp_path, same, message):
    save_bin(tmp_path / "set.bin", [IMAGES[0]] * (2 * len(same)), same)
    with pytest.raises(VerificationSetError, match=message):
        load_bin(tmp_path / "set.bin", (112, 112))


def test_a_set_is_written_whole_or_not_at_all(tmp_path):
    save_bin(tmp_path / "set.bin", IMAGES, SAME)
    with pytest.raises(TypeError):
        save_bin(tmp_path / "set.bin", [*IMAGES, (each for each in [])], SAME)
    assert VerificationSet(tmp_path / "set.bin").images == IMAGES and len(list(tmp_path.iterdir())) == 1
