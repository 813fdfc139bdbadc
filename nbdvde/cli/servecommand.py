"""The `serve` command: its options."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nbdvde.cli.arguments import KeyFile


class LogFormat(StrEnum):
    """Form of the log on standard error."""

    TEXT = "text"
    JSON = "json"


_Images = Annotated[
    list[Path] | None,
    typer.Argument(metavar="IMAGE...", readable=False, help="Paths of images.", show_default=False),
]
_Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Serve an empty disk in memory instead of an image.")]
_Listen = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="unix:PATH, HOST:PORT, vsock:CID:PORT, systemd or stdio; repeatable. [default: localhost:10809]",
    ),
]
_Export = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the export, or of several the default. [default: DISK]")
]
_ReadOnly = Annotated[bool | None, typer.Option("--read-only", help="Refuse every change.")]
_Control = Annotated[str | None, typer.Option(metavar="PATH", help="Control socket, or none. [default: IMAGE.ctl]")]
_Admin = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Dashboard, metrics and health over HTTP. [default: none]")
]
_AdminAllow = Annotated[
    list[str] | None,
    typer.Option(metavar="WHAT", help="remote: an address others can reach; changes, too; repeatable."),
]
_AdminName = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Name of this machine in its URLs; repeatable.")
]
_Config = Annotated[Path | None, typer.Option(metavar="FILE", readable=False, help="Configuration file, TOML.")]
_PidFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="Holds the process id while the server is ready."),
]
_PrintUri = Annotated[
    bool | None, typer.Option("--print-uri", help="Print the URIs on standard output once they are served.")
]
_TlsCert = Annotated[
    Path | None, typer.Option(metavar="FILE", readable=False, help="Certificate in PEM: demand TLS of clients.")
]
_TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", readable=False, help="Key of the certificate, in PEM.")]
_TlsClientCa = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="Authority whose certificates clients must show."),
]
_TlsPsk = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="Keys that clients share, lines NAME:HEX: demand TLS."),
]
_DedupMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory for finding duplicates. [default: that of the image]")
]
_MetricsInterval = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Between samples in metrics logs, at least 0.1; 0: none. [default: 10]"),
]
_LogFormat = Annotated[LogFormat | None, typer.Option(help="Form of the log. [default: text]")]


def serve(
    images: _Images = None, memory: _Memory = None, key_file: KeyFile = None, listen: _Listen = None,
    export: _Export = None, read_only: _ReadOnly = None, control: _Control = None, admin: _Admin = None,
    admin_allow: _AdminAllow = None, admin_name: _AdminName = None, config: _Config = None, pid_file: _PidFile = None,
    print_uri: _PrintUri = None, tls_cert: _TlsCert = None, tls_key: _TlsKey = None,
    tls_client_ca: _TlsClientCa = None, tls_psk: _TlsPsk = None, dedup_memory: _DedupMemory = None,
    metrics_interval: _MetricsInterval = None, log_format: _LogFormat = None,
) -> None:  # fmt: skip
    """Serve the disks of images until SIGTERM or SIGINT; SIGHUP reads the configuration again.

    Several images are exported under the names of their files, without the ending.
    """
    from nbdvde.cli.plan import Plan
    from nbdvde.cli.serve import serve as run
    from nbdvde.config import load

    given = {
        "key_file": key_file and str(key_file), "listen": listen or None, "export": export, "read_only": read_only,
        "control": control, "admin": admin, "admin_allow": admin_allow or None, "admin_names": admin_name or None,
        "pid_file": pid_file and str(pid_file), "print_uri": print_uri,
        "tls_cert": tls_cert and str(tls_cert), "tls_key": tls_key and str(tls_key),
        "tls_client_ca": tls_client_ca and str(tls_client_ca), "tls_psk": tls_psk and str(tls_psk),
        "log_format": log_format and log_format.value, "engine_dedup_memory": dedup_memory,
        "metrics_interval": metrics_interval,
    }  # fmt: skip
    run(Plan.make(images or (), memory, lambda: load(given, config, os.environ)))
