"""Files of torch.save: read bit for bit, whatever they hold, or refused, whatever was done to them."""

import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from io import BytesIO

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from f2c_plugin.errors import CheckpointError
from f2c_plugin.utils.safe_load import load_states
from tests.archives import DIRECTORY, ENTRIES, OTHER, PICKLED, REST, archive, contents, saved

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
          torch.float8_e4m3fn, torch.float8_e5m2]


def load(content, folder):
    (folder / "states.pt").write_bytes(content)
    return load_states(folder / "states.pt")


def refusal(content, folder):
    with pytest.raises(CheckpointError) as caught:
        load(content, folder)
    assert str(caught.value).startswith(f"{folder / 'states.pt'}: ")
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_to_the_bit(tmp_path, dtype):
    bits = torch.randint(0, 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    tensor = (bits % 2).bool()[:6].clone() if dtype is torch.bool else bits.view(dtype)
    for each in tensor, tensor.view(2, 3).t(), tensor[1::2], tensor[:0], tensor[3]:
        assert contents(load(saved({"a": each}), tmp_path)["a"]) == contents(each)


def test_what_a_checkpoint_holds_comes_back_with_its_sharing_and_is_as_good_as_from_torch(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.8, 0.9))
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(12.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer).state_dict()
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule, "rng": torch.get_rng_state(),
              "views": [base, base[3:], base.view(3, 4).t(), nn.Parameter(base[:2])], "size": base.view(3, 4).size(),
              "empty": torch.empty(0, 3), "numbers": (1, -1 << 70, 1.5, None, True, "é", b"\x80"), 7: 8}
    states |= {"parameter": nn.Parameter(torch.ones(2), requires_grad=False), "grad": torch.ones(2, requires_grad=True)}
    content = saved(states)
    read = load(content, tmp_path)
    assert contents(read) == contents(states) == contents(torch.load(BytesIO(content), weights_only=True))
    assert read["net"]._metadata == net.state_dict()._metadata
    assert len({each.untyped_storage().data_ptr() for each in read["views"]}) == 1
    read["views"][1].zero_()
    assert read["views"][0].sum() == 3 and read["views"][2].sum() == 3
    assert (tmp_path / "states.pt").read_bytes() == content
    net.load_state_dict(read["net"])
    optimizer.load_state_dict(read["optimizer"])


TENSORS = st.builds(lambda dtype, shape, stride: (torch.arange(60) % 2).to(dtype).as_strided(shape, (stride, 7)),
                    st.sampled_from(DTYPES), st.tuples(st.integers(0, 4), st.integers(0, 5)), st.integers(1, 3))
TEXTS = st.text(max_size=5)
LEAVES = st.one_of(TENSORS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS, st.binary(min_size=1))
STATES = st.recursive(LEAVES, lambda inside: st.one_of(
    st.lists(inside, max_size=3), st.lists(inside, max_size=3).map(tuple),
    st.dictionaries(st.integers() | TEXTS, inside, max_size=3),
    st.dictionaries(TEXTS, inside, max_size=3).map(OrderedDict)), max_leaves=10)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXTS, STATES, max_size=4))
def test_states_are_read_as_torch_reads_them(tmp_path_factory, states):
    folder = tmp_path_factory.mktemp("states")
    content = saved(states)
    assert contents(load(content, folder)) == contents(torch.load(BytesIO(content), weights_only=True)) == contents(states)
    assert contents(load(saved(states, pickle_protocol=5), folder)) == contents(states)  # which torch does not read so


# Archives that torch did not write.
def two_archives_one_before_the_other():
    """Python's zipfile reads the second archive. Another parser takes the offsets as they are, and reads the first."""
    return archive(before=OTHER[:-22], shift=len(OTHER) - 22)


CRAFTED = {
    "two archives, offsets for the first": (two_archives_one_before_the_other(), "does not follow what is before it"),
    "two archives": (OTHER + archive(), "does not follow what is before it"),
    "two directories": (archive(between=OTHER[DIRECTORY:]), "the directory does not follow"),
    "a directory in the comment": (archive(comment=OTHER[DIRECTORY:]), "does not follow"),
    "data before": (archive(before=b"#!/bin/sh\n"), "does not follow"),
    "data behind": (archive() + b"more", "not a zip file|does not end"),
    "another local name": (archive(local="data/1"), "its directory and the entry data/0 contradict each other"),
    "another local size": (archive(local_size=11), "contradict each other"),
    "another local checksum": (archive(local_crc=1), "contradict each other"),
    "a wrong checksum": (archive(crc=1, local_crc=1), "damaged: data/0 is not as it was written"),
    "a size beyond the file": (archive(size=1 << 20, packed=1 << 20, local_size=1 << 20), "damaged: data/0"),
    "one content for two entries": (archive(offset=0), "does not follow"),
    "compressed": (archive(method=8), "data/0 is compressed or encrypted"),
    "encrypted": (archive(flags=1), "data/0 is compressed or encrypted"),
    "two names": (archive({"data/1": b"", **ENTRIES}, local="data/1", central="data/1"), "holds data/1 twice"),
    "a folder": (archive({"data/": b"", **ENTRIES}), "holds 'archive/data/', which files of torch.save do not"),
    "two folders": (archive({"../archive/data/3": b"", **ENTRIES}), "which files of torch.save do not"),
    "code": (archive({"code/__torch__.py": b"", **ENTRIES}), "holds 'archive/code/__torch__.py', which .* TorchScript"),
    "no pickle": (archive(REST), "holds no data.pkl"),
    "no version": (archive({"data.pkl": PICKLED, "data/0": REST["data/0"]}), "holds no version"),
    "nothing": (archive({}), "not a ZIP archive"),
    "big-endian": (archive({**ENTRIES, "byteorder": b"big"}), "written on a big-endian computer"),
    "another byte order": (archive({**ENTRIES, "byteorder": b"huge"}), "big-endian"),
    "a storage is missing": (archive({"data.pkl": PICKLED, "version": b"3\n"}), "lacks data/0, which a tensor lies in"),
    "a storage is too short": (archive({**ENTRIES, "data/0": bytes(8)}), "data/0 holds 8 bytes, not 3 numbers"),
    "a Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
    "an empty file": (b"", "not a whole checkpoint"),
    "a text": (b"PK\3\4 no archive", "not a whole checkpoint: not a ZIP archive"),
}


def test_an_archive_in_the_form_of_the_crafted_ones_is_read(tmp_path):
    for whole in (archive(), archive(folder="größe"), archive({**ENTRIES, "data/1": OTHER}),
                  archive({name: ENTRIES[name] for name in ("version", "data/0", "data.pkl")})):
        assert load(whole, tmp_path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", CRAFTED)
def test_archives_that_two_parsers_may_read_differently_are_refused(tmp_path, name):
    content, message = CRAFTED[name]
    assert re.search(message, refusal(content, tmp_path))


def test_every_byte_and_every_end_counts(tmp_path):
    content = saved({"a": torch.arange(5), "b": [1, "two"]})
    whole = contents(load(content, tmp_path))
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 4
        with suppress(CheckpointError):  # the padding, and dates, mean nothing
            assert contents(load(bytes(changed), tmp_path)) == whole
        refusal(content[:position], tmp_path)


# Pickles that torch did not write, in archives that are in order.
class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stored(kind="Float", key="X\1\0\0\x000", count="K\3", what="X\7\0\0\0storage"):
    return f"({what}ctorch\n{kind}Storage\n{key}X\3\0\0\0cpu{count}tQ"


def of(storage=stored(), offset="K\0", size="K\3\x85", stride="K\1\x85", grad="\x89", hooks="N",
       function="torch._utils\n_rebuild_tensor_v2", more=""):
    """The pickle of {"a": tensor}, a part of which is changed."""
    return f"\x80\2}}X\1\0\0\0ac{function}\n({storage}{offset}{size}{stride}{grad}{hooks}{more}tRs.".encode("latin1")


def long(number):
    return f"\x8a\x09{number.to_bytes(9, 'little', signed=True).decode('latin1')}"


cyclic: list = []
cyclic.append(cyclic)
deep: list = []
for _ in range(100_000):
    deep = [deep]


def nested(depth):
    return b"\x80\2}X\1\0\0\0a" + b"]" * depth + b"a" * (depth - 1) + b"s."


def doubled(depth):
    """Opcodes for containers of 2**depth leaves, in a few bytes a level."""
    opcodes = b"]q\0K\1a"
    for level in range(1, depth):
        opcodes += b"0]q%c(h%ch%ce" % (level, level - 1, level - 1)
    return opcodes


def doubled_tuples(depth):
    return b")q\0" + b"".join(b"0h%ch%c\x86q%c" % (level, level, level + 1) for level in range(depth))


MALICIOUS = {
    "os.system": (pickle.dumps({"a": Call(os.system, "touch pwned")}, 2), "system, which states of a training do not"),
    "eval": (pickle.dumps({"a": Call(eval, "1")}, 2), "holds __builtin__ eval, which"),
    "a terabyte": (pickle.dumps({"a": Call(bytearray, 1 << 40)}, 2), "holds __builtin__ bytearray, which"),
    "a made-up name": (b"\x80\4}X\1\0\0\0a]]\x93s.", "not a whole checkpoint"),
    "a set": (pickle.dumps({"a": {1}}, 4), "holds other objects"),
    "a function by itself": (b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_parameter\ns.", "holds a function by itself"),
    "a type by itself": (b"\x80\2}X\1\0\0\0actorch\nFloatStorage\ns.", "holds a dtype by itself"),
    "a storage by itself": (b"\x80\2}X\1\0\0\0a" + stored().encode() + b"s.", "holds a _Storage by itself"),
    "storage key": (of(storage=stored(key="]")), "refers to other things than storages"),
    "not a storage": (of(storage=stored(what="X\6\0\0\0module")), "refers to other things"),
    "storage elsewhere": (of(storage=stored(key="X\3\0\0\0../")), "lacks data/../"),
    "number of numbers": (of(storage=stored(count="K\4")), "holds 12 bytes, not 4 numbers"),
    "dtype": (of(storage=stored("Double")), "holds 12 bytes, not 3 numbers of torch.float64"),
    "two dtypes": (of()[:-1] + b"X\1\0\0\0b" + of(storage=stored("Int"))[9:],
                   "not 3 numbers of torch.int32"),
    "offset": (of(offset="K\1"), "shape (3,) stands for more than the file holds"),
    "negative offset": (of(offset=long(-1)), "a form that torch.save never writes"),
    "huge offset": (of(offset=long(1 << 66)), "stands for more"),
    "an offset that is none": (of(offset="\x88"), "a form that torch.save never writes"),
    "size": (of(size="K\4\x85"), "shape (4,) stands for more than the file holds"),
    "huge size": (of(size=long(1 << 66) + "\x85"), "stands for more than the file holds"),
    "negative size": (of(size=long(-3) + "\x85"), "a form that torch.save never writes"),
    "empty, but huge": (of(size="K\0" + long(1 << 66) + "\x86", stride="K\1K\1\x86"), ""),
    "stride": (of(stride="K\2\x85"), "stands for more than the file holds"),
    "stride 0": (of(size="J\0\0\0\x40\x85", stride="K\0\x85"), "shape (1073741824,) stands for more than the file holds"),
    "negative stride": (of(offset="K\2", stride=long(-1) + "\x85"), "a form that torch.save never writes"),
    "strides for another shape": (of(stride="K\1K\1\x86"), "a form that torch.save never writes"),
    "100 dimensions": (of(size="(" + 100 * "K\1" + "t", stride="(" + 100 * "K\1" + "t"), "a form that torch.save never writes"),
    "a size that is a tensor": (of(size="h\0").replace(b"}X", b"}q\0X"), "a form that torch.save never writes"),
    "hooks": (of(hooks="X\1\0\0\0a"), "hooks"),
    "a gradient of whole numbers": (of(storage=stored("Int"), grad="\x88"), ""),
    "metadata": (of(more="}X\1\0\0\0aK\1s"), "a form that torch.save never writes"),
    "a type that is none": (of(function="torch._utils\n_rebuild_tensor_v3", more="K\1"), ""),
    "a list as a tensor's storage": (of(storage="]"), ""),
    "a state set": (b"\x80\2}X\1\0\0\0accollections\nOrderedDict\n)R}X\4\0\0\0keysK\1sbs.", "sets the state of a OrderedDict"),
    "a tensor filled": (of()[:-2] + b"K\0K\1ss.", "fills a Tensor"),
    "a tuple extended": (b"\x80\2}X\1\0\0\0a)K\1as.", "extends a tuple"),
    "not a dictionary": (pickle.dumps([1], 2), "holds a list, not the states of a training"),
    "a cycle": (pickle.dumps({"a": cyclic}, 2), "nested too deeply"),
    "depth": (nested(100_000), "nested too deeply"),
    "keys that take forever": (b"\x80\2}" + doubled_tuples(60) + b"K\1s.", "has odd keys"),
    "a name that takes forever": (b"\x80\4" + doubled_tuples(60) + b"h\0\x93.", "not a whole checkpoint"),
    "a key of a storage that takes forever": (stored(key="%%").encode().replace(b"%%", doubled_tuples(60)), ""),
    "doubled lists": (b"\x80\2}X\1\0\0\0a" + doubled(60) + b"s.", "stands for much more than the file holds"),
    "doubled lists as arguments": (b"\x80\2ctorch\nSize\n" + doubled(60) + b"R.", "calls a function without arguments"),
    "one text many times": (b"\x80\2}X\1\0\0\0a](X\xe8\3\0\0" + 1000 * b"a" + b"q\1" + 1000 * b"h\1" + b"es.",
                            "stands for much more"),
    "memo index": (b"\x80\2Nr\xff\xff\xff\x7f}.", None),
    "a long text": (b"\x80\4\x8d" + (1 << 40).to_bytes(8, "little") + b"a.", "not a whole checkpoint"),
    "long bytes": (b"\x80\5\x8e" + (1 << 40).to_bytes(8, "little") + b"a.", "not a whole checkpoint"),
    "a long bytearray": (b"\x80\5\x96" + (1 << 32).to_bytes(8, "little") + b"a.", ""),
    "a frame": (b"\x80\5\x95" + (1 << 40).to_bytes(8, "little") + b"N.", ""),
    "cut short": (PICKLED[:-10], "not a whole checkpoint"),
}


def test_a_pickle_in_the_form_of_the_malicious_ones_is_read(tmp_path):
    assert load(archive({**ENTRIES, "data.pkl": of()}), tmp_path)["a"].tolist() == [0, 1, 2]
    assert load(archive({**ENTRIES, "data.pkl": nested(50)}), tmp_path)


def test_malicious_pickles_are_refused_and_do_nothing_and_take_neither_time_nor_memory(tmp_path):
    names = list(MALICIOUS)
    for number, (content, _) in enumerate(MALICIOUS.values()):
        (tmp_path / f"{number}.pt").write_bytes(archive({**ENTRIES, "data.pkl": content}))
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (60, 60));"
              "from f2c_plugin.errors import CheckpointError\n"
              "from f2c_plugin.utils.safe_load import load_states\n"
              "for number in range(int(sys.argv[1])):\n"
              "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "    try: print('read', load_states(f'{number}.pt'))\n"
              "    except CheckpointError as error: print(error)\n"
              "    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5, number\n")
    ran = subprocess.run([sys.executable, "-c", script, str(len(names))], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for number, (name, line) in enumerate(zip(names, ran.stdout.splitlines(), strict=True)):
        message = MALICIOUS[name][1]
        if message is None:
            assert line == "read {}", name
        else:
            assert line.startswith(f"{number}.pt: ") and message in line, f"{name}: {line}"
    assert not (tmp_path / "pwned").exists()


def test_what_torch_saves_but_no_training_is_refused(tmp_path):
    for each, message in [
            (torch.sparse_coo_tensor([[5]], [1.0], (1 << 40,), check_invariants=True), "_rebuild_sparse_tensor"),
            (torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "_rebuild_qtensor"),
            (torch.ones(3, dtype=torch.complex64).conj(), "a form that torch.save never writes"),
            (torch.empty(1 << 40, device="meta"), "_rebuild_meta_tensor_no_storage"),
            (torch.UntypedStorage(3), "a _Storage by itself"),
            (torch.zeros(1).expand(1 << 31), "shape (2147483648,) stands for more than the file holds"),
            ([torch.zeros(1 << 16)] * 99, "stands for much more than the file holds"),
            (nn.Linear(2, 2), "holds torch.nn.modules.linear Linear"), (1j, "holds __builtin__ complex"), ({1}, "set")]:
        assert message in refusal(saved({"a": each}), tmp_path)
    assert "in the format of torch < 1.6" in refusal(saved({"a": 1}, _use_new_zipfile_serialization=False), tmp_path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript is not read" in refusal((tmp_path / "script.pt").read_bytes(), tmp_path)


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, reason in ("fifo", "not a file"), ("missing", "no such file"), (".", "not a file"):
        with pytest.raises(CheckpointError, match=reason):
            load_states(tmp_path / name)


def test_storages_that_are_not_aligned_are_read(tmp_path):
    for padding in range(16):
        entries = {"data.pkl": PICKLED, "data/1": bytes(padding), **REST}
        tensor = load(archive(entries), tmp_path)["a"]
        assert tensor.tolist() == [0, 1, 2] and tensor.data_ptr() % tensor.element_size() == 0
