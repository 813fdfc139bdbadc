"""An image by its path: through its control socket when it is served, at rest otherwise."""

import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio
from msgspec import structs

import nbdvde
from nbdvde import keysource
from nbdvde.admin import dictionarychange, volumechange
from nbdvde.admin.calls import Call, Feed
from nbdvde.admin.client import ControlClient, connect, control_path
from nbdvde.admin.difference import Range, Ranges, difference
from nbdvde.admin.keychange import Action, apply
from nbdvde.admin.messages import (
    CopyLine,
    CopyRequest,
    DictionaryReport,
    DictionaryRequest,
    DiffRequest,
    KeyList,
    KeyRequest,
    OptimizeRequest,
    SecretBody,
    VolumeInfo,
    VolumeRequest,
)
from nbdvde.cli.progress import ProgressBar
from nbdvde.disk import Disk
from nbdvde.engine.access import placing
from nbdvde.engine.describe import file_bytes
from nbdvde.engine.image import Image
from nbdvde.engine.keys import KeyArea, Secret
from nbdvde.engine.optimize import Options
from nbdvde.engine.report import CheckReport, ImageInfo, OptimizeReport, RepairReport, SpaceReport
from nbdvde.errors import ImageError, InUseError, NetworkError
from nbdvde.replication.notes import refuse_if_member
from nbdvde.transfer import copy_in, copy_out

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")


class Copied(NamedTuple):
    """From or to which disk how many bytes were copied."""

    disk: str
    bytes: int


def _copied(answer: CopyLine) -> Copied:
    return Copied(answer.disk, answer.bytes)


SERVED_RATE = 64 << 20
"""Bytes a second beside clients, unless somebody says otherwise."""


def default_control(image: Path) -> Path:
    """The control socket of an image, where no other is named. Raises ImageError for `.` and `/`."""
    if not image.name:
        raise ImageError(str(image), "is a directory", "name the image in it")
    return control_path(image)


async def until_interrupted(work: Awaitable[T]) -> T:
    """Do something that Ctrl-C may cancel only where it has a right to be cancelled. Raises KeyboardInterrupt then."""
    interrupted = False

    async def watch() -> None:
        nonlocal interrupted
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                interrupted = True
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        result = await work
        nursery.cancel_scope.cancel()
        return result
    assert interrupted, "nobody else cancels"
    raise KeyboardInterrupt


class ImageByPath:
    """What commands do with an image. Secrets are read, or asked for, only when they are needed."""

    def __init__(self, path: Path, *, key_file: Path | None = None, control: Path | None = None) -> None:
        self._path, self._key_file = path, key_file
        self._secret: Secret | None = None
        self._control = control or default_control(path)

    @cached_property
    def _served(self) -> ControlClient | None:
        return connect(self._control)

    def server(self) -> ControlClient:
        """The running server. Raises NetworkError when there is none."""
        if self._served is None:
            hint = "serve the image first, or name its socket with --control"
            raise NetworkError(f"control socket {self._control}", "no server listens there", hint)
        return self._served

    @property
    def is_served(self) -> bool:
        """Whether a server is asked, not the file."""
        return self._served is not None

    def info(self) -> ImageInfo:
        """All that can be told; without a key file that is less of an encrypted image at rest."""
        if self._served:
            return self._served.info()
        info = nbdvde.read_info(self._path)
        if info.encryption != "none" and not self._key_file:
            return info
        try:
            return self._opened_info()
        except InUseError:
            if self._key_file:
                raise
            return info

    def _opened_info(self) -> ImageInfo:
        async def ask(image: Image) -> ImageInfo:
            return image.info()

        return self._with_image(ask, read_only=True)

    def whole_info(self) -> ImageInfo:
        """As `info`, but never less: a key that is needed is asked for."""
        return self._served.info() if self._served else self._opened_info()

    def diff(self, request: DiffRequest, cut: Callable[[Range], None]) -> Iterator[Range]:
        """What changed since a snapshot; in the end `cut` hears what that has beyond the end of the disk, if so."""
        if self._served:
            return self._served.diff(request, cut)
        found: Ranges = []

        async def tell(part: Ranges) -> None:
            found.extend(part)

        beyond = self._with_image(
            lambda image: difference(image, request, tell, lambda _disk: nullcontext()), read_only=True
        )
        if beyond:
            cut(beyond)
        return iter(found)

    def change_volume(self, action: volumechange.Action, request: VolumeRequest) -> VolumeInfo:
        """Make, change or delete a disk or a snapshot."""
        if self._served:
            return self._served.change_volume(action, request)
        return self._with_image(lambda image: volumechange.change(action, request, image, volumechange.at_rest))

    def call(self, call: Call[Q, A], request: Q) -> A:
        """Ask for something that is asked in the same way of an image at rest."""
        if self._served:
            return self._served.call(call, request)
        return self._with_image(lambda image: call.work(image, request), read_only=not call.changes)

    def calls(self, call: Call[Q, A], requests: Iterable[Q], show: Callable[[A], None]) -> None:
        """The same, once for each request, of which each is taken when the one before it is answered."""
        if self._served:
            for request in requests:
                show(self._served.call(call, request))
            return

        async def ask(image: Image) -> None:
            for request in requests:
                show(await call.work(image, request))

        self._with_image(ask, read_only=not call.changes)

    def feed(self, call: Feed[Q, A], request: Q, show: Callable[[A], None]) -> None:
        """The same, with any number of answers."""
        if self._served:
            for line in self._served.feed(call, request):
                show(line)
            return

        async def ask(image: Image) -> None:
            async with aclosing(call.work(image, request)) as lines:
                async for line in lines:
                    show(line)

        self._with_image(ask, read_only=not call.changes)

    def dictionaries(self) -> DictionaryReport:
        """Those that there are."""
        if self._served:
            return self._served.dictionaries()

        async def ask(image: Image) -> DictionaryReport:
            return DictionaryReport(dictionarychange.listing(image.dictionaries.table))

        return self._with_image(ask, read_only=True)

    def change_dictionaries(self, action: dictionarychange.Action, request: DictionaryRequest) -> DictionaryReport:
        """Train, replace or remove dictionaries."""
        with ProgressBar("reading") as bar:
            if self._served:
                return self._served.change_dictionaries(action, request, bar)
            return self._with_image(
                lambda image: dictionarychange.change(action, request, image, bar), read_only=request.dry_run
            )

    def df(self) -> SpaceReport:
        """Where the bytes went."""
        if self._served:
            return self._served.df()

        reports: list[SpaceReport] = []

        async def ask(image: Image) -> None:
            reports.append(await image.space())

        self._with_image(ask, read_only=True)
        return reports[0]

    def check(self, rate: int | None = None) -> CheckReport:
        """Verify everything, with `rate` at so many bytes a second at most."""
        with ProgressBar("checking") as bar:
            if self._served:
                return self._served.check(bar, rate)
            with self._at_rest():
                return nbdvde.check_image(self._path, key=self.secret(), progress=bar, rate=rate)

    def optimize(self, options: Options) -> OptimizeReport:
        """Make the image smaller; while it is served, at so many bytes a second at most."""
        with ProgressBar("optimizing") as bar:
            if self._served:
                asked = OptimizeRequest(
                    options.rate or SERVED_RATE, list(options.passes), options.level, options.memory
                )
                return self._served.optimize(asked, bar)
            nbdvde.read_info(self._path)  # tells what is wrong with the image
            before = file_bytes(self._path)
            report = self._with_image(lambda image: until_interrupted(image.optimize(options, bar)))
            return structs.replace(report, file_bytes_before=before, file_bytes_after=file_bytes(self._path))

    def repair(self) -> RepairReport:
        """Make again what follows from something else."""
        return self._repair(nbdvde.repair_image)

    def salvage(self, new: Path) -> RepairReport:
        """Save what can be read into a new image."""
        return self._repair(partial(nbdvde.salvage_image, new=new))

    def _repair(self, work: Callable[..., Awaitable[RepairReport]]) -> RepairReport:
        if self._served:
            raise InUseError(str(self._path), "is being served", "stop its server first")
        with self._at_rest(), ProgressBar("checking") as bar:
            return trio.run(partial(work, self._path, key=self.secret(), progress=bar))

    def copy_in(self, file: Path, disk: str | None) -> Copied:
        """Make a disk hold what a raw file holds."""
        with ProgressBar("importing") as bar:
            if self._served:
                return _copied(self._served.copy("import", CopyRequest(str(file.absolute()), disk), bar))
            return self._with_disk(disk, lambda opened: copy_in(file, opened, bar))

    def copy_out(self, file: Path, disk: str | None, *, overwrite: bool) -> Copied:
        """Write a disk to a raw file."""
        with ProgressBar("exporting") as bar:
            if self._served:
                return _copied(self._served.copy("export", CopyRequest(str(file.absolute()), disk, overwrite), bar))
            copying = partial(copy_out, path=file, progress=bar, overwrite=overwrite)
            return self._with_disk(disk, copying, read_only=True)

    def use(self, disk: str | None, work: Callable[[Disk], Awaitable[int]], *, read_only: bool = False) -> Copied:
        """Copy from or to a disk of the image, which must be at rest; `work` answers how many bytes."""
        if self._served:
            hint = "stop its server, or give qemu-img the URI that nbdvde ctl status shows"
            raise InUseError(str(self._path), "is being served", hint)
        return self._with_disk(disk, work, read_only=read_only)

    def _with_disk(
        self, disk: str | None, work: Callable[[Disk], Awaitable[int]], *, read_only: bool = False
    ) -> Copied:
        async def run(image: Image) -> Copied:
            opened = image.disk(disk)
            return Copied(opened.name, await work(opened))

        return self._with_image(run, read_only=read_only)

    def enter_cluster(self, work: Callable[[Image], Awaitable[T]]) -> T:
        """Do to an image what no other command may once it belongs to a cluster. Raises InUseError."""
        if self._served:
            raise InUseError(str(self._path), "is being served", "stop its server first")
        return self._with_image(work, member=True)

    def _with_image(self, work: Callable[[Image], Awaitable[T]], *, read_only: bool = False, member: bool = False) -> T:
        async def run() -> T:
            async with nbdvde.open_image(self._path, key=secret, read_only=read_only) as image:
                if not member:
                    await refuse_if_member(image)
                with placing(self._path):
                    return await work(image)

        with self._at_rest():
            secret = self.secret()
            return trio.run(run)

    def keys(self) -> KeyList:
        """The key slots; no key is needed."""
        return self._served.keys() if self._served else KeyList(nbdvde.read_key_area(self._path).slots())

    def change_keys(
        self, action: Action, *, new_key_file: Path | None = None, slot: int | None = None, label: str = ""
    ) -> KeyList:
        """Add, remove or change a key; answers the slots then in use."""
        self.keys()  # tells what is wrong with the image before a secret is asked for
        secret = keysource.secret(self._key_file, "Passphrase that opens the image: ")
        new = None
        if action != "remove":
            new = SecretBody.of(keysource.secret(new_key_file, "New passphrase: ", confirm=True))
        request = KeyRequest(SecretBody.of(secret), new, slot, label)
        if self._served:
            return self._served.change_keys(action, request)
        return self._change_at_rest(action, request)

    def _change_at_rest(self, action: Action, request: KeyRequest) -> KeyList:
        from nbdvde.engine.access import fresh

        def change(area: KeyArea) -> KeyArea:
            return apply(action, request, area, fresh())

        with self._at_rest():
            nbdvde.update_keys(self._path, change)
        return self.keys()

    def secret(self) -> Secret | None:
        """What opens the image, asked for once; None when it is not encrypted."""
        if self._secret is None:
            self._secret = self._ask()
        return self._secret

    def _ask(self) -> Secret | None:
        encryption = nbdvde.read_info(self._path).encryption  # also tells first what is wrong with the image
        if encryption == "none" and not self._key_file:
            return None
        return keysource.secret(self._key_file)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Say more about an image that is in use than that it is."""
        try:
            yield
        except InUseError as error:
            why = f"{error.why}, and no control socket answers at {self._control}"
            raise InUseError(error.what, why, "stop that process, or name its socket with --control") from None
