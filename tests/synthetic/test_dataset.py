"""Synthetic faces: the same bytes every time, distinct identities, and InsightFace's layout."""

import sys

import numpy as np
import pytest
import simplejpeg

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import InputError
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.synthetic.dataset import power_law, write_dataset
from f2c_plugin.synthetic.face import draw_face, draw_identity

FILES = "train.rec", "train.idx", "property", "synth.bin"


def test_the_same_arguments_give_the_same_bytes_with_any_number_of_processes(tmp_path):
    for name, processes in ("one", 1), ("two", 2):
        write_dataset(tmp_path / name, 6, 3, num_pairs=20, seed=4, processes=processes)
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    write_dataset(tmp_path / "other", 6, 3, num_pairs=20, seed=5, processes=1)
    assert (tmp_path / "other" / "train.rec").read_bytes() != (tmp_path / "one" / "train.rec").read_bytes()


def test_the_command_writes_a_pack_a_verification_set_and_a_contact_sheet(tmp_path, capsys):
    cli(["synth", str(tmp_path), "--identities", "5", "--images-per-identity", "4", "--pairs", "30"])
    assert capsys.readouterr().out == f"{tmp_path}: a pack of 5 identities, and synth.bin with pairs of others\n"
    dataset = RecordDataset(tmp_path)
    assert dataset.index.identity.tolist() == np.repeat(range(5), 4).tolist()
    assert (tmp_path / "property").read_text() == "5,112,112\n"
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")

    verification_set = VerificationSet(tmp_path / "synth.bin")
    assert len(verification_set.same) == 30 and verification_set.same.mean() == 0.5
    trained_on = {dataset.face(i).tobytes() for i in range(20)}
    seen = [simplejpeg.decode_jpeg(image).tobytes() for image in verification_set.images]
    assert not trained_on & set(seen)
    assert all(first != second for first, second in zip(seen[::2], seen[1::2], strict=True))


def test_identities_may_have_different_numbers_of_images_and_their_faces_stay_the_same(tmp_path):
    write_dataset(tmp_path / "equal", 3, 4, num_pairs=2, processes=1)
    write_dataset(tmp_path / "different", 3, [2, 4, 1], num_pairs=2, processes=1)
    equal, different = (RecordDataset(tmp_path / name) for name in ("equal", "different"))
    assert different.index.identity.tolist() == [0, 0, 1, 1, 1, 1, 2]
    for i, same in enumerate([0, 1, 4, 5, 6, 7, 8]):
        np.testing.assert_array_equal(different.face(i), equal.face(same))
    with pytest.raises(InputError, match="images_per_identity has 2 numbers: must have one for each of 3 identities"):
        write_dataset(tmp_path / "new", 3, [2, 4])
    with pytest.raises(InputError, match="--images-per-identity 0: must be at least 1"):
        write_dataset(tmp_path / "new", 2, [2, 0])


@pytest.mark.parametrize("identities, mean", [(10_000, 20), (1_000, 5), (100_000, 2.5)])
def test_a_long_tail_has_the_mean_and_half_of_its_identities_have_one_image_or_two(identities, mean):
    counts = np.array(power_law(identities, mean))
    assert counts.sum() == identities * mean and (counts <= 2).mean() == 0.5
    for least in range(2, counts.max() - 1):
        assert (counts >= least).mean() == pytest.approx(2 ** -(np.log(least) / np.log(3)), abs=1 / identities)
    assert counts.tolist() == power_law(identities, mean) != power_law(identities, mean, seed=1)
    assert abs(np.corrcoef(counts, np.arange(identities))[0, 1]) < 0.1


def test_the_command_draws_a_long_tail_where_there_can_be_one(tmp_path):
    arguments = ["--identities", "9", "--images-per-identity", "3", "--long-tail", "--pairs", "2", "--processes", "1"]
    cli(["synth", str(tmp_path / "drawn"), *arguments])
    index = RecordDataset(tmp_path / "drawn").index
    assert np.diff(index.starts).tolist() == power_law(9, 3) and len(index) == 27
    for option, value, message in (("--images-per-identity", "20", "20: must be from 1 to 14.8 in a long tail of 9 identities"),
                                   ("--images-per-identity", "0", "0: must be from 1"), ("--identities", "0", "0: must be at")):
        with pytest.raises(SystemExit, match=f"{option} {message}"):
            cli(["synth", str(tmp_path / "new"), *arguments, option, value])


def test_an_existing_pack_is_not_overwritten(tmp_path):
    (tmp_path / "train.rec").write_bytes(b"years of work")
    with pytest.raises(SystemExit, match="train.rec exists and is not overwritten"):
        cli(["synth", str(tmp_path), "--identities", "5"])
    assert (tmp_path / "train.rec").read_bytes() == b"years of work"


@pytest.mark.parametrize("option, value", [("--identities", "0"), ("--images-per-identity", "-1"), ("--pairs", "1"),
                                           ("--processes", "0")])
def test_counts_that_are_too_small_are_refused(tmp_path, option, value):
    arguments = {"--identities": "3", option: value}
    with pytest.raises(SystemExit, match=f"{option} {value}: must be at least"):
        cli(["synth", str(tmp_path / "new"), *(word for pair in arguments.items() for word in pair)])
    assert not (tmp_path / "new").exists()


def test_pictures_of_one_identity_are_more_alike_than_pictures_of_two():
    rng = np.random.default_rng(0)
    faces = np.array([[draw_face(identity, rng) for _ in range(6)] for identity in
                      [draw_identity(rng) for _ in range(30)]]).astype(np.float64)  # (30, 6, 112, 112, 3)
    assert faces.shape[2:] == (112, 112, 3)
    mean = faces.mean(axis=1, keepdims=True)
    within = ((faces - mean) ** 2).mean()
    between = ((mean - mean.mean(axis=0)) ** 2).mean()
    assert between > within / 6 * 1.2  # 6 pictures of different identities would give within / 6


def test_pictures_of_one_identity_all_differ():
    rng = np.random.default_rng(1)
    identity = draw_identity(rng)
    assert len({draw_face(identity, rng).tobytes() for _ in range(20)}) == 20


def test_without_pillow_the_contact_sheet_is_skipped_with_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    cli(["synth", str(tmp_path), "--identities", "2", "--images-per-identity", "1", "--pairs", "2"])
    assert "no contact_sheet.png: PIL.Image cannot be imported" in (printed := capsys.readouterr().out)
    assert "pip install 'f2c-plugin[plot]'" in printed and (tmp_path / "train.rec").is_file()
