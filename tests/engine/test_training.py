"""Training: which class a block is of, what is sampled, and when a dictionary is worth having."""

import random
import sqlite3
from pathlib import Path

import pytest

import nbdvde
from nbdvde.disk import BLOCK
from nbdvde.engine.dictionaries import Dictionaries, Table
from nbdvde.engine.sampling import sample
from nbdvde.engine.training import Trainer, classify
from nbdvde.errors import UsageError
from tests.engine.test_dictionaries import holding
from tests.engine.trained import dictionary, text


def lines(one: str) -> bytes:
    """A block of lines that are a little different."""
    return "".join(one.format(number) + "\n" for number in range(1000, 1400)).encode()[:BLOCK]


@pytest.mark.parametrize(("name", "block"), [
    ("text", text(1, random.Random(1))),
    ("text", lines("    if number > {}: return None")),
    ("log", lines("2026-11-21 14:52:{} status installed libc6")),
    ("log", lines("Nov 21 14:52:01 host kernel: [{}] usb 1-1: new device")),
    ("json", lines('{{"level": "info", "number": {}, "path": "/v1/status"}}')),
    ("mail", lines("Received: from mx{}.example.org\nSubject: something\n\nTo whom it may concern\n")),
    ("code", bytes([0x48, 0x8B, 0x05, 0x10, 0x20, 0, 0, 0x48, 0x89, 0xC7, 0xE8, 0xAA, 0xBB, 0xFF, 0xFF, 0x90]) * 256),
    ("binary", random.Random(1).randbytes(BLOCK)),
    ("binary", bytes([13]) + bytes(BLOCK - 1)),
])  # fmt: skip
def test_classes_are_told_apart(name: str, block: bytes) -> None:
    assert classify(block) == name


def test_pages_of_a_database_are(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "db")
    database.execute("create table t (word text primary key, number)")
    database.executemany("insert into t values (?, ?)", ((f"word {n * n}", n) for n in range(2000)))
    database.commit()
    database.close()
    data = (tmp_path / "db").read_bytes()
    found = [classify(data[at : at + BLOCK]) for at in range(BLOCK, len(data), BLOCK)]
    assert found.count("database") > 0.9 * len(found)


def test_only_what_pays_is_worth_having() -> None:
    chance = random.Random(2)
    numbers = [bytes(chance.choices(b"0123456789", k=BLOCK)) for _ in range(80)]
    words = [text(1, chance) for _ in range(80)]
    [useless] = Trainer(1, Dictionaries(), 4096).by_class(numbers)
    assert (useless.name, useless.samples, useless.why_not) == ("text", 80, "saves too little")
    [good] = Trainer(1, Dictionaries(), 8192).by_class([*words, *(chance.randbytes(BLOCK) for _ in range(40))])
    assert (good.name, good.samples, good.why_not) == ("text", 80, "")
    assert good.trained_bytes < 0.9 * good.plain_bytes < 0.9 * good.raw_bytes
    assert [known.why_not for known in Trainer(1, holding(dictionary(1)), 4096).by_class(words)] == [
        "dictionary 0 does as well"
    ]


def test_few_samples_teach_nothing() -> None:
    trainer = Trainer(1, Dictionaries(), 1 << 16)
    words = [text(1, random.Random(n)) for n in range(20)]
    found = {one.name: one for one in trainer.by_class(words, ["text", "json"])}
    assert {name: (one.samples, one.why_not) for name, one in found.items()} == {
        "text": (20, "fewer than 32 samples"), "json": (0, "fewer than 32 samples"),
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [
    [bytes(range(32, 96)) * 64] * 40, [bytes(4095) + b"x"] * 32, [bytes([n]) * BLOCK for n in range(140, 200)],
])  # fmt: skip
def test_of_strange_samples_comes_a_sound_dictionary(blocks: list[bytes]) -> None:
    for size in (1024, 256 << 10):
        [trained] = Trainer(1, Dictionaries(), size).by_class(blocks, [classify(blocks[0])])
        assert Table().adding(0, trained.content, 1, 1)


def test_what_a_dictionary_is_best_at_trains_its_successor() -> None:
    dictionaries, chance = holding(dictionary(1), dictionary(2)), random.Random(3)
    first, second = ([text(kind, chance) for _ in range(40)] for kind in (1, 2))
    trainer = Trainer(1, dictionaries, 4096)
    number = dictionaries.table.get(1).number
    assert trainer.best_at(number, [*first, *second]) == second
    assert trainer.again(number, [*first, *second]).samples == 40
    dictionaries.use(())
    assert trainer.again(number, second).why_not == "fewer than 32 samples"


def test_without_compression_there_is_nothing_to_train_for() -> None:
    with pytest.raises(UsageError, match="not compressed"):
        Trainer(0, Dictionaries())


async def test_a_sample_is_of_what_holds_data(tmp_path: Path) -> None:
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, 1 << 40, secret=None)
    async with nbdvde.open_image(path) as image:
        disk, seen = image.disk(), list[int]()
        assert await sample(disk, 10, lambda done, total: seen.append(done)) == []
        pages = {n * n * 4000: bytes([n + 1]) * BLOCK for n in range(240)}
        for block, page in pages.items():
            await disk.write(block * BLOCK, memoryview(page))
        await disk.zero(0, BLOCK, allocate=True)
        del pages[0]
        assert sorted(await sample(disk, 1000, lambda done, total: seen.append(done))) == sorted(pages.values())
        assert seen == [block * BLOCK for block in pages]
        some = await sample(disk, 50, lambda done, total: None)
        assert len(some) == 50
        assert set(some) <= set(pages.values())
        assert some == await sample(disk, 50, lambda done, total: None)
