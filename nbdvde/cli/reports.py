"""What commands tell of images, disks and servers, as text."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nbdvde.cli.output import counted, line, size, table
from nbdvde.cli.quantities import time_text
from nbdvde.disk import BLOCK
from nbdvde.engine.report import (
    CheckError,
    CheckReport,
    ClassReport,
    ImageInfo,
    OptimizeReport,
    RepairReport,
    SnapshotInfo,
    SpaceReport,
)

if TYPE_CHECKING:
    from nbdvde.admin.messages import DictionaryInfo, ExportStatus, Reloaded, Status
    from nbdvde.engine.keys import SlotInfo


def info(image: ImageInfo) -> None:
    """What `info` tells, as text."""
    facts = [
        ("image", image.path),
        ("format", str(image.format)),
        ("uuid", image.uuid),
        ("encryption", image.encryption),
        ("keys", str(image.key_slots)),
        ("created", time_text(image.created_ns)),
        ("stopped", "cleanly" if image.clean else "not yet, or not cleanly"),
        ("compression", image.compression),
        ("extent", size(image.extent_bytes)),
        ("capacity", "unlimited" if image.capacity is None else size(image.capacity)),
        ("file", size(image.file_bytes)),
    ]
    if image.stored_bytes:
        facts.append(("data", f"{size(sum(d.logical_bytes for d in image.disks))} in {size(image.stored_bytes)}"))
    if image.dedup_memory:
        on = any(disk.dedup_with for disk in image.disks)
        facts.append(("dedup", f"on, with {size(image.dedup_memory)} of memory" if on else "off"))
    for disk in image.disks:
        used = f", {size(disk.logical_bytes)} of data" if image.stored_bytes else ""
        begun = f", cloned from {disk.origin}" if disk.origin else ""
        facts.append((f"disk {disk.name}", size(disk.size) + used + begun))
        if disk.snapshots:
            newest = disk.snapshots[-1]
            text = f"{len(disk.snapshots)}, the newest is {newest.name} of {time_text(newest.created_ns)}"
            facts.append(("snapshots", text))
    if image.cleaning_held:
        facts.append(("cleaning", image.cleaning_held))
    if taken := image.statistics.get("bytes_in"):
        facts.append(("written", _compressed(int(taken), int(image.statistics["bytes_stored"]))))
    if shared := image.statistics.get("blocks_shared"):
        facts.append(("duplicates", f"{size(int(shared) * BLOCK)} stored as references"))
    table(facts)


def space(found: SpaceReport) -> None:
    """What `df` tells, as text."""
    facts = [
        ("capacity", "unlimited" if found.capacity is None else f"{size(found.capacity)}, {found.fill:.1%} full"),
        ("file", size(found.file_bytes)),
        ("logical", size(found.logical_bytes)),
        ("written", size(found.written_bytes)),
        ("unique", size(found.unique_bytes)),
        ("shared", size(found.shared_bytes)),
        ("compressed", size(found.compressed_bytes)),
        ("garbage", size(found.garbage_bytes)),
        ("reserved", size(found.reserved_bytes)),
        ("overhead", size(found.overhead_bytes)),
    ]
    for disk in found.disks:
        parts = f"{size(disk.exclusive_bytes)} exclusive, {size(disk.shared_bytes)} shared"
        name = disk.name if " " in disk.name else f"disk {disk.name}"
        facts.append((name, f"{size(disk.size)}, {size(disk.logical_bytes)} of data: {parts}"))
    table(facts)


def optimized(done: OptimizeReport) -> None:
    """What `optimize` did, as text."""
    before, after = done.file_bytes_before, done.file_bytes_after
    less = f", {(before - after) / before:.1%} less" if after < before else ""
    table([
        ("file", f"{size(before)} before, {size(after)} now{less}"),
        ("repacked", size(done.blocks_repacked * BLOCK)),
        ("duplicates", f"{size(done.blocks_shared * BLOCK)} became references"),
        ("cleaned", size(done.cleaned_bytes)),
        ("dictionaries", _learnt(done)),
        ("recompressed", f"{done.segments_recompressed} segments, {size(done.recompressed_bytes)} saved"),
        ("time", f"{done.seconds:.1f} s"),
    ])  # fmt: skip


def _learnt(done: OptimizeReport) -> str:
    """For which classes a dictionary was trained, and what it saves of a sample; without any, why."""
    if trained := [f"{one.name}, {one.saved:.0%} less" for one in done.dictionaries if one.id is not None]:
        return "; ".join(trained)
    return "none: " + ("; ".join(f"{one.name}, {one.note}" for one in done.dictionaries) or done.dictionaries_note)


def _compressed(taken: int, stored: int) -> str:
    """What clients wrote and what it took, since the image was made."""
    saved = f"{size(taken - stored)} saved, " if taken > stored else ""
    return f"{size(taken)} stored in {size(stored)} ({saved}ratio {taken / (stored or 1):.2f})"


def status(server: "Status") -> None:
    """What `ctl IMAGE status` tells, as text."""
    facts = [
        ("version", server.version),
        ("pid", str(server.pid)),
        ("uptime", f"{server.uptime_s:.0f} s"),
        ("image", server.image or "none, the disk is in memory"),
        ("mode", "read-only" if server.read_only else "read-write"),
        ("exports", ", ".join(server.exports)),
    ]
    facts += [("address", address) for address in server.addresses]
    facts += [("dashboard", address) for address in server.admin]
    facts += [
        (f"client {client.number}", f"{client.peer}, {client.export or 'handshake'}") for client in server.clients
    ]
    if server.failure:
        facts.append(("failure", server.failure))
    table(facts)


def exports(served: Sequence["ExportStatus"]) -> None:
    """The exports, as text."""
    rows = [("name", "size", "mode", "clients", "disk", "description")]
    for export in served:
        mode = "read-only" if export.read_only else "read-write"
        disk = f"{export.disk} of {export.image}" if export.image else "in memory"
        rows.append((export.name, size(export.size), mode, str(export.clients), disk, export.description))
    table(rows)


def reloaded(done: "Reloaded") -> None:
    """What a reload changed, as text."""
    line(f"added: {', '.join(done.added) or 'none'}; removed: {', '.join(done.removed) or 'none'}")


def report(path: os.PathLike[str], checked: CheckReport, new: os.PathLike[str] | None = None) -> None:
    """What `check` found, as text; `new` is where it saved what can be read."""
    for error in checked.repaired if isinstance(checked, RepairReport) else ():
        line(f"repaired: {_placed(error)}")
    for error in checked.errors:
        line(_placed(error))
    count = len(checked.errors)
    saved = f" in {os.fspath(new)}, which has what can be read" if new else ""
    found = "sound" if checked.ok else counted(count, "error")
    line(f"{os.fspath(path)}: {found}, {counted(checked.units_verified, 'unit')} verified{saved}")


def _placed(error: CheckError) -> str:
    where = error.where
    if error.disk is not None and error.offset is not None:
        where += f", disk {error.disk}, {error.length} bytes at {error.offset}"
    return f"{where}: {error.what}"


def disks(image: ImageInfo) -> None:
    """The disks of an image, as text."""
    rows = [("name", "size", "data", "snapshots", "dedup with", "cloned from")]
    rows += [
        (disk.name, size(disk.size), size(disk.logical_bytes), str(len(disk.snapshots)), disk.dedup_with or "-",
         disk.origin or "-")
        for disk in image.disks
    ]  # fmt: skip
    table(rows)


def snapshots(found: Iterable[tuple[str, SnapshotInfo]]) -> None:
    """Snapshots with their names in full, as text."""
    rows = [("name", "created", "size")]
    rows += [(name, time_text(snapshot.created_ns), size(snapshot.size)) for name, snapshot in found]
    table(rows)


def dictionaries(found: Iterable["DictionaryInfo"]) -> None:
    """Dictionaries, as text."""
    rows = [("id", "algorithm", "size", "trained", "samples", "older", "sha256")]
    rows += [
        (str(one.id), one.algorithm, size(one.size), time_text(one.trained_ns), str(one.samples), str(one.kept),
         one.sha256[:16])
        for one in found
    ]  # fmt: skip
    table(rows)


def trained(found: Iterable[ClassReport]) -> None:
    """What training came to, as text."""
    rows = [("class", "samples", "without", "with", "saved", "dictionary")]
    for one in found:
        figures = (f"{one.ratio_without:.2f}", f"{one.ratio_with:.2f}", f"{one.saved:.1%}")
        made = one.note or ("not kept" if one.id is None else str(one.id))
        rows.append((one.name or "-", str(one.samples), *(figures if one.ratio_with else ("-",) * 3), made))
    table(rows)


def ranges(found: Iterable[tuple[int, int]], what: str = "") -> None:
    """Parts of a disk as they become known, (offset, length)."""
    for offset, length in found:
        line(f"{offset:>14} {length:>14}{what}")


def slots(used: Sequence["SlotInfo"]) -> None:
    """The key slots, as text."""
    rows = [("slot", "kind", "created", "label")]
    rows += [(str(slot.slot), slot.kind, time_text(slot.created_ns), slot.label) for slot in used]
    table(rows)
