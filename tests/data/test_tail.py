"""What is said of packs by their numbers of images per identity."""

import numpy as np
import pytest

from f2c_plugin.data.from_config import open_pack
from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.tail import images_per_identity, large_identities, many_alone
from f2c_plugin.data.writer import RecordWriter, pack_image_record


def index_of(sizes):
    """An index whose i-th identity, numbered 2 i, has sizes[i] images."""
    return IdentityIndex.from_labels(np.repeat(2 * np.arange(len(sizes)), sizes))


def test_the_images_per_identity_are_summed_up_in_a_line():
    assert images_per_identity(index_of([1] * 3 + [2] + [5, 5190])) == (
        "1 to 5,190, median 1.5, 50.0% with one image (3, 0.1% of the images)")


@pytest.mark.parametrize("sizes, warning", [
    ([1] * 24 + [2] * 76, None), ([1] * 25 + [2] * 75, "25.0% of the identities have one image: f2c_recipe = \"paper\" makes"),
    ([1] * 99 + [2], "99.0% of"), ([1] * 100, "no identity has two images: nothing shows which"), ([2], None)])
def test_many_identities_with_one_image_are_a_warning(sizes, warning):
    found = many_alone(index_of(sizes))
    assert found is None if warning is None else (found or "").startswith(warning)


@pytest.mark.parametrize("sizes, warning", [
    ([8] * 10, None),  # 10 % of the images each, as in any pack of ten identities
    ([1] * 9 + [1000], None),  # 99 % of the images, but less than ten times the mean of 101
    ([4] * 1980 + [80], None),  # exactly 1 %
    ([4] * 1500 + [90] + [4] * 499, "identity 3000 has 90 images, 1.1% of all: check with `f2c-plugin inspect --ident"),
    ([1] * 50 + [30, 20, 30, 9], "identity 100 has 30 images, 21.6% of all (1 more have over 1% each): check")])
def test_an_identity_of_over_1_percent_of_the_images_and_ten_times_the_mean_is_a_warning(sizes, warning):
    found = large_identities(index_of(sizes))
    assert found is None if warning is None else (found or "").startswith(warning)


def test_a_training_logs_both(tmp_path, caplog):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for i, identity in enumerate([*range(30), *[30] * 70]):
            writer.write(i, pack_image_record(identity, b"", i))
    with caplog.at_level("INFO"):
        open_pack({"rec": str(tmp_path), "num_classes": 31, "num_image": 100})
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert f"{tmp_path / 'train.rec'}: images per identity: 1 to 70, median 1, 96.8% with one image (30, 30.0%" in caplog.text
    assert "identity 30 has 70 images, 70.0% of all: check" in caplog.text
