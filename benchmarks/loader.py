"""Images per second and core: this loader, arcface_torch's own way of reading, PIL, and bare JPEG decoding.

    python benchmarks/loader.py PACK [--mxnet-python .venv-mxnet/bin/python] [--json]

All read the same images of one pack in the same shuffled order, one thread each, in turn; medians
and quartiles are over the repeats.

- this loader: what a worker does for a batch (read, decode into uint8); and once more with flip and
  normalise, which on a GPU run there;
- mxnet, arcface_torch's way: mxnet's reader and decoder, then the arithmetic of its transform (PIL image,
  random flip, ToTensor, Normalize) in NumPy, because torchvision does not install beside mxnet's NumPy.
  Runs in the interpreter given, which needs mxnet; `make mxnet` sets one up;
- PIL: the same records decoded by Pillow, with the same arithmetic;
- bare: simplejpeg (libjpeg-turbo) on JPEGs that are in memory already.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np

BATCH = 128

BY_MXNET = """
import sys, time, json
import numpy as np, mxnet as mx
folder, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pack = mx.recordio.MXIndexedRecordIO(folder + "/train.idx", folder + "/train.rec", "r")
header, _ = mx.recordio.unpack(pack.read_idx(0))
keys = np.arange(1, int(header.label[0])) if header.flag > 0 else np.array(pack.keys)
rng = np.random.RandomState(seed)

def item(key):
    header, image = mx.recordio.unpack(pack.read_idx(key))
    image = mx.image.imdecode(image).asnumpy()
    if rng.rand() < 0.5:
        image = image[:, ::-1]
    image = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
    return (image - np.float32(0.5)) / np.float32(0.5), header.label

item(keys[0])
for line in sys.stdin:
    chosen = rng.permutation(keys)[:count]
    start = time.perf_counter()
    for begin in range(0, count, 128):
        np.stack([item(key)[0] for key in chosen[begin:begin + 128]])
    print(count / (time.perf_counter() - start), flush=True)
"""


def ours(dataset, positions, normalize):
    import torch

    from f2c_plugin.data.dataset import normalize_faces
    for begin in range(0, len(positions), BATCH):
        faces, _ = dataset.faces(positions[begin:begin + BATCH])
        if normalize:
            normalize_faces(faces, torch.rand(len(faces)) < 0.5)


def by_pil(dataset, positions):
    from PIL import Image

    from f2c_plugin.data.recordio import unpack_image_record
    rng = np.random.default_rng(0)
    for begin in range(0, len(positions), BATCH):
        batch = []
        for i in positions[begin:begin + BATCH]:
            record = unpack_image_record(dataset.records.read(int(dataset.index.offsets[i])))
            image = np.asarray(Image.open(BytesIO(record.image)).convert("RGB"))
            if rng.random() < 0.5:
                image = image[:, ::-1]
            batch.append((np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255 - 0.5) / 0.5)
        np.stack(batch)


def bare(jpegs):
    import simplejpeg
    for jpeg in jpegs:
        simplejpeg.decode_jpeg(jpeg, "RGB")


def memory_mb(pid):
    """Private and shared resident memory of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [round(int(fields[name].split()[0]) / 1024) for name in ("RssAnon", "RssFile")]


def workers(folder, count):
    """Start-up to the first batch, images per second and memory of a worker, with ``count`` workers."""
    import torch

    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.data.loader import DualLoader
    from f2c_plugin.data.sampler import DualSampler
    start = time.perf_counter()
    dataset = RecordDataset(folder)
    sampler = DualSampler(dataset.index, BATCH, max(30, len(dataset) // BATCH))
    loader = DualLoader(dataset, sampler, torch.device("cpu"), count)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(len(sampler) - 10):
        next(batches)
    rate = (len(sampler) - 10) * BATCH / (time.perf_counter() - start)
    private, shared = memory_mb(multiprocessing.active_children()[0].pid)
    return {"workers": count, "first_batch_s": round(first, 2), "images_per_s": round(rate),
            "worker_private_mb": private, "worker_shared_mb": shared}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pack", help="folder of train.rec and train.idx")
    parser.add_argument("--mxnet-python", default=os.environ.get("MXNET_PYTHON", ".venv-mxnet/bin/python"))
    parser.add_argument("--images", type=int, default=1280, help="in each repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import torch

    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.data.recordio import unpack_image_record
    torch.set_num_threads(1)
    dataset = RecordDataset(arguments.pack)
    rng = np.random.default_rng(0)
    mxnet = None
    if Path(arguments.mxnet_python).is_file():
        command = [arguments.mxnet_python, "-c", BY_MXNET, arguments.pack, str(arguments.images), "0"]
        mxnet = subprocess.Popen(command, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    else:
        print("without arcface_torch's way of reading: run `make mxnet`, or give --mxnet-python", file=sys.stderr)

    rates = {name: [] for name in ("ours", "ours_normalized", "pil", "bare")} | ({"mxnet": []} if mxnet else {})
    jpegs = []
    for _ in range(arguments.repeats + 1):
        positions = rng.permutation(len(dataset))[:arguments.images]
        jpegs = [bytes(unpack_image_record(dataset.records.read(int(dataset.index.offsets[i]))).image) for i in positions]
        for name, function, *inputs in (
                ("ours", ours, dataset, positions, False), ("bare", bare, jpegs),
                ("ours_normalized", ours, dataset, positions, True), ("pil", by_pil, dataset, positions)):
            start = time.perf_counter()
            function(*inputs)
            rates[name].append(len(positions) / (time.perf_counter() - start))
        if mxnet and mxnet.stdin and mxnet.stdout:
            mxnet.stdin.write("\n")
            mxnet.stdin.flush()
            rates["mxnet"].append(float(mxnet.stdout.readline()))
    if mxnet:
        mxnet.communicate()
    rates = {name: values[1:] for name, values in rates.items()}  # the first warms the caches
    median = {name: float(np.median(values)) for name, values in rates.items()}

    result = {"pack_images": len(dataset), "mean_jpeg_bytes": round(float(np.mean([len(jpeg) for jpeg in jpegs]))),
              "images_per_s_per_core": round(median["ours"]), "with_flip_and_normalize": round(median["ours_normalized"]),
              "pil_images_per_s_per_core": round(median["pil"]), "bare_decoding": round(median["bare"]),
              "share_of_bare_decoding": round(median["ours"] / median["bare"], 3)}
    if mxnet:
        result |= {"mxnet_images_per_s_per_core": round(median["mxnet"]), "ratio": round(median["ours"] / median["mxnet"], 2),
                   "ratio_with_flip_and_normalize": round(median["ours_normalized"] / median["mxnet"], 2)}
    result["quartiles"] = {name: np.percentile(values, [25, 75]).round().tolist() for name, values in rates.items()}
    result["by_workers"] = [workers(arguments.pack, count) for count in (1, 2, 4)]
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{key:<30} {line}")


if __name__ == "__main__":
    main()
