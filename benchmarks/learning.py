"""What heads learn in all worlds, as a table of the results that are committed.

    python benchmarks/learning.py

Reads benchmarks/results/learning_*.json, which accuracy.py and vectors.py write with --json. TAR at FAR 1e-2 and 1e-3 on all
pairs of images of unseen identities, at equal images: means over the seeds; of the second the standard deviation, too.
"""

import json
from pathlib import Path

import numpy as np
from comparison import Result

RESULTS = Path(__file__).parent / "results"
HEADS = {"full FC, with the ramp": "full FC", "Partial FC 0.1, with the ramp": "Partial FC 0.1", "F²C 10 %": "F²C 10 %",
         "F²C 1 %": "F²C 1 %", "F²C 10 %, as published": "as published, 10 %"}


def world(setting: Result) -> str:
    """The world's name, from what its results depend on."""
    if setting.get("world") == "vectors":
        name = f"vectors, {setting['identities']:,} × {setting['images']}"
    elif setting["data"].startswith("synthetic"):
        name = f"synthetic faces, {setting['identities']:,} × {round(setting['images'] / setting['identities'])}"
    else:
        name = f"{setting['data'].partition('_')[0]} faces, {setting['identities']:,}"
    for key, text in (("long_tail", "long tail"), ("wrong_labels", "{:.0%} of the labels wrong"),
                      ("split", "{:.0%} split in two")):
        if setting[key]:
            name += ", " + text.format(setting[key])
    return name


def cell(runs: list[Result]) -> str:
    coarse, fine = (100 * np.array([run[f"tar_{far}"] for run in runs]) for far in ("1e-2", "1e-3"))
    spread = f" ± {fine.std(ddof=1):.1f}" if len(fine) > 1 else ""
    return f"{coarse.mean():.1f}; {fine.mean():.1f}{spread}"


def table() -> str:
    """The table in Markdown: a row for each world and number of passes; the head that is best at FAR 1e-3 is bold."""
    rows: list[str] = []
    for file in sorted(RESULTS.glob("learning_*.json")):
        report = json.loads(file.read_text())
        for each in report["tables"]:
            if each["equal"] != "images":
                continue
            runs = {name: row["runs"] for name, row in each["rows"].items() if name in HEADS}
            best = max(runs, key=lambda name: np.mean([run["tar_1e-3"] for run in runs[name]]))
            cells = {name: cell(found) for name, found in runs.items()}
            cells[best] = f"**{cells[best]}**"
            rows.append(" | ".join([f"| {world(report['setting'])}", f"{each['passes']:g}",
                                    *(cells.get(name, "") for name in HEADS)]) + " |")
    return "\n".join(["| world | passes | " + " | ".join(HEADS.values()) + " |", "|---" * (len(HEADS) + 2) + "|", *rows])


if __name__ == "__main__":
    print(table())
