"""Drain jobs with pgqueuer: ``drain_pgqueuer.py URL JOBS BATCH MANAGERS``; run by `compare.py`.

As its guide to performance advises for one process: durable tables, `optimize_autovacuum` applied, a direct connection
of asyncpg for each queue manager, uvloop, a batch size for short jobs, no aggregation of its log meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import asyncpg
import uvloop
from pgqueuer import PgQueuer, Queries
from pgqueuer.db import AsyncpgDriver
from pgqueuer.types import QueueExecutionMode

if TYPE_CHECKING:
    from pgqueuer.models import Job


async def fill(url: str, jobs: int) -> None:
    """Make the tables, if there are none, and enqueue jobs that are due."""
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    if not await queries.schema_is_installed():
        await queries.install()
        await queries.optimize_autovacuum()
    await queries.clear_queue()
    await queries.enqueue(["wake-up"] * jobs, [uuid.uuid4().bytes for _ in range(jobs)], [0] * jobs)
    await connection.execute("VACUUM ANALYZE pgqueuer")
    await connection.execute("CHECKPOINT")
    await connection.close()


async def drain(url: str, batch: int, managers: int) -> tuple[int, float, float]:
    """Run all jobs; how many, and from when to when: the last job is settled then, too."""
    handled = 0

    async def fire(_: Job) -> None:
        nonlocal handled
        handled += 1

    made = []
    for _ in range(managers):
        manager = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))
        manager.entrypoint("wake-up")(fire)
        made.append(manager)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.monotonic()
    await asyncio.gather(
        *(
            manager.run(
                batch_size=batch,
                mode=QueueExecutionMode.drain,
                dequeue_timeout=timedelta(seconds=1),
                log_aggregation_interval=timedelta(0),
            )
            for manager in made
        )
    )
    return handled, began, time.monotonic()


async def main() -> None:
    """Fill, wait for the word, drain, and print."""
    url, jobs, batch, managers = sys.argv[1:]
    await fill(url, int(jobs))
    print(json.dumps(await drain(url, int(batch), int(managers))))


if __name__ == "__main__":
    uvloop.run(main())
