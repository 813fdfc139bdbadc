"""The `ctl` commands: what a running server is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output, reports
from nbdvde.cli.arguments import Control, DiskName, ImageArgument, Json, KeyFile

if TYPE_CHECKING:
    from nbdvde.admin.client import ControlClient

ctl_app = typer.Typer(help="Ask something of the running server of an image.", rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the export.", show_default=False)]
Texts = list[str] | None


@ctl_app.callback()
def target(context: typer.Context, image: ImageArgument) -> None:
    """Ask something of the running server of an image."""
    context.obj = image


@ctl_app.command()
def status(context: typer.Context, control: Control = None, json: Json = False) -> None:
    """Tell what is served to whom."""
    found = _server(context, control).status()
    output.json(found) if json else reports.status(found)


@ctl_app.command()
def flush(context: typer.Context, control: Control = None, json: Json = False) -> None:
    """Make all writes durable."""
    done = _server(context, control).flush()
    if json:
        output.json(done)


@ctl_app.command()
def stop(context: typer.Context, control: Control = None, json: Json = False) -> None:
    """Begin a clean stop."""
    done = _server(context, control).stop()
    if json:
        output.json(done)


@ctl_app.command("reload")
def reload_(context: typer.Context, control: Control = None, json: Json = False) -> None:
    """Read the configuration file again, as SIGHUP does: exports, limits and certificates."""
    done = _server(context, control).reload()
    output.json(done) if json else reports.reloaded(done)


@ctl_app.command()
def exports(context: typer.Context, control: Control = None, json: Json = False) -> None:
    """List the exports."""
    found = _server(context, control).exports()
    output.json(found) if json else reports.exports(found.exports)


@ctl_app.command("export-add")
def export_add(
    context: typer.Context,
    name: Name,
    image: Annotated[Path | None, typer.Option(metavar="FILE", readable=False, help="The image to serve.")] = None,
    disk: DiskName = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Serve an empty disk in memory instead.")] = None,
    key_file: KeyFile = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every change.")] = False,
    description: Annotated[str, typer.Option(metavar="TEXT", help="What clients show to people.")] = "",
    address: Annotated[
        Texts, typer.Option(metavar="ADDRESS", help="IP address or network, unix or vsock that may; repeatable.")
    ] = None,
    certificate: Annotated[
        Texts, typer.Option(metavar="NAME", help="Name in a client's certificate that may; repeatable.")
    ] = None,
    connections: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most clients at a time.")] = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Serve a further disk, until the server stops."""
    from nbdvde import config
    from nbdvde.admin.messages import AddExport, SecretBody
    from nbdvde.cli.images import ImageByPath

    server = _server(context, control)
    secret = ImageByPath(image, key_file=key_file).secret() if image else None
    request = AddExport(
        name=name, image=str(image.absolute()) if image else None, disk=disk,
        memory=None if memory is None else config.parse_disk_size(memory),
        secret=SecretBody.of(secret) if secret else None, read_only=read_only, description=description,
        addresses=address or None, certificates=certificate or None, connections=connections,
    )  # fmt: skip
    found = server.add_export(request)
    output.json(found) if json else reports.exports(found.exports)


@ctl_app.command("export-remove")
def export_remove(
    context: typer.Context,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Even while clients use it.")] = False,
    control: Control = None,
    json: Json = False,
) -> None:
    """End an export; its image is closed when no other shows it."""
    from nbdvde.admin.messages import RemoveExport

    found = _server(context, control).remove_export(RemoveExport(name, force))
    output.json(found) if json else reports.exports(found.exports)


def _server(context: typer.Context, control: Path | None) -> "ControlClient":
    from nbdvde.cli.images import ImageByPath

    return ImageByPath(context.obj, control=control).server()
