"""Synthetic faces per second on one core: drawn and encoded as JPEG, as `f2c-plugin synth` does.

    OMP_NUM_THREADS=1 python benchmarks/faces.py [--json]
"""

import argparse
import json
import time

import numpy as np
import simplejpeg

from f2c_plugin.synthetic.dataset import JPEG_QUALITY
from f2c_plugin.synthetic.face import draw_face, draw_identity

BATCH = 100


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    wall, cpu = [], []
    for _ in range(arguments.repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(BATCH // 20):
            identity = draw_identity(rng)
            for _ in range(20):
                simplejpeg.encode_jpeg(draw_face(identity, rng), JPEG_QUALITY, "RGB", "420")
        wall.append(BATCH / (time.perf_counter() - start))
        cpu.append(BATCH / (time.process_time() - start_cpu))
    low, middle, high = np.percentile(wall, [25, 50, 75])
    result = {"images_per_s": round(middle), "quartiles": [round(low), round(high)],
              "images_per_cpu_s": round(np.median(cpu))}
    print(json.dumps(result) if arguments.json else
          f"{middle:.0f} images/s (quartiles {low:.0f} to {high:.0f}); {result['images_per_cpu_s']} per second of CPU time")


if __name__ == "__main__":
    main()
