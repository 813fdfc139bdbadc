"""The table of dictionaries, the choice among them, and extents that are compressed with one."""

import hashlib
import random
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.disk import BLOCK
from nbdvde.engine.dictionaries import (
    CONTENT_AT,
    ENTRIES_MAX,
    REGION_BYTES,
    SIZE_MAX,
    SLOTS,
    Choice,
    Dictionaries,
    Entry,
    Table,
    identified,
)
from nbdvde.engine.extent import Compressor, Decoder, dictionary_of
from nbdvde.errors import DamageError, RefusedError, UsageError
from tests.engine.trained import dictionary, text

WORDS, OTHERS = dictionary(1), dictionary(2)


def read(table: Table) -> Table:
    """What comes back of a table that was stored."""
    blocks = table.pack()
    assert len(blocks) <= CONTENT_AT
    return Table.unpack(lambda number: blocks[number])


def holding(*contents: bytes) -> Dictionaries:
    """Dictionaries in slots from 0 on."""
    dictionaries, table = Dictionaries(), Table()
    for slot, content in enumerate(contents):
        table = table.adding(slot, content, 1, 1)
        dictionaries.take(table, {table.get(slot).number: content})
    return dictionaries


@given(st.lists(st.tuples(st.sampled_from(["add", "free", "drop"]), st.integers(0, 5)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_history_keeps_what_it_promises(history: list[tuple[str, int]]) -> None:
    table, shown, numbers = Table(), dict[int, bytes](), set[int]()
    for step, (what, slot) in enumerate(history):
        content = (WORDS, OTHERS)[step % 2]
        if what == "add":
            table = table.adding(slot, content, step, step)
            assert table.get(slot).number not in numbers, "a number is not given twice"
            numbers.add(table.get(slot).number)
            shown[slot] = content
        elif what == "free" and slot in shown:
            table = table.freeing(slot)
            del shown[slot]
        elif what == "drop":
            table = table.dropping([entry.number for entry in table.kept][:slot])
        places = [
            (entry.offset, entry.offset + entry.blocks) for entry in sorted(table.entries, key=lambda e: e.offset)
        ]
        assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
        assert {entry.slot: entry.sha256 for entry in table} == {
            slot: hashlib.sha256(content).digest() for slot, content in shown.items()
        }
        again = read(table)
        assert (again.entries, again.generation) == (table.entries, table.generation)


def test_of_256_slots_each_can_be_taken_once() -> None:
    table = Table()
    for slot in range(SLOTS):
        assert table.free_slot() == slot
        table = table.adding(slot, WORDS, 1, 1)
    assert [entry.slot for entry in read(table)] == list(range(SLOTS))
    assert len(table.of_algorithm(0)) == SLOTS
    assert table.of_algorithm(1) == []
    with pytest.raises(RefusedError, match="all 256 are there"):
        table.free_slot()
    with pytest.raises(RefusedError, match="dictionary 7: exists already"):
        table.free_slot(7)
    for slot in (-1, SLOTS):
        with pytest.raises(UsageError, match="not between 0 and 255"):
            table.free_slot(slot)
    table = table.freeing(9)
    assert table.free_slot() == 9
    with pytest.raises(UsageError, match="dictionary 9: does not exist"):
        table.get(9)


def test_older_versions_are_kept_within_a_limit() -> None:
    table = Table()
    for step in range(255):
        table = table.adding(0, WORDS, 1, step)
    with pytest.raises(RefusedError, match="255 versions"):
        table.adding(0, WORDS, 1, 1)
    first = table.kept[0].number
    again = table.dropping([first]).adding(0, WORDS, 1, 1)
    assert again.get(0).number == first, "after the last version comes the first one that is free"
    for step in range(ENTRIES_MAX - 255):
        table = table.adding(1 + step % 200, WORDS, 1, 1)
    assert len(read(table).entries) == ENTRIES_MAX
    with pytest.raises(RefusedError, match="1024 are kept"):
        table.adding(1, WORDS, 1, 1)


@pytest.mark.parametrize("content", [b"", b"x", bytes(SIZE_MAX + 1), b"no dictionary " * 100, WORDS[:100]])
def test_what_is_no_dictionary_is_refused(content: bytes) -> None:
    with pytest.raises(UsageError, match="dictionary"):
        Table().adding(0, content, 1, 1)


@pytest.mark.parametrize("wrong", [
    Entry(0x0003, 0, 32, 1, 5, 0, 0, bytes(32)), Entry(0x0103, 0, 31, 1, 5, 0, 0, bytes(32)),
    Entry(0x0103, 0, 32, 2, 5, 0, 0, bytes(32)), Entry(0x0103, 0, REGION_BYTES // BLOCK, 1, 5, 0, 0, bytes(32)),
    Entry(0x0103, 0, 32, SIZE_MAX // BLOCK + 1, SIZE_MAX + 1, 0, 0, bytes(32)),
])  # fmt: skip
def test_entries_that_cannot_be_are_damage(wrong: Entry) -> None:
    with pytest.raises(DamageError, match="impossibly"):
        read(Table([wrong]))


def test_a_table_names_a_dictionary_once() -> None:
    entry = Table().adding(0, WORDS, 1, 1).get(0)
    with pytest.raises(DamageError, match="twice"):
        read(Table([entry, entry]))


def test_contents_are_compared_with_what_was_trained() -> None:
    table = Table().adding(0, WORDS, 1, 1).adding(1, OTHERS, 1, 1)
    good, bad = table.get(0), table.get(1)
    dictionaries = Dictionaries()
    assert dictionaries.load(table, {good.number: WORDS, bad.number: OTHERS[:-1] + b"?"}) == [bad]
    assert dictionaries.used == (good.number,)
    assert dictionaries.content(good.number) == WORDS
    with pytest.raises(DamageError, match="dictionary 1: is missing"):
        dictionaries.content(bad.number)


def test_ids_follow_from_the_content_and_take_two_bytes() -> None:
    assert zstandard.ZstdCompressionDict(WORDS).dict_id() != zstandard.ZstdCompressionDict(OTHERS).dict_id()
    assert identified(WORDS) == WORDS
    assert 1 << 15 <= zstandard.ZstdCompressionDict(WORDS).dict_id() < 1 << 16


# Extents


def test_small_extents_use_the_dictionary_that_pays() -> None:
    dictionaries, chance = holding(OTHERS, WORDS), random.Random(1)
    choice = dictionaries.choice(5)
    assert choice is not None
    compressor, decoder = Compressor(1, dictionaries), Decoder(dictionaries)
    for _ in range(40):
        page = text(1, chance)
        [packed] = compressor.encode([[page]], choice)
        assert dictionary_of(packed) == dictionaries.table.get(1).number
        assert decoder.frame(packed, 1, 0) == page
        assert len(packed) < 0.9 * len(Compressor(1).encode([[page]])[0])


def test_what_no_dictionary_is_good_for_is_compressed_without() -> None:
    dictionaries, chance = holding(OTHERS), random.Random(2)
    choice = dictionaries.choice(5)
    pages = [bytes(chance.choices(b"0123456789", k=BLOCK)) for _ in range(40)]
    packed = Compressor(1, dictionaries).encode([[page] for page in pages], choice)
    assert not any(map(dictionary_of, packed))
    assert [Decoder(dictionaries).frame(plain, 1, 0) for plain in packed] == pages


def test_long_extents_and_those_that_cannot_be_compressed_have_none() -> None:
    dictionaries, chance = holding(WORDS), random.Random(3)
    long = [text(1, chance, 4 * BLOCK), text(1, chance)]
    noise, short = [chance.randbytes(BLOCK)], [text(1, chance)]
    packed = Compressor(1, dictionaries).encode([long, noise, short], dictionaries.choice(1))
    assert [dictionary_of(plain) for plain in packed] == [0, 0, dictionaries.table.get(0).number]
    assert Decoder().frames(packed[0], 5) == long
    assert Decoder().frames(packed[1], 1) == noise
    together = Decoder(dictionaries).many([(packed[2], 1, 0), (packed[0], 5, 1), (packed[1], 1, 0), (packed[0], 5, 0)])
    assert list(map(bytes, together)) == [*short, long[1], *noise, long[0]]
    assert not dictionary_of(Compressor(0, dictionaries).encode([[text(1, chance)]], dictionaries.choice(1))[0])


def test_the_choice_follows_the_data() -> None:
    dictionaries, chance = holding(WORDS, OTHERS), random.Random(4)
    choice, compressor = dictionaries.choice(1), Compressor(1, dictionaries)
    found = [dictionary_of(compressor.encode([[text(kind, chance)]], choice)[0]) for kind in (1,) * 64 + (2,) * 400]
    first, second = (dictionaries.table.get(slot).number for slot in (0, 1))
    assert found[:64] == [first] * 64
    assert found[-32:] == [second] * 32


def test_each_disk_chooses_for_itself_and_the_region_not_at_all() -> None:
    dictionaries = holding(WORDS)
    dictionaries.volume = 3
    assert dictionaries.choice(3) is None
    assert dictionaries.choice(1) is dictionaries.choice(1) is not dictionaries.choice(2)
    dictionaries.use(())
    assert dictionaries.choice(1) is None


def test_what_is_not_to_be_used_any_more_comes_into_no_later_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionaries = holding(WORDS, OTHERS)
    second = dictionaries.used[1]

    class Interrupted(Choice):
        """While a thread makes one, the event loop takes a dictionary away."""

        def __init__(self, numbers: tuple[int, ...]) -> None:
            super().__init__(numbers)
            dictionaries.use((second,)) if len(numbers) > 1 else None

    monkeypatch.setattr("nbdvde.engine.dictionaries.Choice", Interrupted)
    dictionaries.choice(1)
    later = dictionaries.choice(1)
    assert later is not None
    assert later.candidates() == [second]


def test_of_many_dictionaries_a_few_are_tried_at_a_time() -> None:
    choice = Choice(tuple(range(1, 11)))
    asked = {extent: numbers for extent in range(1, 100) if (numbers := choice.candidates())}
    assert list(asked) == [1, 2, 4, 8, 16, 32, 64, 96]
    assert [asked[extent] for extent in (1, 2, 4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 1, 2]]
    choice.learn(100, {3: 50, 5: 96})
    assert choice.best == 3
    choice.learn(100, {3: 400})
    assert choice.best == 0, "what costs more than it saves is not used"


def test_another_content_under_the_number_is_noticed() -> None:
    table = Table().adding(0, WORDS, 1, 1)
    number = table.get(0).number
    writing, reading = Dictionaries(), Dictionaries()
    writing.take(table, {number: WORDS})
    reading.take(table, {number: OTHERS})
    [packed] = Compressor(1, writing).encode([[text(1, random.Random(5))]], writing.choice(1))
    with pytest.raises(DamageError, match="cannot be decompressed"):
        Decoder(reading).frame(packed, 1, 0)
    with pytest.raises(DamageError, match="dictionary 0: is missing"):
        Decoder().frame(packed, 1, 0)
    damaged = Dictionaries()
    damaged.damaged = "a block fails its checksum"
    with pytest.raises(DamageError, match="a block fails its checksum"):
        Decoder(damaged).frame(packed, 1, 0)
