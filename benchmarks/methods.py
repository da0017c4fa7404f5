"""What the neighbours of F²C gain in each world, as a table of the results that are committed.

    python benchmarks/methods.py

Reads benchmarks/results/methods_*.json, and of the same worlds learning_*.json, which accuracy.py and vectors.py write with
--json. TAR at FAR 1e-2 and 1e-3 on all pairs of images of unseen identities: means over the seeds; of the second the standard
deviation, too; then the number of seeds. At equal images, and of methods that take more or less compute in a step also at equal
compute. A cell is bold where TAR at FAR 1e-3 is above that of the head without a method by more than both deviations.
"""

import json

from comparison import DCQ, FORWARD_AND_BACKWARD, METHODS, Result
from learning import RESULTS, cell, deviation, tars, world

PLAIN, EQUAL_COMPUTE = "without", ", equal compute"


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
            name = f"{world(report['setting'])}, {table['passes']:g} {'pass' if table['passes'] == 1 else 'passes'}"
            if file.name.startswith("methods_"):
                worlds.add(name)
            for variant, row in table["rows"].items():
                head, method = place(variant)
                if table["equal"] == "compute":
                    if row["runs"][0]["units"] == FORWARD_AND_BACKWARD:
                        continue
                    method += EQUAL_COMPUTE
                cells = found.setdefault((name, head), {})
                if len(row["runs"]) > len(cells.get(method, [])):
                    cells[method] = row["runs"]
    return {key: cells for key, cells in sorted(found.items()) if key[0] in worlds and len(cells) > 1}


def table() -> str:
    """In Markdown."""
    found = rows()
    order = [method + equal for method in (PLAIN, *METHODS, DCQ.upper()) for equal in ("", EQUAL_COMPUTE)]
    columns = [column for column in order if any(column in cells for cells in found.values())]
    lines = ["| world | head | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for (name, head), cells in found.items():
        plain = tars(cells.get(PLAIN, []))
        texts = {method: f"{cell(runs)} ({len(runs)})" for method, runs in cells.items()}
        for method, values in ((method, tars(runs)) for method, runs in cells.items() if len(plain)):
            if values.mean() - plain.mean() > max(deviation(values), deviation(plain)):
                texts[method] = f"**{texts[method]}**"
        lines.append(" | ".join([f"| {name}", head, *(texts.get(column, "") for column in columns)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
