"""A name for this start of all ranks, in a store that remembers earlier ones.

torchrun's agents keep one store over restarts. It holds the addresses of dead ranks, so each start needs keys of its
own. TORCHELASTIC_RESTART_COUNT does not name a start: every agent counts for itself, none counts a restart for a node
that joined, and the agent of a node that was started again begins at 0 (pytorch/pytorch#135712). Under such names ranks
would wait for each other until the time is over.
"""

from __future__ import annotations

import json
import time
import uuid

from torch.distributed import Store

PAUSE = 0.1  # seconds between two looks at the store, of ranks that wait for rank 0


def agree(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """A name that all ranks of this start get, and no other start. Raises DistError or TimeoutError after ``seconds``.

    Rank 0 counts its starts in the store, collects a word of every other rank under the new number and then publishes
    the words. Another rank leaves its word under the newest number, old or new, until a list has it.
    """
    if rank == 0:
        name = f"start {store.add('starts', 1)}"
        words = [f"{name} {other}" for other in range(1, world_size)]
        if words:
            store.wait(words)
        store.set(f"{name} met", json.dumps([store.get(word).decode() for word in words]))
        return name
    own, left_at, deadline = uuid.uuid4().hex, "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        name = f"start {store.add('starts', 0)}"
        if name != left_at:
            store.set(f"{name} {rank}", own)
            left_at = name
        if store.check([f"{name} met"]) and own in json.loads(store.get(f"{name} met")):
            return name
        time.sleep(PAUSE)
    raise TimeoutError(f"rank 0 did not come within {seconds:g} s")
