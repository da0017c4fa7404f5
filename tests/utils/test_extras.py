"""Optional packages: imported if they are installed, and otherwise named with the command that installs them."""

import sys

import pytest

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import F2CError
from f2c_plugin.utils.extras import require
from tests.conftest import FIXTURES


def test_an_installed_module_is_imported():
    assert require("json.decoder", extra="plot") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(F2CError, match=r"no_such_package.module cannot be imported .*: pip install 'f2c-plugin\[plot\]'"):
        require("no_such_package.module", extra="plot")


@pytest.mark.parametrize("command", [["inspect", "--out"], ["index", "--plot"]])
def test_an_unknown_image_format_is_refused(command, tmp_path):
    with pytest.raises(SystemExit, match="out.xyz: "):
        cli([*command, str(tmp_path / "out.xyz"), str(FIXTURES / "insightface")])
