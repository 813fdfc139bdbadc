"""Everything that commands print."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from json import dumps
from typing import TYPE_CHECKING, TextIO

import msgspec

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
from nbdvde.errors import NbdvdeError

if TYPE_CHECKING:
    from nbdvde.admin.anoncalls import ErasureInfo, MappingInfo
    from nbdvde.admin.messages import DictionaryInfo, ExportStatus, Reloaded, Status
    from nbdvde.admin.streamcalls import StreamInfo
    from nbdvde.admin.vaultcalls import PassportInfo
    from nbdvde.admin.wormcalls import WormInfo, WormRecord
    from nbdvde.engine.keys import SlotInfo


def line(text: str) -> None:
    """One line on standard output. Raises OSError when it cannot be written; nothing more is written then."""
    _print(clean(text))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        silence(sys.stdout)
        error.filename = "standard output"
        raise


def raw(data: bytes) -> None:
    """Bytes on standard output. Raises OSError when they cannot be written."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        silence(sys.stdout)
        error.filename = "standard output"
        raise


def lines(texts: Iterable[str]) -> None:
    """As `line`, many at a time."""
    rest = iter(texts)
    while part := list(islice(rest, 1000)):
        _print("\n".join(map(clean, part)))


def prints(text: str) -> bool:
    """Whether standard output has the characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def coloured(text: str) -> None:
    """As `line`, of text that is ours and may have escape sequences of colours."""
    _print(text)


def note(text: str) -> None:
    """One line on standard error, if there is anybody to read it."""
    try:
        print(f"nbdvde: {clean(text)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


@contextmanager
def unless_interrupted(consequence: str) -> Iterator[None]:
    """Tell what follows from it when somebody ends the work inside."""
    try:
        yield
    except (KeyboardInterrupt, BaseExceptionGroup) as error:
        if isinstance(error, KeyboardInterrupt) or error.subgroup(KeyboardInterrupt):
            note(consequence)
        raise


def silence(stream: TextIO) -> None:
    """Throw away what a stream still holds and gets, so that flushing it at exit does not fail once more."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def clean(text: str) -> str:
    """The text with everything replaced that a terminal might obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def json(value: object) -> None:
    """As `line`, of JSON in ASCII: names of files need not be valid text."""
    _print(dumps(msgspec.to_builtins(value)))


def failure(error: NbdvdeError, *, as_json: bool) -> int:
    """Tell of an error; answers its exit code."""
    note(str(error))
    if as_json:
        with suppress(OSError):
            json({"error": {"code": int(error.exit_code), "message": error.message, "hint": error.hint}})
    return error.exit_code


def bug(error: BaseException) -> NbdvdeError:
    """What tells of an exception nobody expected, with its traceback in a file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nbdvde-", suffix=".log", delete=False, errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return NbdvdeError("unexpected failure", text, "this is a bug; there was no place for a log")
    return NbdvdeError("unexpected failure", text, f"this is a bug; please report it with {file.name}")


def size(count: int) -> str:
    """Bytes for people, in units of 1024; exact ones look like the sizes that are typed."""
    value, unit = float(count), ""
    for larger in "KMGTP":
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.{0 if value == int(value) else 1}f}{unit}"


def info(image: ImageInfo) -> None:
    """What `info` tells, as text."""
    facts = [
        ("image", image.path),
        ("format", str(image.format)),
        ("uuid", image.uuid),
        ("encryption", image.encryption),
        ("keys", str(image.key_slots)),
        ("created", _time(image.created_ns)),
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
            text = f"{len(disk.snapshots)}, the newest is {newest.name} of {_time(newest.created_ns)}"
            facts.append(("snapshots", text))
    if image.cleaning_held:
        facts.append(("cleaning", image.cleaning_held))
    if taken := image.statistics.get("bytes_in"):
        facts.append(("written", _compressed(int(taken), int(image.statistics["bytes_stored"]))))
    if shared := image.statistics.get("blocks_shared"):
        facts.append(("duplicates", f"{size(int(shared) * BLOCK)} stored as references"))
    _aligned(facts)


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
    _aligned(facts)


def optimized(done: OptimizeReport) -> None:
    """What `optimize` did, as text."""
    before, after = done.file_bytes_before, done.file_bytes_after
    less = f", {(before - after) / before:.1%} less" if after < before else ""
    _aligned([
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
    _aligned(facts)


def exports(served: Sequence["ExportStatus"]) -> None:
    """The exports, as text."""
    rows = [("name", "size", "mode", "clients", "disk", "description")]
    for export in served:
        mode = "read-only" if export.read_only else "read-write"
        disk = f"{export.disk} of {export.image}" if export.image else "in memory"
        rows.append((export.name, size(export.size), mode, str(export.clients), disk, export.description))
    _aligned(rows)


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


def counted(count: int, what: str) -> str:
    """So many of something."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


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
    _aligned(rows)


def snapshots(found: Iterable[tuple[str, SnapshotInfo]]) -> None:
    """Snapshots with their names in full, as text."""
    rows = [("name", "created", "size")]
    rows += [(name, _time(snapshot.created_ns), size(snapshot.size)) for name, snapshot in found]
    _aligned(rows)


def dictionaries(found: Iterable["DictionaryInfo"]) -> None:
    """Dictionaries, as text."""
    rows = [("id", "algorithm", "size", "trained", "samples", "older", "sha256")]
    rows += [
        (str(one.id), one.algorithm, size(one.size), _time(one.trained_ns), str(one.samples), str(one.kept),
         one.sha256[:16])
        for one in found
    ]  # fmt: skip
    _aligned(rows)


def passports(found: Iterable["PassportInfo"]) -> None:
    """Compliance passports, as text."""
    rows = [("id", "object", "framework", "status", "state", "issued", "expires", "issuer")]
    rows += [
        (str(one.id), str(one.object), one.framework, one.status, one.state, _time(one.issued_ns),
         "never" if one.expires_ns is None else _time(one.expires_ns), clean(one.issuer))
        for one in found
    ]  # fmt: skip
    _aligned(rows)


def worm(found: "WormInfo") -> None:
    """The state of a WORM region, as text."""
    from nbdvde.engine.regions.worm import shown

    left = "for ever" if found.left_ns is None else shown(found.left_ns) if found.left_ns else "ended"
    kept = "for ever" if not found.retention_ns else shown(found.retention_ns)
    _aligned([
        ("capacity", f"{size(found.capacity)}, {size(found.capacity - found.mark)} free"),
        ("appends", str(found.records)),
        ("created", _time(found.created_ns)),
        ("clock", _time(found.created_ns + found.clock_ns)),
        ("retention", kept),
        ("left", left),
    ])  # fmt: skip


def worm_records(found: Iterable["WormRecord"]) -> None:
    """Appends to a WORM region, as text."""
    rows = [("offset", "bytes", "time", "sha256")]
    rows += [(str(one.offset), str(one.length), _time(one.time_ns), one.sha256) for one in found]
    _aligned(rows)


def stream(found: "StreamInfo") -> None:
    """The state of a stream, as text."""
    _aligned([
        ("policy", found.policy),
        ("capacity", f"{size(found.capacity)}, {found.allocation:.1%} allocated, {size(found.increment)} at a time"),
        ("entries", str(found.entries)),
        ("tail", str(found.tail)),
        ("head", str(found.head)),
    ])  # fmt: skip


def mappings(found: Iterable["MappingInfo"]) -> None:
    """Mappings of the anonymisation table, as text."""
    rows = [("mapping", "subject", "type", "state", "created", "token")]
    rows += [(str(one.id), str(one.subject), one.type, one.state, _time(one.created_ns), one.token) for one in found]
    _aligned(rows)


def erasure(found: "ErasureInfo") -> None:
    """The proof of an erasure, as text."""
    _aligned([
        ("subject", str(found.subject)),
        ("erased", _time(found.erased_ns)),
        ("key", f"{found.key_fingerprint}, destroyed"),
        ("mappings", f"{found.mappings}, SHA-256 {found.mappings_sha256}"),
        ("link", f"{found.number} of {found.of}, {found.chain}"),
        ("proof", "holds" if found.holds else "; ".join(found.doubts)),
    ])  # fmt: skip


def trained(found: Iterable[ClassReport]) -> None:
    """What training came to, as text."""
    rows = [("class", "samples", "without", "with", "saved", "dictionary")]
    for one in found:
        figures = (f"{one.ratio_without:.2f}", f"{one.ratio_with:.2f}", f"{one.saved:.1%}")
        made = one.note or ("not kept" if one.id is None else str(one.id))
        rows.append((one.name or "-", str(one.samples), *(figures if one.ratio_with else ("-",) * 3), made))
    _aligned(rows)


def ranges(found: Iterable[tuple[int, int]], what: str = "") -> None:
    """Parts of a disk as they become known, (offset, length)."""
    for offset, length in found:
        line(f"{offset:>14} {length:>14}{what}")


def _time(since_1970_ns: int) -> str:
    return datetime.fromtimestamp(since_1970_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def slots(used: Sequence["SlotInfo"]) -> None:
    """The key slots, as text."""
    rows = [("slot", "kind", "created", "label")]
    rows += [(str(slot.slot), slot.kind, _time(slot.created_ns), slot.label) for slot in used]
    _aligned(rows)


def table(rows: Iterable[Sequence[str]]) -> None:
    """Rows of cells, the first one their titles, in columns."""
    _aligned(rows)


def _aligned(rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
