"""The address at which `serve` shows its dashboard, if it is to have one."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self

import trio

from nbdvde.admin import http, web
from nbdvde.admin.service import Service
from nbdvde.config import ServerOptions
from nbdvde.errors import RefusedError, UsageError
from nbdvde.listeners import Listener, TcpAddress, open_listener, parse_listen

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DashboardPlan:
    """Where it is, and for whom."""

    address: TcpAddress
    remote: bool
    """Whether other machines may reach it."""
    changes: bool
    """Whether it may change anything."""
    names: tuple[str, ...]
    """Names of this machine."""

    @classmethod
    def of(cls, options: ServerOptions) -> Self | None:
        """None when there is to be none. Raises UsageError."""
        if options.admin is None:
            if options.admin_allow or options.admin_names:
                raise UsageError("--admin-allow and --admin-name", "are of no use without --admin", "give an address")
            return None
        address = _parse(options.admin)
        names = (*options.admin_names, address.host, socket.gethostname())
        return cls(address, "remote" in options.admin_allow, "changes" in options.admin_allow, names)


def _parse(text: str) -> TcpAddress:
    what, hint = f"--admin {text}", "use HOST:PORT, like localhost:8080"
    try:
        address = parse_listen(text)
    except UsageError as error:
        raise UsageError(what, error.why, hint) from None
    if not isinstance(address, TcpAddress):
        raise UsageError(what, "is no TCP address", hint)
    return address


class Dashboard:
    """The dashboard of a server, bound and not yet answering."""

    def __init__(self, plan: DashboardPlan, listener: Listener) -> None:
        self._plan, self._listener = plan, listener

    @classmethod
    async def bind(cls, plan: DashboardPlan) -> Self:
        """Raises NetworkError, and RefusedError for an address that others can reach."""
        dashboard = cls(plan, await open_listener(plan.address))
        if not plan.remote:
            try:
                dashboard._refuse_remote()
            except RefusedError:
                dashboard.close()
                raise
        return dashboard

    def _refuse_remote(self) -> None:
        for place in self._listener.bound:
            assert isinstance(place, TcpAddress), "no other is bound"
            if not ip_address(place.host.partition("%")[0]).is_loopback:
                why = "other machines could reach it, and it asks nobody who they are"
                hint = "use localhost and a tunnel, or add --admin-allow remote"
                raise RefusedError(f"--admin {self._plan.address}", why, hint)

    @property
    def urls(self) -> list[str]:
        """Where a browser finds it."""
        known = self._plan.address.port
        return [f"http://{place}/" for place in ([self._plan.address] if known else self._listener.bound)]

    @asynccontextmanager
    async def answering(self, service: Service) -> AsyncIterator[None]:
        """Answer meanwhile."""
        plan = self._plan
        policy = web.StrangersPolicy(plan.names, changes=plan.changes)
        routes = web.routes(service.routes())
        async with trio.open_nursery() as nursery:
            for sock in self._listener.sockets:
                await nursery.start(http.serve, sock, routes, policy)
            for url in self.urls:
                _log.info("dashboard at %s", url, extra={"fields": {"admin": url}})
            yield
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Close its sockets."""
        self._listener.close()
