"""What tools leave out of the images that they are given, and why."""

from collections import Counter
from pathlib import Path

LEFT_OUT = "left_out.tsv"
NO_FACE, DETECTOR_FAILS = "no face found", "the detector fails"  # kinds of reasons of ``align``
_EXAMPLES = 3  # of each kind that are named in the report


class LeftOut:
    """What a tool has left out.

    Args:
        out: folder or file that it has written.
        listed_in: the list of what was left out; if None, ``left_out.tsv`` in ``out``.

    Attributes:
        left_out: {kind of reason: number of images, files or folders}.
    """

    def __init__(self, out: Path, listed_in: Path | None = None):
        self.out, self._listed_in = out, listed_in or out / LEFT_OUT
        self.left_out: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def leave_out(self, name: str, reason: str) -> bytes:
        """Count it, for a reason "kind" or "kind: detail". Returns its line for the list."""
        kind, _, detail = reason.partition(": ")
        self.left_out[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{name} ({detail})" if detail else name)
        return f"{on_one_line(name)}\t{on_one_line(reason)}\n".encode()

    def lines(self) -> list[str]:
        """What was left out, in lines for people."""
        heading = [f"left out, see {self._listed_in}:"] if self.left_out else []
        return heading + [f"  {line}" for line in self.reasons()]

    def reasons(self) -> list[str]:
        """A line for each kind of reason to leave images out."""
        return [with_examples(count, kind, self._examples[kind]) for kind, count in self.left_out.most_common()]


def photos_without_face(folder: Path) -> set[str]:
    """Names of the photos in ``folder`` in which ``align`` found no face, from ``left_out.tsv`` there or in a folder above.

    They are as ``on_one_line`` shows them.
    """
    found: set[str] = set()
    folder = folder.absolute()
    for around in folder, *folder.parents[:2]:
        if (around / LEFT_OUT).is_file():
            for line in (around / LEFT_OUT).read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, reason = line.partition("\t")
                if reason.partition(": ")[0] in (NO_FACE, DETECTOR_FAILS) and (around / name).parent == folder:
                    found.add(Path(name).name)
    return found


def with_examples(count: int, kind: str, names: list[str]) -> str:
    """A line for people, with the first of ``count`` names."""
    shown = names[:_EXAMPLES]
    return f"{count} × {kind}: {on_one_line(', '.join(shown))}{', …' if count > len(shown) else ''}"


def on_one_line(text: str) -> str:
    r"""Text for a table and a terminal: control characters and what is not UTF-8 as \\ escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
