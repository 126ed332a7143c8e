"""What commands print: tables and colours at a terminal, plain lines with tabs in a pipe, JSON if it is asked for."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aion_timers.cli.database import USAGE, CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aion_timers.inventory import Record

_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def console(*, stderr: bool = False) -> Console:
    """A console of this moment's standard output; it knows NO_COLOR, TERM=dumb and pipes."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def line(text: str, *, flush: bool = False) -> None:
    """Print a line on standard output."""
    sys.stdout.write(text + "\n")
    if flush:
        sys.stdout.flush()


def note(text: str) -> None:
    """Print a line on standard error, for somebody who looks, not for a program that reads."""
    sys.stderr.write(text + "\n")


def as_json(fields: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    line(json.dumps(fields, ensure_ascii=False), flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, styled: int | None = None) -> None:
    """Print rows: a table at a terminal, else a line each, with tabs and without a head.

    Args:
        columns: their heads.
        rows: the cells.
        styled: the column that says how bad a row is.
    """
    out = console()
    if not out.is_terminal:
        for row in rows:
            line("\t".join(map(_one_line, row)))
        return
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        cells = [Text(_one_line(cell)) for cell in row]
        if styled is not None:
            cells[styled].stylize(_STYLES.get(row[styled], ""))
        made.add_row(*cells)
    out.print(made, soft_wrap=False)


_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _one_line(text: str) -> str:
    # a name may hold what would move the cursor of a terminal, or end a line of a pipe
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


# -- values -----------------------------------------------------------------------------------------------------------


def record_json(record: Record, now: datetime) -> dict[str, Any]:
    """A timer as a JSON object; ``timer_id`` is a string or an integer."""
    return {
        "workflow_id": str(record.timer.workflow_id),
        "timer_id": record.timer.timer_id.value,
        "fire_at": record.timer.fire_at.isoformat(),
        "held_until": None if record.until is None or record.until <= now else record.until.isoformat(),
        "attempts": record.attempts,
    }


def record_row(record: Record, now: datetime) -> list[str]:
    """A timer as the cells of `RECORD_COLUMNS`."""
    timer_id = record.timer.timer_id
    held = record.until is not None and record.until > now
    return [
        record.timer.fire_at.isoformat(),
        str(record.timer.workflow_id),
        str(timer_id.value) if timer_id.is_named else f"#{timer_id.value}",
        f"held for {duration(record.until - now)}" if record.until is not None and held else "free",
        str(record.attempts),
    ]


RECORD_COLUMNS: Final = ("fire at", "workflow", "timer", "lease", "attempts")


def duration(length: timedelta) -> str:
    """A length of time as people write it: 0.3s, 4m05s, 3d02h."""
    seconds = length.total_seconds()
    if seconds < 0:
        return "-" + duration(-length)
    if seconds < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


_LENGTH: Final = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parsed_length(option: str, text: str) -> timedelta:
    """A length of time such as 90s, 1h30m or 0.5s.

    Raises:
        CommandError: it is none.
    """
    found = _LENGTH.fullmatch(text)
    if not text or found is None:
        raise CommandError(f"{option} {text!r}: no length of time; write it as in 90s, 1h30m or 3d", USAGE)
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError:
        raise CommandError(f"{option} {text!r}: too long; an instant is at most in year 9999", USAGE) from None


def parsed_instant(option: str, text: str, now: datetime) -> datetime:
    """An instant: ``now``, a length from now on with a sign, or ISO 8601 with a zone.

    Raises:
        CommandError: it is none.
    """
    if text == "now":
        return now
    try:
        if text[:1] in {"+", "-"}:
            length = parsed_length(option, text[1:])
            return now + length if text[0] == "+" else now - length
        instant = datetime.fromisoformat(text)
    except OverflowError:
        raise CommandError(f"{option} {text!r}: outside the years 1 to 9999; give an instant between", USAGE) from None
    except ValueError:
        cure = "write it as in 2030-01-01T09:00:00+01:00, +3d or now"
        raise CommandError(f"{option} {text!r}: no instant; {cure}", USAGE) from None
    if instant.utcoffset() is None:
        cure = f"write it as in {instant.isoformat()}Z"
        raise CommandError(f"{option} {text!r}: it has no time zone, so it names no instant; {cure}", USAGE)
    return instant.astimezone(UTC)
