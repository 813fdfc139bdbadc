#!/usr/bin/python3
"""Connect a kernel's NBD device again when its server restarts: `nbd_keep.py /dev/nbd0 HOST PORT EXPORT [SECONDS]`.

`nbd-client` attaches a device and ends. This stays: it has the kernel hold requests back for so many seconds (60) after
a connection is lost, and gives it a new one. It needs root and Python alone, so that it can be copied to a client.
Sources: Linux, include/uapi/linux/nbd-netlink.h and genetlink.h; the NBD specification, "Fixed newstyle negotiation".
"""

import socket
import struct
import sys
import time
from collections.abc import Iterator

RETRY_S = 0.2
ANSWER_S = 10
OPTION_MAGIC, REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
NBD_OPT_GO, NBD_REP_ACK, NBD_REP_ERROR = 7, 1, 1 << 31
NBD_INFO_EXPORT = 0
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_GENERIC = 270, 1, 16
NLMSG_ERROR, NLM_F_REQUEST, NLM_F_ACK, NLA_F_NESTED = 2, 1, 4, 0x8000
GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_ATTR_MCAST_GROUPS = 1, 2, 7
CTRL_ATTR_MCAST_GRP_NAME, CTRL_ATTR_MCAST_GRP_ID = 1, 2
NBD_CMD_RECONFIGURE, NBD_CMD_LINK_DEAD = 3, 4
NBD_ATTR_INDEX, NBD_ATTR_SOCKETS, NBD_ATTR_DEAD_CONN_TIMEOUT = 1, 7, 8
NBD_SOCK_ITEM, NBD_SOCK_FD = 1, 1


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute of a netlink message."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Decode attributes: (kind, value) of each."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & ~NLA_F_NESTED, data[4:length]
        data = data[(length + 3) & ~3 :]


class Netlink:
    """The kernel's side of NBD devices; OSError is what the kernel says."""

    def __init__(self) -> None:
        """Find out the kernel's numbers for `nbd`."""
        self._socket = self._open()
        found = dict(
            attributes(self._ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")))
        )
        (self._family,) = struct.unpack("=H", found[CTRL_ATTR_FAMILY_ID])
        ((_, group),) = attributes(found[CTRL_ATTR_MCAST_GROUPS])
        self._events = self._open()
        (number,) = struct.unpack("=I", dict(attributes(group))[CTRL_ATTR_MCAST_GRP_ID])
        self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, number)

    def hold_requests(self, index: int, seconds: int) -> None:
        """Requests without a connection wait so long before they fail."""
        self._reconfigure(index, attribute(NBD_ATTR_DEAD_CONN_TIMEOUT, struct.pack("=Q", seconds)))

    def replace(self, index: int, connection: socket.socket) -> None:
        """Use a connection in place of one that is lost."""
        item = attribute(NBD_SOCK_FD, struct.pack("=I", connection.fileno()))
        items = attribute(NBD_SOCK_ITEM | NLA_F_NESTED, item)
        self._reconfigure(index, attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, items))

    def lost(self) -> Iterator[int]:
        """For ever: the index of a device that lost a connection, once for each connection."""
        while True:
            message = self._events.recv(65536)
            if message[16] == NBD_CMD_LINK_DEAD:
                yield struct.unpack("=I", dict(attributes(message[20:]))[NBD_ATTR_INDEX])[0]

    def _reconfigure(self, index: int, what: bytes) -> None:
        self._ask(self._family, NBD_CMD_RECONFIGURE, attribute(NBD_ATTR_INDEX, struct.pack("=I", index)) + what)

    def _open(self) -> socket.socket:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        opened.bind((0, 0))
        return opened

    def _ask(self, family: int, command: int, what: bytes) -> bytes:
        """Send a command; the attributes of the answer, if it has any."""
        body = struct.pack("=BBH", command, 1, 0) + what
        flags = NLM_F_REQUEST | NLM_F_ACK
        self._socket.send(struct.pack("=IHHII", 16 + len(body), family, flags, 0, 0) + body)
        answer = b""
        while True:
            data = self._socket.recv(65536)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_ERROR:
                    (error,) = struct.unpack_from("=i", data, 16)
                    if error:
                        raise OSError(-error, f"netlink: error {-error}")
                    return answer
                answer, data = data[20:length], data[(length + 3) & ~3 :]


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("the server closed the connection")
        data += more
    return data


class Server:
    """Where the disk comes from; its address is looked up once, as the resolver may wait for the disk later."""

    def __init__(self, host: str, port: str, export: str, size: int) -> None:
        """`size` is the disk's in bytes."""
        where = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)[0]
        self._family, self._address = where[0], where[4]
        self._export, self._size = export.encode(), size

    def connect(self) -> socket.socket:
        """A connection that is ready for requests, as soon as there is a server; ValueError if it has another disk."""
        while True:
            connection = socket.socket(self._family)
            connection.settimeout(ANSWER_S)
            try:
                connection.connect(self._address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                size = negotiate(connection, self._export)
            except OSError:
                connection.close()
                time.sleep(RETRY_S)
                continue
            if size != self._size:
                raise ValueError(f"the export now has {size} bytes, the device {self._size}")
            connection.setblocking(True)
            return connection


def negotiate(connection: socket.socket, export: bytes) -> int:
    """Choose an export; its size in bytes. OSError when the server does not have it."""
    receive(connection, 18)
    payload = struct.pack(">I", len(export)) + export + bytes(2)
    connection.sendall(struct.pack(">IQII", 3, OPTION_MAGIC, NBD_OPT_GO, len(payload)) + payload)
    size = -1
    while True:
        magic, _, kind, length = struct.unpack(">QIII", receive(connection, 20))
        data = receive(connection, length)
        if magic != REPLY_MAGIC or kind >= NBD_REP_ERROR:
            raise ConnectionError("the server does not serve the export")
        if kind == NBD_REP_ACK:
            return size
        if struct.unpack_from(">H", data)[0] == NBD_INFO_EXPORT:
            (size,) = struct.unpack_from(">Q", data, 2)


def keep(device: str, host: str, port: str, export: str, seconds: int) -> None:
    """Until the device is detached (OSError)."""
    index = int(device.removeprefix("/dev/nbd"))
    with open(f"/sys/block/nbd{index}/size") as file:
        server = Server(host, port, export, int(file.read()) * 512)
    kernel = Netlink()
    kernel.hold_requests(index, seconds)
    print(f"keeping {device}", flush=True)
    for lost in kernel.lost():
        if lost == index:
            with server.connect() as connection:
                kernel.replace(index, connection)
            print(f"connected {device} again", flush=True)


def main() -> None:
    """As a program."""
    if len(sys.argv) not in (5, 6):
        sys.exit(f"usage: {sys.argv[0]} /dev/nbdN HOST PORT EXPORT [SECONDS]")
    device, host, port, export, *seconds = sys.argv[1:]
    try:
        keep(device, host, port, export, int(*seconds or (60,)))
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")


if __name__ == "__main__":
    main()
