"""Clients made of random steps, against plain models of what has been agreed and of what the disk holds."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdvde.protocol.constants import Option, OptionReply
from nbdvde.protocol.handshake import Handshake, Phase, Tls
from tests.fuzz.model import DISC, PAYLOAD_LEN, READ, WRITE, Agreed
from tests.fuzz.targets import SIZE, Setting, converse
from tests.protocol.client import (
    FLAGS,
    extended,
    info_data,
    meta_data,
    option,
    request,
    split_option_replies,
    status_filter,
)
from tests.protocol.test_handshake import EXPORTS, Directory

ACK, INVALID, UNKNOWN = OptionReply.ACK, OptionReply.ERR_INVALID, OptionReply.ERR_UNKNOWN
NAMES = st.sampled_from([*EXPORTS, "unknown"])


class Haggling(RuleBasedStateMachine):
    """A handshake, option after option, in pieces of any size."""

    @initialize(tls=st.sampled_from(Tls))
    def first_client(self, tls: Tls) -> None:
        self.begin(tls)

    def begin(self, tls: Tls) -> None:
        self.machine, self.tls = Handshake(Directory(), tls), tls
        self.structured = self.extended = False
        self.contexts: tuple[str, tuple[str, ...]] | None = None
        self.machine.feed(FLAGS)
        assert self.machine.step() == b""

    @precondition(lambda self: self.machine.phase is not Phase.OPTIONS)
    @rule(tls=st.sampled_from(Tls))
    def next_client(self, tls: Tls) -> None:
        self.begin(tls)

    def ask(self, number: int, data: bytes = b"", piece: int = 1000) -> list[int]:
        """Types of the replies."""
        message, sent = option(number, data), b""
        for at in range(0, len(message), piece):
            self.machine.feed(message[at : at + piece])
            while (reply := self.machine.step()) is not None:
                assert at + piece >= len(message), "answered before it was complete"
                sent += reply
        kinds = split_option_replies(sent)
        assert all(echoed == number for echoed, _, _ in kinds)
        return [kind for _, kind, _ in kinds]

    @property
    def closed(self) -> bool:
        """Whether nothing but STARTTLS and ABORT is answered."""
        return self.tls is Tls.REQUIRED

    def expect(self, found: Sequence[int], expected: Sequence[int]) -> None:
        assert list(found) == ([OptionReply.ERR_TLS_REQD] if self.closed else list(expected))

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(data=st.sampled_from([b"", b"x"]), piece=st.integers(1, 30))
    def structured_reply(self, data: bytes, piece: int) -> None:
        expected = INVALID if data else OptionReply.ERR_EXT_HEADER_REQD if self.extended else ACK
        self.expect(self.ask(Option.STRUCTURED_REPLY, data, piece), [expected])
        self.structured |= expected == ACK and not self.closed

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(data=st.sampled_from([b"", b"x"]))
    def extended_headers(self, data: bytes) -> None:
        self.expect(self.ask(Option.EXTENDED_HEADERS, data), [INVALID if data else ACK])
        self.extended |= not data and not self.closed

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(data=st.sampled_from([b"", b"x"]))
    def list_exports(self, data: bytes) -> None:
        expected = [INVALID] if data else [OptionReply.SERVER] * 2 + [ACK]
        self.expect(self.ask(Option.LIST, data), expected)

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(
        name=NAMES, context=st.sampled_from(["base:allocation", "base:", "other:x"]), tail=st.sampled_from([b"", b"x"])
    )
    def select(self, name: str, context: str, tail: bytes) -> None:
        found = self.ask(Option.SET_META_CONTEXT, meta_data(name, context) + tail)
        if not self.closed:
            self.contexts = None
        if tail or not (self.structured or self.extended):
            self.expect(found, [INVALID])
        elif name not in EXPORTS:
            self.expect(found, [UNKNOWN])
        else:
            known = tuple(c for c in EXPORTS[name].contexts if c == context)
            self.expect(found, [OptionReply.META_CONTEXT] * len(known) + [ACK])
            if not self.closed:
                self.contexts = name, known

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(name=NAMES, tail=st.sampled_from([b"", b"x"]), piece=st.integers(1, 30))
    def info(self, name: str, tail: bytes, piece: int) -> None:
        expected = [INVALID] if tail else [OptionReply.INFO, ACK] if name in EXPORTS else [UNKNOWN]
        self.expect(self.ask(Option.INFO, info_data(name) + tail, piece), expected)

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(number=st.sampled_from([0, 4, 12, 99, 1 << 31]), data=st.binary(max_size=50))
    def unknown(self, number: int, data: bytes) -> None:
        self.expect(self.ask(number, data), [OptionReply.ERR_UNSUP])

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(data=st.sampled_from([b"", b"x"]))
    def starttls(self, data: bytes) -> None:
        refusal = OptionReply.ERR_POLICY if self.tls is Tls.OFF else INVALID if self.tls is Tls.DONE else ACK
        expected = INVALID if data else refusal
        assert self.ask(Option.STARTTLS, data) == [expected]
        if expected == ACK:
            assert self.machine.phase is Phase.TLS
            self.machine.secured()
            self.tls, self.structured, self.extended, self.contexts = Tls.DONE, False, False, None

    @precondition(lambda self: self.machine.phase is Phase.OPTIONS)
    @rule(name=NAMES, abort=st.booleans())
    def end(self, name: str, abort: bool) -> None:
        if abort:
            assert self.ask(Option.ABORT, b"ignored") == [ACK]
            assert self.machine.phase is Phase.ABORTED
        elif self.closed or name not in EXPORTS:
            self.expect(self.ask(Option.GO, info_data(name)), [UNKNOWN])
        else:
            self.expect(self.ask(Option.GO, info_data(name)), [OptionReply.INFO, ACK])
            agreed = self.machine.negotiated
            assert agreed is not None
            assert (agreed.export, agreed.structured, agreed.extended) == (
                EXPORTS[name], self.structured, self.extended,
            )  # fmt: skip
            assert agreed.contexts == (self.contexts[1] if self.contexts and self.contexts[0] == name else ())

    @invariant()
    def served_only_when_agreed(self) -> None:
        if hasattr(self, "machine"):
            assert (self.machine.negotiated is not None) == (self.machine.phase is Phase.TRANSMISSION)
            assert not (self.closed and self.machine.negotiated)


class Transmission(RuleBasedStateMachine):
    """A session of valid, doubtful and bad requests; it is held, and compared with the model, at the end."""

    @initialize(
        structured=st.booleans(), wide=st.booleans(), contexts=st.integers(0, 2), read_only=st.sampled_from([0, 0, 1]),
        hurried=st.booleans(), piece=st.sampled_from([7, 60, 4096]),
    )  # fmt: skip
    def begin(self, structured: bool, wide: bool, contexts: int, read_only: int, hurried: bool, piece: int) -> None:
        structured = structured or wide
        agreed = Agreed(SIZE, bool(read_only), structured, wide, contexts if structured else 0)
        self.setting = Setting(agreed, False, hurried, piece, max(piece, 128), 100 if piece == 60 else 1 << 20)
        self.stream = b""

    def send(self, command: int, offset: int, length: int, flags: int, payload: bytes | None = None) -> None:
        make = extended if self.setting.agreed.extended else request
        self.stream += make(command, offset, length, flags=flags, payload=payload)

    @rule(command=st.integers(0, 8), offset=st.integers(0, SIZE), length=st.integers(0, SIZE), bit=st.integers(-3, 6))
    def one(self, command: int, offset: int, length: int, bit: int) -> None:
        flags = 1 << bit if bit >= 0 else 0
        if command not in (DISC, WRITE) and flags != PAYLOAD_LEN:
            self.send(command, offset, length, flags)

    @rule(offset=st.integers(0, SIZE + 5), data=st.binary(min_size=1, max_size=300), fua=st.booleans())
    def write(self, offset: int, data: bytes, fua: bool) -> None:
        self.send(WRITE, offset, 0, int(fua), data)
        self.send(READ, max(0, offset - 20), min(SIZE, offset + 320) - max(0, offset - 20), 0)

    @precondition(lambda self: self.setting.agreed.extended)
    @rule(command=st.sampled_from([0, 3, 4, 6, 7]), ids=st.lists(st.integers(0, 2), max_size=3))
    def payload_on_anything(self, command: int, ids: list[int]) -> None:
        self.send(command, 0, 0, 0, status_filter(SIZE, *ids))

    @rule()
    def disconnect(self) -> None:
        self.send(DISC, 0, 0, 0)

    def teardown(self) -> None:
        if hasattr(self, "setting"):
            converse(self.setting, self.stream)


EFFORT = settings(max_examples=150, stateful_step_count=30)
TestHaggling = Haggling.TestCase
TestHaggling.settings = EFFORT
TestTransmission = Transmission.TestCase
TestTransmission.settings = EFFORT
