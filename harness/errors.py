"""The one error that means: the person at the keyboard can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used: one sentence saying what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's code says, without the lines below."""
    return (str(error).splitlines() or ["no reason given"])[0]


def unknown_name(kind: str, given: str, allowed: Iterable[str], list_with: str) -> UserError:
    """The error for a name that is not in a list, with the closest allowed name where there is one.

    Args:
        kind: what the name should have named, such as ``method``.
        given: the name as typed.
        allowed: every name that would have been accepted.
        list_with: the command that prints them, such as ``harness methods``.
    """
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(f"unknown {kind} {given!r}{hint} (`{list_with}` lists all)")
