"""Short nets, and few faces for those that are not."""

from functools import partial

import pytest

from f2c_plugin.models import NETWORKS
from f2c_plugin.models.vit import VisionTransformer
from f2c_plugin.synthetic.dataset import write_dataset


@pytest.fixture
def shorts(monkeypatch):
    """Three short nets by name. The first two have the same parameters, of other shapes."""
    for name, dim, mask_ratio in ("vit_32", 32, 0.1), ("vit_64", 64, 0.1), ("vit_64_mask0", 64, 0.0):
        monkeypatch.setitem(NETWORKS, name, partial(VisionTransformer, dim, 2, 0.1, mask_ratio, checkpointing=True))


@pytest.fixture(scope="session")
def few_faces(tmp_path_factory):
    """Keys of a config for three steps, of eight faces each."""
    folder = tmp_path_factory.mktemp("few")
    write_dataset(folder, 6, 4, num_pairs=4, processes=1)
    return dict(rec=str(folder), num_classes=6, num_image=24, batch_size=8, val_targets=[])
