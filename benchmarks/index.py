"""The identity index and the dual sampler at the size of WebFace42M.

    python benchmarks/index.py --images 42474557 --identities 2059906 [--json] [--folder DIR]

Writes an InsightFace pack whose images are empty (a label and no JPEG: 40 bytes a record, 1.9 GB for
WebFace42M), indexes it, opens the index again in a process of its own and draws batches. With real
images, building also has to fetch from disk the page of each label that it reads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from f2c_plugin.data.index import open_index
from f2c_plugin.data.recordio import MAGIC

_RECORD = np.dtype([("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")])
_RANGE = np.dtype([*_RECORD.descr, ("first", "<f4"), ("end", "<f4")])

CHILD = """
import json, sys, time
import numpy as np
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.data.index import open_index

def private_mb():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) / 1024

before = private_mb()
start = time.perf_counter()
index = open_index(sys.argv[1])
opened = time.perf_counter() - start
opened_mb = private_mb() - before
sampler = DualSampler(index, 1024, len(index) // 8192, seed=1, rank=3, world_size=8)
start = time.perf_counter()
sampler.set_epoch(5)
batches = iter(sampler)
next(batches)
epoch_start = time.perf_counter() - start
times = []
for _ in range(200):
    start = time.perf_counter()
    next(batches)
    times.append(1000 * (time.perf_counter() - start))
print(json.dumps({"open_s": round(opened, 3), "open_private_mb": round(opened_mb, 1), "epoch_start_s": round(epoch_start, 2),
                  "batch_ms": round(float(np.median(times)), 3),
                  "batch_ms_quartiles": np.percentile(times, [25, 75]).round(3).tolist(),
                  "sampler_private_mb": round(private_mb() - before - opened_mb, 1)}))
"""


def write_pack(folder, num_images, num_identities):
    sizes = np.full(num_identities, num_images // num_identities)
    sizes[: num_images % num_identities] += 1
    starts = 1 + np.append(0, np.cumsum(sizes))
    offset, chunk = 0, 1 << 21
    with open(folder / "train.rec", "wb") as rec, open(folder / "train.idx", "w") as idx:
        def write(records, first_key, length):
            nonlocal offset
            records["magic"], records["length"] = MAGIC, length - 8
            rec.write(records.tobytes())
            offsets = offset + length * np.arange(len(records))
            keys = range(first_key, first_key + len(records))
            idx.write("".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets.tolist(), strict=True)))
            offset += length * len(records)

        def ranges(first, end):
            records = np.zeros(len(first), _RANGE)
            records["flag"], records["first"], records["end"] = 2, first, end
            return records

        write(ranges([num_images + 1], [num_images + 1 + num_identities]), 0, _RANGE.itemsize)
        for start in range(0, num_images, chunk):
            records = np.zeros(min(chunk, num_images - start), _RECORD)
            records["label"] = np.searchsorted(starts, 1 + np.arange(start, start + len(records)), "right") - 1
            write(records, 1 + start, _RECORD.itemsize)
        write(ranges(starts[:-1], starts[1:]), 1 + num_images, _RANGE.itemsize)
    return sizes


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=42_474_557)
    parser.add_argument("--identities", type=int, default=2_059_906)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where there is room for 4 GB; default: the folder for temporary files")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        sizes = write_pack(folder, arguments.images, arguments.identities)
        start = time.perf_counter()
        index = open_index(folder, progress=True)
        build = time.perf_counter() - start
        assert np.array_equal(np.diff(index.starts), sizes) and len(index) == arguments.images
        runs = [json.loads(subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, capture_output=True,
                                          text=True).stdout) for _ in range(arguments.repeats)]
    result = {"images": arguments.images, "identities": arguments.identities, "build_s": round(build, 1)}
    result |= {key: np.median([run[key] for run in runs], axis=0).tolist() for key in runs[0]}
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(f"{key:<20} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
