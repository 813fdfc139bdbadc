"""Make docs/dashboard.png: the dashboard of a server with some work to do, in Chromium.

Takes three minutes: `python tools/screenshot.py [FILE]`.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from tests.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
NBDVDE = [sys.executable, "-m", "nbdvde"]
PORT = 10812
LOADS = (
    ("mail", ["--rw=randrw", "--bs=16k", "--rate=24m,12m", "--fsync=32"]),
    ("web", ["--rw=randread", "--bs=64k", "--rate=9m"]),
)
SECONDS = 140
WIDTH, HEIGHT = 1180, 1790


def prepare(folder: Path) -> None:
    """An image with disks, snapshots and regions."""
    (folder / "value").write_text("somebody@example.org")
    for words in (
        "create disk.vde 2G --disk mail --capacity 6G --encryption none",
        "disk create disk.vde web 4G",
        "disk create disk.vde backup 16G",
        "stream create disk.vde --capacity 64M",
        "worm create disk.vde --disk backup --capacity 256M --retention 7y",
        "metrics create disk.vde",
        "anon create disk.vde --disk web",
        "vault create disk.vde --disk web",
        "anon map disk.vde --disk web --subject somebody --type email --value-file value",
        "worm append disk.vde value --disk backup",
        "stream append disk.vde value",
    ):
        subprocess.run([*NBDVDE, *words.split()], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def picture(folder: Path, file: Path) -> None:
    """Serve, give it work, and look at it when the charts are full."""
    serve = [*NBDVDE, "serve", "disk.vde", "--listen", f"unix:{folder}/sock", "--admin", f"localhost:{PORT}"]
    server = subprocess.Popen(serve, cwd=folder)
    try:
        while not (folder / "sock").exists():
            time.sleep(0.1)
        loads = [
            subprocess.Popen(
                ["fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///{disk}?socket={folder}/sock", *options,
                 "--iodepth=4", "--size=1500M", "--buffer_compress_percentage=60", "--time_based",
                 f"--runtime={SECONDS + 300}"],
                cwd=folder, stdout=subprocess.DEVNULL,
            )
            for disk, options in LOADS
        ]  # fmt: skip
        (folder / "browser").mkdir()
        with chromium.running(chromium.program() or "chromium", folder / "browser") as browser:
            browser.size(WIDTH, HEIGHT)
            browser.open(f"http://localhost:{PORT}/")
            for name in ("monday", "tuesday"):
                time.sleep(SECONDS / 2)
                subprocess.run([*NBDVDE, "snapshot", "create", "disk.vde", f"mail@{name}"], cwd=folder, check=True)
            time.sleep(20)  # until the page has asked for snapshots again
            browser.screenshot(file, whole=False)
        shrink(file)
        for load in loads:
            load.terminate()
            load.wait()
    finally:
        server.terminate()
        server.wait()


def shrink(file: Path) -> None:
    """A palette is enough for a picture of so few colours."""
    with Image.open(file) as whole:
        few = whole.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    few.save(file, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        picture(Path(name), Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "dashboard.png"))
