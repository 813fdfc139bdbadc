"""All calls there are."""

from typing import Any

from nbdvde.admin import regioncalls, vaultcalls
from nbdvde.admin.calls import Call, Feed

CALLS: tuple[Call[Any, Any] | Feed[Any, Any], ...] = (
    regioncalls.REGIONS,
    *vaultcalls.VAULT_CALLS,
)
"""What the control interface answers besides what `service.PATHS` has."""
