"""Git-LFS pointers: what a clone holds in place of large files until ``git lfs pull`` fetches them."""

_BEGINNING = b"version https://git-lfs.github.com/spec/"
NOT_FETCHED = "a Git-LFS pointer, not the file itself: run `git lfs pull` in the clone that it is from"


def is_lfs_pointer(content: bytes | memoryview) -> bool:
    return bytes(content[:len(_BEGINNING)]) == _BEGINNING
