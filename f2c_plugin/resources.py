"""The folders that come with the code: configs and patches."""

from pathlib import Path


def data_folder(name: str) -> Path:
    """Folder ``configs`` or ``patches``: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())
