"""The README's Python runs as it stands, and its tables are those of the records."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.record import RECORDS, table
from unitstep.recipes import RUN_TO_THE_END

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_a_snippet():
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_tables_are_those_of_the_records():
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    assert records.keys() == RUN_TO_THE_END
    assert [name for name, found in records.items() if table(found) not in README.read_text()] == []
