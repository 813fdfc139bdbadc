"""Changes of the key slots, as commands and the control socket ask for them."""

from typing import Literal

from nbdvde.admin.messages import KeyRequest
from nbdvde.engine.keys import Fresh, KeyArea, Secret
from nbdvde.errors import KeyFailure, RefusedError, UsageError

Action = Literal["add", "remove", "change"]


def apply(action: Action, request: KeyRequest, area: KeyArea, fresh: Fresh) -> KeyArea:
    """The key area after a change. Raises KeyFailure, RefusedError, UsageError.

    Derives up to a key per slot: call it from a worker thread.
    """
    master, opened = area.open(request.secret.secret())
    number = opened if request.slot is None else request.slot
    assert number is not None, "a request never holds the master key"
    if action == "remove":
        return area.without_slot(master, number)
    if request.new_secret is None:
        raise UsageError(f"key {action}", "there is no new key", "give new_secret")
    new = request.new_secret.secret()
    _refuse_twice(area, new, number if action == "change" else None)
    if action == "change":
        return area.with_changed(master, number, new, fresh)
    return area.with_slot(master, new, fresh, slot=request.slot, label=request.label)


def _refuse_twice(area: KeyArea, new: Secret, changed: int | None) -> None:
    """A secret in two slots would still open the image after it is removed."""
    try:
        number = area.open(new)[1]
    except KeyFailure:
        return
    if number != changed:
        raise RefusedError("new key", f"opens the image already, it is in slot {number}", "use another")
