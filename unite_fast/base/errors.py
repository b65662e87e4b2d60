"""What can end a program: a mistake that the user can mend, or what no command could prevent."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend. Programs print its one line and exit with code 2."""


def idle(option: str, beside: str) -> UserError:
    """The refusal of an option that would change nothing."""
    return UserError(f"{option} does nothing {beside}; leave it out")


class CommonError(UserError):
    """A user's mistake that every rank sees alike, so that rank 0 alone prints it."""


class RunError(Exception):
    """What ends a run although the command was right. Programs print its one line and exit with code 1."""


class Stopped(Exception):
    """A stop was asked for while a long loop ran; raised on all ranks after the same round."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
