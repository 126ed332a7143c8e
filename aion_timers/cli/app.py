"""The commands: what each takes, and what it prints."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from aion_timers import doctor as doctoring
from aion_timers import inventory, migrate
from aion_timers.cli import bench as benching
from aion_timers.cli import output, watching, worker
from aion_timers.cli.copying import Copying, OnConflict
from aion_timers.cli.database import (
    FINDING,
    SOFTWARE,
    USAGE,
    VARIABLE,
    CommandError,
    Database,
    told,
    wants_traceback,
)
from aion_timers.dispatcher.pacing import DEFAULT_BATCH
from aion_timers.errors import DowngradeRefusedError, MigrationError
from aion_timers.inventory import Criteria, Place
from aion_timers.repository import TimerRepository
from aion_timers.statements import IfExists  # noqa: TC001 - typer looks at it when it runs
from aion_timers.values import TimerId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

NAME: Final = "aion-timers"
INTERRUPTED: Final = 130

app = typer.Typer(
    name=NAME,
    help="Durable timers in the database that an application already has.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def run() -> int:
    """Run the command of ``sys.argv``; the code to exit with."""
    try:
        ended = app(standalone_mode=False, prog_name=NAME)
    except typer.TyperException as error:
        return _failed(error.format_message(), error.exit_code)
    except typer.Abort:
        return INTERRUPTED
    except CommandError as error:
        if error.code == SOFTWARE and wants_traceback():
            raise
        return _failed(str(error), error.code)
    return ended if isinstance(ended, int) else 0


def _failed(message: str, code: int) -> int:
    if message:
        output.note(f"{NAME}: {' '.join(message.split())}")
    return code


# -- options that several commands have -------------------------------------------------------------------------------

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar=VARIABLE, show_envvar=True, show_default=False, help="The database, of a sync or async driver."
    ),
]
Schema = Annotated[
    str,
    typer.Option("--schema", show_default=False, help="The PostgreSQL schema of the table, if not the default one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="TIMER is a position in a sequence, not a name.")]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name", show_default=False, help="Only timers of this name; NAME* is every one that begins so. Repeat it."
    ),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="How many timers a page has.")]


def _version(*, wanted: bool) -> None:
    if wanted:
        output.line(f"{NAME} {version(NAME)}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=lambda value: _version(wanted=value), is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@contextmanager
def _session(database: Database) -> Iterator[Session]:
    engine = database.engine()
    with told(database), Session(engine) as session, session.begin():
        yield session


def _workflow(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise CommandError(f"WORKFLOW {text!r}: no UUID; write it as in {UUID(int=10)}", USAGE) from None


def _timer(text: str, *, anonymous: bool) -> TimerId:
    if anonymous and not text.isdecimal():
        raise CommandError(f"TIMER {text!r}: no position; write a number, or leave out --anonymous", USAGE)
    with told():
        return TimerId.anonymous(int(text)) if anonymous else TimerId.named(text)


# -- the schema -------------------------------------------------------------------------------------------------------


@app.command("migrate")
def migrate_(
    *,
    revision: Annotated[
        str, typer.Option(help="How far; by default head, or base on the way down.", show_default=False)
    ] = "",
    down: Annotated[bool, typer.Option("--down", help="Go back instead: downgrade.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Drop timers on the way down, too.")] = False,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL for another tool, and change nothing.")] = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Make the table, or bring it up to this version; or take it back."""
    database = Database(url, schema, new=sql or not down)
    revision = revision or ("base" if down else "head")
    if force and not down:
        raise CommandError("--force is for the way down; leave it out, or give --down", USAGE)
    if sql:
        with told(database):
            sys.stdout.write(
                migrate.offline(database.url.get_backend_name(), revision, down=down, schema=schema or None)
            )
        return
    engine = database.engine()
    try:
        with told(database):
            before = migrate.current(engine)
            if down:
                migrate.downgrade(engine, revision, force=force)
            else:
                migrate.upgrade(engine, revision)
            after = migrate.current(engine)
    except CommandError as error:
        if isinstance(error.__cause__, DowngradeRefusedError):
            problem = str(error).partition(";")[0]
            raise CommandError(f"{problem}; let them fire or cancel them first, or give --force", FINDING) from error
        raise
    output.line(f"at {after or 'base'}" if before == after else f"{before or 'base'} -> {after or 'base'}")


@app.command()
def check(url: Url = "", schema: Schema = "") -> None:
    """Compare the table with what this version works with; it changes nothing."""
    database = Database(url, schema)
    engine = database.engine()
    try:
        with told(database):
            migrate.check(engine)
            revision = migrate.current(engine)
    except CommandError as error:
        if isinstance(error.__cause__, MigrationError):
            raise CommandError(str(error), FINDING) from error
        raise
    output.line(f"at {revision}, and the table is as it should be")


# -- single timers ----------------------------------------------------------------------------------------------------


@app.command()
def schedule(
    workflow: Annotated[str, typer.Argument(help="Whose timer it is: a UUID.")],
    timer: Annotated[str, typer.Argument(help="Its name.")],
    fire_at: Annotated[str, typer.Argument(help="When: ISO 8601 with a zone, +90s, +1h30m, +3d or now.")],
    *,
    if_exists: Annotated[IfExists, typer.Option(help="What becomes of a timer that has the same key.")] = "replace",
    anonymous: Anonymous = False,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Schedule a timer, or move the one that has its key."""
    database = Database(url, schema)
    workflow_id, timer_id = _workflow(workflow), _timer(timer, anonymous=anonymous)
    with _session(database) as session:
        timers = TimerRepository(session)
        instant = output.parsed_instant("FIRE_AT", fire_at, timers.now())
        changed = timers.schedule(workflow_id, timer_id, instant, if_exists=if_exists)
        found = timers.get(workflow_id, timer_id)
    at = (found.fire_at if found is not None else instant).isoformat()
    if as_json:
        output.as_json({"workflow_id": str(workflow_id), "timer_id": timer_id.value, "fire_at": at, "changed": changed})
    else:
        output.line(f"{'scheduled for' if changed else 'left at'} {at}")


@app.command()
def cancel(
    workflow: Annotated[str, typer.Argument(help="Whose timer it is: a UUID.")],
    timer: Annotated[str, typer.Argument(help="Its name.", show_default=False)] = "",
    *,
    every: Annotated[bool, typer.Option("--all", help="Cancel all timers of the workflow.")] = False,
    anonymous: Anonymous = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Cancel a timer, or all of a workflow. Exits with 1 if there was none."""
    database = Database(url, schema)
    workflow_id = _workflow(workflow)
    if every == bool(timer):
        raise CommandError("cancel takes a TIMER or --all; give one of the two", USAGE)
    timer_id = None if every else _timer(timer, anonymous=anonymous)
    with _session(database) as session:
        timers = TimerRepository(session)
        number = timers.cancel_workflow(workflow_id) if timer_id is None else int(timers.cancel(workflow_id, timer_id))
    output.line(f"cancelled {number:,}")
    if not number:
        raise typer.Exit(FINDING)


# -- lists ------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    *,
    workflow: Annotated[str, typer.Option(show_default=False, help="Only timers of this workflow: a UUID.")] = "",
    name: Names = None,
    due_after: Annotated[
        str, typer.Option(show_default=False, help="Only timers that are due at this instant or later.")
    ] = "",
    due_before: Annotated[str, typer.Option(show_default=False, help="Only timers that are due before.")] = "",
    held: Annotated[
        bool | None,
        typer.Option("--held/--free", show_default=False, help="Only timers that a worker holds, or that none does."),
    ] = None,
    limit: Limit = 100,
    after: Annotated[str, typer.Option(show_default=False, help="Where the page before ended.")] = "",
    every: Annotated[bool, typer.Option("--all", help="All pages.")] = False,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """List timers in the order in which they fire, page by page."""
    database = Database(url, schema)
    workflow_id = _workflow(workflow) if workflow else None
    with told(database), database.engine().connect() as connection:
        place = Place.parse(after) if after else None
        now = TimerRepository(connection).now()
        criteria = Criteria(
            workflow_id,
            [TimerId.named(its).value for its in name] if name else None,  # type: ignore[misc] # a named id's value is its name
            output.parsed_instant("--due-after", due_after, now) if due_after else None,
            output.parsed_instant("--due-before", due_before, now) if due_before else None,
            held=held,
        )
        _list(connection, criteria, now, limit, place, every=every, as_json=as_json)


@app.command()
def due(
    *,
    name: Names = None,
    limit: Limit = 100,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """List the timers that are due now, held or not, the oldest first."""
    database = Database(url, schema)
    with told(database), database.engine().connect() as connection:
        now = TimerRepository(connection).now()
        criteria = Criteria(names=name, until=now)
        _list(connection, criteria, now, limit, None, every=every, as_json=as_json)


def _list(
    connection: Connection,
    criteria: Criteria,
    now: datetime,
    limit: int,
    after: Place | None,
    *,
    every: bool,
    as_json: bool,
) -> None:
    foreign = 0
    while True:
        page = inventory.page(connection, criteria=criteria, limit=limit, after=after)
        connection.rollback()
        foreign += len(page.foreign)
        if as_json:
            for record in page.records:
                output.as_json(output.record_json(record, now))
        elif page.records:
            output.table(output.RECORD_COLUMNS, (output.record_row(record, now) for record in page.records))
        after = page.after
        if after is None or not every:
            break
    sys.stdout.flush()
    if foreign:
        output.note(f"left out {foreign:,} in a form of another program's own; `aion-timers doctor` shows them")
    if after is not None:
        output.note(f"next page: --after {after}")


@app.command("next")
def next_(*, name: Names = None, as_json: Json = False, url: Url = "", schema: Schema = "") -> None:
    """Show the next timer that a worker can claim. Exits with 1 if there is none."""
    database = Database(url, schema)
    with told(database), database.engine().connect() as connection:
        timers = TimerRepository(connection)
        now = timers.now()
        page = inventory.page(connection, criteria=Criteria(names=name, held=False), limit=100)
        wake = timers.next_wake(name)
    if wake is None:
        output.note("there is no timer")
        raise typer.Exit(FINDING)
    record = page.records[0] if page.records else None
    if as_json:
        found = None if record is None else output.record_json(record, now)
        output.as_json({"claimable_in": max(wake.total_seconds(), 0.0), "timer": found})
    else:
        when = "now" if wake.total_seconds() <= 0 else f"in {output.duration(wake)}"
        cells = ["held ones only"] if record is None else output.record_row(record, now)[:3]
        output.line("\t".join([when, *cells]))


# -- work -------------------------------------------------------------------------------------------------------------


@app.command("run")
def run_(
    handlers: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:HANDLERS",
            help="A function, an async function, a mapping from names to functions, or a ready dispatcher.",
        ),
    ],
    *,
    concurrency: Annotated[
        int | None, typer.Option(min=1, show_default="1", help="How many handlers run at once.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, show_default=str(DEFAULT_BATCH), help="How many timers one claim takes at most."),
    ] = None,
    lease: Annotated[
        str, typer.Option(show_default="30s", help="How soon another worker takes over from a dead one.")
    ] = "",
    max_sleep: Annotated[str, typer.Option(show_default="1s", help="The longest sleep.")] = "",
    once: Annotated[bool, typer.Option("--once", help="Fire what is due now, then end.")] = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Fire timers with your handlers until SIGTERM or SIGINT; a second one kills."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    found = worker.load(handlers)
    settings: dict[str, Any] = {
        "concurrency": concurrency,
        "batch": batch,
        "lease": output.parsed_length("--lease", lease) if lease else None,
        "max_sleep": output.parsed_length("--max-sleep", max_sleep) if max_sleep else None,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    database = None
    if not worker.is_dispatcher(found):
        database = Database(url, schema)
    elif given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CommandError(f"{handlers!r} is a ready dispatcher with settings of its own; leave out {options}", USAGE)
    with told(*[database] if database is not None else []):
        handled = worker.run(found, database, given, once=once)
    if handled is not None:
        output.line(f"fired {handled:,}")


@app.command()
def watch(
    *,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Show what is due, held and next, the lag and the throughput, again and again."""
    database = Database(url, schema)
    with told(database):
        watching.watch(database.engine(), str(database), interval, once=once, as_json=as_json)


@app.command()
def doctor(
    engine: Annotated[
        str,
        typer.Argument(
            metavar="[MODULE:ENGINE]", show_default=False, help="The application's own engine, instead of a URL."
        ),
    ] = "",
    *,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Look for what is wrong with the database. Exits with 1 if there is a finding."""
    if engine:
        found = worker.load(engine)
        with told():
            findings = _examined(found, engine)
    else:
        database = Database(url, schema)
        with told(database):
            findings = doctoring.examine(database.engine())
    if as_json:
        for its in findings:
            output.as_json({"name": its.name, "status": its.status, "found": its.found, "cure": its.cure})
    else:
        rows = [(its.status, its.name, its.found + (f"; {its.cure}" if its.cure else "")) for its in findings]
        output.table(("status", "what", "found"), rows, styled=0)
    if any(its.status != "ok" for its in findings):
        raise typer.Exit(FINDING)


def _examined(engine: Any, name: str) -> list[doctoring.Finding]:  # noqa: ANN401 - whatever the user named
    if isinstance(engine, Engine):
        return doctoring.examine(engine)
    if not hasattr(engine, "sync_engine"):
        raise CommandError(f"{name!r} is a {type(engine).__name__}; name an Engine or an AsyncEngine", USAGE)

    async def examine() -> list[doctoring.Finding]:
        async with engine.connect() as connection:
            found: list[doctoring.Finding] = await connection.run_sync(doctoring.examine)
        await engine.dispose()
        return found

    return asyncio.run(examine())


# -- copies and measurements ------------------------------------------------------------------------------------------


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The URL of the database that is read.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The URL of the database that is written; migrated.")],
    *,
    if_exists: Annotated[
        OnConflict, typer.Option(help="What becomes of another timer under the same key at DST.")
    ] = "refuse",
    held: Annotated[
        Literal["refuse", "copy"], typer.Option(help="What to do if workers hold timers of SRC.")
    ] = "refuse",
    source_schema: Annotated[str, typer.Option(show_default=False, help="The PostgreSQL schema at SRC.")] = "",
    target_schema: Annotated[str, typer.Option(show_default=False, help="The PostgreSQL schema at DST.")] = "",
    as_json: Json = False,
) -> None:
    """Copy all timers, leases and attempts too, and compare them row by row. Run it again to go on.

    SRC is only read. Exits with 1 if a row was not copied, or is not the same at DST.
    """
    of = Database(source, source_schema, origin="SRC")
    to = Database(target, target_schema, origin="DST")
    if of.identity == to.identity:
        raise CommandError(f"SRC and DST are the same database, {of}; name two", USAGE)
    engines = []
    for database in (of, to):
        with told(database):
            engines.append(engine := database.engine())
            migrate.check(engine)
    with told(of), engines[0].connect() as connection:
        rows, holding = inventory.count(connection), inventory.count_held(connection)
    if holding:
        if held == "refuse":
            cure = "stop the workers and wait until their leases have ended, or give --held copy"
            raise CommandError(f"{of}: {holding:,} timers are held by workers, and would be fired twice; {cure}")
        output.note(f"{holding:,} timers are held by workers of SRC; each fires at DST once its lease has ended")
    began = time.monotonic()
    with told(of, to), _progress(rows) as step:
        copying = Copying(engines[0], engines[1], if_exists, step("copying"))
        copying.copy()
        seconds = time.monotonic() - began
        copying.progress = step("comparing")
        copying.verify()
    report = copying.report
    figures = {
        "rows": rows,
        "copied": report.copied,
        "same": report.same,
        "kept": report.kept,
        "rounded": report.rounded,
        "verified": report.verified,
        "foreign": len(report.foreign),
        "different": len(report.different),
        "missing": len(report.missing),
        "rows_a_second": round(rows / max(seconds, 1e-9)),
        "seconds": round(time.monotonic() - began, 3),
    }
    for row in report.foreign:
        output.note(f"not copied, in a form of another program's own: {inventory.shown_row(row)}")
    for kind, keys in (("different", report.different), ("missing", report.missing)):
        for workflow_id, timer_id in keys:
            output.note(f"{kind} at DST: {workflow_id} {timer_id}")
    if as_json:
        output.as_json(figures)
    else:
        output.line(", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in figures.items()))
    if not report.is_whole:
        raise typer.Exit(FINDING)


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[str], Callable[[int], object]]]:
    console = output.console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda what: _Lines(what, rows).step
        return
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def begin(what: str) -> Callable[[int], object]:
            task = progress.add_task(what, total=rows)
            return lambda number: progress.advance(task, number)

        yield begin


class _Lines:
    """Progress where there is no terminal: a line now and then."""

    every: Final = 5.0

    def __init__(self, what: str, rows: int) -> None:
        self._what = what
        self._rows = rows
        self._done = 0
        self._told = time.monotonic()

    def step(self, number: int) -> None:
        """So many rows more."""
        self._done += number
        if time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            output.note(f"{self._what} {self._done:,} of {self._rows:,}")


@app.command()
def bench(
    *,
    number: Annotated[int, typer.Option("--timers", min=1, help="How many timers.")] = 10_000,
    as_json: Json = False,
    url: Url = "",
    schema: Schema = "",
) -> None:
    """Measure the database, in a schema or a file of its own that is removed in the end."""
    database = Database(url, schema)
    with told(database):
        for figure in benching.bench(database, number):
            if as_json:
                output.as_json(
                    {
                        "what": figure.what,
                        "number": figure.number,
                        "seconds": round(figure.seconds, 4),
                        "rate": round(figure.rate),
                    }
                )
            else:
                output.line(
                    f"{figure.rate:>12,.0f}/s  {figure.what} ({figure.number:,} in {figure.seconds:.2f} s)", flush=True
                )
