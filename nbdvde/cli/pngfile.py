"""Pictures as PNG files."""

import os
from pathlib import Path

from PIL import Image

from nbdvde.errors import RefusedError, UsageError

_COLOURS = 128
"""A table of so many makes files a third as large, and nobody sees it."""


def save(picture: Image.Image, file: Path, *, overwrite: bool) -> None:
    """Write a picture to a file, which is there whole or not at all. Raises RefusedError, UsageError, OSError."""
    if not file.name:
        raise UsageError(f"file {file}", "is a directory", "name a file in it")
    if not overwrite and os.path.lexists(file):
        raise RefusedError(str(file), "exists already", "choose another name, or say --overwrite")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(part, "PNG", optimize=True)
        os.replace(part, file)
    except OSError as error:
        error.filename = str(file)
        raise
    finally:
        part.unlink(missing_ok=True)
