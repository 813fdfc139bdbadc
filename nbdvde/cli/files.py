"""The files that commands read and write besides images."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nbdvde.errors import ImageError, RefusedError, UsageError, reason
from nbdvde.newfile import NewFile
from nbdvde.transfer import placed, refuse_image

_OPTION = "--overwrite"


@contextmanager
def opened(file: Path) -> Iterator[Callable[[int], bytes]]:
    """What reads from a file, or from standard input, as much as there is now. That and this raise ImageError."""
    if str(file) == "-":
        if sys.stdin is None:
            raise ImageError("standard input", "is closed", "name a file")
        yield _reading("standard input", sys.stdin.fileno())
        return
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(str(file), reason(error), "check the path and its permissions") from None
    try:
        yield _reading(str(file), fd)
    finally:
        os.close(fd)


def _reading(name: str, fd: int) -> Callable[[int], bytes]:
    def read(most: int) -> bytes:
        try:
            return os.read(fd, most)
        except OSError as error:
            raise ImageError(name, reason(error), "name a file") from None

    return read


@contextmanager
def written(file: Path, image: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to write, which others cannot read, and which is there whole and durable at the end, or not at all.

    With `overwrite` it replaces one, but never the image or another one in use, by whatever name. Raises UsageError,
    RefusedError, ImageError, NoSpaceError.
    """
    if not file.name:
        raise UsageError(f"file {file}", "is a directory", "name a file in it")
    with placed(file, _OPTION):
        if overwrite and os.path.lexists(file):
            refuse_image(file, image)
            if not file.is_file():
                raise RefusedError(str(file), "is not a file", "choose another name")
        new = NewFile(file, replace=overwrite)
        try:
            with os.fdopen(new.file, "wb") as out:
                yield out
            new.finish()
        finally:
            new.abandon()
