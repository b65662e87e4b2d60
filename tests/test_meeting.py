"""Where the ranks of a start meet, in a store that has seen earlier starts."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore

from unite_fast.parallel import meeting


@pytest.fixture
def store() -> HashStore:
    made = HashStore()
    made.set_timeout(timedelta(seconds=5))
    return made


def arrive(store: HashStore, ranks: list[int], late: list[int], world: int) -> list[str]:
    """What ranks agree on, of which those of ``late`` come when the others already wait."""
    with ThreadPoolExecutor(world) as threads:
        found: list[Future[str]] = []
        for rank in [*ranks, *late]:
            if late and rank == late[0]:
                time.sleep(2 * meeting.PAUSE)
                assert not any(one.done() for one in found)
            found.append(threads.submit(meeting.agree, store, rank, world, 5))
        return [one.result() for one in found]


def test_each_start_has_a_name_of_its_own(store):
    """Whoever comes first, and whatever an earlier start left."""
    assert arrive(store, [0, 1, 2], [], 3) == ["start 1"] * 3
    assert arrive(store, [2, 1], [0], 3) == ["start 2"] * 3
    assert arrive(store, [0, 2], [1], 3) == ["start 3"] * 3
    assert arrive(store, [0], [], 1) == ["start 4"]


def test_a_start_that_was_lost_does_not_count(store):
    """Rank 0 came and was killed before the others were there, and one of them after it had left its word."""
    store.add("starts", 1)
    store.set("start 1 1", "the word of a dead rank")
    assert arrive(store, [1, 2], [0], 3) == ["start 2"] * 3


def test_nobody_waits_for_ever(store):
    with pytest.raises(TimeoutError, match=r"rank 0 did not come within 0\.3 s"):
        meeting.agree(store, 1, 2, 0.3)
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(DistStoreError):
        meeting.agree(store, 0, 2, 0.3)
