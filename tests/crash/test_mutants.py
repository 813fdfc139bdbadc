"""The tests notice faults: each deliberate one in the engine makes a detector fail."""

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import create_image
from tests.crash import (
    test_damage,
    test_erasure,
    test_faults,
    test_keys,
    test_metrics_crashes,
    test_roots,
    test_vault_crashes,
)
from tests.crash.campaign import PROFILES, Effort, Tally, run_seed
from tests.crash.mutants import EQUIVALENT, MUTANTS, REDUNDANT, Mutant
from tests.crash.nonces import Ledger, lives
from tests.engine import (
    test_checkpointer,
    test_cleaner,
    test_dictchange,
    test_diskmap,
    test_duplicates,
    test_lbamap,
    test_learning,
    test_moving,
    test_optimize,
    test_replay,
    test_volumes,
)
from tests.engine.regions import (
    test_anon,
    test_anon_image,
    test_sketch,
    test_stream,
    test_tiers,
    test_vault,
    test_vault_image,
    test_worm,
)
from tests.engine.regions.passports import NOW


def crash() -> None:
    """A part of what test_crash looks at."""
    tally = Tally()
    for seed in range(3):
        for name in PROFILES:
            run_seed(seed, Effort(subsets=256), tally, name)


def history() -> None:
    """As `crash`, only of images with snapshots."""
    tally = Tally()
    for seed in range(12):
        for name in ("snapshots", "old snapshots", "cleaned snapshots"):
            run_seed(seed, Effort(subsets=32, torn=4), tally, name)


def repeats() -> None:
    """As `crash`, only of images with duplicates."""
    tally = Tally()
    for seed in range(8):
        for name in ("duplicates", "dying duplicates", "duplicates in snapshots"):
            run_seed(seed, Effort(subsets=32, torn=4), tally, name)


def either_superblock() -> None:
    """As `crash`, opening with the older superblock whenever there are two."""
    with EQUIVALENT.applied():
        crash()


def cleaning() -> None:
    """A part of what test_crash looks at, where segments are cleaned."""
    tally = Tally()
    for seed in range(6):
        for name in ("cleaned", "cleaned and overwritten"):
            run_seed(seed, Effort(subsets=64), tally, name)


def optimizing() -> None:
    """As `crash`, only of images that are optimized."""
    tally = Tally()
    for seed in range(8):
        run_seed(seed, Effort(subsets=16, torn=4), tally, "optimized")


def recompressed_wrongly() -> None:
    """A compressor that makes something else of its input."""
    with pytest.MonkeyPatch.context() as patch:
        trio.run(test_optimize.test_only_what_gives_the_same_again_is_kept, patch)


def damaged_leaf() -> None:
    """Cleaning beside a leaf that cannot be read."""
    messages = cast(pytest.LogCaptureFixture, SimpleNamespace(records=[]))
    trio.run(test_cleaner.test_what_a_damaged_leaf_may_lead_to_is_left_alone, messages)


def removed_meanwhile() -> None:
    """A dictionary that goes while segments are recompressed with it."""
    with pytest.MonkeyPatch.context() as patch:
        trio.run(test_learning.test_no_dictionary_is_used_that_was_removed_meanwhile, patch)


def nonces() -> None:
    """Lives of an image, with every nonce noted."""
    for seed in range(30):
        ledger = Ledger()
        with ledger.watching():
            lives(seed, 8)
        assert ledger.repeats == []


def dictionaries() -> None:
    """As `crash`, only of images with dictionaries."""
    tally = Tally()
    for seed in range(8):
        run_seed(seed, Effort(subsets=16, torn=4, sessions=2), tally, "dictionaries")


def with_image(test: Callable[[Path], Awaitable[None]]) -> Callable[[], None]:
    """A test of dictionaries, with an image."""

    def detector() -> None:
        with TemporaryDirectory() as folder:
            trio.run(test, test_dictchange.made(Path(folder)))

    return detector


def worm_salvage() -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        clock = test_worm.clocked(patch)
        try:
            trio.run(test_worm.test_nothing_is_salvaged_that_may_be_retained, Path(folder), clock, 30)
        except pytest.fail.Exception as failed:  # not an `Exception`
            raise AssertionError from failed


def full_vault() -> None:
    with TemporaryDirectory() as folder:
        path = test_vault_image.new(Path(folder))
        trio.run(test_vault_image.test_a_full_one_says_so_and_still_takes_all_revocations, path, 1, 1)


def no_room() -> None:
    """A checkpoint fails for lack of space, and the next one writes what both had to."""
    with pytest.MonkeyPatch.context() as patch:
        trio.run(test_checkpointer.test_without_room_in_the_image_a_checkpoint_changes_nothing, 1, patch)


def keys() -> None:
    """Crashes while key slots are changed."""
    test_keys.test_after_a_crash_the_old_keys_open_the_image_or_the_new_ones()
    test_keys.test_a_change_that_a_crash_made_visible_is_not_undone_by_the_next_crash()


def maps() -> None:
    """What a disk is made of, compared with a snapshot."""
    with TemporaryDirectory() as folder:
        trio.run(test_diskmap.test_what_changed_since_a_snapshot, test_diskmap.new(Path(folder)))


def erasure() -> None:
    """What is left of the key of a subject."""
    test_erasure.test_nothing_that_the_master_key_opens_ever_held_a_key()
    test_erasure.test_a_crash_leaves_a_subject_erased_or_not()


def many_subjects() -> None:
    """Keys beside segments, in an image that is opened again."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.vde"
        create_image(path, 1 << 20, secret=test_anon_image.KEY, segment_bytes=256 << 10)
        trio.run(test_anon_image.test_keys_and_segments_do_not_meet, path)


def vault() -> None:
    """What passports are signed for, and what ends them."""
    test_vault.test_the_signature_covers_every_bit_before_it()
    test_vault.test_a_revoked_one_stays_revoked_whatever_the_clock_says()
    for record, key, error, why in test_vault.WRONG:
        refused = ""
        try:
            test_vault.ledger(test_vault.GOOD).refuse(record, key, NOW)
        except error as caught:
            refused = str(caught)
        assert why in refused


def streams() -> None:
    """As `crash`, only of images with a stream."""
    tally = Tally()
    for seed in range(8):
        run_seed(seed, Effort(subsets=16, torn=4, sessions=2), tally, "streams")


def with_worm(test: Callable[..., Awaitable[None]], *more: object) -> Callable[[], None]:
    """A test of WORM regions, with an image, a clock, and what else it takes."""

    def detector() -> None:
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            given = {"clock": lambda: test_worm.clocked(patch), "monkeypatch": lambda: patch}
            known = {name: given[name]() for name in inspect.signature(test).parameters if name in given}
            try:
                trio.run(partial(test, test_worm.new(folder), *more, **known))
            except pytest.fail.Exception as failed:  # not an `Exception`
                raise AssertionError from failed

    return detector


def worm_crashes() -> None:
    """As `crash`, only of images with a WORM region."""
    tally = Tally()
    for seed in range(8):
        run_seed(seed, Effort(subsets=16, torn=4, sessions=2), tally, "worm")


def read_beside_a_writer() -> None:
    """Entries of a stream are overwritten while they are read."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        test = test_stream.test_what_is_overwritten_while_it_is_read_is_not_shown
        trio.run(test, test_stream.new(folder), patch)


DETECTORS: dict[str, Callable[[], None]] = {
    "crash": crash,
    "history": history,
    "shared and cleaned": test_volumes.test_what_a_snapshot_shares_outlives_cleaning_and_overwriting,
    "cleaning": cleaning,
    "either superblock": either_superblock,
    "cleaned, older superblock": test_volumes.test_after_cleaning_either_superblock_leads_to_everything,
    "optimizing": optimizing,
    "recompressed": lambda: trio.run(test_optimize.test_segments_are_recompressed_once),
    "recompressed wrongly": recompressed_wrongly,
    "damaged leaf": damaged_leaf,
    "dictionaries lie": lambda: trio.run(test_learning.test_what_dictionaries_lie_in_needs_none_of_them),
    "removed meanwhile": removed_meanwhile,
    "nobody uses": lambda: trio.run(test_learning.test_what_nobody_uses_is_not_trained_from),
    "tell each other": lambda: trio.run(test_learning.test_disks_that_share_nothing_tell_each_other_nothing),
    "written meanwhile": lambda: trio.run(test_moving.test_what_was_written_meanwhile_stays),
    "reference into a victim": lambda: trio.run(test_moving.test_no_reference_leads_into_a_victim),
    "another segment": lambda: trio.run(test_moving.test_a_segment_that_is_another_one_now_is_left_alone),
    "shared by a snapshot": lambda: trio.run(test_moving.test_what_a_snapshot_shares_stays_where_it_is),
    "refers to damage": lambda: trio.run(test_moving.test_what_is_damaged_is_not_referred_to),
    "lowest of equals": test_moving.test_the_lowest_of_equal_blocks_is_taken,
    "nonces": nonces,
    "damage": lambda: test_damage.test_no_flipped_bit_of_a_crashed_image_shows_wrong_data(True),
    "readers": lambda: trio.run(test_cleaner.test_readers_in_a_segment_keep_it),
    "damaged root and log": lambda: test_roots.test_without_the_log_between_it_is_damage("unflushed"),
    "duplicates": lambda: trio.run(test_duplicates.test_no_reference_leads_into_a_victim),
    "large commits": lambda: trio.run(
        test_duplicates.test_large_commits_with_some_that_is_new_and_some_that_is_not, 16 * BLOCK
    ),
    "damaged duplicates": lambda: trio.run(test_duplicates.test_what_was_found_damaged_is_stored_once_more, "read"),
    "cleaned duplicates": lambda: trio.run(
        test_duplicates.test_what_a_cleaned_segment_kept_is_found_and_nothing_else, "at once"
    ),
    "replacing": lambda: trio.run(test_cleaner.test_no_segment_is_replaced_while_a_checkpoint_is_written),
    "born": lambda: trio.run(test_cleaner.test_when_a_cleaned_segment_was_born_is_known_after_opening),
    "going on": lambda: trio.run(test_cleaner.test_the_log_goes_on_in_durable_space_only),
    "counts": lambda: trio.run(test_checkpointer.test_a_checkpoint_counts_what_it_wrote_for_snapshots),
    "growing": lambda: trio.run(test_volumes.test_a_disk_grows_over_what_a_checkpoint_wrote, True),
    "grown only": lambda: trio.run(test_volumes.test_a_disk_grows_over_what_a_checkpoint_wrote, False),
    "no room": no_room,
    "copies": test_lbamap.test_a_copy_holds_what_is_newest_below_it,
    "keys": keys,
    "repeats": repeats,
    "damaged root": lambda: test_roots.test_crashes_while_such_an_image_is_opened_and_used_lose_nothing(0),
    "dictionaries": dictionaries,
    "needed dictionaries": with_image(test_dictchange.test_it_stays_while_an_extent_needs_it),
    "dictionaries and duplicates": with_image(
        test_dictchange.test_what_a_duplicate_may_be_made_of_is_kept_with_its_dictionary
    ),
    "lost dictionaries": with_image(test_dictchange.test_nothing_becomes_a_duplicate_of_what_needs_a_lost_one),
    "older readers": with_image(test_dictchange.test_who_does_not_know_dictionaries_must_not_open_the_image),
    "maps": maps,
    "metrics tiers": test_tiers.test_interleaved_metrics_become_windows_of_a_minute,
    "metrics crashes": test_metrics_crashes.test_a_crash_leaves_the_first_samples_whole,
    "sketches": test_sketch.test_a_level_is_the_same_whenever_it_is_reached,
    "vault": vault,
    "erasure": erasure,
    "hashes": test_anon.test_a_hash_is_of_a_value_under_the_key_of_its_subject,
    "many subjects": many_subjects,
    "vault crashes": test_vault_crashes.test_what_was_acknowledged_survives_every_crash,
    "worm": with_worm(test_worm.test_what_is_appended_is_there_again),
    "worm crashes": worm_crashes,
    "worm chain": test_worm.test_the_chain_is_what_the_documents_say,
    "worm put back": with_worm(test_worm.test_an_older_copy_put_back_is_found),
    "worm clock": with_worm(test_worm.test_a_clock_that_went_back_is_found),
    "worm retention": with_worm(test_worm.test_nothing_goes_while_it_is_retained),
    "disks and regions": with_worm(test_worm.test_what_is_made_while_its_disk_is_deleted_is_refused_or_keeps_it, 0),
    "worm gone": with_worm(test_worm.test_a_disk_goes_when_the_time_is_over),
    "worm clocks": with_worm(test_worm.test_one_that_cannot_note_the_time_keeps_no_other_from_it),
    "worm salvage": worm_salvage,
    "full vault": full_vault,
    "worm disk": with_worm(test_worm.test_just_below_the_mark_is_below_it),
    "rings": test_stream.test_entries_that_are_there_have_places_of_their_own,
    "streams": streams,
    "read beside a writer": read_beside_a_writer,
    "no space": test_faults.test_without_space_writers_are_told_and_nothing_is_lost,
}


SEEDS = {
    "a failed sync is forgotten": (0, "failed sync", Effort(subsets=64)),
    "a failed write is forgotten": (0, "failed write", Effort(subsets=64)),
    "a snapshot protects nothing": (5, "old snapshots", Effort(subsets=32, torn=4)),
    "dead segments go before the checkpoint is durable": (0, "overwritten", Effort(subsets=64)),
    "the end is cut off before the clean stop is durable": (0, "keys", Effort(subsets=256)),
    "the log point is that of the checkpoint before": (0, "checkpoints", Effort(subsets=64)),
    "the open segment is cleaned": (1, "cleaned", Effort(subsets=64)),
    "what is dead was decided at an older cut": (0, "cleaned snapshots", Effort(subsets=64)),
}
"""Where the fault showed at once: looked at before the whole detector, which takes long to come there."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_pytest.assertion.util._reprcompare", None)  # explaining 1 MiB that differs takes minutes
    with mutant.applied():
        assert _fails_at_once(mutant) or _fails(DETECTORS[mutant.found_by]), f"{mutant.found_by} noticed nothing"


def _fails_at_once(mutant: Mutant) -> bool:
    if mutant.name not in SEEDS:
        return False
    seed, profile, effort = SEEDS[mutant.name]
    return _fails(lambda: run_seed(seed, effort, Tally(), profile))


def _fails(detector: Callable[[], None]) -> bool:
    try:
        detector()
    except Exception:  # the mutated engine may fail in any way
        return True
    return False


@pytest.mark.parametrize("mutant", REDUNDANT, ids=lambda mutant: mutant.name)
def test_only_a_forged_log_shows_that_it_is_missing(mutant: Mutant) -> None:
    with mutant.applied():
        assert _fails(test_replay.test_a_record_counts_only_in_its_own_history)
        run_seed(1, Effort(subsets=64), Tally(), "rolling")
        test_damage.test_moved_extents_and_segments_are_noticed(0)
