"""What the control socket can do with an image of a running server."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec

from nbdvde import workers
from nbdvde.admin import dictionarychange, volumechange
from nbdvde.admin.calls import parse
from nbdvde.admin.difference import Ranges, difference
from nbdvde.admin.everywhere import caught_up, clock, shown, written
from nbdvde.admin.http import Emit
from nbdvde.admin.keychange import Action, apply
from nbdvde.admin.measures import as_text
from nbdvde.admin.messages import (
    CheckLine,
    CopyLine,
    CopyRequest,
    DictionaryLine,
    DictionaryReport,
    DictionaryRequest,
    DiffLine,
    DiffRequest,
    Done,
    KeyList,
    KeyRequest,
    OptimizeLine,
    OptimizeRequest,
    ScrubRequest,
    VolumeInfo,
    VolumeRequest,
)
from nbdvde.admin.watching import check, watched
from nbdvde.engine.access import fresh, naming, placing
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.optimize import options_of
from nbdvde.engine.pace import check_rate
from nbdvde.engine.report import SpaceReport
from nbdvde.engine.volume import Volume
from nbdvde.errors import RefusedError, UsageError
from nbdvde.hosting import Host
from nbdvde.replication.registry import replica_of
from nbdvde.transfer import copy_in, copy_out

_log = logging.getLogger(__name__)


class ImageService:
    """Handlers of the control interface that are about the image."""

    PATHS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "/v1/df": ("POST", "df"),
        "/v1/check": ("POST", "check"),
        "/v1/scrub": ("POST", "scrub"),
        "/v1/optimize": ("POST", "optimize"),
        "/v1/import": ("POST", "import_"),
        "/v1/export": ("POST", "export"),
        "/v1/flush": ("POST", "flush"),
        "/v1/disks/create": ("POST", "create_disk"),
        "/v1/disks/clone": ("POST", "clone_disk"),
        "/v1/disks/resize": ("POST", "resize_disk"),
        "/v1/disks/delete": ("POST", "delete_disk"),
        "/v1/snapshots/create": ("POST", "create_snapshot"),
        "/v1/snapshots/delete": ("POST", "delete_snapshot"),
        "/v1/snapshots/rollback": ("POST", "roll_back"),
        "/v1/snapshots/diff": ("POST", "diff"),
        "/v1/dictionaries": ("GET", "dictionaries"),
        "/v1/dictionaries/train": ("POST", "train_dictionaries"),
        "/v1/dictionaries/replace": ("POST", "replace_dictionary"),
        "/v1/dictionaries/remove": ("POST", "remove_dictionary"),
        "/v1/keys": ("GET", "keys"),
        "/v1/keys/add": ("POST", "add_key"),
        "/v1/keys/remove": ("POST", "remove_key"),
        "/v1/keys/change": ("POST", "change_key"),
    }
    """See `Service.PATHS`."""

    def __init__(self, image: Callable[[], Image | None], host: Host) -> None:
        """`image` tells which one is spoken of, if any."""
        self._image, self._host = image, host

    def find(self, path: str | None = None) -> Image:
        """That of a path, or the one that is spoken of. Raises RefusedError, UsageError."""
        if path is not None:
            found = next((image for image in self._host.images if as_text(image.path) == path), None)
            if found is None:
                raise UsageError(f"image {path}", "is not served here", "see nbdvde ctl status")
            return found
        if (image := self._image()) is None:
            raise RefusedError("disk in memory", "has no image to ask about")
        return image

    async def df(self, body: bytes, emit: Emit) -> SpaceReport:
        """Where the bytes of the image went."""
        return await self.find().space()

    async def check(self, body: bytes, emit: Emit) -> CheckLine:
        """Verify everything: lines of progress, then the report."""
        return CheckLine(report=await check(self.find(), emit))

    async def scrub(self, body: bytes, emit: Emit) -> CheckLine:
        """Verify everything, at so many bytes a second at most: lines of progress, then the report."""
        rate = check_rate(parse(body, ScrubRequest).rate)
        return CheckLine(report=await check(self.find(), emit, rate))

    async def optimize(self, body: bytes, emit: Emit) -> OptimizeLine:
        """Make the image smaller, at so many bytes a second at most: lines of progress, then the report."""
        asked, image = parse(body, OptimizeRequest), self.find()
        options = options_of(asked.passes, asked.level, check_rate(asked.rate), asked.memory)
        with naming(image.path):
            return OptimizeLine(report=await watched(emit, lambda meter: image.optimize(options, meter)))

    async def import_(self, body: bytes, emit: Emit) -> CopyLine:
        """Copy a raw file into a disk: lines of progress, then `done`."""
        asked, image, disk = self._copying(body)
        async with self._host.unused(shown(image, disk), hint="disconnect them first"), written(image, disk) as used:
            _log.info("%s: disk %s is overwritten with %s", image.path, disk.name, asked.file)
            with placing(image.path):
                copied = await watched(emit, lambda meter: copy_in(Path(asked.file), used, meter))
        return CopyLine(done=True, disk=disk.name, bytes=copied)

    async def export(self, body: bytes, emit: Emit) -> CopyLine:
        """Copy a disk out to a raw file: lines of progress, then `done`."""
        asked, image, disk = self._copying(body)
        await caught_up(image)
        with self._host.reading(shown(image, disk)), placing(image.path):
            copied = await watched(
                emit, lambda meter: copy_out(disk, Path(asked.file), meter, overwrite=asked.overwrite)
            )
        return CopyLine(done=True, disk=disk.name, bytes=copied)

    def _copying(self, body: bytes) -> tuple[CopyRequest, Image, Volume]:
        asked = parse(body, CopyRequest)
        if not os.path.isabs(asked.file):
            raise UsageError(f"file {asked.file}", "is not an absolute path")
        image = self.find()
        return asked, image, image.disk(asked.disk)

    async def flush(self, body: bytes, emit: Emit) -> Done:
        """Make every write accepted so far durable."""
        if image := self._image():
            await image.flush()
        return Done()

    async def create_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make the empty disk `name` of `size` bytes."""
        return await self._change_volumes("disks/create", body)

    async def clone_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make the disk `name`, which begins as the snapshot or disk `source` is now."""
        return await self._change_volumes("disks/clone", body)

    async def resize_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Give the disk `name` another `size`; `discard` cuts off data."""
        return await self._change_volumes("disks/resize", body)

    async def delete_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Delete the disk `name`, which has no snapshots."""
        return await self._change_volumes("disks/delete", body)

    async def create_snapshot(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Keep what a disk holds now as `name`, `DISK@NAME`."""
        return await self._change_volumes("snapshots/create", body)

    async def delete_snapshot(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Delete the snapshot `name`, `DISK@NAME`."""
        return await self._change_volumes("snapshots/delete", body)

    async def roll_back(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make a disk what it was when its snapshot `name`, `DISK@NAME`, was taken."""
        return await self._change_volumes("snapshots/rollback", body)

    async def diff(self, body: bytes, emit: Emit) -> DiffLine:
        """Ranges in which a disk, or `until`, differs from its snapshot `since`: lines of `changes`, then `done`."""

        async def tell(found: Ranges) -> None:
            await emit(DiffLine(found))

        image, request = self.find(), parse(body, DiffRequest)
        await caught_up(image)
        cut = await difference(image, request, tell, self._host.reading)
        return DiffLine(cut=cut, done=True)

    async def _change_volumes(self, action: volumechange.Action, body: bytes) -> VolumeInfo:
        image, request = self.find(), parse(body, VolumeRequest)
        if replica := replica_of(image):
            shows = clock(image, request.name.partition(SEPARATOR)[0])
            done = msgspec.json.decode(await replica.call(action, body, shows), type=VolumeInfo)
            _log.info("%s: %s %s on all nodes", image.path, action, done.name)
            return done
        with naming(image.path):
            done = await volumechange.change(action, request, image, partial(self._host.unused, force=request.force))
        _log.info("%s: %s %s%s", image.path, action, done.name, " by force" if request.force else "")
        return done

    async def dictionaries(self, body: bytes, emit: Emit) -> DictionaryReport:
        """The compression dictionaries."""
        return DictionaryReport(dictionarychange.listing(self.find().dictionaries.table))

    async def train_dictionaries(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Train dictionaries from a disk, and keep what pays: lines of progress, then the report."""
        return await self._change_dictionaries("train", body, emit)

    async def replace_dictionary(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Train the dictionary `id` anew: lines of progress, then the report."""
        return await self._change_dictionaries("replace", body, emit)

    async def remove_dictionary(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Remove the dictionary `id`, which no data needs: lines of progress, then the report."""
        return await self._change_dictionaries("remove", body, emit)

    async def _change_dictionaries(self, action: dictionarychange.Action, body: bytes, emit: Emit) -> DictionaryLine:
        image, request = self.find(), parse(body, DictionaryRequest)
        with naming(image.path), ExitStack() as held:
            if action != "remove":
                held.enter_context(self._host.reading(image.disk(request.disk)))
            work = partial(dictionarychange.change, action, request, image)
            return DictionaryLine(report=await watched(emit, work))

    async def keys(self, body: bytes, emit: Emit) -> KeyList:
        """The key slots in use."""
        image = self._encrypted_image()
        with naming(image.path):
            return KeyList((await workers.run(_key_area, image)).slots())

    async def add_key(self, body: bytes, emit: Emit) -> KeyList:
        """Let `new_secret` open the image too."""
        return await self._change_keys("add", body)

    async def remove_key(self, body: bytes, emit: Emit) -> KeyList:
        """Free a slot: the given one, or that of `secret`."""
        return await self._change_keys("remove", body)

    async def change_key(self, body: bytes, emit: Emit) -> KeyList:
        """Replace the secret of a slot by `new_secret`."""
        return await self._change_keys("change", body)

    async def _change_keys(self, action: Action, body: bytes) -> KeyList:
        image, request = self._encrypted_image(), parse(body, KeyRequest)
        with naming(image.path):
            await image.update_keys(lambda area: apply(action, request, area, fresh()))
        return KeyList((await workers.run(_key_area, image)).slots())

    def _encrypted_image(self) -> Image:
        image = self.find()
        if not image.encrypted:
            raise RefusedError("image", "is not encrypted, it has no key slots", "make a new one with a key")
        return image


def _key_area(image: Image) -> KeyArea:
    return image.key_area
