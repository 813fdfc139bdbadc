"""Health and readiness, by the eyes of whoever looks after the server."""

import json
from pathlib import Path

import pytest
import trio

from nbdvde.engine.image import Image
from tests.admin.test_measures import working
from tests.admin.test_openapi import ask

FINE = (200, {"ok": True, "problems": []})


async def state(folder: Path, path: str) -> tuple[int, object]:
    """Status and body."""
    status, _, body = await trio.to_thread.run_sync(ask, folder / "ctl", "GET", path)
    return status, json.loads(body)


async def states(folder: Path) -> tuple[object, object]:
    return await state(folder, "/healthz"), await state(folder, "/readyz")


async def test_a_server_that_starts_or_stops(tmp_path: Path) -> None:
    async with working(tmp_path) as (control, *_):
        assert await states(tmp_path) == (FINE, FINE)
        control.told.is_ready = False
        problem = {"ok": False, "problems": ["the server is starting or stopping"]}
        assert await states(tmp_path) == (FINE, (503, problem))


async def test_an_image_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with working(tmp_path):
        with monkeypatch.context() as patched:
            patched.setattr(Image, "poisoned", property(lambda _: "syncing failed: no such device"))
            problems = [f"{tmp_path}/image.vde: syncing failed: no such device"]
            assert await states(tmp_path) == (
                (200, {"ok": True, "problems": problems}),
                (503, {"ok": False, "problems": problems}),
            )
            status, _, body = await trio.to_thread.run_sync(ask, tmp_path / "ctl", "GET", "/metrics")
            assert status == 200
            assert f'nbdvde_image_failed{{image="{tmp_path}/image.vde"}} 1.0' in body.decode()
        assert await states(tmp_path) == (FINE, FINE)
