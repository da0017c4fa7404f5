"""Synthetic faces with a bar of colours at the bottom, and a net that reads the bar: its embeddings are known."""

import numpy as np
import onnx
import simplejpeg
from onnx import helper

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from f2c_plugin.synthetic.face import draw_face, draw_identity

CODE = 12  # four colours; the other three of the bar are their mirror images


def write_net(path, last="Flatten", top=96):
    """An ONNX model whose embedding is the bar below row ``top``, or what the operator ``last`` makes of it."""
    names = {"starts": [top], "ends": [top + 16], "axes": [2]}
    nodes = [helper.make_node("Slice", ["images", *names], ["bar"]),
             helper.make_node("AveragePool", ["bar"], ["means"], kernel_shape=[16, 16], strides=[16, 16]),
             helper.make_node(last, ["means"], ["last"]), helper.make_node("Flatten", ["last"], ["code"])]
    shapes = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
              for name, shape in (("images", ["n", 3, 112, 112]), ("code", ["n", 21]))]
    graph = helper.make_graph(nodes, "bar", shapes[:1], shapes[1:],
                              [helper.make_tensor(name, onnx.TensorProto.INT64, [1], value) for name, value in names.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def codes(rng, count, about=None, noise=0.0):
    """Unit vectors (count, CODE), random or ``noise`` away from one."""
    points = rng.normal(size=(count, CODE)) if about is None else about + noise * rng.normal(size=(count, CODE)) / np.sqrt(CODE)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def face(rng, code, quality=95):
    """A JPEG of a random face with the code in its bar."""
    pixels = draw_face(draw_identity(rng), rng).copy()
    colours = np.clip(np.round(127.5 * (1 + code.reshape(4, 3))), 0, 255).astype(np.uint8)
    pixels[96:] = np.repeat(colours[[0, 1, 2, 3, 2, 1, 0]], 16, 0)
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "444")


def write_pack(folder, images):
    """Of (identity, image) in any order; keys from 1."""
    folder.mkdir()
    with RecordWriter(folder / "train.rec") as pack:
        for key, (identity, image) in enumerate(images, 1):
            pack.write(key, pack_image_record(identity, image, key))
    return folder


def read_pack(folder):
    """{identity: encoded images}."""
    pack = RecordDataset(folder)
    return {identity: [pack.encoded(i) for i in pack.index.images_of(identity)] for identity in pack.index.numbers.tolist()}
