"""Training, replacing and removing dictionaries, as commands and the control socket ask for it."""

from collections.abc import Callable
from typing import Literal

from nbdvde import workers
from nbdvde.admin.messages import DictionaryInfo, DictionaryReport, DictionaryRequest
from nbdvde.engine.dictchange import class_report, train_each
from nbdvde.engine.dictionaries import ALGORITHMS, SIZE_MAX, Entry, Table, check_slot
from nbdvde.engine.image import Image
from nbdvde.engine.report import ClassReport
from nbdvde.engine.sampling import sample
from nbdvde.engine.training import CLASSES, SAMPLES, SIZE, SIZE_MIN, Trained, Trainer
from nbdvde.errors import RefusedError, UsageError

Action = Literal["train", "replace", "remove"]
Progress = Callable[[int, int], None]


async def change(action: Action, request: DictionaryRequest, image: Image, progress: Progress) -> DictionaryReport:
    """Do it, durably. Raises NbdvdeError."""
    _check(action, request)
    match action:
        case "train":
            classes = await _train(request, image, progress)
        case "replace":
            classes = [await _replace(_slot(action, request), request, image, progress)]
        case "remove":
            classes = []
            await image.remove_dictionary(_slot(action, request), progress)
    return DictionaryReport(listing(image.dictionaries.table), classes)


def listing(table: Table) -> list[DictionaryInfo]:
    """What is in use, by slot."""
    return [_info(entry, sum(kept.slot == entry.slot for kept in table.kept)) for entry in table]


def _info(entry: Entry, kept: int) -> DictionaryInfo:
    algorithm = ALGORITHMS[entry.algorithm] if entry.algorithm < len(ALGORITHMS) else str(entry.algorithm)
    digest = entry.sha256.hex()
    return DictionaryInfo(entry.slot, algorithm, entry.size, entry.trained_ns, entry.samples, digest, kept)


def _check(action: Action, request: DictionaryRequest) -> None:
    if not SIZE_MIN <= request.size <= SIZE_MAX:
        raise UsageError(f"size {request.size}", f"is not between {SIZE_MIN} and {SIZE_MAX} bytes", f"try {SIZE}")
    for name in request.classes:
        if name not in CLASSES:
            raise UsageError(f"class {name}", "is unknown", f"use {', '.join(CLASSES)}")
    if action != "train":
        check_slot(_slot(action, request))


def _slot(action: Action, request: DictionaryRequest) -> int:
    if request.id is None:
        raise UsageError(f"dictionaries {action}", "there is no id", "give id")
    return request.id


async def _train(request: DictionaryRequest, image: Image, progress: Progress) -> list[ClassReport]:
    async def keep(trained: Trained) -> int | str:
        if request.dry_run:
            return ""
        return (await image.register_dictionary(trained.content, trained.samples)).slot

    trainer = Trainer(image.superblock.compression, image.dictionaries, request.size)
    return await train_each(trainer.by_class(await _blocks(request, image, progress), request.classes), keep)


async def _replace(slot: int, request: DictionaryRequest, image: Image, progress: Progress) -> ClassReport:
    number = image.dictionaries.table.get(slot).number
    trainer = Trainer(image.superblock.compression, image.dictionaries, request.size)
    trained = await workers.run(trainer.again, number, await _blocks(request, image, progress))
    if trained.why_not:
        raise RefusedError(f"dictionary {slot}", f"cannot be trained anew: {trained.why_not}", "it stays as it is")
    if not request.dry_run:
        await image.replace_dictionary(slot, trained.content, trained.samples, progress)
    return class_report(trained, slot)


async def _blocks(request: DictionaryRequest, image: Image, progress: Progress) -> list[bytes]:
    disk = image.disk(request.disk)
    blocks = await sample(disk, SAMPLES, progress)
    if not blocks:
        raise RefusedError(f"disk {disk.name}", "holds no data to train from", "write some first")
    return blocks
