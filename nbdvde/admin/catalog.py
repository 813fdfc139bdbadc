"""All calls there are."""

from typing import Any

from nbdvde.admin import (
    anoncalls,
    clustercalls,
    imagecalls,
    mapcalls,
    metricscalls,
    regioncalls,
    streamcalls,
    vaultcalls,
    wormcalls,
)
from nbdvde.admin.calls import Call, Feed

CALLS: tuple[Call[Any, Any] | Feed[Any, Any], ...] = (
    imagecalls.INFO,
    regioncalls.REGIONS,
    *streamcalls.CALLS,
    *vaultcalls.VAULT_CALLS,
    *metricscalls.CALLS,
    *mapcalls.CALLS,
    *anoncalls.ANON_CALLS,
    *wormcalls.CALLS,
    *clustercalls.CALLS,
)
"""What the control interface answers besides `service.handlers`."""
