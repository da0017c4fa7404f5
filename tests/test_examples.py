"""The examples as a reader would run them: each learns what the built-in trainer learns from the same faces."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.runs import completed, launch

EXAMPLES = Path(__file__).parent.parent / "examples"
IDENTITIES, IMAGES = 100, 20  # as every example draws them

# Over the seeds 0 to 4, the accuracies of the trainer and of every example lie between 0.911 and 0.938, with a standard
# deviation of 0.007. Two of them differ by 0.010 (one standard deviation), so this is about four.
TOLERANCE = 0.04
# A net that has not been trained reaches 0.61 to 0.64.
LEARNED = 0.85


def accuracy_of(example, data, *arguments):
    """What the example prints at its end."""
    done = completed(EXAMPLES / example, "--data", data, *arguments, stderr=subprocess.STDOUT, cwd=data.parent)
    assert done.returncode == 0, done.stdout
    accuracy, = re.findall(r"^accuracy (0\.\d{4})$", done.stdout, re.MULTILINE)  # printed once, by one rank
    return float(accuracy)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(a folder of faces that an example has drawn, the accuracy of that example)."""
    data = tmp_path_factory.mktemp("examples") / "faces"
    return data, accuracy_of("plain_pytorch.py", data)


@pytest.fixture(scope="module")
def trainer_accuracy(drawn):
    """Of the built-in trainer on the same faces, with the same net, batch size, steps and learning rate."""
    data, _ = drawn
    keys = dict(head="f2c_dcp", f2c_pool_rate=0.7, network="tiny", embedding_size=64, batch_size=64, num_epoch=4, lr=0.1,
                margin_list=(1.0, 0.0, 0.35), scale=32.0, rec=str(data), num_classes=IDENTITIES, num_image=IDENTITIES * IMAGES,
                num_workers=0, val_targets=["synth"], seed=0, output=str(data.parent / "out"))
    lines = [f"config.{key} = {value!r}" for key, value in keys.items()]
    config = data.parent / "config.py"
    config.write_text("from easydict import EasyDict as edict\nconfig = edict()\n" + "\n".join(lines))
    launch(str(config))
    return json.loads((data.parent / "out" / "report.json").read_text())["verification"]["accuracy"]


def test_a_plain_loop_draws_its_faces_and_learns_what_the_trainer_learns(drawn, trainer_accuracy):
    data, accuracy = drawn
    assert (data / "property").read_text() == f"{IDENTITIES},112,112\n"
    assert accuracy > LEARNED and accuracy == pytest.approx(trainer_accuracy, abs=TOLERANCE)


@pytest.mark.parametrize("example, package, arguments", [
    ("lightning_module.py", "lightning", []), ("lightning_module.py", "lightning", ["--devices", "2"]),
    ("accelerate_bf16.py", "accelerate", [])], ids=["lightning", "lightning-two-ranks", "accelerate"])
def test_a_loop_of_another_framework_learns_what_the_trainer_learns(example, package, arguments, request):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT RUN WITH {package.upper()}: pip install {package}")
    (data, _), trainer_accuracy = (request.getfixturevalue(name) for name in ("drawn", "trainer_accuracy"))
    accuracy = accuracy_of(example, data, *arguments)
    assert accuracy > LEARNED and accuracy == pytest.approx(trainer_accuracy, abs=TOLERANCE)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_readable_alone(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    assert f"python examples/{path.name} --data" in source.splitlines()[0]
    others = {other.stem for other in EXAMPLES.glob("*.py")} - {path.stem}
    assert not others & set(re.findall(r"\w+", source))
    assert importlib.util.find_spec(path.stem) is None  # a script that is named as a package is imported in its place
