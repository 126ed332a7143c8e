"""The test files that docs/testing.md shows are passed by pytest."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_documents import ROOT

FILE = re.compile(r"^```python\n# ((?:conftest|test_\w+)\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_test_files_of_the_page_pass(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    files = FILE.findall((ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    assert [name for name, _ in files] == ["conftest.py", "test_reminders.py", "conftest.py"]
    (_, fixtures), (_, tests), (_, preparing) = files
    tables = """
from sqlalchemy import text


def test_the_tables_are_there(sessions):
    with sessions() as session:
        assert session.scalars(text("SELECT * FROM orders")).all() == []
"""
    # the class of the second one, which is the application's, has a table here
    table = "\n\nfrom sqlalchemy import Column, Integer, Table\nTable('orders', Base.metadata, Column('id', Integer))\n"
    pytester.makeconftest(fixtures + preparing + table)
    pytester.makepyfile(test_reminders=tests, test_tables=tables)

    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error").assert_outcomes(passed=2)
