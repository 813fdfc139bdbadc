"""One test for each known flaw of other servers whose lesson the protocol can teach; what needs more stands elsewhere.

CVE-2024-7409 is in tests/test_strangers.py, CVE-2013-7441 in tests/test_server.py, CVE-2015-0847 in
tests/cli/test_serve.py, CVE-2013-6410 in tests/test_exports.py, the socket's side of CVE-2021-3716 in
tests/test_tls.py.
"""

import itertools
import struct

import pytest

from nbdvde.protocol.constants import MAX_STRING, Command, Option, OptionReply
from nbdvde.protocol.handshake import Handshake, HandshakeLimits, Phase, Tls
from tests.protocol.client import FLAGS, info_data, meta_data, option, split_option_replies, string
from tests.protocol.test_connection import parser, refused
from tests.protocol.test_handshake import Directory, feed

ACK, INVALID = OptionReply.ACK, OptionReply.ERR_INVALID
CONTEXTS = (
    option(Option.STRUCTURED_REPLY),
    option(Option.EXTENDED_HEADERS),
    option(Option.SET_META_CONTEXT, meta_data("disk", "base:allocation")),
)
LENGTHS = [0, 257, MAX_STRING, MAX_STRING + 1, 1 << 31, (1 << 32) - 1]


def kinds(machine: Handshake, data: bytes) -> list[int]:
    return [reply for _, reply, _ in split_option_replies(feed(machine, data))]


def test_what_was_agreed_before_starttls_is_forgotten_cve_2021_3716() -> None:
    """nbdkit kept structured replies that someone in between had slipped in."""
    fresh, used = Handshake(Directory(), Tls.REQUIRED), Handshake(Directory(), Tls.REQUIRED)
    feed(fresh, FLAGS + option(Option.STARTTLS))
    used._structured, used._extended = True, True
    used._contexts, used._contexts_for = ("base:allocation",), "disk"
    feed(used, FLAGS + b"".join(CONTEXTS) + option(Option.STARTTLS))
    for machine in (fresh, used):
        assert machine.phase is Phase.TLS
        machine.secured()
    assert feed(fresh, option(Option.GO, info_data("disk"))) == feed(used, option(Option.GO, info_data("disk")))
    assert fresh.negotiated == used.negotiated
    assert fresh.negotiated is not None
    assert not fresh.negotiated.structured


def test_nothing_is_used_before_go_cve_2019_14850() -> None:
    """nbdkit opened what it served before it knew who wanted it, which strangers could make costly."""
    directory = Directory()
    machine = Handshake(directory)
    feed(machine, FLAGS + b"".join(CONTEXTS) + option(Option.LIST) + option(Option.INFO, info_data("disk")))
    assert directory.entered == []
    feed(machine, option(Option.GO, info_data("disk")))
    assert directory.entered == ["disk"]


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_any_order_of_options_is_answered_cve_2019_14851(order: tuple[int, ...]) -> None:
    """nbdkit ended with an assertion when INFO was not followed by what it expected."""
    machine = Handshake(Directory())
    feed(machine, FLAGS)
    options = (*CONTEXTS, option(Option.INFO, info_data("disk")))
    for number in order:
        *_, last = kinds(machine, options[number])
        assert last == ACK or last >> 31
    assert kinds(machine, option(Option.GO, info_data("disk")))[-1] == ACK


def test_a_command_that_was_not_agreed_on_is_refused_cve_2019_14851() -> None:
    for command in (Command.BLOCK_STATUS, 8, 0xFFFF):
        assert refused(parser(structured=False, contexts=()), _header(command)) == 22


def _header(command: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, 1, 0, 512)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_lengths_of_names_cve_2022_26495_and_cve_2017_15118(number: Option, length: int) -> None:
    """nbd-server added one to 2^32-1; QEMU kept names in 256 bytes of its stack. The name itself is not even sent."""
    machine = Handshake(Directory())
    data = struct.pack(">I", length) + b"n" * min(length, 2 * MAX_STRING) + bytes(6)
    fits = length == min(length, 2 * MAX_STRING)
    (reply,) = kinds(machine, FLAGS + option(Option.STRUCTURED_REPLY) + option(number, data))[1:]
    assert reply >> 31
    if fits and length <= MAX_STRING and number in (Option.INFO, Option.GO):
        assert reply == INVALID, "what is behind the name is no list of infos"
    assert kinds(machine, option(Option.GO, info_data("disk")))[-1] == ACK


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_a_name_of_the_greatest_length_is_looked_for_cve_2017_15118(number: Option) -> None:
    data = string(b"n" * MAX_STRING) + bytes(2)
    assert kinds(Handshake(Directory()), FLAGS + option(number, data)) == [OptionReply.ERR_UNKNOWN]


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_what_is_skipped_is_never_kept_cve_2022_26496(number: Option) -> None:
    """nbd-server skipped data through a buffer that they did not fit into."""
    limits = HandshakeLimits()
    length = limits.handshake_bytes // 2
    machine = Handshake(Directory())
    feed(machine, FLAGS + option(number)[:-4] + struct.pack(">I", length))
    piece, sent = bytes(1 << 16), b""
    for _ in range(length // len(piece)):
        sent += feed(machine, piece)
        assert machine.unread == b""
    assert [reply for _, reply, _ in split_option_replies(sent)] == [OptionReply.ERR_TOO_BIG]
    assert kinds(machine, option(Option.GO, info_data("disk")))[-1] == ACK
