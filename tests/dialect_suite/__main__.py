"""Runs SQLAlchemy's own suite for dialects on a file: `make dialect-suite`.

What the standard library's dialect passes has to pass on ours, sync and async, or to be listed here with the reason.
An entry of the list whose test passes is an error, too.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

BASELINE = "sqlite"
OURS = ("sqlite+libsql", "sqlite+aiolibsql")

_BY_NAME = "the suite knows by its name which driver has cursors on the server's side, and libSQL's are not among them"
EXCEPTIONS = {
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_conn_option"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[for_update_expr]"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[global_expr]"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[global_string]"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[global_text]"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[stmt_option]"): _BY_NAME,
    ("sqlite+aiolibsql", "ServerSideCursorsTest::test_ss_cursor_status[text_ss_option]"): _BY_NAME,
}

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_HERE = Path(__file__).parent
_OF_A_DIALECT = re.compile(r"_sqlite\+\w+$")


class Run:
    """The suite on one dialect, in a process and a directory of its own."""

    def __init__(self, dialect: str, directory: Path) -> None:
        self.dialect = dialect
        self._report = directory / "report.xml"
        self._log = directory / "log.txt"
        directory.mkdir()
        command = [sys.executable, "-m", "pytest", "-c", _HERE / "setup.cfg", _HERE / "suite.py"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--dburi", f"{dialect}:///suite.db", f"--junitxml={self._report}"],
                cwd=directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outcomes(self) -> dict[str, str]:
        """What became of each test, by its name without the dialect's."""
        if self._process.wait() not in {0, 1} or not self._report.exists():
            sys.exit(f"{self._log.read_text()}\nthe suite did not run on {self.dialect}")
        outcomes: dict[str, str] = {}
        for case in ET.parse(self._report).iter("testcase"):  # noqa: S314 - our own process has just written it
            name = f"{_OF_A_DIALECT.sub('', case.attrib['classname'].rpartition('.')[2])}::{case.attrib['name']}"
            tags = {child.tag for child in case}
            # a test has two cases where its teardown fails
            if tags & {"failure", "error"} or outcomes.get(name) == FAILED:
                outcomes[name] = FAILED
            else:
                outcomes[name] = SKIPPED if "skipped" in tags else PASSED
        return outcomes

    def show_failures(self) -> None:
        """Print what pytest said of them."""
        log = self._log.read_text()
        print(log[log.find("= FAILURES =") :])


def worse(outcomes: dict[str, str], baseline: dict[str, str]) -> set[str]:
    """What the baseline passes and these outcomes don't, and failures of what only an async dialect is asked."""
    return {
        name
        for name in outcomes.keys() | baseline.keys()
        if outcomes.get(name) != PASSED
        and (baseline.get(name) == PASSED or (name not in baseline and outcomes[name] == FAILED))
    }


def main() -> int:
    """Run it on all three, print the counts and what is wrong; 1 if anything is."""
    wrong = False
    with TemporaryDirectory() as directory:
        runs = [Run(dialect, Path(directory, dialect)) for dialect in (BASELINE, *OURS)]
        results = [(run, run.outcomes()) for run in runs]
        print(f"{'dialect':<18}{PASSED:>8}{FAILED:>8}{SKIPPED:>9}")
        for run, outcomes in results:
            counts = [list(outcomes.values()).count(outcome) for outcome in (PASSED, FAILED, SKIPPED)]
            print(f"{run.dialect:<18}{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}")
        (_, baseline), *ours = results
        for run, outcomes in ours:
            found = worse(outcomes, baseline)
            listed = {name for dialect, name in EXCEPTIONS if dialect == run.dialect}
            for name in sorted(found & listed):
                print(f"as listed: {run.dialect} {name}: {EXCEPTIONS[run.dialect, name]}")
            for name in sorted(found - listed):
                print(f"WRONG: {run.dialect} {name}: {outcomes.get(name, 'missing')}")
            for name in sorted(listed - found):
                print(f"WRONG: {run.dialect} {name}: passes, and is listed as an exception")
            if found - listed:
                run.show_failures()
            wrong = wrong or found != listed
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
