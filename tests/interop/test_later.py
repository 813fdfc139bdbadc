"""Clients of a later Debian release, which have extended headers."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.interop.conftest import SIZE
from tests.interop.harness import ROOT, Served, run, run_json, serve_image, serve_memory
from tests.interop.later import later, later_libnbd
from tests.interop.test_libnbd import check_names
from tests.interop.test_tools import equal

HUGE = 3 << 40
WIDE = (
    "is_negotiated",
    "can_be_left_out",
    "sixteen_gib_are_zeroed_in_one_request",
    "all_of_a_disk_is_trimmed_in_one_request",
    "status_has_lengths_of_64_bits",
    "status_can_be_filtered",
    "requests_past_the_end_are_refused",
)


@pytest.fixture(params=["memory", "image"])
def huge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """An empty disk that no compact header can speak of at once."""
    with closing({"memory": serve_memory, "image": serve_image}[request.param](tmp_path, HUGE)) as disk:
        yield disk


def test_libnbd_with_extended_headers(huge: Served) -> None:
    for check in WIDE:
        later_libnbd("libnbd_wide", check, huge.uri)


def test_libnbd_finds_the_same_as_before(served: Served) -> None:
    for check in check_names():
        later_libnbd("libnbd_checks", "clear", served.uri)
        later_libnbd("libnbd_checks", check, served.uri)


def test_all_wide_checks_are_run() -> None:
    text = (ROOT / "tests/interop/libnbd_wide.py").read_text()
    assert all(f"def {check}(uri" in text for check in WIDE)
    assert text.count("(uri: str) -> None:") == len(WIDE)


def test_nbdinfo_and_nbdcopy(served: Served, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    data = random.Random(3).randbytes(SIZE // 4)
    source.write_bytes(data + bytes(SIZE // 2) + data)
    assert run_json(*later("nbdinfo", "--json", served.uri))["protocol"] == "newstyle-fixed"
    assert "using extended packets" in run(*later("nbdinfo", served.uri))
    run(*later("nbdcopy", "--connections=4", "--flush", source, served.uri))
    mapped = run_json(*later("nbdinfo", "--map", "--json", served.uri))
    assert [(part["length"], part["type"]) for part in mapped] == [(SIZE // 4, 0), (SIZE // 2, 3), (SIZE // 4, 0)]
    run(*later("nbdcopy", "--connections=4", served.uri, back))
    assert equal(source, back)


def test_qemu(served: Served, tmp_path: Path) -> None:
    """QEMU has extended headers since 8.2."""
    source, back = tmp_path / "source", tmp_path / "back.qcow2"
    source.write_bytes(random.Random(4).randbytes(SIZE // 2) + bytes(SIZE // 2))
    run(*later("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, served.uri))
    run(*later("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, back))
    assert "identical" in run(*later("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, back))
    assert "identical" in run(*later("qemu-img", "compare", "-f", "raw", "-F", "raw", source, served.uri))


def test_qemu_writes_zeroes_with_64_bits(huge: Served) -> None:
    qemu_io = later("qemu-io", "-f", "raw", "-d", "unmap")
    trace = ["--trace", "nbd_send_*"]
    written = ["-c", "write -q -P 1 9G 1M", "-c", "write -q -z -u -n 0 16G", "-c", "flush", "-c", "read -P 0 9G 1M"]
    done = run("sh", "-c", '"$@" 2>&1', "sh", *qemu_io, *trace, *written, huge.uri)
    assert "option request 11 (extended headers)" in done
    assert f".from = 0, .len = {16 << 30}," in done
    assert "verification failed" not in done
    assert "1 MiB, 1 ops" in done
