"""What commands tell of the management regions of disks, as text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nbdvde.cli.output import clean, size, table
from nbdvde.cli.quantities import time_text

if TYPE_CHECKING:
    from nbdvde.admin.anoncalls import ErasureInfo, MappingInfo
    from nbdvde.admin.streamcalls import StreamInfo
    from nbdvde.admin.vaultcalls import PassportInfo
    from nbdvde.admin.wormcalls import WormInfo, WormRecord


def passports(found: Iterable["PassportInfo"]) -> None:
    """Compliance passports, as text."""
    rows = [("id", "object", "framework", "status", "state", "issued", "expires", "issuer")]
    rows += [
        (str(one.id), str(one.object), one.framework, one.status, one.state, time_text(one.issued_ns),
         "never" if one.expires_ns is None else time_text(one.expires_ns), clean(one.issuer))
        for one in found
    ]  # fmt: skip
    table(rows)


def worm(found: "WormInfo") -> None:
    """The state of a WORM region, as text."""
    from nbdvde.engine.regions.worm import shown

    left = "for ever" if found.left_ns is None else shown(found.left_ns) if found.left_ns else "ended"
    kept = "for ever" if not found.retention_ns else shown(found.retention_ns)
    table([
        ("capacity", f"{size(found.capacity)}, {size(found.capacity - found.mark)} free"),
        ("appends", str(found.records)),
        ("created", time_text(found.created_ns)),
        ("clock", time_text(found.created_ns + found.clock_ns)),
        ("retention", kept),
        ("left", left),
    ])  # fmt: skip


def worm_records(found: Iterable["WormRecord"]) -> None:
    """Appends to a WORM region, as text."""
    rows = [("offset", "bytes", "time", "sha256")]
    rows += [(str(one.offset), str(one.length), time_text(one.time_ns), one.sha256) for one in found]
    table(rows)


def stream(found: "StreamInfo") -> None:
    """The state of a stream, as text."""
    table([
        ("policy", found.policy),
        ("capacity", f"{size(found.capacity)}, {found.allocation:.1%} allocated, {size(found.increment)} at a time"),
        ("entries", str(found.entries)),
        ("tail", str(found.tail)),
        ("head", str(found.head)),
    ])  # fmt: skip


def mappings(found: Iterable["MappingInfo"]) -> None:
    """Mappings of the anonymisation table, as text."""
    rows = [("mapping", "subject", "type", "state", "created", "token")]
    rows += [
        (str(one.id), str(one.subject), one.type, one.state, time_text(one.created_ns), one.token) for one in found
    ]
    table(rows)


def erasure(found: "ErasureInfo") -> None:
    """The proof of an erasure, as text."""
    table([
        ("subject", str(found.subject)),
        ("erased", time_text(found.erased_ns)),
        ("key", f"{found.key_fingerprint}, destroyed"),
        ("mappings", f"{found.mappings}, SHA-256 {found.mappings_sha256}"),
        ("link", f"{found.number} of {found.of}, {found.chain}"),
        ("proof", "holds" if found.holds else "; ".join(found.doubts)),
    ])  # fmt: skip
