"""What heads learn in all worlds, as a table of the results that are committed.

    python benchmarks/learning.py [--plot FILE]

Reads benchmarks/results/learning_*.json, which accuracy.py and vectors.py write with --json. TAR at FAR 1e-2 and 1e-3 on all
pairs of images of unseen identities, at equal images: means over the seeds; of the second the standard deviation, too.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from comparison import Result

RESULTS = Path(__file__).parent / "results"
BASELINE = "full FC"
# {variant: its column}. Partial FC is sampled at 0.1, or at the smaller pool's rate where there is no larger pool.
COLUMNS = {"full FC, with the ramp": BASELINE, "Partial FC 0.1, with the ramp": "Partial FC",
           "Partial FC 0.01, with the ramp": "Partial FC", "F²C 10 %": "F²C 10 %", "F²C 1 %": "F²C 1 %",
           "F²C 10 %, as published": "as published, 10 %"}
HEADS = list(dict.fromkeys(COLUMNS.values()))


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
    return name + (f", seen at {setting['pixels']} pixels" if "pixels" in setting else "")


class Row(NamedTuple):
    """The runs of each of HEADS in a world with a number of passes."""

    world: str
    passes: float
    runs: dict[str, list[Result]]


def rows() -> list[Row]:
    """In the order of their worlds and passes. Where several files have a head in one row, that with the most seeds counts."""
    found: dict[tuple[str, float], dict[str, list[Result]]] = {}
    for file in sorted(RESULTS.glob("learning_*.json")):
        report = json.loads(file.read_text())
        for each in report["tables"]:
            if each["equal"] == "images":
                row = found.setdefault((world(report["setting"]), each["passes"]), {})
                for name, head in each["rows"].items():
                    column = COLUMNS.get(name)
                    if column and len(head["runs"]) > len(row.get(column, [])):
                        row[column] = head["runs"]
    return [Row(*of, runs) for of, runs in sorted(found.items())]


def tars(runs: list[Result], far: str = "1e-3") -> np.ndarray:
    """In percent, one for each seed."""
    return 100 * np.array([run[f"tar_{far}"] for run in runs])


def deviation(values: np.ndarray) -> float:
    """The standard deviation; of one value 0."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def cell(runs: list[Result]) -> str:
    coarse, fine = tars(runs, "1e-2"), tars(runs)
    spread = f" ± {deviation(fine):.1f}" if len(fine) > 1 else ""
    return f"{coarse.mean():.1f}; {fine.mean():.1f}{spread}"


def table() -> str:
    """The table in Markdown: a row for each world and number of passes; the head that is best at FAR 1e-3 is bold."""
    lines = ["| world | passes | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 2) + "|"]
    for row in rows():
        best = max(row.runs, key=lambda name: tars(row.runs[name]).mean())
        cells = {name: cell(found) for name, found in row.runs.items()}
        cells[best] = f"**{cells[best]}**"
        lines.append(" | ".join([f"| {row.world}", f"{row.passes:g}", *(cells.get(name, "") for name in HEADS)]) + " |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    """How far each head is from full FC in each world, with the standard deviations of both."""
    from f2c_plugin.tools.plotting import pyplot

    plt = pyplot()
    found = [row for row in rows() if BASELINE in row.runs][::-1]
    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.45 * len(found)), layout="constrained")
    for number, head in enumerate(HEADS[1:]):
        shown = [(at, tars(row.runs[head]), tars(row.runs[BASELINE])) for at, row in enumerate(found) if head in row.runs]
        if not shown:
            continue
        axis.errorbar([values.mean() - full_fc.mean() for _, values, full_fc in shown], [at for at, *_ in shown],
                      xerr=[deviation(values) for _, values, _ in shown],
                      fmt="os^D"[number], capsize=3, label=head)
    for at, row in enumerate(found):
        values = tars(row.runs[BASELINE])
        axis.barh(at, 2 * deviation(values), 0.6, -deviation(values), color="0.85", label="full FC" * (not at) or None)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(found)), [
        f"{row.world}, {row.passes:g} {'pass' if row.passes == 1 else 'passes'} ({tars(row.runs[BASELINE]).mean():.0f} %)"
        for row in found])
    axis.set(xlabel="TAR at FAR 1e-3, points above full FC with the ramp\n(in brackets its TAR; bars: ± 1 standard deviation)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(loc="best")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(table())
    if arguments.plot:
        plot(arguments.plot)


if __name__ == "__main__":
    main()
