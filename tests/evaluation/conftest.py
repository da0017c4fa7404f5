"""Shared by the tests of the protocols."""

import pytest

from tests.protocol_sets import write_net


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """A small net, ``model.pt``."""
    return write_net(tmp_path_factory.mktemp("net") / "model.pt")
