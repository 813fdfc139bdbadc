"""Pictures as PNG files."""

from pathlib import Path

from PIL import Image

from nbdvde.cli.files import written

_COLOURS = 128
"""A table of so many makes files a third as large, and nobody sees it."""


def save(picture: Image.Image, file: Path, image: Path, *, overwrite: bool) -> None:
    """Write a picture of an image to a file, as `files.written` does."""
    with written(file, image, overwrite=overwrite) as out:
        picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
