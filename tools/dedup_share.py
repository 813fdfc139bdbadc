"""How much of what full deduplication of 4 KiB blocks finds an image does find, and what that costs.

    python tools/dedup_share.py [--tree DIRECTORY] [--mib N] [--memory-gb-per-tb X] [--folder FOLDER]

Two ext4 file systems are made with mke2fs, the second from the same tree with 5 % of the files removed, 5 % edited by
an insertion and 10 % added, and written to one new image one after the other. The memory of the index is scaled to
the unique data, so that its limit bites. Without --tree the files are generated. Then speeds: unique data with
deduplication on and off, and the same data once more.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trio
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nbdvde
from nbdvde.engine.keys import MasterKey

BLOCK, PIECE = 4096, 1 << 20
KEY = MasterKey(bytes(32))
WORDS = [random.Random(number).randbytes(random.Random(number).randint(2, 9)) for number in range(4000)]


def content(rng: random.Random, size: int) -> bytes:
    """A file that compresses about as programs do, or not at all."""
    if rng.random() < 0.3:
        return rng.randbytes(size)
    return b" ".join(rng.choices(WORDS, k=size // 5 + 1))[:size]


def generate(tree: Path, mib: int) -> None:
    """Fill a tree with files of 100 bytes to some megabytes, `mib` MiB in all."""
    rng, left, number = random.Random(1), mib << 20, 0
    while left > 0:
        size = min(int(rng.lognormvariate(9.5, 1.8)) + 100, 8 << 20)
        folder = tree / f"d{number % 97}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number}").write_bytes(content(rng, size))
        left, number = left - size, number + 1


def change(tree: Path) -> None:
    """Remove 5 % of the files, insert into 5 %, and add 10 %."""
    rng = random.Random(2)
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    for number, path in enumerate(files):
        chance = rng.random()
        if chance < 0.05:
            path.unlink()
        elif chance < 0.1:
            data = path.read_bytes()
            at = rng.randint(0, len(data))
            path.unlink()  # it may be a link to the original
            path.write_bytes(data[:at] + content(rng, rng.randint(1, 300)) + data[at:])
        elif chance < 0.2:
            (path.parent / f"new{number}").write_bytes(content(rng, path.stat().st_size))


def file_system(tree: Path, image: Path) -> Path:
    """An ext4 image of a tree."""
    used = sum(path.lstat().st_size + 8192 for path in tree.rglob("*"))
    size = (int(used * 1.15) >> 20) + 64
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-E", "hash_seed=00000000-0000-0000-0000-000000000001",
         "-U", "00000000-0000-0000-0000-000000000002", "-d", str(tree), str(image), f"{size}M"], check=True,
    )  # fmt: skip
    return image


def pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of the parts of a file that hold anything."""
    with path.open("rb") as file:
        for offset in range(0, path.stat().st_size, PIECE):
            if any(data := file.read(PIECE)):
                yield offset, data


def full(files: list[Path]) -> tuple[int, int]:
    """Blocks that are not zero, and distinct ones, of all files."""
    seen, total, zero = set[bytes](), 0, bytes(BLOCK)
    for path in files:
        for _, data in pieces(path):
            for at in range(0, len(data), BLOCK):
                block = data[at : at + BLOCK]
                if block != zero:
                    total += 1
                    seen.add(blake3(block).digest(16))
    return total, len(seen)


async def write(image: Path, files: list[Path], memory: int, *, reopen: bool) -> dict[str, int]:
    """Write the files one behind the other; answers the counters of the image."""
    at, statistics = 0, dict[str, int]()
    for group in [[file] for file in files] if reopen else [files]:
        async with nbdvde.open_image(image, key=KEY, dedup_memory=memory) as opened:
            await opened._hooking.finish()
            for path in group:
                for offset, data in pieces(path):
                    await opened.disk().write(at + offset, memoryview(data), owned=True)
                at += -(-path.stat().st_size // PIECE) * PIECE
            await opened.flush()
            statistics = opened.statistics
    return statistics


def share(folder: Path, files: list[Path], gb_per_tb: float) -> dict[str, float]:
    """What is found of what full deduplication finds."""
    total, distinct = full(files)
    memory = int(distinct * BLOCK * gb_per_tb / 1000)
    image = folder / "share.vde"
    nbdvde.create_image(image, sum(path.stat().st_size + PIECE for path in files) // BLOCK * BLOCK, secret=KEY)
    statistics = trio.run(lambda: write(image, files, memory, reopen=True))
    image.unlink()
    found = statistics["blocks_shared"]
    return {
        "blocks": total, "distinct": distinct, "duplicates": total - distinct, "found": found,
        "share": round(found / (total - distinct), 4), "memory": memory,
    }  # fmt: skip


def speeds(folder: Path, source: Path) -> dict[str, float]:
    """MiB/s of unique data with deduplication off and on, and of the same data again. Best of three, in turns."""
    best: dict[str, float] = {}
    data = [piece for _, piece in pieces(source)][:512]

    async def timed(image: Path, names: tuple[str, ...]) -> None:
        async with nbdvde.open_image(image, key=KEY) as opened:
            for turn, name in enumerate(names):
                begun = time.perf_counter()
                for number, piece in enumerate(data):
                    await opened.disk().write((turn * len(data) + number) * PIECE, memoryview(piece), owned=True)
                await opened.flush()
                best[name] = max(best.get(name, 0), round(len(data) / (time.perf_counter() - begun), 1))

    for number in range(3):
        for dedup, names in ((False, ("off",)), (True, ("unique", "duplicates"))):
            image = folder / f"speed{number}{dedup}.vde"
            nbdvde.create_image(image, 2 * len(data) * PIECE, secret=KEY, dedup=dedup)
            trio.run(timed, image, names)
            image.unlink()
    return best


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--memory-gb-per-tb", type=float, default=0.35)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tree = folder / "tree"
        if arguments.tree:
            shutil.copytree(arguments.tree, tree, symlinks=True)
        else:
            tree.mkdir()
            generate(tree, arguments.mib)
        files = [file_system(tree, folder / "first.ext4")]
        change(tree)
        files.append(file_system(tree, folder / "second.ext4"))
        print(
            json.dumps({"share": share(folder, files, arguments.memory_gb_per_tb), "MiB/s": speeds(folder, files[0])})
        )


if __name__ == "__main__":
    main()
