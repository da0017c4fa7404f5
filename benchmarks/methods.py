"""What the neighbours of F²C gain in each world, as tables of the results that are committed.

    python benchmarks/methods.py

Reads benchmarks/results/methods_*.json, and of the same worlds learning_*.json, which accuracy.py and vectors.py write with
--json. TAR at FAR 1e-2 and 1e-3 on all pairs of images of unseen identities: means over the seeds; of the second the standard
deviation, too; then the number of seeds, if it is not three. At equal images, and of methods that take more or less compute in
a step also at equal compute. A cell is bold where TAR at FAR 1e-3 is above that of the same head without a method by more than
both deviations.
"""

import json

from comparison import DCQ, FORWARD_AND_BACKWARD, METHODS, Result
from learning import RESULTS, cell, deviation, tars, world

EQUAL_COMPUTE = ", equal compute"
SEEDS = 3


def head_of(variant: str) -> str:
    """The variant without its method, which it is compared with. DCQ is compared with F²C's default."""
    variant = variant.removesuffix(EQUAL_COMPUTE).replace(DCQ.upper(), "F²C")
    return next((variant.removesuffix(f", {method}") for method in sorted(METHODS, key=len, reverse=True)
                 if variant.endswith(f", {method}")), variant)


def columns() -> dict[str, dict[str, list[Result]]]:
    """{world and passes: {variant: its runs}}; of several results of one cell, those with the most seeds."""
    found: dict[str, dict[str, list[Result]]] = {}
    compared: set[str] = set()
    for file in sorted(RESULTS.glob("methods_*.json")) + sorted(RESULTS.glob("learning_*.json")):
        report = json.loads(file.read_text())
        for table in report["tables"]:
            name = f"{world(report['setting'])}, {table['passes']:g} {'pass' if table['passes'] == 1 else 'passes'}"
            compared |= {name} if file.name.startswith("methods_") else set()
            for variant, row in table["rows"].items():
                if table["equal"] == "compute":
                    if row["runs"][0]["units"] == FORWARD_AND_BACKWARD:
                        continue
                    variant += EQUAL_COMPUTE
                cells = found.setdefault(name, {})
                if len(row["runs"]) > len(cells.get(variant, [])):
                    cells[variant] = row["runs"]
    return {name: found[name] for name in sorted(compared)}


def tables() -> str:
    """In Markdown, for each kind of world: a row for each head and method, a column for each world."""
    kinds: dict[str, dict[str, dict[str, list[Result]]]] = {}
    for name, cells in columns().items():
        kind, _, rest = name.partition(", ")
        kinds.setdefault(kind, {})[rest] = cells
    return "\n\n".join(table(*each) for each in kinds.items())


def table(kind: str, found: dict[str, dict[str, list[Result]]]) -> str:
    variants = sorted({variant for cells in found.values() for variant in cells}, key=lambda name: (head_of(name), name))
    heads = {head_of(variant) for variant in variants if head_of(variant) != variant}  # with a method somewhere
    lines = [f"| {kind} | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for variant in variants:
        if head_of(variant) in heads:
            lines.append(f"| {variant} | " + " | ".join(text(cells, variant) for cells in found.values()) + " |")
    return "\n".join(lines)


def text(cells: dict[str, list[Result]], variant: str) -> str:
    """The cell of a variant in a world."""
    if variant not in cells:
        return ""
    runs, plain = cells[variant], cells.get(head_of(variant), [])
    written = cell(runs) + (f" ({len(runs)})" if len(runs) != SEEDS else "")
    better = bool(plain) and tars(runs).mean() - tars(plain).mean() > max(deviation(tars(runs)), deviation(tars(plain)))
    return f"**{written}**" if better else written


if __name__ == "__main__":
    print(tables())
