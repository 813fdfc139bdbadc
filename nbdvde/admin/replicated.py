"""Changes of a replicated image: whoever is asked has its group agree on them, and every node makes them."""

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, cast, get_args

import msgspec

from nbdvde import moment
from nbdvde.admin import metricscalls, streamcalls, vaultcalls, volumechange, wormcalls
from nbdvde.admin.calls import Call as AdminCall
from nbdvde.admin.calls import Feed, parse
from nbdvde.admin.messages import VolumeRequest
from nbdvde.disk import Disk
from nbdvde.engine.access import naming
from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError
from nbdvde.replication.machine import Execute, ImageMachine
from nbdvde.replication.operations import Call

_ACTIONS = get_args(volumechange.Action)


def _changes(calls: Iterable[AdminCall[Any, Any] | Feed[Any, Any]]) -> dict[str, AdminCall[Any, Any]]:
    return {call.path: call for call in calls if isinstance(call, AdminCall) and call.changes}


_OF_REGIONS = _changes(
    (*streamcalls.CALLS, *vaultcalls.VAULT_CALLS, *metricscalls.CALLS, *wormcalls.CALLS, wormcalls.TEND)
)


def executing(image: Image) -> Execute:
    """What makes a change that was agreed on, with the answer as JSON; the same on every node."""

    async def execute(machine: ImageMachine, call: Call) -> bytes:
        index = machine.applied.index + 1
        said = moment.given(call.time_ns, call.seed, clock=call.clock, entry=index)
        with said, naming(image.path):
            if call.path in _ACTIONS:
                done = await _change_volumes(image, machine, call)
            elif call.path in _OF_REGIONS:
                done = await _change_region(image, index, call)
            else:
                raise RefusedError(f"replicated image {image.path}", f"knows no {call.path}", "is another node newer?")
        return msgspec.json.encode(done)

    return execute


async def _change_volumes(image: Image, machine: ImageMachine, call: Call) -> object:
    # Whether images deduplicate is the business of each: what a disk shares must not decide whether there is one.
    request = msgspec.structs.replace(parse(call.request, VolumeRequest), dedup_with=None)
    unused = partial(_unused, machine, force=request.force)
    try:
        return await volumechange.change(cast(volumechange.Action, call.path), request, image, unused)
    finally:
        _note_disk(image, machine, call, request.name)


def _note_disk(image: Image, machine: ImageMachine, call: Call, name: str) -> None:
    """Goes by what is there: the change was refused if it had been made before a failure."""
    disk = image.volumes.find(name)
    if call.path in ("disks/create", "disks/clone") and disk is not None and disk.created_ns == call.time_ns:
        machine.renew(name)
    elif call.path == "disks/delete" and disk is None:
        machine.forget(name)


async def _change_region(image: Image, index: int, call: Call) -> object:
    """Once only: unlike changes of blocks, one of a region is not the same when it is made again."""
    kind = _OF_REGIONS[call.path]
    try:
        request = msgspec.msgpack.decode(call.request, type=kind.request)
    except msgspec.MsgspecError as error:
        raise RefusedError(call.path, f"is not understood: {error}", "is another node newer?") from None
    if (await image.regions.area(image.disk(request.disk))).entry >= index:
        raise RefusedError(call.path, "was done before a failure", "look at what is there")
    return await kind.work(image, request)


def _unused(
    machine: ImageMachine, disk: Disk, *, ending: bool = False, force: bool
) -> AbstractAsyncContextManager[None]:
    return machine.unused(disk.name, force=force)
