"""libnbd's tools and QEMU's over TLS, with and without certificates of their own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.certificates import Authority, make_authority
from tests.interop.harness import Process, need, run, run_json
from tests.interop.test_tools import equal

SIZE = 16 << 20


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "pki")


@contextmanager
def serving(folder: Path, authority: Authority, *, clients: bool = False) -> Iterator[str]:
    """A URI of a disk in memory over TLS, for clients that look for their files in the authority's directory."""
    certificate, key = authority.server
    options: list[str | Path] = ["--tls-cert", certificate, "--tls-key", key]
    if clients:
        options += ["--tls-client-ca", authority.ca]
    server = Process(folder, ["--memory", str(SIZE), *options], listen="127.0.0.1:0")
    assert server.uri.startswith("nbds://127.0.0.1:")
    yield f"{server.uri.replace('127.0.0.1', 'localhost')}?tls-certificates={authority.directory}"
    server.stop()


@pytest.mark.parametrize("clients", [False, True])
def test_libnbd(tmp_path: Path, authority: Authority, clients: bool) -> None:
    need("nbdinfo", "nbdcopy")
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"".join(number.to_bytes(8, "big") for number in range(SIZE // 8)))
    with serving(tmp_path, authority, clients=clients) as uri:
        assert run_json("nbdinfo", "--json", uri)["TLS"]
        run("nbdcopy", source, uri)
        run("nbdcopy", uri, copy)
    assert equal(source, copy)


def test_qemu(tmp_path: Path, authority: Authority) -> None:
    need("qemu-img")
    source = tmp_path / "source"
    source.write_bytes(b"qemu" * (SIZE // 4))
    with serving(tmp_path, authority, clients=True) as uri:
        credentials = f"tls-creds-x509,id=tls,dir={authority.directory},endpoint=client"
        disk = f"driver=nbd,host=localhost,port={urlsplit(uri).port},tls-creds=tls"
        run("nbdcopy", source, uri)
        compare = ["--object", credentials, "--image-opts", disk, f"driver=raw,file.driver=file,file.filename={source}"]
        assert "identical" in run("qemu-img", "compare", *compare)


def test_who_does_not_belong_is_refused(tmp_path: Path, authority: Authority) -> None:
    need("nbdinfo")
    stranger = make_authority(tmp_path / "stranger")
    with serving(tmp_path, authority, clients=True) as uri:
        plain = uri.partition("?")[0].replace("nbds:", "nbd:")
        for other in (plain, uri.replace(str(authority.directory), str(stranger.directory))):
            assert subprocess.run(["nbdinfo", other], capture_output=True, check=False).returncode
        run("nbdinfo", uri)
