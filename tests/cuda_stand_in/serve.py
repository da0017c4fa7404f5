"""Counts case after case: python -m tests.cuda_stand_in.serve, in a process with the stand-in.

A line of stdin is the JSON of a case, with "script": "count" or "count_training". It is counted in a process of its own,
forked from this one, which imports PyTorch once for all. The line on stdout that answers is JSON: what is counted, or "error".
"""

import json
import os
import sys
import traceback

import torch._dynamo  # noqa: F401  # fake tensors would import it, in each process again

from tests.cuda_stand_in import count, count_training

SCRIPTS = {"count": count.main, "count_training": count_training.main}


def main() -> None:
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            try:
                case = json.loads(line)
                answer = SCRIPTS[case.pop("script")](case)
            except BaseException:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), flush=True)
            os._exit(0)  # PyTorch's end would wait for a device
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"error": f"the process has ended with status {status}"}), flush=True)


if __name__ == "__main__":
    main()
