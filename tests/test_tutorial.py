"""The tutorial's commands, as they stand on the page, from photographs to a model in the insightface package."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs/tutorial.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_tutorial_leads_to_a_model_that_tells_people_apart(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = ""
    for language, text in BLOCKS:
        if language == "python":
            (tmp_path / text.split()[1]).write_text(text)  # its first line names it
        else:
            done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert not done.returncode, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            printed += done.stdout
    made = {"photos/000/0001.jpg", "pack/identities.json", "sheet.png", "run/model.onnx", "run/report.html", "roc.png"}
    assert not {name for name in made if not (tmp_path / name).is_file()}
    accuracies = re.findall(r"Accuracy-Flip: ([\d.]+)", (tmp_path / "run/training.log").read_text())
    assert float(accuracies[-1]) > 0.85 and len(accuracies) == 4
    same, different = (float(re.search(rf"{who} +(-?[\d.]+)", printed)[1]) for who in ("the same person:", "different people:"))
    assert same > different + 0.1
