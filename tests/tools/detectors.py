"""Small detectors in ONNX, which OpenCV and the insightface package run like trained ones: a face is around a white square.

The face has 112 pixels and its points are those of the template, so that its aligned image is cut out of the photo as it is.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from f2c_plugin.data.template import TEMPLATE
from f2c_plugin.tools.align import CENTRE

SQUARE = 8  # pixels: the stride at which there are faces, and how many it is from the corner of a square to its middle, twice
_FROM_MIDDLE = TEMPLATE + CENTRE - 56 - 56j
# (5, 2) from the corner of the square that is white, in squares. The packages' points have 0 at the middle of a pixel.
_POINTS = (np.stack([_FROM_MIDDLE.real, _FROM_MIDDLE.imag], 1) + SQUARE / 2 - 0.5) / SQUARE


def write_yunet(path: str | Path) -> None:
    """The score is cls × obj, a box its middle and the logarithm of its size; pixels are from 0 to 255."""
    row = {"cls": [0.0], "obj": [1.0], "bbox": [0.5, 0.5, *np.log([112 / SQUARE] * 2)], "kps": _POINTS.ravel()}
    _write(path, "height", 1 / 255, row, "cls")


def write_scrfd(path: str | Path) -> None:
    """Boxes are distances to the four sides, two in each square; pixels are from −1 to 1."""
    to_corner, from_corner = (56 - SQUARE / 2) / SQUARE, (56 + SQUARE / 2) / SQUARE
    row = {"score": [0.0], "box": [to_corner, to_corner, from_corner, from_corner], "points": _POINTS.ravel()}
    _write(path, 640, 1.0, {name: [*values] * 2 for name, values in row.items()}, "score")


def _write(path, side, brightness, rows, score):
    """A net with an output for each row and stride, (1, squares, width): the row; for ``score``, how bright a square is."""
    tensors = {"none": np.float32(0), "bright": np.float32(brightness), "column": np.array([1, -1, 1])}
    nodes, outputs = [], []
    for stride in SQUARE, 16, 32:
        square = dict(kernel_shape=[stride, stride], strides=[stride, stride])
        nodes += [helper.make_node("AveragePool", ["image"], [f"pool{stride}"], **square),
                  helper.make_node("ReduceMean", [f"pool{stride}"], [f"mean{stride}"], axes=[1], keepdims=1),
                  helper.make_node("Reshape", [f"mean{stride}", "column"], [f"column{stride}"]),
                  helper.make_node("Mul", [f"column{stride}", "bright" if stride == SQUARE else "none"], [f"bright{stride}"]),
                  helper.make_node("Mul", [f"column{stride}", "none"], [f"none{stride}"])]
    for name, row in rows.items():
        width = 10 if len(row) > 8 else 4 if len(row) > 2 else 1
        tensors |= {f"row_{name}": np.float32([[row]]), f"form_{name}": np.array([1, -1, width])}
        for stride in SQUARE, 16, 32:
            nodes += [helper.make_node("Add", [f"{'bright' if name == score else 'none'}{stride}", f"row_{name}"],
                                       [f"all_{name}_{stride}"]),
                      helper.make_node("Reshape", [f"all_{name}_{stride}", f"form_{name}"], [f"{name}_{stride}"])]
            outputs.append(helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, [1, "squares", width]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])
    graph = helper.make_graph(nodes, "detector", [image], outputs,
                              [numpy_helper.from_array(np.asarray(each), name) for name, each in tensors.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), str(path))
