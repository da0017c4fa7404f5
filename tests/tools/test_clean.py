"""Wrong labels and identities that are one person's are found in a real pack, and nothing goes that is not listed."""

import json

import numpy as np
import pytest
import simplejpeg

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import F2CError, InputError, OverwriteError
from f2c_plugin.tools.clean import clean
from f2c_plugin.tools.repack import merge
from tests.tools.coded_faces import codes, face, read_pack, write_net, write_pack

PEOPLE, IMAGES, WRONG = 24, 12, 0.15
TWICE, BROKEN = 1000, 2000  # person 0 under another number; an identity whose only image is broken


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return write_net(tmp_path_factory.mktemp("net") / "bar.onnx")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A pack with wrong labels, {key: (identity, image)} and the keys of the wrong ones."""
    rng = np.random.default_rng(0)
    people = codes(rng, PEOPLE)
    true = np.append(np.repeat(np.arange(PEOPLE), IMAGES), [0] * IMAGES)
    labels = np.append(10 * np.repeat(np.arange(PEOPLE), IMAGES), [TWICE] * IMAGES)
    wrong = rng.permutation(PEOPLE * IMAGES)[:round(WRONG * PEOPLE * IMAGES)]
    labels[wrong] = 10 * ((true[wrong] + rng.integers(1, PEOPLE, len(wrong))) % PEOPLE)
    images = [(label, face(rng, codes(rng, 1, people[person], 0.5)[0]))
              for label, person in zip(labels.tolist(), true, strict=True)]
    small = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    images += [(BROKEN, images[0][1][:-300]), (10, images[0][1][:-300]), (10, small)]
    folder = write_pack(tmp_path_factory.mktemp("noisy") / "pack", images)
    return folder, dict(enumerate(images, 1)), {int(each) + 1 for each in wrong}


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_wrong_labels_are_found_listed_and_left_out(noisy, net, tmp_path, capsys):
    folder, images, wrong = noisy
    out = tmp_path / "out"
    cli(["clean", str(folder), str(net), str(out)])
    shown = capsys.readouterr().out
    lines = table(out / "clean.tsv")
    far = {int(key) for reason, _, key, _ in lines if reason == "far"}
    assert len(far & wrong) >= 0.95 * len(far) and len(far & wrong) >= 0.95 * len(wrong)  # precision and recall
    assert [line[1:3] for line in lines if line[0] == "unreadable"] == [["10", "302"], [str(BROKEN), "301"], ["", "303"]]
    assert ["no image left", str(BROKEN), "", ""] in lines
    assert all(images[int(key)][0] == int(identity) for _, identity, key, _ in lines if identity and key)
    gone = far | {301, 302, 303}
    numbers = {int(old): int(new) for new, _, old in table(out / "identities.tsv")}
    kept = {}
    for key, (identity, image) in images.items():
        if key not in gone:
            kept.setdefault(numbers[identity], []).append(image)
    assert read_pack(out) == kept and len(kept) == PEOPLE + 1
    assert f"left out: {len(far)} images with a cosine below" in shown and f"left with no image: {BROKEN}" in shown
    cosine = {int(key): float(cosine) for reason, _, key, cosine in lines if reason == "far"}
    assert max(cosine.values()) < float(shown.split("cosine below ")[1].split()[0]) + 5e-4


def test_identities_of_one_person_are_listed_for_merge_which_makes_them_one(noisy, net, tmp_path):
    found = clean(noisy[0], net, tmp_path / "out")
    assert [line[:2] for line in table(tmp_path / "out/clean.tsv") if line[0] == "same-1"] == [["same-1", "0"],
                                                                                          ["same-1", str(TWICE)]]
    assert [(each.pack, each.identity, each.name) for each in found.same] == [(1, 0, "same-1"), (1, PEOPLE, "same-1")]
    merged = merge([tmp_path / "out"], tmp_path / "merged", tmp_path / "out/same.tsv")
    assert (merged.images, merged.identities) == (found.images, PEOPLE)


def test_the_page_shows_the_decisions(noisy, net, tmp_path):
    clean(noisy[0], net, tmp_path / "out")
    page = (tmp_path / "out/clean.html").read_text()
    assert page.count("image/png") == 1 and page.count("image/jpeg") == 3 * 12 * 2 + 2  # two of an image; of two identities
    assert "Wrong labels do not move it" in page and "May be one person's</h2>\n<p>0, 1000: " in page
    farthest, nearest, kept, _ = ([float(each.split(":")[0]) for each in part.split("<p>")[1:]] if number < 3 else part
                                  for number, part in enumerate(page.split("<h2>")[1:]))
    assert farthest == sorted(farthest) and nearest == sorted(nearest)[::-1] and kept == sorted(kept)
    assert max(farthest) < min(nearest) and max(nearest) < min(kept)
    assert page.index("the farthest") < page.index("nearest to the threshold") < page.index("Kept: the nearest")


def test_thresholds_that_are_given_count_and_the_result_as_json(noisy, net, tmp_path, capsys):
    cli(["clean", str(noisy[0]), str(net), str(tmp_path / "all"), "--least", "-1", "--least-same", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["far"], found["unreadable"], found["images"], found["same"]) == (0, 3, 300, [])
    assert (found["least"], found["j"], found["least_same"], found["emptied"]) == (-1, None, 1, [BROKEN])
    none = clean(noisy[0], net, tmp_path / "few", least=0.9)
    assert none.images + none.far == 300 and none.far > 100
    assert {float(line[3]) < 0.9 for line in table(tmp_path / "few/clean.tsv") if line[0] == "far"} == {True}


def test_identities_of_fewer_than_four_images_are_compared_only_by_a_threshold_that_is_given(net, tmp_path, capsys):
    rng = np.random.default_rng(0)
    people = codes(rng, 8)
    people[1] = people[0]
    pack = write_pack(tmp_path / "pack", [(identity, face(rng, codes(rng, 1, person, 0.3)[0]))
                                          for identity, person in enumerate(people) for _ in range(3)])
    cli(["clean", str(pack), str(net), str(tmp_path / "out")])
    assert "identities are not compared: " in capsys.readouterr().out
    page = (tmp_path / "out/clean.html").read_text()
    assert "compared by their dominant centres" not in page and "identities are not compared" in page.lower()
    found = clean(pack, net, tmp_path / "given", least_same=0.9)
    assert [(each.name, each.identity) for each in found.same] == [("same-1", 0), ("same-1", 1)]


@pytest.mark.parametrize("identities, lacking", [([7] * 8, "only one identity"), (range(8), "no identity with two images")])
def test_a_pack_without_a_threshold_to_find_needs_one_that_is_given(net, tmp_path, identities, lacking):
    rng = np.random.default_rng(0)
    pack = write_pack(tmp_path / "pack", [(identity, face(rng, codes(rng, 1)[0])) for identity in identities])
    with pytest.raises(InputError, match=f"the pack has {lacking} .*: give --least"):
        clean(pack, net, tmp_path / "out")
    assert clean(pack, net, tmp_path / "out", least=-1).images == 8


def test_what_cannot_be_cleaned_is_refused_and_nothing_is_written(noisy, net, tmp_path):
    with pytest.raises(InputError, match="--least 2: must be a cosine"):
        clean(noisy[0], net, tmp_path / "out", least=2)
    with pytest.raises(OverwriteError, match="train.idx exists"):
        clean(noisy[0], net, noisy[0])
    with pytest.raises(InputError, match="does not separate the identities: .* take a better model, or give --least"):
        clean(noisy[0], write_net(tmp_path / "other.onnx", top=0), tmp_path / "out")
    with pytest.raises(F2CError, match=r"log.onnx: its embeddings of .*pack are not finite"):
        clean(noisy[0], write_net(tmp_path / "log.onnx", "Log"), tmp_path / "out")
    with pytest.raises(F2CError, match="missing.onnx: no such file"):
        clean(noisy[0], tmp_path / "missing.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists() and len([*noisy[0].glob("*.rec")]) == 1
