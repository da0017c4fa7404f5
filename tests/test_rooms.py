"""Each room imports only from rooms below it (docs/architecture.md)."""

import ast
from pathlib import Path

import f2c_plugin

PACKAGE = Path(f2c_plugin.__file__).parent
# From the ground up; rooms of one floor do not import each other.
FLOORS = [
    {"errors"},
    {"utils"},
    {"config", "models"},
    {"data", "method"},
    {"build", "config_files", "evaluation", "initial"},
    {"terms"},
    {"arcface_torch", "synthetic", "trainer"},
    {"tools"},
    {"cli", "train"},
    {"__main__"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module):
    return module.split(".")[1]


def imports(path):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("f2c_plugin"):
            names = [alias.name for alias in node.names] if node.module == "f2c_plugin" else [""]
            yield from (f"{node.module}.{name}".rstrip(".") for name in names)


def test_every_room_has_a_floor():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()
             if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(FLOOR)


def test_no_import_goes_up_or_across():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        if relative.name == "__init__.py" and len(relative.parts) == 1:
            continue  # the public names of all rooms
        here = relative.parts[0].removesuffix(".py")
        for module in imports(path):
            there = room_of(module)
            if there != here and there in FLOOR and FLOOR[there] >= FLOOR[here]:
                wrong.append(f"{relative} imports {module}")
    assert not wrong
