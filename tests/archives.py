"""Files of torch.save, and archives that torch.save never wrote. For tests, and for fuzz.py, which runs beside this file."""

import struct
import zipfile
import zlib
from collections import OrderedDict
from io import BytesIO

import torch


def saved(states, **options):
    file = BytesIO()
    torch.save(states, file, **options)
    return file.getvalue()


def contents(each):
    """All that is in states, to the bit."""
    if isinstance(each, torch.Tensor):
        kind = type(each).__name__, str(each.dtype), tuple(each.shape), each.stride(), each.storage_offset(), each.requires_grad
        return *kind, bytes(torch.empty(each.shape, dtype=each.dtype).copy_(each).view(-1).view(torch.uint8).tolist())
    if isinstance(each, dict):
        return type(each).__name__, [(key, contents(value)) for key, value in each.items()], contents(vars(each)) if isinstance(
            each, OrderedDict) else None
    if isinstance(each, (list, tuple)):
        return type(each).__name__, [contents(part) for part in each]
    return type(each).__name__, repr(each)


PICKLED = zipfile.ZipFile(BytesIO(saved({"a": torch.arange(3.0)}))).read("archive/data.pkl")
REST = {"byteorder": b"little", "data/0": torch.arange(3.0).numpy().tobytes(), "version": b"3\n"}
ENTRIES = {"data.pkl": PICKLED, **REST}


def archive(entries=None, shift=0, before=b"", between=b"", comment=b"", folder="archive", **of_data):
    """A ZIP archive of stored entries; its offsets are ``shift`` too low. ``of_data`` changes fields of the entry data/0."""
    body, directory = before, b""
    for name, content in (ENTRIES if entries is None else entries).items():
        fields = dict(local=name, central=name, crc=zlib.crc32(content), local_crc=zlib.crc32(content), size=len(content),
                      local_size=len(content), packed=len(content), method=0, flags=0, offset=len(body) - shift)
        fields |= of_data if name == "data/0" else {}
        local, central = f"{folder}/{fields['local']}".encode(), f"{folder}/{fields['central']}".encode()
        body += struct.pack("<4sHHH4xLLLHH", b"PK\3\4", 20, fields["flags"], fields["method"], fields["local_crc"],
                            fields["local_size"], fields["local_size"], len(local), 0) + local + content
        directory += struct.pack("<4s2H2H4xLLLHHHHHLL", b"PK\1\2", 20, 20, fields["flags"], fields["method"], fields["crc"],
                                 fields["packed"], fields["size"], len(central), 0, 0, 0, 0, 0, fields["offset"]) + central
    count = directory.count(b"PK\1\2")
    at = len(body) + len(between) - shift
    end = struct.pack("<4s4xHHLLH", b"PK\5\6", count, count, len(directory), at, len(comment))
    return body + between + directory + end + comment


OTHER = archive({**ENTRIES, "data/0": bytes(12)})
DIRECTORY = OTHER.index(b"PK\1\2")
