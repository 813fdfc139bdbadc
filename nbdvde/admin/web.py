"""The control interface at a TCP address: the dashboard, and what a stranger may ask there."""

from collections.abc import Iterable
from functools import partial
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import urlsplit

from nbdvde.admin.http import Asked, Emit, Page, Policy, Refusal, Routes
from nbdvde.admin.messages import ErrorBody
from nbdvde.errors import ExitCode

READABLE = frozenset({
    "/metrics", "/healthz", "/readyz", "/v1/openapi.json", "/v1/status", "/v1/metrics", "/v1/info", "/v1/exports",
    "/v1/dictionaries", "/v1/regions", "/v1/map", "/v1/cluster/status",
})  # fmt: skip
"""What may be asked by whoever can connect: nothing that changes anything, and no data of disks, regions or keys."""
CHANGES = frozenset({
    "/v1/df", "/v1/check", "/v1/scrub", "/v1/optimize", "/v1/flush", "/v1/stop", "/v1/reload", "/v1/exports/remove",
    "/v1/disks/create", "/v1/disks/clone", "/v1/disks/resize", "/v1/disks/delete",
    "/v1/snapshots/create", "/v1/snapshots/delete", "/v1/snapshots/rollback", "/v1/snapshots/diff",
    "/v1/dictionaries/train", "/v1/dictionaries/replace", "/v1/dictionaries/remove",
})  # fmt: skip
"""What may be done as well where changes are allowed. The rest needs files of the host or secrets, or tells of data."""
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/cluster.js": ("cluster.js", "text/javascript; charset=utf-8"),
    "/regions.js": ("regions.js", "text/javascript; charset=utf-8"),
    "/widgets.js": ("widgets.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path to file and content type."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class StrangersPolicy(Policy):
    """Who connects over TCP is nobody in particular, and may be a browser that a page of others has sent."""

    headers = tuple(_HEADERS.items())
    connections = 64
    patience_s = 30.0
    shielded = False

    def __init__(self, names: Iterable[str], *, changes: bool) -> None:
        """`names` of hosts under which the server is asked, besides addresses and localhost."""
        self._names = {name.lower().rstrip(".") for name in names} | {"localhost"}
        self._changes = changes

    def refusal(self, asked: Asked) -> Refusal | None:
        """See `Policy`."""
        host = asked.headers.get("host", "")
        if not self._knows(host):
            hint = "ask for its address, or name it with --admin-name"
            return _refusal(421, f"host {host!r}", "is not a name of this server", hint)
        if not _is_own(asked, host):
            return _refusal(403, "request", "a page of another server sent it")
        if asked.path in READABLE or asked.path in PAGES:
            return None
        if asked.path not in CHANGES:
            return _refusal(403, f"path {asked.path}", "is answered at the control socket only", "ask there")
        if not self._changes:
            hint = "use the control socket, or serve with --admin-allow changes"
            return _refusal(403, f"path {asked.path}", "this address is for reading only", hint)
        if asked.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refusal(415, f"path {asked.path}", "takes JSON only", "send Content-Type: application/json")
        return None

    def _knows(self, host: str) -> bool:
        """Whether a page of another server cannot have made its own name lead here (DNS rebinding)."""
        name = _host_of(host)
        return name is not None and (name in self._names or _is_address(name))


def routes(control: Routes) -> Routes:
    """What is answered: as at the control socket, and the dashboard. `StrangersPolicy` refuses most of it."""
    folder = files("nbdvde.admin").joinpath("web")
    pages = {path: Page(kind, folder.joinpath(name).read_bytes()) for path, (name, kind) in PAGES.items()}
    return {**control, **{path: ("GET", partial(_page, page)) for path, page in pages.items()}}


async def _page(page: Page, body: bytes, emit: Emit) -> Page:
    return page


def _is_own(asked: Asked, host: str) -> bool:
    """Whether it is no request of another server's page, as far as the browser tells (Fetch Metadata, Origin)."""
    site, mode = asked.headers.get("sec-fetch-site", "none"), asked.headers.get("sec-fetch-mode")
    if site not in ("same-origin", "none") and (mode != "navigate" or asked.path != "/"):
        return False
    origin = asked.headers.get("origin")
    return origin is None or origin.partition("://")[2] == host


def _host_of(host: str) -> str | None:
    """The name or address in a Host header, without port and brackets."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name and name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _refusal(status: int, what: str, why: str, hint: str = "") -> Refusal:
    return Refusal(status, ErrorBody(ExitCode.REFUSED, f"{what}: {why}", hint))
