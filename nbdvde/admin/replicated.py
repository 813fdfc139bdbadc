"""Changes of a replicated image: whoever is asked has its group agree on them, and every node makes them."""

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import cast, get_args

import msgspec

from nbdvde import moment
from nbdvde.admin import volumechange
from nbdvde.admin.calls import parse
from nbdvde.admin.messages import VolumeRequest
from nbdvde.disk import Disk
from nbdvde.engine.access import naming
from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError
from nbdvde.replication.machine import Execute, ImageMachine
from nbdvde.replication.operations import Call

_ACTIONS = get_args(volumechange.Action)


def executing(image: Image) -> Execute:
    """What makes a change that was agreed on, with the answer as JSON; the same on every node."""

    async def execute(machine: ImageMachine, call: Call) -> bytes:
        if call.path not in _ACTIONS:
            raise RefusedError(f"replicated image {image.path}", f"knows no {call.path}", "is another node newer?")
        # Whether images deduplicate is the business of each: what a disk shares must not decide whether there is one.
        request = msgspec.structs.replace(parse(call.request, VolumeRequest), dedup_with=None)
        unused = partial(_unused, machine, force=request.force)
        with moment.given(call.time_ns, call.seed), naming(image.path):
            done = await volumechange.change(cast(volumechange.Action, call.path), request, image, unused)
        if call.path in ("disks/create", "disks/clone"):
            machine.renew(request.name)
        elif call.path == "disks/delete":
            machine.forget(request.name)
        return msgspec.json.encode(done)

    return execute


def _unused(
    machine: ImageMachine, disk: Disk, *, ending: bool = False, force: bool
) -> AbstractAsyncContextManager[None]:
    return machine.unused(disk.name, force=force)
