"""Python's garbage collector during training: at the same steps on all ranks, and only over what is new.

Left to itself it looks through every object of the process whenever enough were made, on each rank in another step, and
the other ranks wait for it there. A training step makes no cycles that hold tensors (tests/test_run.py).
"""

from __future__ import annotations

import gc

kept = False


def keep() -> None:
    """Leaves all there is now out of every later collection, for good: before forks, or between runs of a process.

    Runs then freeze nothing, since they could not unfreeze their own alone, and look at what was made since.
    """
    global kept
    gc.freeze()
    kept = True


class Collector:
    """``hold`` before the first step, ``collect`` now and then, ``release`` after the last."""

    def __init__(self) -> None:
        self.held = self.frozen = self.begun = False

    def hold(self) -> None:
        """No collections but those that are asked for."""
        self.held = gc.isenabled()
        gc.disable()

    def collect(self) -> None:
        """The first time everything, which is then left out of later collections: what a run sets up, it keeps."""
        gc.collect()
        if not self.begun and not kept:
            gc.freeze()
            self.frozen = True
        self.begun = True

    def release(self) -> None:
        if self.frozen:
            gc.unfreeze()
        if self.held:
            gc.enable()
        self.held = self.frozen = self.begun = False
