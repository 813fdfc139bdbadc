"""Make an image with one region of each kind, as this version writes it: python tools/region_fixture.py FILE.

One of a released version is never made anew: later versions must read it.
"""

import os
import sys
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nbdvde import AnonTable, MetricsLog, Sample, Stream, Vault, Worm, open_image
from nbdvde.engine.access import create_image
from nbdvde.engine.image import Image
from nbdvde.engine.keys import MasterKey
from nbdvde.engine.regions.vault import Record

NAME = "v1-regions.vde"
KEY = MasterKey(bytes(range(32)))
SIGNER = ec.derive_private_key(0x5EED, ec.SECP256R1())
NOW_NS = 1_760_000_000_000_000_000
STREAM = [b"entry %d" % number * number for number in range(40)]
"""A ring of 32 has the last ones."""
WORM = [b"kept for ever", bytes(range(256)) * 20]
KEPT, ERASED = bytes(range(16)), bytes(range(1, 17))
VALUE = b"someone@example.org"
METRIC, SAMPLES = 1000, 500


def passport(image: Image) -> Record:
    """The one in the vault."""
    about = image.uuid_of(image.disk().number).bytes
    record = Record(bytes(range(2, 18)), about, 0, 1, NOW_NS, 0, NOW_NS, "the issuer", "noted", bytes(64))
    return record.signed_with(SIGNER)


async def make(path: Path) -> None:
    """Write the image."""
    create_image(path, 1 << 20, secret=KEY, segment_bytes=65536)
    async with open_image(path, key=KEY) as image:
        disk, regions = image.disk(), image.regions
        area = await regions.area(disk)
        stream = await Stream.create(regions, disk, 32)
        await stream.append_many(STREAM)
        worm = await Worm.create(regions, disk, 64, 0, NOW_NS)
        for data in WORM:
            await worm.append(data)
        await Vault.create(area)
        vault = await regions.get(Vault, disk)
        await vault.add(passport(image), SIGNER.public_key(), NOW_NS)
        await AnonTable.create(area)
        table = await regions.get(AnonTable, disk)
        for subject in (KEPT, ERASED):
            await table.map(subject, 1, VALUE, NOW_NS, os.urandom(48))
        await table.erase(ERASED, NOW_NS)
        await MetricsLog.create(area, 1 << 20)
        metrics = await regions.get(MetricsLog, disk)
        await metrics.append(Sample(METRIC, NOW_NS + at * 10**9, float(at)) for at in range(SAMPLES))
    os.chmod(path, 0o644)


if __name__ == "__main__":
    trio.run(make, Path(sys.argv[1]))
