"""What the neighbours of F²C gain in each world, as a table of the results that are committed.

    python benchmarks/methods.py

Reads benchmarks/results/methods_*.json, and of the same worlds learning_*.json, which accuracy.py and vectors.py write with
--json. TAR at FAR 1e-2 and 1e-3 on all pairs of images of unseen identities: means over the seeds; of the second the standard
deviation, too, and behind it the number of seeds. Without a method and with the better ones than without, the cell is bold.
"""

import json

from comparison import DCQ, METHODS, Result
from learning import RESULTS, cell, tars, world

PLAIN = "without"
COLUMNS = [PLAIN, *METHODS, DCQ.upper()]


def place(variant: str) -> tuple[str, str]:
    """The head and the method that a variant's name tells."""
    for method in sorted(METHODS, key=len, reverse=True):
        if variant.endswith(f", {method}"):
            return variant.removesuffix(f", {method}"), method
    return (variant.replace(DCQ.upper(), "F²C"), DCQ.upper()) if variant.startswith(DCQ.upper()) else (variant, PLAIN)


def rows() -> dict[tuple[str, str], dict[str, list[Result]]]:
    """{(world and passes, head): {method: its runs}}; of several results of one cell, those with the most seeds."""
    found: dict[tuple[str, str], dict[str, list[Result]]] = {}
    worlds: set[str] = set()
    for file in sorted(RESULTS.glob("methods_*.json")) + sorted(RESULTS.glob("learning_*.json")):
        report = json.loads(file.read_text())
        for table in report["tables"]:
            equal = "" if table["equal"] == "images" else ", equal compute"
            name = f"{world(report['setting'])}, {table['passes']:g} {'pass' if table['passes'] == 1 else 'passes'}{equal}"
            if file.name.startswith("methods_"):
                worlds.add(name)
            for variant, row in table["rows"].items():
                head, method = place(variant)
                cells = found.setdefault((name, head), {})
                if len(row["runs"]) > len(cells.get(method, [])):
                    cells[method] = row["runs"]
    return {key: cells for key, cells in sorted(found.items()) if key[0] in worlds and len(cells) > 1}


def table() -> str:
    """In Markdown."""
    lines = ["| world | head | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (name, head), cells in rows().items():
        plain = tars(cells[PLAIN]).mean() if PLAIN in cells else 1.0
        texts = {method: f"{cell(runs)} ({len(runs)})" for method, runs in cells.items()}
        texts |= {method: f"**{texts[method]}**" for method, runs in cells.items() if tars(runs).mean() > plain}
        lines.append(" | ".join([f"| {name}", head, *(texts.get(column, "") for column in COLUMNS)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
