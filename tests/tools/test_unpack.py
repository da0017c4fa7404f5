"""The images of a pack as files, and back."""

import json
import os

import numpy as np
import pytest

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import RecordError
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders
from f2c_plugin.tools.unpack import unpack
from tests.runs import with_room_for
from tests.tools.test_packs import damaged_pack, encoded


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_packing_what_was_unpacked_gives_the_same_images_and_labels(faces, tmp_path, capsys):
    cli(["unpack", str(faces), str(tmp_path / "deep" / "images"), "--json"])
    source = RecordDataset(faces)
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["identities"]) == (len(source), 12)
    pack(Folders(tmp_path / "deep" / "images"), tmp_path / "again", processes=1)
    again = RecordDataset(tmp_path / "again")
    everything = np.arange(len(source))
    assert again.labels(everything).tolist() == source.labels(everything).tolist()
    assert [again.encoded(i) for i in everything] == [source.encoded(i) for i in everything]


def test_files_are_named_by_identity_and_record_with_leading_zeros(tmp_path):
    damaged_pack(tmp_path, lambda jpeg: encoded(4, "PNG"))
    cli(["unpack", str(tmp_path), str(tmp_path / "out")])
    assert sorted(contents(tmp_path / "out")) == [*(f"0/{i}.jpg" for i in range(3)), "1/3.jpg", "1/4.png", "1/5.jpg",
                                                  *(f"2/{i}.jpg" for i in range(6, 9))]
    write_dataset(tmp_path / "more", 11, 1, num_pairs=2, processes=1)
    cli(["unpack", str(tmp_path / "more"), str(tmp_path / "out2")])
    assert {"00/01.jpg", "10/11.jpg"} < set(contents(tmp_path / "out2"))


def test_a_damaged_record_is_named_and_nothing_written_or_left_out_on_request(tmp_path, capsys):
    (tmp_path / "pack").mkdir()
    damaged_pack(tmp_path / "pack", lambda jpeg: encoded(1, size=224))
    with pytest.raises(SystemExit, match="unpack: .*record 4"):
        cli(["unpack", str(tmp_path / "pack"), str(tmp_path / "out")])
    assert [each.name for each in tmp_path.iterdir()] == ["pack"]
    cli(["unpack", str(tmp_path / "pack"), str(tmp_path / "out"), "--skip-damaged"])
    assert len(contents(tmp_path / "out")) == 8
    assert capsys.readouterr().out == (f"{tmp_path / 'out'}: 8 images of 3 identities\n"
                                       "  left out: 1 images, damaged, or not 112×112\n")


def test_records_that_a_cut_has_reached_are_left_out_and_counted(tmp_path):
    damaged_pack(tmp_path, lambda jpeg: jpeg)
    starts = [int(line.split()[1]) for line in (tmp_path / "train.idx").read_text().splitlines()]
    os.truncate(tmp_path / "train.rec", starts[6] - 4)  # the end of record 5
    with pytest.raises(RecordError, match="cut short"):
        unpack(tmp_path, tmp_path / "out")
    found = unpack(tmp_path, tmp_path / "out", skip_damaged=True)
    assert (found.images, found.identities, found.left_out) == (5, 2, {"damaged, or not 112×112": 4})
    assert len(contents(tmp_path / "out")) == 5


def test_what_exists_is_not_overwritten(faces, tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(SystemExit, match="mine exists and is not overwritten"):
        cli(["unpack", str(faces), str(tmp_path / "mine")])
    assert (tmp_path / "mine").read_text() == "text"


def test_on_a_full_disk_the_file_is_named_and_nothing_stays(faces, tmp_path):
    done = with_room_for(2000, "unpack", faces, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.endswith(f"f2c-plugin unpack: [Errno 27] File too large: '{tmp_path}/out/00/001.jpg'\n")
    assert not list(tmp_path.iterdir())
