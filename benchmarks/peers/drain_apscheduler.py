"""Drain jobs with APScheduler 3: ``drain_apscheduler.py URL JOBS THREADS``; run by `compare.py`.

A job store of SQLAlchemy with psycopg, and an executor of threads, as its user guide shows them. A job with a date that
is over is a timer that is due; ``misfire_grace_time=None`` lets it run however late it is. There is no batch size: it
reads all jobs that are due, and removes one at a time.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

ended: list[float] = []
over = threading.Event()


def fire(jobs: int, _: str) -> None:
    """The handler."""
    ended.append(time.monotonic())
    if len(ended) == jobs:
        over.set()


def main() -> None:
    """Fill, wait for the word, drain, and print how many jobs ran, and from when to when."""
    url, jobs, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.WARNING)  # it logs each job
    scheduler = BackgroundScheduler(
        jobstores={"default": SQLAlchemyJobStore(url)},
        executors={"default": ThreadPoolExecutor(threads)},
        job_defaults={"misfire_grace_time": None, "coalesce": True},
        timezone=UTC,
    )
    scheduler.start(paused=True)
    scheduler.remove_all_jobs()
    now = datetime.now(UTC)
    for number in range(jobs):
        due = now - timedelta(milliseconds=jobs - number)
        scheduler.add_job(fire, "date", run_date=due, args=[jobs, "wake-up"], id=str(uuid.uuid4()))
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    scheduler.resume()
    over.wait()
    last = time.monotonic()
    scheduler.shutdown()
    print(json.dumps([len(ended), began, last]))


if __name__ == "__main__":
    main()
