"""Fixed newstyle negotiation: one table drives the machine whole, byte by byte and with bytes behind."""

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.protocol.constants import MAX_STRING, Info, Option, OptionReply, TransmissionFlag
from nbdvde.protocol.handshake import Handshake, HandshakeLimits, Phase, transmission_flags
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError
from tests.protocol.client import FLAGS, info_data, meta_data, option, split_option_replies, string

CONTEXT = "base:allocation"
DEPTH, OURS = "qemu:allocation-depth", "x-nbdvde:extent"
DISK = ExportInfo("disk", 1 << 30, description="a disk", contexts=(CONTEXT, DEPTH, OURS))
LOCKED = ExportInfo("locked", 512, read_only=True)
EXPORTS = {"": DISK, "disk": DISK, "locked": LOCKED}
ACK = OptionReply.ACK
INVALID = OptionReply.ERR_INVALID
UNKNOWN = OptionReply.ERR_UNKNOWN
STRUCTURED = option(Option.STRUCTURED_REPLY)


LIMITS = HandshakeLimits()


class Directory:
    def __init__(self, obstacle: str | None = None) -> None:
        self.obstacle = obstacle
        self.entered: list[str] = []

    def find(self, name: str) -> ExportInfo | None:
        return EXPORTS.get(name)

    def listing(self) -> list[ExportInfo]:
        return [DISK, LOCKED]

    def enter(self, name: str) -> str | None:
        self.entered.append(name)
        return self.obstacle


def handshake() -> Handshake:
    return Handshake(Directory())


def feed(machine: Handshake, data: bytes) -> bytes:
    machine.feed(data)
    sent = b""
    while (reply := machine.step()) is not None:
        sent += reply
    return sent


def whole(machine: Handshake, data: bytes) -> bytes:
    return feed(machine, data)


def byte_by_byte(machine: Handshake, data: bytes) -> bytes:
    return b"".join(feed(machine, data[i : i + 1]) for i in range(len(data)))


FEEDS = pytest.mark.parametrize("feeder", [whole, byte_by_byte])
Feeder = Callable[[Handshake, bytes], bytes]


def replies(data: bytes) -> list[tuple[int, int]]:
    return [(number, reply) for number, reply, _ in split_option_replies(data)]


META = Option.SET_META_CONTEXT
BAD_DATA = [
    pytest.param(Option.LIST, b"x", id="list with data"),
    pytest.param(Option.STRUCTURED_REPLY, b"x", id="structured reply with data"),
    pytest.param(Option.EXTENDED_HEADERS, b"x", id="extended headers with data"),
    *(
        pytest.param(number, data, id=f"{number.name.lower()}: {label}")
        for number in (Option.INFO, Option.GO)
        for label, data in {
            "no data": b"",
            "half a length": b"\0\0\0",
            "no count": string("disk"),
            "name longer than data": struct.pack(">I", 5) + b"disk",
            "name of 2^31 bytes": struct.pack(">I", 1 << 31) + b"disk\0\0",
            "name of 2^32-1 bytes": struct.pack(">I", (1 << 32) - 1) + b"disk\0\0",
            "name of 4097 bytes": info_data("x" * (MAX_STRING + 1)),
            "name with NUL": info_data("di\0sk"),
            "name that is not UTF-8": info_data(b"\xff\xfe"),
            "count too big": string("disk") + struct.pack(">HH", 2, 3),
            "bytes left over": info_data("disk", (3,)) + b"\0",
        }.items()
    ),
    *(
        pytest.param(number, data, id=f"{number.name.lower()}: {label}")
        for number in (Option.LIST_META_CONTEXT, META)
        for label, data in {
            "no data": b"",
            "no count": string("disk"),
            "query longer than data": string("disk") + struct.pack(">II", 1, 16) + CONTEXT.encode(),
            "too many queries": string("disk") + struct.pack(">I", (1 << 32) - 1) + string(CONTEXT),
            "query of 4097 bytes": meta_data("disk", "base:" + "x" * 4092),
            "bytes left over": meta_data("disk", CONTEXT) + b"\0",
        }.items()
    ),
]


@FEEDS
@pytest.mark.parametrize(("number", "data"), BAD_DATA)
def test_bad_data_gives_exactly_one_error_and_haggling_goes_on(feeder: Feeder, number: Option, data: bytes) -> None:
    machine = handshake()
    sent = feeder(machine, FLAGS + STRUCTURED + option(number, data) + option(Option.ABORT))
    assert replies(sent) == [(Option.STRUCTURED_REPLY, ACK), (number, INVALID), (Option.ABORT, ACK)]
    assert machine.phase is Phase.ABORTED


@FEEDS
@pytest.mark.parametrize(
    ("number", "data", "expected"),
    [
        pytest.param(4, b"", OptionReply.ERR_UNSUP, id="peek export, withdrawn"),
        pytest.param(Option.STARTTLS, b"", OptionReply.ERR_POLICY, id="starttls"),
        pytest.param(0xDEADBEEF, b"data", OptionReply.ERR_UNSUP, id="unknown"),
        pytest.param(Option.INFO, info_data("nothing"), UNKNOWN, id="info of an unknown export"),
        pytest.param(Option.GO, info_data("x" * MAX_STRING), UNKNOWN, id="longest name"),
        pytest.param(META, meta_data("nothing", CONTEXT), UNKNOWN, id="context of an unknown export"),
        pytest.param(Option.LIST_META_CONTEXT, meta_data("nothing"), UNKNOWN, id="contexts of an unknown export"),
    ],
)
def test_what_cannot_be_done_is_said(feeder: Feeder, number: int, data: bytes, expected: OptionReply) -> None:
    machine = handshake()
    sent = feeder(machine, FLAGS + STRUCTURED + option(number, data) + option(Option.GO, info_data("disk")))
    assert replies(sent)[:2] == [(Option.STRUCTURED_REPLY, ACK), (number, expected)]
    assert machine.phase is Phase.TRANSMISSION


@FEEDS
def test_list_names_every_export_with_its_description(feeder: Feeder) -> None:
    sent = split_option_replies(feeder(handshake(), FLAGS + option(Option.LIST)))
    assert sent == [
        (Option.LIST, OptionReply.SERVER, string("disk") + b"a disk"),
        (Option.LIST, OptionReply.SERVER, string("locked")),
        (Option.LIST, ACK, b""),
    ]


def information(machine: Handshake, number: Option, infos: tuple[int, ...], name: str = "") -> list[bytes]:
    *found, (_, final, data) = split_option_replies(feed(machine, option(number, info_data(name, infos))))
    assert (final, data) == (ACK, b"")
    assert all(reply[:2] == (number, OptionReply.INFO) for reply in found)
    return [reply[2] for reply in found]


def test_info_and_go_tell_the_same() -> None:
    machine = handshake()
    feed(machine, FLAGS + STRUCTURED)
    asked = (3, 2, 1, 0, 77, 3)
    told = information(machine, Option.INFO, asked)
    assert machine.phase is Phase.OPTIONS
    assert told == information(machine, Option.GO, asked)
    flags = transmission_flags(read_only=False, structured=True)
    assert told == [
        struct.pack(">HQH", Info.EXPORT, 1 << 30, flags),
        struct.pack(">H", Info.NAME) + b"disk",
        struct.pack(">H", Info.DESCRIPTION) + b"a disk",
        struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 1 << 25),
    ]


def test_info_without_requests_tells_size_and_flags_alone() -> None:
    machine = handshake()
    feed(machine, FLAGS)
    assert information(machine, Option.INFO, (), "locked") == [
        struct.pack(">HQH", Info.EXPORT, 512, transmission_flags(read_only=True, structured=False))
    ]
    assert len(information(machine, Option.INFO, (Info.DESCRIPTION,), "locked")) == 1


def test_transmission_flags() -> None:
    plain = transmission_flags(read_only=False, structured=False)
    assert plain == 0b1101_0110_1101
    assert transmission_flags(read_only=False, structured=True) == plain | TransmissionFlag.SEND_DF
    assert transmission_flags(read_only=True, structured=False) == 0b0101_0000_1111


@FEEDS
def test_bytes_behind_go_belong_to_transmission(feeder: Feeder) -> None:
    machine = handshake()
    feeder(machine, FLAGS + option(Option.GO, info_data("disk")) + b"request")
    assert machine.negotiated == Negotiated(DISK, structured=False)
    assert machine.unread == b"request"


@FEEDS
@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name(feeder: Feeder, flags: int, zeroes: int) -> None:
    machine = handshake()
    sent = feeder(machine, struct.pack(">I", flags) + option(Option.EXPORT_NAME, b"disk") + b"request")
    assert sent == struct.pack(">QH", 1 << 30, transmission_flags(read_only=False, structured=False)) + bytes(zeroes)
    assert machine.negotiated == Negotiated(DISK, structured=False)
    assert machine.unread == b"request"


@FEEDS
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack(">I", 4), id="unknown client flag"),
        pytest.param(struct.pack(">I", 0x80000003), id="unknown high client flag"),
        pytest.param(FLAGS + b"IHAVEOPS" + bytes(8), id="wrong option magic"),
        pytest.param(FLAGS + option(Option.EXPORT_NAME, b"nothing"), id="unknown export by name"),
        pytest.param(FLAGS + option(Option.EXPORT_NAME, b"\xff"), id="name not UTF-8"),
        pytest.param(FLAGS + option(Option.EXPORT_NAME, b"x" * (MAX_STRING + 1)), id="name too long"),
        pytest.param(FLAGS + option(Option.EXPORT_NAME, b"x" * (LIMITS.option_bytes + 1)), id="name absurdly long"),
        pytest.param(
            FLAGS + option(99)[:-4] + struct.pack(">I", LIMITS.handshake_bytes + 1), id="data above the limit"
        ),
        pytest.param(FLAGS + option(99)[:-4] + b"\xff" * 4, id="data of 2^32-1 bytes"),
        pytest.param(FLAGS + option(99) * (LIMITS.options + 1), id="too many options"),
    ],
)
def test_violations_end_the_connection(feeder: Feeder, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        feeder(handshake(), data)


@FEEDS
def test_options_are_limited_all_together(feeder: Feeder) -> None:
    machine = Handshake(Directory(), limits=HandshakeLimits(handshake_bytes=1000))
    asked = option(99, bytes(234))
    assert len(replies(feeder(machine, FLAGS + asked * 4))) == 4
    with pytest.raises(ProtocolError, match="in all"):
        feeder(machine, asked)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(Option.INFO, OptionReply.ERR_TOO_BIG), (META, OptionReply.ERR_TOO_BIG), (99, OptionReply.ERR_UNSUP)],
)
@pytest.mark.parametrize("piece", [1 << 12, 1 << 20])
def test_long_data_are_skipped_without_being_kept(number: int, expected: OptionReply, piece: int) -> None:
    machine = handshake()
    data = FLAGS + STRUCTURED + option(number, bytes(LIMITS.option_bytes * 3 + 5)) + option(Option.ABORT)
    sent = b""
    for start in range(0, len(data), piece):
        sent += feed(machine, data[start : start + piece])
        assert len(machine.unread) <= LIMITS.option_bytes + 16
    assert replies(sent) == [(Option.STRUCTURED_REPLY, ACK), (number, expected), (Option.ABORT, ACK)]


@FEEDS
@pytest.mark.parametrize("data", [b"", b"why", bytes(LIMITS.option_bytes + 1)])
def test_abort_is_acknowledged_whatever_comes_with_it(feeder: Feeder, data: bytes) -> None:
    machine = handshake()
    assert replies(feeder(machine, FLAGS + option(Option.ABORT, data))) == [(Option.ABORT, ACK)]
    assert machine.phase is Phase.ABORTED


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ((), [CONTEXT, DEPTH, OURS], ()),
        (("qemu:", "x-nbdvde:"), [DEPTH, OURS], ()),
        ((OURS, CONTEXT), [CONTEXT, OURS], (CONTEXT, OURS)),
        ((CONTEXT, DEPTH, OURS, "base:"), [CONTEXT, DEPTH, OURS], (CONTEXT, DEPTH, OURS)),
        (("base:",), [CONTEXT], ()),
        ((CONTEXT,), [CONTEXT], (CONTEXT,)),
        ((CONTEXT, CONTEXT), [CONTEXT], (CONTEXT,)),
        (("base:other", "qemu:dirty-bitmap:b", "x-y:"), [], ()),
        (("qemu:dirty-bitmap:b", CONTEXT), [CONTEXT], (CONTEXT,)),
        (("nonsense",), [], ()),
    ],
)
def test_metadata_contexts(queries: tuple[str, ...], listed: list[str], selected: tuple[str, ...]) -> None:
    machine = handshake()
    feed(machine, FLAGS + STRUCTURED)
    data = meta_data("disk", *queries)
    for number, names in ((Option.LIST_META_CONTEXT, listed), (META, selected)):
        found = split_option_replies(feed(machine, option(number, data)))
        ids = range(len(names)) if number == META else [0] * len(names)
        expected = [
            (number, OptionReply.META_CONTEXT, context_id.to_bytes(4, "big") + name.encode())
            for context_id, name in zip(ids, names, strict=True)
        ]
        assert found == [*expected, (number, ACK, b"")]
    feed(machine, option(Option.GO, info_data("disk")))
    assert machine.negotiated == Negotiated(DISK, structured=True, contexts=selected)


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, META])
def test_contexts_need_structured_replies(number: Option) -> None:
    assert replies(feed(handshake(), FLAGS + option(number, meta_data("disk", CONTEXT)))) == [(number, INVALID)]


@pytest.mark.parametrize(
    "then",
    [
        pytest.param(option(META, meta_data("disk")), id="replaced by nothing"),
        pytest.param(option(META, meta_data("nothing", CONTEXT)), id="failed: unknown export"),
        pytest.param(option(META, b"?"), id="failed: bad data"),
        pytest.param(option(META, bytes(LIMITS.option_bytes + 1)), id="failed: too much data"),
        pytest.param(option(META, meta_data("", CONTEXT)), id="made for another name"),
    ],
)
def test_every_set_meta_context_replaces_the_selection(then: bytes) -> None:
    machine = handshake()
    feed(machine, FLAGS + STRUCTURED + option(META, meta_data("disk", CONTEXT)) + then)
    feed(machine, option(Option.GO, info_data("disk")))
    assert machine.negotiated == Negotiated(DISK, structured=True)


def test_a_selection_outlives_other_options() -> None:
    machine = handshake()
    feed(machine, FLAGS + STRUCTURED + option(META, meta_data("disk", CONTEXT)) + STRUCTURED + option(Option.LIST))
    feed(machine, option(Option.INFO, info_data("locked")) + option(Option.GO, info_data("disk")))
    assert machine.negotiated == Negotiated(DISK, structured=True, contexts=(CONTEXT,))


EXTENDED = option(Option.EXTENDED_HEADERS)


@FEEDS
def test_extended_headers_imply_structure(feeder: Feeder) -> None:
    machine = handshake()
    selected = option(META, meta_data("disk", CONTEXT))
    sent = feeder(machine, FLAGS + EXTENDED + selected + option(Option.GO, info_data("disk")))
    assert replies(sent)[:2] == [(Option.EXTENDED_HEADERS, ACK), (META, OptionReply.META_CONTEXT)]
    assert machine.negotiated == Negotiated(DISK, structured=False, contexts=(CONTEXT,), extended=True)
    (flags,) = [struct.unpack(">HQH", data)[2] for _, reply, data in split_option_replies(sent) if reply == 3]
    assert flags & TransmissionFlag.SEND_DF
    assert flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


def test_a_filter_is_offered_only_with_contexts_and_extended_headers() -> None:
    for options in (EXTENDED, STRUCTURED + option(META, meta_data("disk", CONTEXT))):
        sent = feed(handshake(), FLAGS + options + option(Option.GO, info_data("disk")))
        (flags,) = [struct.unpack(">HQH", data)[2] for _, reply, data in split_option_replies(sent) if reply == 3]
        assert not flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


def test_there_is_no_way_back_from_extended_headers() -> None:
    machine = handshake()
    sent = feed(machine, FLAGS + STRUCTURED + EXTENDED + EXTENDED + STRUCTURED)
    assert replies(sent) == [
        (Option.STRUCTURED_REPLY, ACK),
        (Option.EXTENDED_HEADERS, ACK),
        (Option.EXTENDED_HEADERS, ACK),
        (Option.STRUCTURED_REPLY, OptionReply.ERR_EXT_HEADER_REQD),
    ]
    with pytest.raises(ProtocolError):
        feed(machine, option(Option.EXPORT_NAME, b"disk"))


OPTION_BYTES = st.builds(
    option,
    st.one_of(st.sampled_from([*Option]), st.integers(0, (1 << 32) - 1)),
    st.one_of(
        st.binary(max_size=40),
        st.builds(info_data, st.sampled_from(["", "disk", "locked", "no"]), st.just((3, 1))),
        st.builds(meta_data, st.sampled_from(["", "disk", "no"]), st.sampled_from([CONTEXT, "base:", "x"])),
    ),
)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    start = 0
    for cut in sorted({min(cut, len(data)) for cut in cuts} | {len(data)}):
        yield data[start:cut]
        start = cut


def transcript(parts: Iterator[bytes]) -> tuple[bytes, bool, Phase, Negotiated | None, bytes]:
    machine = handshake()
    sent, violated = b"", False
    for part in parts:
        try:
            sent += feed(machine, part)
        except ProtocolError:
            violated = True
            break
    return sent, violated, machine.phase, machine.negotiated, b"" if violated else machine.unread


@given(st.lists(OPTION_BYTES, max_size=6), st.binary(max_size=30), st.lists(st.integers(0, 300)))
def test_segmentation_does_not_matter(options: list[bytes], tail: bytes, cuts: list[int]) -> None:
    data = FLAGS + b"".join(options) + tail
    result = transcript(pieces(data, cuts))
    expected = transcript(iter([data]))
    if expected[1]:
        assert result[1]
    else:
        assert result == expected


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_raise_nothing_but_the_protocol_error(data: bytes, greeted: bool) -> None:
    transcript(iter([FLAGS + option(6)[:8] + data if greeted else data]))


@FEEDS
def test_an_export_that_cannot_be_used_now(feeder: Feeder) -> None:
    """It can be looked at, and something else can be done."""
    exports = Directory("it is full")
    machine = Handshake(exports)
    wanted = info_data("disk")
    sent = feeder(machine, FLAGS + option(Option.INFO, wanted) + option(Option.GO, wanted) + option(Option.ABORT))
    types = [(number, reply) for number, reply in replies(sent) if reply != OptionReply.INFO]
    assert types == [(Option.INFO, ACK), (Option.GO, OptionReply.ERR_POLICY), (Option.ABORT, ACK)]
    assert exports.entered == ["disk"]
    with pytest.raises(ProtocolError, match="full"):
        feeder(Handshake(exports), FLAGS + option(Option.EXPORT_NAME, b"disk"))
