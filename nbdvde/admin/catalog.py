"""All calls there are."""

from typing import Any

from nbdvde.admin import (
    anoncalls,
    clustercalls,
    mapcalls,
    metricscalls,
    regioncalls,
    streamcalls,
    vaultcalls,
    wormcalls,
)
from nbdvde.admin.calls import Call, Feed

CALLS: tuple[Call[Any, Any] | Feed[Any, Any], ...] = (
    regioncalls.REGIONS,
    *streamcalls.CALLS,
    *vaultcalls.VAULT_CALLS,
    *metricscalls.CALLS,
    *mapcalls.CALLS,
    *anoncalls.ANON_CALLS,
    *wormcalls.CALLS,
    *clustercalls.CALLS,
)
"""What the control interface answers besides what `service.PATHS` has."""
