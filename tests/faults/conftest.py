"""Ranks for the fault matrix, and the table of its rows at the end: id, fault, expected, outcome."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs import STRAIGHT, TINY, Job, Launcher
from test_matrix import ROWS


def pytest_runtest_setup(item):
    for mark in item.iter_markers("fault"):
        item.user_properties.append(("fault", list(mark.args)))


def pytest_terminal_summary(terminalreporter):
    outcomes: dict[str, list] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "fault" and (outcome != "passed" or report.when == "call"):
                    outcomes.setdefault(value[0], []).append((value, outcome, report.duration))
    if not outcomes:
        return
    terminalreporter.section("fault matrix")
    for row in sorted(outcomes):
        (_, fault, expected), _, _ = outcomes[row][0]
        failed = [o for _, o, _ in outcomes[row] if o != "passed"]
        seconds = sum(s for _, _, s in outcomes[row])
        said = f"{len(failed)} of {len(outcomes[row])} {failed[0]}" if failed else "passed"
        terminalreporter.write_line(f"{row}  {fault:42.42}  {expected:64.64}  {said}  {seconds:.1f} s")
    if missing := [row for row in ROWS if row not in outcomes]:
        terminalreporter.write_line("not run: " + " ".join(missing))


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    assert made.server.stdin is not None
    made.server.stdin.close()
    made.server.wait(10)


@pytest.fixture
def job(launcher, tmp_path) -> Job:
    return Job(launcher, tmp_path / "job")


@pytest.fixture
def jobs(launcher, tmp_path):
    """A function that makes further jobs: jobs("name", config)."""
    return lambda name, config=TINY: Job(launcher, tmp_path / name, config)


@pytest.fixture(scope="session")
def straight(launcher, tmp_path_factory) -> Job:
    """20 undisturbed steps on two ranks, a checkpoint every 5: what disturbed runs are compared with."""
    done = Job(launcher, tmp_path_factory.mktemp("straight"))
    done.train(*STRAIGHT)
    return done
