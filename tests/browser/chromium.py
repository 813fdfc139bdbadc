"""Headless Chromium, driven over a pipe by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--mute-audio",
    "--no-proxy-server", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 20.0


def program() -> str | None:
    """The browser that is installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """A browser with one page. Every call ends in time, or fails."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._last = 0
        self._rest = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        """Errors and warnings of the console, scripts that failed, violations of the policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> Any:
        """One command and its result."""
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _messages(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + PATIENCE_S
        while True:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(line)
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has gone"
            self._rest += data

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.complaints.append(str(details.get("exception", {}).get("description", details["text"])))
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "warning", "assert"):
                self.complaints.append(" ".join(str(argument.get("value")) for argument in found["args"]))
            case "Log.entryAdded" if found["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")

    def size(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Have the page shown in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    @contextmanager
    def prepared(self, script: str) -> Iterator[None]:
        """Run a script before those of the pages that are opened meanwhile."""
        number = self.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
        yield
        self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=number)

    def open(self, url: str) -> None:
        """Show a page."""
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str, patience_s: float = PATIENCE_S / 2) -> Any:
        """Wait until a condition holds in the page; what it came to."""
        loop = f"""new Promise((tell, fail) => {{
            const until = performance.now() + {patience_s * 1000};
            const look = () => {{
                const found = {condition};
                if (found) tell(found);
                else if (performance.now() > until) fail(new Error("never: " + document.body.innerText));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        return self.ask(loop)

    def text(self, selector: str) -> str:
        """What is to be read in an element."""
        return str(self.ask(f"document.querySelector({selector!r}).innerText"))

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A picture of the page in a PNG file."""
        done = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))


@contextmanager
def running(name: str, folder: Path) -> Iterator[Chromium]:
    """The browser, with a profile in an empty folder."""
    to_it, from_it = os.pipe(), os.pipe()
    line = [name, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    # The protocol has fixed descriptors, 3 and 4, which Popen cannot give; a shell can.
    shell = ["bash", "-c", f'exec "$@" 3<&{to_it[0]} 4>&{from_it[1]}', "chromium", *line]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            shell, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(to_it[0], from_it[1]),
            start_new_session=True, env={**os.environ, "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
        )  # fmt: skip
    os.close(to_it[0])
    os.close(from_it[1])
    try:
        yield Chromium(from_it[0], to_it[1])
    finally:
        os.close(to_it[1])
        os.close(from_it[0])
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
