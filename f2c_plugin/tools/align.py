"""Aligns the faces of photographs to arcface_torch's template: one folder tree becomes another, of 112 × 112 JPEGs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.data.template import TEMPLATE, Points, turn_from_template
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.errors import F2CError, InputError, RecordError
from f2c_plugin.evaluation.tinyface import LISTS
from f2c_plugin.tools.image_files import upright
from f2c_plugin.tools.left_out import DETECTOR_FAILS, LEFT_OUT, NO_FACE, LeftOut
from f2c_plugin.tools.pack_sources import NO_IDENTITY, File, walk
from f2c_plugin.utils.atomic import PARTIAL, partials_of, written_whole
from f2c_plugin.utils.extras import installing, require
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer
from f2c_plugin.utils.paths import require_no_file
from f2c_plugin.utils.workers import worker_pool

QUALITY = 95
CENTRE = 0.5 + 0.5j  # of the first pixel in Pillow; it is 0 in OpenCV
DETECTED_AT = 320  # pixels of the longer side; YuNet finds faces of 10 to 300
LEAST_SCORE = 0.6  # of YuNet
_MOST_TIMES = 32  # that a face is drawn larger than it becomes
_CHUNK = 8  # photos that a process takes at a time
_LONGEST_NAME = 255 - len(".01234567" + PARTIAL)  # bytes
_DETECTORS = "det_*.onnx", "scrfd_*.onnx", "*yunet*.onnx"  # as they are called in insightface's model packs and opencv_zoo
_TO_HAVE_ONE = ("Give --detector the file of YuNet, face_detection_yunet_2023mar.onnx from "
                f"https://github.com/opencv/opencv_zoo ({installing('align')}), or the folder of a model pack from "
                f"https://github.com/deepinsight/insightface/releases, like buffalo_l ({installing('insightface')})")


class YuNet:
    """Finds faces with YuNet, which OpenCV runs."""

    def __init__(self, model: Path):
        cv2 = _imported("cv2", "align")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        try:
            self._net = cv2.FaceDetectorYN.create(str(model), "", (DETECTED_AT, DETECTED_AT), LEAST_SCORE)
        except cv2.error as error:
            raise F2CError(f"--detector {model}: OpenCV {cv2.__version__} needs YuNet in ONNX: {error}") from error

    def points(self, image: Any) -> Points | None:
        """Eyes, nose and corners of the mouth, (5,) x + iy, of the face that is largest and most central; None without a face.

        Args:
            image: of Pillow, RGB; so are the coordinates, with 0 at the corner of the first pixel.
        """
        scale = DETECTED_AT / max(image.size)
        scaled = require("PIL.ImageOps", "align").scale(image, scale)
        self._net.setInputSize(scaled.size)
        _, faces = self._net.detect(_bgr(scaled))
        if faces is None:
            return None
        x, y, width, height = faces[:, :4].T
        off_centre = x + width / 2 - scaled.width / 2 + 1j * (y + height / 2 - scaled.height / 2)
        best = faces[np.argmax(width * height - 2 * np.abs(off_centre) ** 2)]
        return (best[4:14:2] + 1j * best[5:14:2] + CENTRE) / scale


class SCRFD:
    """Finds faces with the SCRFD of insightface's model packs, which the insightface package runs on the CPU."""

    def __init__(self, model: Path):
        scrfd, runtime = (_imported(each, "insightface") for each in ("insightface.model_zoo.scrfd", "onnxruntime"))
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            self._net = scrfd.SCRFD(str(model), session)
        except Exception as error:  # of ONNX Runtime's own kinds
            raise F2CError(f"--detector {model}: the insightface package cannot open it: {error}") from error

    def points(self, image: Any) -> Points | None:
        """As of ``YuNet``. What the package finds counts from the middle of the first pixel, as for its ``norm_crop``."""
        _, points = self._net.detect(_bgr(image), max_num=1)
        return points[0] @ [1, 1j] + CENTRE if len(points) else None


@cache  # once in each process
def detector(model: Path) -> YuNet | SCRFD:
    """The detector in an ONNX file, on one thread. Raises F2CError if it holds none, or a package that runs it is missing."""
    _imported("cv2", "align").setNumThreads(1)  # both need it
    outputs = _outputs(model)
    if {"cls_8", "obj_8", "bbox_8", "kps_8"} <= outputs:
        return YuNet(model)
    if len(outputs) in (9, 15):  # scores, boxes and points, each of 3 or 5 strides
        return SCRFD(model)
    raise F2CError(f"--detector {model}: is neither YuNet, of 2023 or later, nor an SCRFD that finds points: it has the "
                   f"outputs {', '.join(sorted(outputs))}. {_TO_HAVE_ONE}")


def detector_file(named: str | Path | None) -> Path:
    """The ONNX file of a detector: the file that is named, or the one in a folder that is.

    Without either, that of one of the insightface package's model packs in ~/.insightface/models, buffalo_l if it is there.
    Raises F2CError if there is none.
    """
    if named is None:
        models = Path("~/.insightface/models").expanduser()
        folders, where = [models / "buffalo_l", *sorted(models.glob("*"))], f"no face detector: {models} has no model pack"
    elif not Path(named).is_dir():
        return Path(named)
    else:
        folders, where = [Path(named)], f"--detector {named}: the folder has no {', '.join(_DETECTORS)}"
    for folder in folders:
        if found := [file for name in _DETECTORS for file in sorted(folder.glob(name))]:
            return found[0]
    raise F2CError(f"{where}. {_TO_HAVE_ONE}")


def _outputs(model: Path) -> set[str]:
    """The names of an ONNX file's outputs."""
    onnx = require("onnx", "align")
    try:
        if model.exists() and not model.is_file():  # a pipe would be waited for
            raise F2CError(f"--detector {model}: is not a file. {_TO_HAVE_ONE}")
        if is_lfs_pointer(model.read_bytes()):
            raise F2CError(f"--detector {model}: {NOT_FETCHED}")
        if outputs := {output.name for output in onnx.load(str(model), load_external_data=False).graph.output}:
            return outputs
        raise ValueError("it has no outputs")
    except OSError as error:
        raise F2CError(f"--detector {model}: cannot be read: {error.strerror}. {_TO_HAVE_ONE}") from error
    except F2CError:
        raise
    except Exception as error:  # of protobuf
        raise F2CError(f"--detector {model}: is not an ONNX file: {error}. {_TO_HAVE_ONE}") from error


def _imported(module: str, extra: str) -> Any:
    try:
        return require(module, extra)
    except F2CError as error:
        raise F2CError(f"--detector: {error}") from error


def _bgr(image: Any) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def aligned(image: Any, points: Points) -> Any:
    """Turn, scale and shift an image so that its five points come nearest to those of the template, in least squares.

    What insightface's ``norm_crop`` does, but no pixel of a large face is skipped. What is outside the image is black.

    Args:
        image: of Pillow, RGB.
        points: (5,) as from ``YuNet.points``.
    """
    pillow = require("PIL.Image", "align")
    turn = turn_from_template(points)
    shift = points.mean() - turn * (TEMPLATE.mean() + CENTRE)
    times = int(np.clip(np.ceil(abs(turn)), 1, _MOST_TIMES))  # drawn so much larger and then reduced
    turn /= times
    matrix = turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag
    size = times * IMAGE_SIZE, times * IMAGE_SIZE
    drawn = image.transform(size, pillow.Transform.AFFINE, matrix, pillow.Resampling.BICUBIC)
    return drawn.resize((IMAGE_SIZE, IMAGE_SIZE), pillow.Resampling.BOX)


class Aligned(LeftOut):
    """What ``align`` has done.

    Attributes:
        aligned: number of faces that it has written.
        before: number of photos that it has not touched, because their faces were there.
        copied: number of TinyFace's lists that lay among the photos, and lie beside the faces now.
    """

    def __init__(self, out: Path):
        super().__init__(out)
        self.aligned = self.before = self.copied = 0

    def report(self) -> str:
        """In lines for people."""
        return "\n".join([f"{self.out}: {self.aligned} faces aligned" + (f", {self.before} were there" if self.before else "")
                          + (f", {self.copied} lists of TinyFace copied" if self.copied else ""), *self.lines()])


def align(photos: str | Path, out: str | Path, model: str | Path | None = None, processes: int | None = None) -> Aligned:
    """Write the face of every photo below a folder as a JPEG of 112 × 112 of the same path below another.

    Of several faces in a photo it takes the one that is largest and most central. A face takes the name of its photo, and
    ".jpg" behind it if it has another suffix. Where there is such a file, the photo is not done again, so an interrupted run
    goes on where it was. ``out/left_out.tsv`` names the photos without a face and says why. TinyFace's lists are copied.

    Args:
        model: as ``detector_file`` takes it.
        processes: None means one per CPU.
    Raises:
        F2CError: there is no detector, or a package is missing.
        RecordError: there is no photo, or none with a face, or a link leads out of ``photos``.
        InputError: one of the folders is inside the other, or ``out`` is a file.
        OverwriteError: ``out`` holds a pack.
    """
    photos, out = Path(photos), Path(out)
    require_no_file(photos, "the folder of the photos", "", RecordError)
    if not photos.is_dir():
        raise RecordError(f"{photos}: no such folder")
    real, real_out = photos.resolve(), out.resolve()
    if real_out.is_relative_to(real) or real.is_relative_to(real_out):
        raise InputError(f"{out} and {photos}: one is inside the other, so faces would lie among photos: choose a folder "
                         "outside")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, but the faces need a folder: name a new one, or that of an earlier run")
    refuse_to_overwrite(out)
    require("PIL.Image", "align")
    model = detector_file(model)
    done = Aligned(out)
    count = sum(1 for _ in walk(photos))  # also finds links that lead out, before the work begins
    if not count:
        raise RecordError(f"{photos}: the folder is empty: it must hold photos, most often in a folder for each person")
    with (opencv_without_threads(), worker_pool(processes) as pool,
          tqdm(total=count, desc="aligning", unit=" photos", disable=None) as bar):
        list(pool.imap(_open, [model]))  # its errors come before any file
        out.mkdir(parents=True, exist_ok=True)
        for folder, _, _ in os.walk(out):
            for partial_file in partials_of(Path(folder, "*")):  # of a run that was killed
                partial_file.unlink()

        def to_do() -> Iterator[File]:
            for path, reason in walk(photos):
                reason = "" if reason == NO_IDENTITY else reason
                if not reason and Path(path).name in LISTS.values():
                    _copy(photos / path, out / path)
                    done.copied += 1
                    bar.update()
                elif not (reason := reason or _no_name(photos, path)) and (out / _face_path(path)).is_file():
                    done.before += 1
                    bar.update()
                else:
                    yield path, reason
        with written_whole(out / LEFT_OUT) as left_out:
            for path, reason in pool.imap(partial(_align, photos, out, model), to_do(), _CHUNK):
                if reason:
                    left_out.write(done.leave_out(path, reason))
                else:
                    done.aligned += 1
                bar.update()
    if not done.aligned + done.before:
        raise RecordError("\n  ".join([f"{photos}: no photo with a face, see {out / LEFT_OUT}", *done.reasons()]))
    if not done.left_out:
        (out / LEFT_OUT).unlink()
    return done


def _face_path(photo: str) -> str:
    return photo if photo.lower().endswith((".jpg", ".jpeg")) else f"{photo}.jpg"


def _no_name(photos: Path, path: str) -> str:
    """Why a photo's face has no name of its own; "" if it has. Not seen from the faces: a second run finds other ones there."""
    face = _face_path(path)
    if len(os.fsencode(Path(face).name)) > _LONGEST_NAME:
        return "name too long"
    return f"its face would have the name of another photo: {face}" if face != path and os.path.lexists(photos / face) else ""


def _copy(file: Path, out: Path) -> None:
    with written_whole(out) as written:
        written.write(file.read_bytes())


@contextmanager
def opencv_without_threads() -> Iterator[None]:
    """While this lasts, processes can be forked: one in which OpenCV once had threads would wait for them without end."""
    cv2 = _imported("cv2", "align")
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _open(model: Path) -> None:
    detector(model)


def _align(photos: Path, out: Path, model: Path, file: File) -> tuple[str, str]:
    """The path of a photo, and why it has no face below ``out``; "" if it has."""
    path, reason = file
    face = out / _face_path(path)
    if reason:
        return path, reason
    encoded = _face(photos / path, model)
    if isinstance(encoded, str):
        return path, encoded
    with written_whole(face) as written:
        written.write(encoded)
    return path, ""


def _face(photo: Path, model: Path) -> bytes | str:
    """The face of a photo, a JPEG; or why there is none."""
    image = upright(photo)
    if isinstance(image, str):
        return image
    try:
        points = detector(model).points(image)
    except Exception as error:  # of the detector's packages, for pictures of odd shapes
        return f"{DETECTOR_FAILS}: {error}"
    if points is None:
        return NO_FACE
    return simplejpeg.encode_jpeg(np.ascontiguousarray(aligned(image, points)), QUALITY, "RGB", "444")
