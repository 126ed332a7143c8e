"""The command line ``aion-timers``, of the extra ``cli``.

`main` is its entry point. It says in one line what went wrong, and ends with one of these:

====  ==================================================================================================
0     done
1     done, and there is something to see to: a finding, a difference, a timer that was not there
2     the command was not understood, or a value in it cannot be
69    the database cannot be reached or written
70    anything else went wrong
78    the database is not migrated, the engine or a driver does not serve, or an extra is missing
130   interrupted
====  ==================================================================================================
"""

from __future__ import annotations

import sys
from typing import Final

NEEDED: Final = ("typer", "rich")


def main() -> None:
    """Run the command of ``sys.argv`` and exit."""
    try:
        from aion_timers.cli.app import run  # noqa: PLC0415 - what it needs is an extra
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        sys.stderr.write(
            f"aion-timers: the command line needs {missing}, which is not installed; pip install 'aion-timers[cli]'\n"
        )
        sys.exit(78)
    sys.exit(run())
