"""A sample of each attack; ``make attack`` runs them whole."""

from __future__ import annotations

from pathlib import Path

import attack
import pytest
import torch

MOST = {"kill": 2, "errors": 3, "interrupt": 2, "damage": 3, "fuzz": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> attack.Place:
    torch.set_num_threads(1)
    return attack.Place(Path(tmp_path_factory.mktemp("attack")))


@pytest.mark.parametrize("name", attack.ATTACKS)
def test_attack(place, name):
    tried, failed = attack.attack(name, place, MOST[name], seed=0)
    assert tried >= MOST[name]
    assert not failed, "\n".join(failed)


def test_an_attack_can_fail(place):
    """Else nothing is shown: a traceback, a hang of a command and other parameters are all seen."""
    attack.PROGRAMS["broken"] = lambda argv: [][1]
    try:
        assert not attack.run(["broken"]).is_clean
    finally:
        del attack.PROGRAMS["broken"]
    place.fresh()
    assert not place.ends_right(place.trial)
