"""What tools leave out of the images that they are given, and why."""

from collections import Counter
from pathlib import Path

LEFT_OUT = "left_out.tsv"
_EXAMPLES = 3  # of each kind that are named in the report


class LeftOut:
    """What a tool has left out.

    Attributes:
        out: folder that it has written.
        left_out: {kind of reason: number of images, files or folders}.
    """

    def __init__(self, out: Path):
        self.out = out
        self.left_out: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def leave_out(self, name: str, reason: str) -> bytes:
        """Count it, for a reason "kind" or "kind: detail". Returns its line for ``out/left_out.tsv``."""
        kind, _, detail = reason.partition(": ")
        self.left_out[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{name} ({detail})" if detail else name)
        return f"{on_one_line(name)}\t{on_one_line(reason)}\n".encode()

    def lines(self) -> list[str]:
        """What was left out, in lines for people."""
        heading = [f"left out, see {self.out / LEFT_OUT}:"] if self.left_out else []
        return heading + [f"  {line}" for line in self.reasons()]

    def reasons(self) -> list[str]:
        """A line for each kind of reason to leave images out."""
        return [with_examples(count, kind, self._examples[kind]) for kind, count in self.left_out.most_common()]


def with_examples(count: int, kind: str, names: list[str]) -> str:
    """A line for people, with the first of ``count`` names."""
    shown = names[:_EXAMPLES]
    return f"{count} × {kind}: {on_one_line(', '.join(shown))}{', …' if count > len(shown) else ''}"


def on_one_line(text: str) -> str:
    r"""Text for a table and a terminal: control characters and what is not UTF-8 as \\ escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
