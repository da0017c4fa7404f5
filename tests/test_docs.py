"""README and pages: they stay short, their links lead somewhere, and their figures are those of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from f2c_plugin.cli import COMMANDS
from f2c_plugin.config import PREFIX, F2CConfig, known_keys
from f2c_plugin.models import get_model
from f2c_plugin.tools.net_costs import count
from f2c_plugin.tools.plan import Plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HOME = "https://github.com/f2c-plugin/f2c-plugin/"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_has_at_most_120_lines_and_absolute_links():
    assert len(README.splitlines()) <= 120
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if link.startswith(("https://github.com/f2c-plugin", "https://raw.githubusercontent.com/f2c-plugin")):
            assert (ROOT / re.sub(r"^.*?/f2c-plugin/f2c-plugin/(?:(?:blob|tree)/)?main/", "", link)).exists(), link
        elif not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_tests_that_the_pages_name_exist():
    for name in re.findall(r"`((?:\w+/)?test_\w+\.py)`", (ROOT / "docs/reliability.md").read_text()):
        assert (ROOT / "tests" / name).is_file(), name


def test_every_key_is_on_the_config_page_with_its_default():
    page = (ROOT / "docs/config.md").read_text()
    for name, default in vars(F2CConfig()).items():
        written = {2 / 3: "2/3"}.get(default, f'"{default}"' if isinstance(default, str) else str(default))
        assert f"| `{PREFIX}{name}` | `{written}` |" in page, name


def test_the_memory_in_the_readme_is_what_plan_says():
    rows = re.findall(r"^\| (\d+ M|[\d,]+)[^|]*\| ([\d., ]+) / ([\d.]+) GB \| ([\d., ]+) / ([\d.]+) GB \|", README, re.M)
    assert len(rows) == 5
    for identities, *cells in rows:
        number = int(identities.replace(",", "").replace(" M", "000000"))
        for gpus, f2c, partial_fc in (1, *cells[:2]), (8, *cells[2:]):
            plans = [Plan(number, gpus, "r100", 128, rate) for rate in (0.1, 0.01)]
            expected = [plan.f2c() + plan.gallery_net() for plan in plans] + [plans[0].partial_fc(0.1)]
            for written, size in zip([*f2c.split(", "), partial_fc], expected, strict=True):
                rounding = 0.5 / 10 ** len(written.partition(".")[2])  # of the last digit
                assert abs(float(written) - size / 2**30) <= rounding, (identities, gpus, written, size / 2**30)


def test_parameters_and_operations_of_light_networks_are_those_that_plan_counts():
    rows = re.findall(r"^\| `(\w+)` \| .+ \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs/config.md").read_text(), re.M)
    assert [name for name, *_ in rows] == ["mbf", "mbf_large", "mixfacenet_s", "mixfacenet_m", "vargfacenet"]
    for name, millions, mflops in rows:
        with torch.device("meta"):
            parameters = sum(each.numel() for each in get_model(name).parameters())
        assert (f"{parameters / 1e6:.2f}", f"{count(name, 512, 2, False).forward_flops / 2e6:.1f}") == (millions, mflops), name


def test_the_site_is_built_without_a_warning_and_has_every_key_and_command(tmp_path):
    """A warning is a link that leads nowhere, a page that no menu has, or a table that is none."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    keys, commands = ((tmp_path / "site" / f"{page}.html").read_text() for page in ("keys", "commands"))
    assert not [key for key in known_keys() if f">{key}<" not in keys]
    assert not [name for name in COMMANDS if f'id="{name}"' not in commands]
    loaded = [source for page in (tmp_path / "site").glob("*.html")
              for source in re.findall(r'<(?:script|img|link)[^>]* (?:src|href)="(http[^"]*)"', page.read_text())]
    assert not loaded
