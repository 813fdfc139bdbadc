"""Images by their path: create, open, lock, and what can be read or changed without opening."""

import errno
import fcntl
import os
import stat
import time
import uuid as uuids
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from nbdvde import workers
from nbdvde.engine import keys
from nbdvde.engine.check import Progress, check_storage
from nbdvde.engine.checkpoint import write_superblocks
from nbdvde.engine.checkpointer import LOG_BYTES
from nbdvde.engine.describe import clear_info, file_bytes
from nbdvde.engine.extent import LEVELS
from nbdvde.engine.image import BUFFER_BYTES, CACHE_BYTES, Image
from nbdvde.engine.keys import KeyArea, MasterKey, Secret
from nbdvde.engine.keystore import change_key_area, load_key_area, store_key_area
from nbdvde.engine.layout import (
    BLOCK,
    COMPRESSION_MAX,
    DATA_START,
    ENCRYPTION_AES_256_GCM,
    ENCRYPTION_NONE,
    EXTENT_BLOCKS_MAX,
    MIN_CAPACITY,
    SEGMENT_BYTES,
    STATE_CLEAN,
    Kind,
    LogPoint,
    Root,
    Segment,
    Superblock,
    VolumeEntry,
)
from nbdvde.engine.lbamap import height_for
from nbdvde.engine.managed.exported import load_exported
from nbdvde.engine.metadata import deflate
from nbdvde.engine.pace import paced
from nbdvde.engine.recovery import empty_segment, load, read_superblocks
from nbdvde.engine.report import CheckReport, ImageInfo
from nbdvde.engine.sealing import Keyring, public_master
from nbdvde.engine.storage import FileStorage, Storage
from nbdvde.engine.volumes import check_size
from nbdvde.errors import (
    DamageError,
    ImageError,
    InUseError,
    KeyFailure,
    NbdvdeError,
    NoSpaceError,
    RefusedError,
    UsageError,
    reason,
)
from nbdvde.newfile import NewFile

PathLike = str | os.PathLike[str]
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
EXTENT_BYTES = 64 << 10
"""Default extent. With 32 KiB clients read 1 MiB at a time a fifth slower, and small requests no faster."""


def compression_level(name: str | int) -> int:
    """zstd level of a compression setting: a name, 1 to 22, or 0 for none. Raises UsageError."""
    level = LEVELS.get(name, name) if isinstance(name, str) else name
    if isinstance(level, str) and level.isdecimal():
        level = int(level)
    if isinstance(level, int) and (1 <= level <= COMPRESSION_MAX or name == "none"):
        return level
    raise UsageError(f"compression {name}", "is unknown", f"use {', '.join(LEVELS)} or a level from 1 to 22")


def create_image(
    path: PathLike, size: int, *, secret: Secret | None, compression: str | int = "fastest",
    extent_bytes: int = EXTENT_BYTES, disk_name: str = "disk", segment_bytes: int | None = None, capacity: int = 0,
    dedup: bool = True, dedup_memory: int = 0,
) -> None:  # fmt: skip
    """Make an image with one disk of `size` bytes, encrypted unless `secret` is None.

    `capacity` is the most bytes that the file may have, 0 for no limit; `dedup_memory` the bytes for the index of
    duplicates, 0 for the default. A `MasterKey` as secret makes an image without key slots. Raises UsageError,
    RefusedError, NoSpaceError.
    """
    check_size(size)
    if extent_bytes % BLOCK or not BLOCK <= extent_bytes <= EXTENT_BLOCKS_MAX * BLOCK:
        raise UsageError(f"extent size {extent_bytes}", "is not a multiple of 4096 up to 1 MiB")
    check_capacity(capacity)
    level = compression_level(compression)
    segment_bytes = segment_bytes or _segment_bytes(capacity)
    with new_file(path) as storage:
        try:
            format_storage(
                storage, size, secret, level, extent_bytes, disk_name, segment_bytes, capacity=capacity,
                domain=int(dedup), dedup_mib=-(-dedup_memory >> 20),
            )  # fmt: skip
        finally:
            storage.close()


def check_capacity(capacity: int) -> None:
    """Raise UsageError unless an image can have this capacity."""
    if capacity and not MIN_CAPACITY <= capacity < 1 << 63:
        raise UsageError(f"capacity {capacity}", f"is not between {MIN_CAPACITY >> 20} MiB and 8 EiB")


def _segment_bytes(capacity: int) -> int:
    """Length of segments: 16 MiB, and less where that is much of the capacity: gaps between them would stay unused."""
    return min(SEGMENT_BYTES, max(1 << 20, 1 << (capacity // 256).bit_length() - 1)) if capacity else SEGMENT_BYTES


def format_storage(
    storage: Storage, size: int, secret: Secret | None, level: int = 1, extent_bytes: int = EXTENT_BYTES,
    disk_name: str = "disk", segment_bytes: int = SEGMENT_BYTES, *, capacity: int = 0, domain: int = 1,
    dedup_mib: int = 0,
) -> None:  # fmt: skip
    """Write an empty image. The superblocks come last, so that half an image is none."""
    uuid = uuids.uuid4().bytes
    encryption = ENCRYPTION_NONE if secret is None else ENCRYPTION_AES_256_GCM
    master = public_master(uuid)
    if secret is not None:
        key = secret if isinstance(secret, MasterKey) else MasterKey(os.urandom(32))
        master = key.data
        store_key_area(storage, _new_key_area(uuid, key, secret), storage.sync)
    keyring = Keyring(master, uuid, encryption)
    segment = Segment(0, BLOCK, 1, DATA_START, os.urandom(32))
    volume = VolumeEntry(1, disk_name, size, height_for(-(-size // BLOCK)), 0, None, domain=domain)
    catalogue = Root((volume,), (), 2, (0,) * 16, dedup_mib=dedup_mib)
    root = keyring.sealer(segment).seal(0, Kind.ROOT, deflate(catalogue.pack()))
    storage.allocate(0, segment.end)
    storage.write(segment.offset, [root.ljust(BLOCK, b"\0")])
    storage.sync()
    superblock = Superblock(
        uuid, 0, 0, encryption, level, extent_bytes, segment_bytes, STATE_CLEAN, time.time_ns(), capacity,
        segment, len(root), LogPoint(empty_segment(), 0, 0, 1, bytes(32)), ((disk_name, size),),
    )  # fmt: skip
    write_superblocks(storage, superblock, keyring.superblock_key(), storage.sync, both=True)


def _new_key_area(uuid: bytes, master: MasterKey, secret: Secret) -> KeyArea:
    if secret is master:
        return KeyArea.without_slots(uuid, master)
    return KeyArea.create(uuid, master, secret, fresh())


def fresh() -> keys.Fresh:
    """Random bytes and the time, for a new key slot."""
    return keys.Fresh(os.urandom(32), os.urandom(12), time.time_ns())


@contextmanager
def new_file(path: PathLike) -> Iterator[FileStorage]:
    """A new file that is there under its name, durable, when all went well, and else not at all. Close it inside.

    Raises RefusedError, ImageError, NoSpaceError.
    """
    try:
        new = NewFile(Path(path))
        try:
            yield FileStorage(new.file)
            new.finish()
        finally:
            new.abandon()
    except OSError as error:
        raise _host_error(path, error) from None


def _host_error(path: PathLike, error: OSError) -> NbdvdeError:
    if isinstance(error, FileExistsError):
        return RefusedError(str(path), "exists already", "choose another name, or remove it first")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(str(path), "no space left on the host", "free some")
    hint = "check the path and its permissions"
    return ImageError(str(path), reason(error), hint)


def open_file(path: PathLike, *, write: bool, lock: bool = True) -> FileStorage:
    """Open and lock an image file. Raises ImageError, InUseError, RefusedError."""
    try:
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if write and error.errno in _NOT_WRITABLE and os.access(path, os.R_OK):
            hint = "serve it with --read-only, or make it writable"
            raise RefusedError(str(path), "can be read, but not written", hint) from None
        raise _host_error(path, error) from None
    try:
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            raise ImageError(str(path), "is neither a file nor a block device")
        if lock:
            fcntl.flock(fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise InUseError(
            str(path), "is in use by another process", "stop it first, or use its control socket"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return FileStorage(fd)


def _named(path: PathLike, error: NbdvdeError) -> NbdvdeError:
    """The error with the image's path instead of just `image`, or in front of the damaged part's name."""
    if error.what == "image":
        return type(error)(str(path), error.why, error.hint)
    if isinstance(error, DamageError) and not error.what.startswith(str(path)):
        return type(error)(f"{path}: {error.what}", error.why, error.hint)
    return error


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Name the image in the errors that its parts and its device raise."""
    try:
        with placing(path):
            yield
    except OSError as error:
        raise _host_error(path, error) from None


@contextmanager
def placing(path: PathLike) -> Iterator[None]:
    """As `naming`, where errors of the system may be those of something else."""
    try:
        yield
    except NbdvdeError as error:
        raise _named(path, error) from None


@asynccontextmanager
async def open_image(
    path: PathLike, *, key: Secret | None = None, read_only: bool = False, cache_bytes: int = CACHE_BYTES,
    buffer_bytes: int = BUFFER_BYTES, dedup_memory: int | None = None,
) -> AsyncIterator[Image]:  # fmt: skip
    """Open an image, and close it cleanly at the end. The file stays locked in between.

    Raises ImageError, KeyFailure, InUseError, DamageError.
    """
    with naming(path):
        storage = await workers.run(open_file, path, write=not read_only)
        image = await open_storage(
            storage, key, read_only=read_only, cache_bytes=cache_bytes, buffer_bytes=buffer_bytes, path=str(path),
            dedup_memory=dedup_memory,
        )  # fmt: skip
    try:
        yield image
    finally:
        with naming(path):
            await image.close()


async def open_storage(
    storage: Storage, key: Secret | None, *, read_only: bool = False, cache_bytes: int = CACHE_BYTES,
    buffer_bytes: int = BUFFER_BYTES, checkpoint_bytes: int = LOG_BYTES, path: str = "image",
    dedup_memory: int | None = None,
) -> Image:  # fmt: skip
    """Open what is in a storage; it belongs to the image from then on, and is closed on failure."""
    try:
        loaded = await workers.run(
            load, storage, lambda superblock: master_key(storage, superblock, key), salvage=read_only
        )
        image = Image(
            loaded, path=path, read_only=read_only, cache_bytes=cache_bytes, buffer_bytes=buffer_bytes,
            checkpoint_bytes=checkpoint_bytes, dedup_memory=dedup_memory,
        )  # fmt: skip
        with trio.CancelScope(shield=True):
            await image.start()
            await load_exported(path, image.volumes, image.regions)
    except BaseException:
        storage.close()
        raise
    return image


def master_key(storage: Storage, superblock: Superblock, secret: Secret | None) -> bytes:
    """The master key of an image. Raises KeyFailure."""
    if superblock.encryption == ENCRYPTION_NONE:
        if secret is not None:  # or an image could be exchanged for a plain one unnoticed
            raise KeyFailure("image", "is not encrypted, and a key was given", "leave the key out if that is expected")
        return public_master(superblock.uuid)
    if secret is None:
        raise KeyFailure("image", "is encrypted", "give its key with --key-file")
    if isinstance(secret, MasterKey):
        return secret.data
    return load_key_area(storage).unlock(secret).data


def read_key_area(path: PathLike) -> KeyArea:
    """The key slots of an image, in use or not."""
    with naming(path), _peek(path) as storage:
        _refuse_unencrypted(read_superblocks(storage)[0])
        return load_key_area(storage)


def update_keys(path: PathLike, change: Callable[[KeyArea], KeyArea]) -> None:
    """Change the key slots of an image that nobody uses."""
    with naming(path):
        storage = open_file(path, write=True)
        try:
            _refuse_unencrypted(read_superblocks(storage)[0])
            change_key_area(storage, change, storage.sync)
        finally:
            storage.close()


def _refuse_unencrypted(superblock: Superblock) -> None:
    if superblock.encryption == ENCRYPTION_NONE:
        raise RefusedError("image", "is not encrypted, it has no key slots", "make a new one with a key")


@contextmanager
def _peek(path: PathLike) -> Iterator[FileStorage]:
    storage = open_file(path, write=False, lock=False)
    try:
        yield storage
    finally:
        storage.close()


def read_info(path: PathLike) -> ImageInfo:
    """What an image says in clear: no key needed, and it may be in use."""
    with naming(path), _peek(path) as storage:
        superblock = read_superblocks(storage)[0]
        used = 0
        if superblock.encryption != ENCRYPTION_NONE:
            used = len(load_key_area(storage).slots())
        return clear_info(superblock, str(path), file_bytes(path), used)


def check_image(
    path: PathLike, *, key: Secret | None = None, progress: Progress | None = None, rate: int | None = None
) -> CheckReport:  # fmt: skip
    """Verify an image that nobody writes, without changing it; blocks. With `rate`, so many bytes a second at most."""
    with naming(path):
        storage = open_file(path, write=False)
        try:
            slow, progress = paced(storage, rate, progress)
            return check_storage(slow, lambda superblock: master_key(storage, superblock, key), progress)
        finally:
            storage.close()
