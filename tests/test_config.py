"""Configs: what is refused and how; the configs that come with the package."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from f2c_plugin import train
from f2c_plugin.arcface_torch.patching import arcface_torch_configs
from f2c_plugin.config import F2CConfig, unused_keys
from f2c_plugin.config_files import load_config
from f2c_plugin.errors import ConfigError
from f2c_plugin.trainer.check import check
from tests.runs import history

GOOD = dict(batch_size=128, num_classes=10_000, dali=False)


def test_defaults_are_what_the_readme_says():
    assert F2CConfig.read(GOOD) == F2CConfig(
        0.1, "resident", None, False, None, "memory", 0.99, True, None, 1, 0.0, 0.0, None, 8192, 1, None, "float32", False,
        True, False, "probe", None, 50)


@pytest.mark.parametrize("change, message", [
    (dict(f2c_pool_rat=0.1), "f2c_pool_rat: unknown key; did you mean f2c_pool_rate?"),
    (dict(f2c_zebra=1), "f2c_zebra: unknown key; there are f2c_pool_rate, f2c_recipe"),
    (dict(f2c_pool_rate=0), "f2c_pool_rate=0: must be above 0, up to 1"),
    (dict(f2c_pool_rate="0.1"), "f2c_pool_rate='0.1': must be"),
    (dict(f2c_momentum=1.0), "f2c_momentum=1.0: must be from 0 to below 1"),
    (dict(f2c_symmetric=1), "f2c_symmetric=1: must be True or False"),
    (dict(f2c_identity_rate=1.5), "f2c_identity_rate=1.5: must be from 0 to 1"),
    (dict(f2c_identity_rate=True), "f2c_identity_rate=True: must be from 0 to 1"),
    (dict(f2c_hard_negatives=0), "f2c_hard_negatives=0: must be a whole number above 0, or None"),
    (dict(f2c_recipe="fast"), "f2c_recipe='fast': must be one of 'resident', 'paper'"),
    (dict(f2c_pool_dtype="half"), "f2c_pool_dtype='half': must be one of 'float32', 'bfloat16', 'float16'"),
    (dict(f2c_export="both"), "f2c_export='both': must be one of 'probe', 'gallery', 'best'"),
    (dict(f2c_shard_pool=2), "f2c_shard_pool=2: must be True or False"),
    (dict(batch_size=127, f2c_recipe="paper"), "batch_size=127: .* make it even, 126 or 128"),
    (dict(batch_size=1, f2c_identity_rate=0.5), "batch_size=1: .* make it even, 2$"),
    (dict(f2c_margin="sphereface"), "f2c_margin='sphereface': must be one of 'arcface', 'cosface', 'adaface', 'sface', None"),
    (dict(f2c_kept_weights="disk"), "f2c_kept_weights='disk': must be one of 'memory', 'file'"),
    (dict(f2c_export="gallery"), "f2c_export='gallery': the recipe 'resident' has no gallery net: leave it out, or set "
                                 "f2c_recipe='paper'"),
    (dict(batch_size="128"), "batch_size='128': must be a whole number above 0"),
    (dict(dali=True), "dali=True: must be False: this package's loader decodes by itself"),
])
def test_a_bad_key_is_named_with_the_value_found_and_the_remedy(change, message):
    with pytest.raises(ConfigError, match=message):
        F2CConfig.read(GOOD | change)


def test_a_rate_gives_the_slots_that_it_says():
    assert F2CConfig(pool_rate=0.29).num_slots(100) == 29


def test_a_pool_smaller_than_a_gathered_batch_is_refused_with_the_rate_that_would_do():
    bad = GOOD | dict(f2c_pool_rate=0.001, num_classes=93_431, f2c_recipe="paper")
    message = (r"f2c_pool_rate=0.001 gives 93 slots for num_classes=93431, but a gathered batch holds up to 512 "
               r"identities: raise it to at least 0.00548")
    with pytest.raises(ConfigError, match=message) as error:
        F2CConfig.read(bad, world_size=8)
    enough = float(str(error.value).split()[-1])
    assert F2CConfig.read(bad | dict(f2c_pool_rate=enough), 8).num_slots(93_431) == 512
    with pytest.raises(ConfigError, match="holds up to 1024 identities"):  # every image may show another
        F2CConfig.read(bad | dict(f2c_pool_rate=enough, f2c_recipe="resident"), 8)


def test_a_pool_with_fewer_slots_than_ranks_is_not_sharded():
    with pytest.raises(ConfigError, match="f2c_shard_pool=True: 4 slots cannot be split over 8 ranks"):
        F2CConfig.read(dict(batch_size=4, num_classes=4, f2c_pool_rate=1.0, f2c_shard_pool=True), world_size=8)


def test_everything_that_is_wrong_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        F2CConfig.read(GOOD | dict(f2c_zebra=1, f2c_momentum=2, f2c_pool_rate=1e-5, batch_size=3, f2c_recipe="paper"))
    assert all(word in str(error.value) for word in ("f2c_zebra", "f2c_momentum=2", "f2c_pool_rate=1e-05", "batch_size=3"))


@pytest.mark.parametrize("name", [config.stem for config in arcface_torch_configs()] + ["f2c_demo"])
def test_configs_that_come_with_the_package_are_in_order(name):
    cfg = load_config(name)
    assert cfg.head == "f2c_dcp" and cfg.output == f"work_dirs/{name}"
    F2CConfig.read(cfg, world_size=1 if "onegpu" in name or name == "f2c_demo" else 8)


def write(path, text):
    path.write_text("from easydict import EasyDict as edict\nconfig = edict()\n" + text)
    return str(path)


def test_a_config_by_path_takes_the_base_beside_it_as_arcface_torch_does(tmp_path):
    write(tmp_path / "base.py", "config.lr = 0.5\nconfig.momentum = 0.8\n")
    path = write(tmp_path / "mine.py", "config.lr = 0.3\nconfig.rec = 'x'\nconfig.num_classes = config.num_image = 9\n")
    for name in path, path.removesuffix(".py"):
        cfg = load_config(name)
        assert (cfg.lr, cfg.momentum, cfg.weight_decay) == (0.3, 0.8, 5e-4)


def test_a_config_may_name_another_as_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "lowest.py", "config.rec = 'x'\nconfig.num_classes = config.num_image = 9\nconfig.lr = 0.5\n")
    write(tmp_path / "sub/middle.py", "config.base = '../lowest'\nconfig.lr = 0.4\nconfig.momentum = 0.8\n")
    path = write(tmp_path / "mine.py", "config.base = 'sub/middle.py'\nconfig.momentum = 0.7\n")
    cfg = load_config(path)
    assert (cfg.lr, cfg.momentum, cfg.rec, cfg.output, "base" in cfg) == (0.4, 0.7, "x", "work_dirs/mine", False)
    assert load_config(write(tmp_path / "onto.py", "config.base = 'wf42m_r100_f2c'\n")).network == "r100"
    write(tmp_path / "lowest.py", "config.base = 'mine'\n")
    with pytest.raises(ConfigError, match="mine.py: is its own base: mine.py → middle.py → lowest.py → mine.py: take one out"):
        load_config(path)
    with pytest.raises(ConfigError, match="mine.py: base=3: must be the path of a config file"):
        load_config(write(tmp_path / "mine.py", "config.base = 3\n"))
    with pytest.raises(ConfigError, match=r"mine.py: base: nowhere: no such config file"):
        load_config(write(tmp_path / "mine.py", "config.base = 'nowhere'\n"))


def test_a_base_gives_what_it_would_give_by_itself(tmp_path):
    for folder in "ours", "theirs":
        (tmp_path / folder).mkdir()
    write(tmp_path / "theirs/base.py", "config.seed = 7\nconfig.lr = 0.5\n")
    write(tmp_path / "theirs/r50.py", "config.rec = 'x'\nconfig.num_classes = config.num_image = 9\nconfig.momentum = 0.8\n")
    write(tmp_path / "ours/base.py", "config.seed = 8\nconfig.weight_decay = 0.1\n")
    mine = write(tmp_path / "ours/mine.py", "config.base = '../theirs/r50'\nconfig.momentum = 0.7\n")
    assert (found := load_config(mine)) and (found.seed, found.lr, found.momentum, found.weight_decay) == (7, 0.5, 0.7, 0.1)


def test_base_py_may_have_a_base_and_be_named_as_one(tmp_path):
    write(tmp_path / "lowest.py", "config.rec = 'x'\nconfig.num_classes = config.num_image = 9\n")
    write(tmp_path / "base.py", "config.base = 'lowest'\nconfig.lr = 0.5\n")
    for name, base in ("mine.py", ""), ("named.py", "config.base = 'base'\n"):
        found = load_config(write(tmp_path / name, base + "config.momentum = 0.7\n"))
        assert (found.rec, found.lr, found.momentum) == ("x", 0.5, 0.7) and not unused_keys(found)


def test_all_wrong_overrides_are_named_with_the_keys_that_lack(tmp_path):
    path = write(tmp_path / "mine.py", "config.rec = 'x'\nconfig.num_image = 9\n")
    with pytest.raises(ConfigError, match="(?s)zebra: unknown key.*lrr: unknown key.*mine.py: lacks num_classes"):
        load_config(path, ["zebra=1", "lr=0.1", "lrr=3"])


@pytest.mark.parametrize("text, value", [
    ("lr=0.2", 0.2), ("lr=1", 1), ("f2c_pool_rate=.05", 0.05), ("fp16=true", True), ("fp16=False", False),
    ("network=r18", "r18"),
    ("output=7", "7"), ("output=a=b", "a=b"), ("f2c_init='none'", "none"), ("optimizer=adamw", "adamw"),
    ("val_targets=lfw, agedb_30", ["lfw", "agedb_30"]), ("val_targets=lfw", ["lfw"]), ("val_targets=", []),
    ("val_targets=['lfw']", ["lfw"]), ("margin_list=1,0,0.4", (1, 0, 0.4)), ("resume=auto", "auto"), ("resume=True", True),
    ("f2c_hard_negatives=None", None), ("num_epoch=2", 2), ("f2c_recipe=paper", "paper")])
def test_an_override_is_typed_by_its_key(config, text, value):
    found = load_config(config(), ["num_epoch=3", text])
    key = text.partition("=")[0]
    assert found[key] == value and type(found[key]) is type(value)
    assert key == "num_epoch" or found.num_epoch == 3


@pytest.mark.parametrize("text, message", [
    ("lr", "'lr': must be KEY=VALUE, as lr=0.2"), ("=3", "'=3': must be KEY=VALUE"), ("2=3", "'2=3': must be KEY=VALUE"),
    ("lrr=3", "lrr: unknown key: did you mean lr?"),
    ("f2c_poolrate=3", "f2c_poolrate: unknown key: did you mean f2c_pool_rate?"),
    ("sample_rate=0.1", "sample_rate: unknown key: it is Partial FC's; .* f2c_pool_rate"),
    ("LR=0.1", r"LR: unknown key: did you mean lr\?"), ("learning_rate=0.1", r"learning_rate: unknown key: did you mean lr\?"),
    ("base=other", "base: unknown key: config files name theirs, config.base; .* name it in place of this one"),
    ("zebra=1", "zebra: unknown key: neither the built-in trainer nor F²C has such a key")])
def test_an_override_of_no_key_is_refused_with_the_nearest(config, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config(), [text])


def test_keys_that_nobody_reads_are_named_with_what_there_is_instead(config, tmp_path):
    assert not unused_keys(load_config(config()))
    found = unused_keys(load_config(config(sample_rate=0.3, pretrained="x.pt", lerning_rate=3, zebra=1)))
    assert found == [
        "sample_rate=0.3 is not used: it is Partial FC's; the share of classes that F²C holds is f2c_pool_rate",
        "pretrained='x.pt' is not used: f2c_init starts from a pretrained net",
        "lerning_rate=3 is not used: neither the built-in trainer nor F²C has such a key",
        "zebra=1 is not used: neither the built-in trainer nor F²C has such a key"]
    # arcface_torch's base.py sets some of them whatever the training.
    write(tmp_path / "base.py", f"config.sample_rate = 1\nconfig.wandb_key = {'X' * 40!r}\nconfig.momentun = 1\n")
    assert unused_keys(load_config(config())) == ["momentun=1 is not used: did you mean momentum?"]
    write(tmp_path / "base.py", "config.sample_rate = 0.1\nconfig.wandb_log_all = True\n")
    assert unused_keys(load_config(config())) == [found[0].replace("0.3", "0.1")]


def test_a_training_takes_overrides_and_says_which_keys_it_does_not_use(config):
    train.main([config(num_epoch=2, frequent=5, sample_rate=0.3), "num_epoch=1", "lr=0.01"])
    said = Path("out/training.log").read_text()
    assert "sample_rate=0.3 is not used: it is Partial FC's" in said
    assert "step 5: loss" in said and "left 0:00:0" in said
    assert " and 2 verifications" in said.split("step 5: loss")[1].split("\n")[0]  # of this step and at the end
    assert "verifications" not in said.split("step 10: loss")[1].split("\n")[0]  # by then it is known how long one takes
    assert history()[-1]["images"] == 120 and history()[0]["learning_rate"] == pytest.approx(0.01 * 0.6)


def test_configs_that_are_none_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="no such config file.*f2c_demo, glint360k_r100_f2c"):
        load_config("f2c_dmeo")
    with pytest.raises(ConfigError, match="mine.py: lacks num_classes\n.*mine.py: lacks num_image"):
        load_config(write(tmp_path / "mine.py", "config.rec = 'x'\n"))
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="none.py: sets no `config`"):
        load_config(str(tmp_path / "none.py"))


# Values that a key may have, and values that it may not. What is not in either is left at what the fixture has.
RIGHT = dict(
    head=["f2c_dcp", "softmax"], sampler=[None, "f2c_dual"], network=["tiny", "r18"], embedding_size=[32, 1],
    batch_size=[12, 2], num_epoch=[1, 10**6], gradient_acc=[1, 3], num_workers=[0, 2], warmup_epoch=[0, 1],
    seed=[0, 2**32 - 1], lr=[0.1, 1, 1e-9],
    scale=[64.0, 1], weight_decay=[0, 5e-4], momentum=[0, 0.9], interclass_filtering_threshold=[0, 0.4], fp16=[True, False],
    save_all_states=[True, False], softmax_ramp=[True, False], resume=[True, False, "auto"], dali=[False],
    optimizer=["sgd", "adamw"],
    margin_list=[(1.0, 0.5, 0.0), [1, 0, 0.4]], val_targets=[[], ["synth"]], f2c_pool_rate=[1.0, 1],
    f2c_momentum=[0.0, 0.999],
    f2c_symmetric=[True, False], f2c_skip_damaged=[True], f2c_shard_pool=[True, False], f2c_save_every=[None, 1],
    f2c_max_bad_steps=[1], f2c_hard_negatives=[None, 5], f2c_identity_rate=[0, 0.5, 1.0, None],
    f2c_export=["probe"], f2c_kept_weights=["memory", "file"], f2c_margin=[None],
    f2c_pool_dtype=["float32", "bfloat16"], f2c_recipe=["resident", "paper"], f2c_sub_centers=[1], f2c_forget_rate=[0],
    f2c_low_resolution=[0, 0.5], f2c_queue_size=[1, 1 << 13],
    f2c_gallery_images=[1, 4], f2c_teacher=[None])
NONSENSE = [None, -1, -0.5, float("nan"), float("inf"), "", "x", "1", b"1", [], {}, (1,), object, 10**30]
WRONG = dict(
    head=["f2c_dpc", 3], sampler=["f2c_daul", 1.5], network=["r51", None],
    embedding_size=[0, 1 << 40, True], batch_size=[0, 1.5, 10**9],
    num_classes=[5, 13, 10**15, "12"], num_image=[1, 121, 10**12, None], num_epoch=[0, "2"], gradient_acc=[0],
    num_workers=[-1, None, 1025],
    warmup_epoch=[-1, 10**7], seed=[-1, 2**32, "a"], lr=[0, "0.1", float("nan")], scale=[0, float("inf")],
    weight_decay=[-1, None],
    momentum=[1.0, "0.9"], interclass_filtering_threshold=[2], fp16=["True", 1], save_all_states=[1],
    softmax_ramp=["ramp", 1], resume=["yes", 1], dali=[True, 0],
    optimizer=["adam", None], margin_list=[(1.0, 0.5), (0.9, 0.5, 0.0), (1, 0, "0.4"), 0.5],
    val_targets=["synth", ["lfw"], [1], None],
    rec=["nowhere", 7], f2c_pool_rate=[0, 1.1, 0.01, "1"], f2c_momentum=[1, -0.1], f2c_symmetric=[1, "no"],
    f2c_skip_damaged=[0],
    f2c_shard_pool=[None], f2c_save_every=[0, 1.5], f2c_max_bad_steps=[0, None], f2c_hard_negatives=[0, 2.5],
    f2c_identity_rate=[1.5, "1"], f2c_export=["both", "best"], f2c_kept_weights=["disk", None], f2c_margin=["sphereface", 0.4],
    f2c_pool_dtype=["half", None], f2c_recipe=["fast", None],
    f2c_sub_centers=[0, 1.5], f2c_forget_rate=[1, "0.1"], f2c_low_resolution=[1.5, None], f2c_queue_size=[0, None],
    f2c_gallery_images=[0, 1.5],
    f2c_teacher=["nowhere.pt", 3],
    f2c_pool_rat=[0.1], f2c_momentun=[0.9], f2c_=[1])
# Keys that are wrong only beside others, or only where F²C is trained.
DEPENDS = {"f2c_pool_rate": 0.01, "batch_size": 3, "warmup_epoch": 10**7, "f2c_export": "best"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_config_says_each_wrong_key_is_named_with_its_value_and_nothing_else_happens(config, data):
    cfg = load_config(config(num_epoch=2))
    right = data.draw(st.lists(st.sampled_from(sorted(RIGHT)), unique=True, max_size=8))
    wrong = data.draw(st.lists(st.sampled_from(sorted(WRONG)), unique=True, max_size=4))
    given = {key: data.draw(st.sampled_from(WRONG[key]), label=key) for key in wrong}
    cfg.update({key: data.draw(st.sampled_from(RIGHT[key]), label=key) for key in right} | given)
    try:
        check(cfg, world_size=data.draw(st.sampled_from([1, 2])))
        said = ""
    except ConfigError as error:
        said = str(error)
    for key, value in given.items():
        if DEPENDS.get(key) == value or {"rec", "num_classes", "num_image", "val_targets"} & given.keys() - {key}:
            continue  # a missing pack is reported alone
        lines = [line for line in said.splitlines() if key in line]
        is_unknown = key.startswith("f2c_") and lines and "unknown" in lines[0]
        assert lines and (is_unknown or repr(value).strip("[]'") in " ".join(lines)), (key, value, said)
    if not wrong and "resume" not in right and "f2c_export" not in right:
        assert not said or "batch_size" in said or "f2c_shard_pool" in said or "DCQ learns from pairs" in said


def said_of(cfg, if_right):
    """What is said to be wrong with a config; ``if_right`` if nothing is."""
    try:
        check(cfg)
    except ConfigError as error:
        return str(error)
    return if_right


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted({*RIGHT, *WRONG})), value=st.sampled_from(NONSENSE) | st.integers() | st.text() | st.floats())
def test_nonsense_in_any_key_ends_in_a_config_error_or_in_a_config_that_is_right(config, key, value):
    cfg = load_config(config(num_epoch=2))
    cfg[key] = value
    assert key in said_of(cfg, key)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted({*RIGHT, *WRONG} - {"f2c_pool_rat", "f2c_momentun", "f2c_"})), value=st.text())
def test_whatever_an_override_says_its_key_is_named_or_right(config, key, value):
    assert key in said_of(load_config(config(), [f"{key}={value}"]), key)


@pytest.mark.parametrize("text, message", [
    ("config.lr = (0.1\n", "mine.py, line 3: '(' was never closed: correct it"),
    ("config.lr = 1 / 0\n", "mine.py, line 3: cannot be run: ZeroDivisionError: division by zero"),
    ("def lr():\n    raise KeyError(3)\nconfig.lr = lr()\n", "mine.py, line 4: cannot be run: KeyError: 3"),
    ("import nowhere\n", "mine.py, line 3: cannot be run: ModuleNotFoundError: No module named 'nowhere'"),
    ("import sys\nsys.exit(3)\n", "mine.py, line 4: cannot be run: SystemExit: 3"),
    ("config = {3: 4}\n", "mine.py: sets no `config`"), ("config = None\n", "mine.py: sets no `config`"),
    (b"config.rec = '\xff'\n", "(unicode error) 'utf-8' codec can't decode byte 0xff"),
    ("config.rec = '\0'\n", "mine.py"),
], ids=range(9))
def test_a_config_file_that_cannot_be_run_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(b"from easydict import EasyDict as edict\nconfig = edict()\n" + content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(str(path))


def test_a_config_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.py", "")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr("runpy.run_path", refuse)  # root may read any file
    with pytest.raises(ConfigError, match=r"mine.py: cannot be run: PermissionError: .*Permission denied"):
        load_config(path)


def test_values_of_numpys_types_are_those_of_python(config):
    path = config()
    with open(path, "a") as file:
        file.write("\nimport numpy as np\nconfig.update(batch_size=np.int64(12), lr=np.float32(0.5), fp16=np.bool_(False), "
                   "margin_list=np.array([1.0, 0.0, 0.2]), f2c_momentum=np.float64(0.9), val_targets=(np.str_('synth'),))\n")
    cfg = load_config(path)
    check(cfg)
    types = dict(batch_size=int, lr=float, fp16=bool, margin_list=list, f2c_momentum=float)
    assert {key: type(cfg[key]) for key in types} == types
    assert type(cfg.val_targets[0]) is str
    settings = F2CConfig.read(GOOD | dict(f2c_symmetric=np.bool_(False), f2c_hard_negatives=np.int32(5)))
    assert settings.symmetric is False and type(settings.hard_negatives) is int
