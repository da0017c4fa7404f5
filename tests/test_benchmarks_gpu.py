"""The measurements for a GPU, at a size that only shows that they run."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_part_writes_its_results_and_the_page(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--device", "cpu", "--repeats", "1", "--out", tmp_path],
        capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    found, page = (next(tmp_path.glob(f"gpu_*.{suffix}")).read_text() for suffix in ("json", "md"))
    parts = json.loads(found)["parts"]
    assert [each["identities"] for each in parts["head"]] == [20_000, 50_000]
    for each in parts["head"][0], parts["steps"][0]:
        assert each["f2c_ms"] > 0 and each["f2c_paper_peak_mb"] > 0
    assert parts["head"][0]["f2c_planned_mb"] > 0 and "f2c_ms" not in parts["head"][1]
    assert all(each["f2c_paper_planned_mb"] > 0 and each["floor_ms"] > 0 for each in parts["head"])
    assert parts["steps"][0]["backbone_images_per_s"] > 0
    for head in "f2c", "full_fc", "backbone":
        assert all(parts["nets"][0][f"{head}_{what}"] > 0 for what in ("ms", "peak_mb", "planned_mb"))
    assert parts["nets"][0]["full_fc_estimated_ms"] > parts["nets"][0]["f2c_estimated_ms"] > 0
    assert 0 < parts["loader"][0]["share_of_one_batch"] < 10
    for head in "f2c", "f2c_paper", "floor", "backbone":
        assert f"| {head} |" in page
    assert "## Steps fed by the loader" in page and next(tmp_path.glob("gpu_*.png")).stat().st_size > 10_000
