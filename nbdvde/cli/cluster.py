"""The commands about the cluster that replicates an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output
from nbdvde.cli.arguments import Control, ImageArgument, Json, KeyFile, image_at
from nbdvde.errors import DamageError, RefusedError

if TYPE_CHECKING:
    from nbdvde.admin.calls import Call
    from nbdvde.admin.clustercalls import Agreed, ClusterStatus, NodeRequest

cluster_app = typer.Typer(help="Replicate an image to several machines.", rich_markup_mode=None)

Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where other nodes call this one.", show_default=False)]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="In the certificate of the node. [default: its host]")]
TicketFile = Annotated[Path, typer.Option(metavar="FILE", help="What the new node needs to join.", show_default=False)]
NodeNumber = Annotated[
    int | None, typer.Option("--node", metavar="N", help="Its number, as in `cluster status`.", show_default=False)
]


@cluster_app.command("init")
def init(
    image: ImageArgument, address: Address, name: Name = None, key_file: KeyFile = None, json: Json = False
) -> None:
    """Make an image the first of a new cluster. It keeps what it holds; serve it with a [cluster] table then."""
    from nbdvde.admin.clustercalls import place_of
    from nbdvde.replication import membership

    place = place_of(address, name)
    identity = image_at(image, key_file, None).enter_cluster(lambda opened: membership.found(opened, place))
    shown = {"cluster": identity.cluster.hex(), "node": identity.node}
    output.json(shown) if json else output.line(f"cluster {shown['cluster']}, node {identity.node}")


@cluster_app.command("invite")
def invite(
    image: ImageArgument, address: Address, ticket: TicketFile, name: Name = None, control: Control = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Let a node join, and write the ticket that it needs. The ticket holds the key of the cluster: keep it secret."""
    from nbdvde.admin import clustercalls

    if ticket.exists():
        raise RefusedError(f"ticket {ticket}", "exists already", "choose another file")
    made = image_at(image, None, control).server().call(clustercalls.INVITE, clustercalls.Invitation(address, name))
    made.save(ticket)
    output.json({"node": made.identity.node}) if json else output.line(f"node {made.identity.node}")


@cluster_app.command("join")
def join(image: ImageArgument, ticket: TicketFile, key_file: KeyFile = None, json: Json = False) -> None:
    """Have a new, empty image become what those of a cluster are, as soon as it is served with a [cluster] table."""
    from nbdvde.replication import membership
    from nbdvde.replication.ticket import Ticket

    given = Ticket.load(ticket)
    identity = image_at(image, key_file, None).enter_cluster(lambda opened: membership.join(opened, given))
    output.json({"node": identity.node}) if json else output.line(f"node {identity.node}")


@cluster_app.command("recover")
def recover(
    image: ImageArgument,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where its replication log is. [default: IMAGE.raft]")
    ] = None,
    key_file: KeyFile = None, json: Json = False,
) -> None:  # fmt: skip
    """Make a new cluster of the one node that is left when a majority is lost for good; the others cannot come back.

    Take the node that has most (`cluster status` at rest): what it lacks is lost.
    """
    from nbdvde.replication import membership

    log = directory or image.with_name(f"{image.name}.raft")
    identity = image_at(image, key_file, None).enter_cluster(lambda opened: membership.recover(opened, log))
    shown = {"cluster": identity.cluster.hex(), "node": identity.node}
    output.json(shown) if json else output.line(f"cluster {shown['cluster']}, node {identity.node}")


@cluster_app.command("leave")
def leave(image: ImageArgument, node: NodeNumber = None, control: Control = None, json: Json = False) -> None:
    """Have a node, or the one that serves this image, belong to its cluster no more."""
    from nbdvde.admin import clustercalls

    _about(clustercalls.LEAVE, image, node, control, json)


@cluster_app.command("transfer")
def transfer(image: ImageArgument, node: NodeNumber = None, control: Control = None, json: Json = False) -> None:
    """Have another node lead: the given one, or whichever has most."""
    from nbdvde.admin import clustercalls

    _about(clustercalls.TRANSFER, image, node, control, json)


@cluster_app.command("groups")
def groups(
    image: ImageArgument,
    add: Annotated[int, typer.Option(min=0, metavar="N", help="Have so many more.", show_default=False)] = 0,
    remove: Annotated[
        list[str], typer.Option(metavar="GROUP", help="Have this one no more; may come again.", show_default=False)
    ] = [],  # noqa: B006 - it is only read
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Show the groups that share the disks, or have more or fewer: each has its own leader and order of changes."""
    from nbdvde.admin import clustercalls
    from nbdvde.admin.calls import Nothing

    if add or remove:
        request = clustercalls.GroupsRequest(add, tuple(remove))
        found = image_at(image, None, control).server().call(clustercalls.GROUPS, request)
    else:
        found = image_at(image, key_file, control).call(clustercalls.STATUS, Nothing())
    if json:
        output.json(found.groups)
        return
    rows = [("GROUP", "SLOTS", "LEADER", "TERM", "APPLIED")]
    for group in found.groups:
        leader = str(group.leader or "none")
        rows.append((group.group, str(group.slots), leader, str(group.term), f"{group.applied} of {group.committed}"))
    output.table(rows)


@cluster_app.command("status")
def status(image: ImageArgument, key_file: KeyFile = None, control: Control = None, json: Json = False) -> None:
    """Show the nodes of a cluster, who leads, and how far they are. Of an image at rest, what it knows."""
    from nbdvde.admin import clustercalls
    from nbdvde.admin.calls import Nothing

    found = image_at(image, key_file, control).call(clustercalls.STATUS, Nothing())
    output.json(found) if json else _show(found)


@cluster_app.command("verify")
def verify(
    image: ImageArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Have most nodes decide about what one holds differently.")]
    = False,
    control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Compare what all nodes hold, while they are used. Ends with 6 when anything differs that was not repaired."""
    from nbdvde.admin import clustercalls

    compared, left, nodes = dict[str, int](), 0, ""
    for line in image_at(image, None, control).server().feed(clustercalls.VERIFY, clustercalls.VerifyRequest(repair)):
        compared[line.disk], nodes = line.done, ", ".join(map(str, line.nodes))
        left += sum(not difference.repaired for difference in line.differences)
        if json:
            output.json(line)
            continue
        for difference in line.differences:
            wrong = ", ".join(map(str, difference.nodes))
            done = "repaired" if difference.repaired else "not repaired"
            output.line(f"disk {difference.disk}, 1 MiB at {difference.offset}: differs on node {wrong}, {done}")
    if not json:
        output.line(f"{output.size(sum(compared.values()))} compared on nodes {nodes}")
    if left:
        raise DamageError(str(image), f"{output.counted(left, 'chunk')} not the same on all nodes", "use --repair")


def _about(
    call: "Call[NodeRequest, Agreed]", image: Path, node: int | None, control: Path | None, json: bool
) -> None:  # fmt: skip
    from nbdvde.admin.clustercalls import NodeRequest

    done = image_at(image, None, control).server().call(call, NodeRequest(node))
    output.json(done) if json else output.line(f"node {done.node}")


def _show(found: "ClusterStatus") -> None:
    role = found.role if found.role == "at rest" else f"{found.role}, term {found.term}"
    output.line(f"cluster {found.cluster}, node {found.node} ({role})")
    output.line(f"applied {found.applied} of {found.committed} entries that a majority has")
    if found.problem:
        output.line(f"stands still: {found.problem}")
    rows = [("NODE", "ADDRESS", "CERTIFICATE", "ROLE", "CONNECTED", "BEHIND")]
    for node in found.nodes:
        behind = "" if node.behind is None else str(node.behind)
        connected = "yes" if node.connected else "no"
        rows.append((str(node.node), node.address, node.name, node.role, connected, behind))
    output.table(rows)
