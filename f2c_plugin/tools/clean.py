"""Writes a pack without the images that do not show their identity, and a report of what it found."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.identities import Ints
from f2c_plugin.data.recordio import Float32s, Int64s
from f2c_plugin.data.writer import new_pack
from f2c_plugin.errors import InputError
from f2c_plugin.tools import repack
from f2c_plugin.tools.cleaning import BINS, SUB_CENTRES, dominant_centre, halves_cosine, histogram, separation
from f2c_plugin.tools.duplicates import Suggested, suggestions
from f2c_plugin.tools.pack_embeddings import by_identity, embedded
from f2c_plugin.tools.packs import contact_sheet, spread
from f2c_plugin.tools.plotting import look, panels, pyplot, save_figure
from f2c_plugin.tools.report import html_image, html_page, html_picture
from f2c_plugin.utils.atomic import written_whole

LIST, SAME, PAGE, PLOT = "clean.tsv", "same.tsv", "clean.html", "clean.png"
_NAMES = (LIST, SAME, PLOT, PAGE, "property", repack.IDENTITIES, "train.idx", "train.rec")  # in the order in which they appear
_LEAST_J = 0.5  # below, a quarter of good images would go, or a quarter of wrong ones stay
_SAMPLE = 2048  # identities whose nearest other one is looked for
_BLOCK = 1 << 15  # centres that they are compared with at a time
_ROWS, _COLUMNS = 12, 8  # of a contact sheet
_BARS = 100  # of a drawn histogram
_NAMED = 20  # identities without an image that the report names
_NOT_COMPARED = ("identities are not compared: their halves are not nearer to each other than other identities are, or none "
                 "has four images")


@dataclass
class Cleaned:
    """What was found in a pack.

    Attributes:
        out: folder of the new pack.
        images, identities: that it holds.
        far: images left out, whose cosine to the dominant centre of their identity is below ``least``.
        unreadable: images left out that cannot be decoded, or are damaged.
        least: of the cosines of images, and Youden's J there if it comes from their distribution.
        emptied: identities, by the source's numbers, that are left with no image.
        same: identities of the new pack that may be one person's; as in ``duplicates``.
        least_same: of the cosines of identities; None if they do not separate, and J.
    """

    out: Path
    images: int
    identities: int
    far: int
    unreadable: int
    least: float
    j: float | None
    emptied: list[int]
    same: list[Suggested]
    least_same: float | None
    j_same: float | None

    def report(self) -> str:
        """In lines for people."""
        groups = len({each.name for each in self.same})
        lines = [f"{self.out}: {self.images} images of {self.identities} identities; see {self.out / PAGE}",
                 f"  left out: {self.far} images with a cosine below {self.least:.3f} to the dominant centre of their identity",
                 f"  left out: {self.unreadable} images that cannot be decoded"]
        if self.emptied:
            named = ", ".join(map(str, self.emptied[:_NAMED])) + ", …" * (len(self.emptied) > _NAMED)
            lines.append(f"  {len(self.emptied)} identities are left with no image: {named}")
        lines.append(f"  {_NOT_COMPARED}; give --least-same" if self.least_same is None else
                     f"  {len(self.same)} identities in {groups} groups may be one person's, with a cosine of "
                     f"{self.least_same:.3f} or more: look at them, and give {self.out / SAME} to f2c-plugin merge --same")
        return "\n".join(lines)

    def reasons(self) -> Iterator[str]:
        """How it was decided, for the page."""
        given = "The threshold was given."
        yield (f"Each identity is split into up to {SUB_CENTRES} sub-centres; the one with most images is dominant, and images "
               "are judged by their cosine to it (sub-center ArcFace, ECCV 2020, section 3.4). " + (
                   given if self.j is None else "The threshold is where cosines to the own centre and to that of a random "
                   f"other identity separate best: of the latter, {self.j:.1%} more are below. Wrong labels do not move it."))
        if self.least_same is None:
            yield _NOT_COMPARED.capitalize() + "."
        else:
            yield ("Identities are compared by their dominant centres. " + (
                given if self.j_same is None else "The threshold is where cosines of the two halves of an identity and of "
                f"identities to the nearest other one separate best: of the latter, {self.j_same:.1%} more are below it."))


@dataclass
class _Judged:
    """Cosines of images (n,) to the dominant centre of their identity, NaN if unreadable; and histograms of cosines: of images
    to their own centre, to another's; of an identity's halves."""

    cosines: Float32s
    own: Int64s
    other: Int64s
    halves: Int64s


def clean(source: str | Path, model: str | Path, out: str | Path, least: float | None = None,
          least_same: float | None = None) -> Cleaned:
    """Write a pack without the images that are far from the dominant centre of their identity (``cleaning.dominant_centre``).

    ``out/clean.tsv`` lists all that was found, ``out/same.tsv`` the identities that may be one person's, for ``repack.merge``
    of the new pack, and ``out/clean.html`` shows how it was decided. ``out/identities.tsv`` lists the new numbers.

    Args:
        model: an ``.onnx`` file, a ``model.pt`` or a checkpoint.
        least: cosine of an image to the dominant centre; by default, where such cosines and those to the dominant centre of
            another, random identity separate (``cleaning.separation``).
        least_same: cosine of two dominant centres; by default, where the cosines of the two halves of an identity and those of
            identities to the nearest other one separate.
    Raises:
        InputError: there are no such cosines, or the model does not separate the identities.
        RecordError: the pack cannot be read.
        OverwriteError: ``out`` already holds a pack.
        F2CError: the model cannot be read, its embeddings are not finite, or matplotlib is missing.
    """
    out = Path(out)
    for name, value in ("least", least), ("least-same", least_same):
        if value is not None and not -1 <= value <= 1:
            raise InputError(f"--{name} {value}: must be a cosine, from -1 to 1")
    pyplot()  # a missing package is told before the work, not after
    with new_pack(out, _NAMES) as folder:
        pack = RecordDataset(source, skip_damaged=True)
        index = pack.index
        embeddings = embedded(pack, model, folder)
        centres = np.zeros((len(index.numbers), embeddings.shape[1]), np.float32)
        first = least if least is not None else _separating(_judged(embeddings, index.starts, None, centres), model)[0]
        judged = _judged(embeddings, index.starts, first, centres)
        least, j = _separating(judged, model) if least is None else (least, None)
        kept = judged.cosines >= least  # not NaN
        has_images = np.logical_or.reduceat(kept, index.starts[:-1])
        having, numbers = np.flatnonzero(has_images), np.where(has_images, has_images.cumsum() - 1, -1)
        centres[~has_images] = 0
        nearest = histogram(_nearest(centres))
        j_same = None
        if least_same is None:
            least_same, j_same = separation(judged.halves, nearest)
            least_same = least_same if j_same >= _LEAST_J else None
        same = [] if least_same is None else suggestions(centres, least_same, lambda each: (1, int(numbers[each])))
        images, unreadable = int(kept.sum()), int(np.isnan(judged.cosines).sum())
        found = Cleaned(out, images, len(having), len(kept) - images - unreadable, unreadable + len(index.unusable), least, j,
                        index.numbers[~has_images].tolist(), same, least_same, j_same)
        in_pack = np.zeros(len(index), bool)
        in_pack[index.grouped] = kept
        repack.write_kept(source, folder, in_pack, numbers)
        with written_whole(folder / SAME) as file:
            file.writelines(map(Suggested.line, same))
        with written_whole(folder / LIST) as file:
            file.writelines(f"{line}\n".encode() for line in _lines(pack, judged.cosines, found, having))
        _draw(judged, nearest, found, folder / PLOT)
        with written_whole(folder / PAGE) as file:
            file.write(_page(pack, judged.cosines, found, having, folder / PLOT).encode("utf-8", "surrogateescape"))
    return found


def _judged(embeddings: NDArray[np.float16], starts: Int64s, least: float | None, centres: Float32s) -> _Judged:
    """Writes the dominant centres into ``centres`` (identities, D)."""
    rng = np.random.default_rng(0)
    found = _Judged(np.full(len(embeddings), np.nan, np.float32), *np.zeros((3, BINS), np.int64))
    for i, rows, unit in by_identity(embeddings, starts, "centres" if least is None else "judging"):
        centres[i] = dominant_centre(unit, least)
        found.cosines[rows] = own = unit @ centres[i]
        if len(unit) > 1:  # an only image is its own centre
            found.own += histogram(own)
        if i:
            found.other += histogram((unit * centres[rng.integers(i, size=len(unit))]).sum(1))
        if least is not None:
            found.halves += histogram(halves_cosine(unit[own >= least]))
    return found


def _separating(judged: _Judged, model: str | Path) -> tuple[float, float]:
    for counts, lacking in (judged.own, "no identity with two images"), (judged.other, "only one identity"):
        if not counts.any():
            raise InputError(f"the pack has {lacking} that can be decoded, so there is nothing to find a threshold by: give "
                             "--least")
    least, j = separation(judged.own, judged.other)
    if j < _LEAST_J:
        raise InputError(f"{model}: does not separate the identities: at the best threshold, {least:.3f}, the share of images "
                         f"below it is only {j:.2f} larger for other identities' centres than for the own, not {_LEAST_J}: "
                         "take a better model, or give --least")
    return least, j


def _nearest(centres: Float32s) -> Float32s:
    """The largest cosine to another centre, of a sample of the centres (n, D) that are not 0."""
    sample = np.flatnonzero(centres.any(1))
    sample = sample[spread(len(sample), _SAMPLE)]
    found = np.full(len(sample), -1, np.float32)
    for start in range(0, len(centres), _BLOCK):
        block = centres[start:start + _BLOCK]
        cosines = centres[sample] @ block.T
        inside = np.flatnonzero((sample >= start) & (sample < start + len(block)))
        cosines[inside, sample[inside] - start] = -1
        np.maximum(found, cosines.max(1), out=found)
    return found


def _lines(pack: RecordDataset, cosines: Float32s, found: Cleaned, having: Int64s) -> Iterator[str]:
    """Reason, identity, record and cosine, with tabs between."""
    index = pack.index
    for row in np.flatnonzero(~(cosines >= found.least)).tolist():  # also NaN
        reason, cosine = ("unreadable", "") if np.isnan(cosines[row]) else ("far", f"{cosines[row]:.4f}")
        yield f"{reason}\t{index.identity[index.grouped[row]]}\t{index.keys[index.grouped[row]]}\t{cosine}"
    yield from (f"unreadable\t\t{key}\t" for key in index.unusable[:, 0].tolist())
    yield from (f"no image left\t{identity}\t\t" for identity in found.emptied)
    yield from (f"{each.name}\t{index.numbers[having[each.identity]]}\t\t{each.cosine}" for each in found.same)


def _draw(judged: _Judged, nearest: Int64s, found: Cleaned, path: Path) -> None:
    figure, axes = panels(2, 2, (5.5, 3.6))
    drawn = (("images", found.least, {"to the dominant centre": judged.own, "to that of a random other": judged.other}),
             ("identities", found.least_same, {"first half to second half": judged.halves, "to the nearest other": nearest}))
    for axis, (counted, threshold, histograms) in zip(axes, drawn, strict=True):
        for number, (label, counts) in enumerate(histograms.items()):
            axis.stairs(counts.reshape(_BARS, -1).sum(1), np.linspace(-1, 1, _BARS + 1), label=label, **look(number))
        if threshold is not None:
            axis.axvline(threshold, color="black", label=f"threshold, {threshold:.3f}")
        axis.set(xlabel=f"cosine of {counted}", ylabel=counted, yscale="symlog")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


def _page(pack: RecordDataset, cosines: Float32s, found: Cleaned, having: Int64s, plot: Path) -> str:
    index = pack.index
    order = np.argsort(cosines)[:np.count_nonzero(~np.isnan(cosines))]  # NaN comes last

    def sheet(*grid: Ints) -> str:
        rows = (simplejpeg.encode_jpeg(contact_sheet(pack, [row]), 85, "RGB", "420") for row in grid)
        return " ".join(html_image("faces", row) for row in rows)

    def typical(i: int, count: int) -> Ints:
        rows = np.arange(*index.starts[i:i + 2].tolist())
        return index.grouped[rows[np.argsort(-cosines[rows], kind="stable")[:count]]]

    def judged(rows: Int64s) -> list[str]:
        lines: list[str] = []
        for row in rows[:_ROWS].tolist():
            i = int(np.searchsorted(index.starts, row, "right")) - 1
            image = index.grouped[row:row + 1]
            lines.append(f"{cosines[row]:.3f}: record {index.keys[image[0]]}, beside identity {index.numbers[i]}<br />"
                         + sheet(image, typical(i, _COLUMNS)))
        return lines
    groups = [[*group] for _, group in groupby(found.same, lambda each: each.name)][:_ROWS]
    same = [f"{', '.join(str(index.numbers[having[each.identity]]) for each in group)}: {group[0].cosine:.3f}<br />"
            + sheet(*(typical(int(having[each.identity]), _COLUMNS // 2) for each in group[:3])) for group in groups]
    far, near = order[:found.far], order[found.far:]
    parts = [f"<p>{html.escape(line)}</p>" for line in [*found.report().splitlines(), *found.reasons()]]
    parts.append(html_picture("histograms of cosines", plot.read_bytes()))
    for title, lines in (("Left out: the farthest", judged(far)), ("Left out: the nearest to the threshold", judged(far[::-1])),
                         ("Kept: the nearest to the threshold", judged(near)), ("May be one person's", same)):
        parts += [f"<h2>{title}</h2>", *(f"<p>{line}</p>" for line in lines or ["None."])]
    return html_page(f"{html.escape(str(pack.root_dir))}, cleaned", "\n".join(parts))
