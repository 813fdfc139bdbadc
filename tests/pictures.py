"""PNG files, read by decoders that accept nothing that is not as the standard says."""

import shutil
import subprocess
from pathlib import Path

from PIL import Image, ImageFile

from tests.interop.harness import need


def strictly(file: Path) -> Image.Image:
    """The picture in a file, when pngcheck, libpng and Pillow all have nothing against it."""
    need("pngcheck", "pngfix")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    checked = subprocess.run(["pngcheck", "-q", file], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    fixed = subprocess.run([shutil.which("pngfix") or "", file], capture_output=True, text=True, check=False)
    assert fixed.returncode == 0, fixed
    assert fixed.stdout.startswith("IDAT OK "), "nothing to mend"
    with Image.open(file) as picture:
        picture.verify()
    with Image.open(file) as picture:
        picture.load()
        return picture.convert("RGB")
