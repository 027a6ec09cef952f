"""The Python of the README and of the page on conversion runs as it stands; tables are those of the records."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.conversion import table as conversion_table
from benchmarks.record import RECORDS, table
from benchmarks.results import PAGE, page, records
from unitstep.recipes import RUN_TO_THE_END

README = Path(__file__).resolve().parents[1] / "README.md"
CONVERSION = README.parent / "docs" / "conversion.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text() + CONVERSION.read_text(), re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "documentation", "exec"), {"__name__": "__main__"})


def test_tables_are_those_of_the_records():
    conversion = json.loads((RECORDS / "conversion.json").read_text())
    assert conversion_table(conversion) == CONVERSION.with_name("conversion-table.md").read_text()
    ladders = records()
    assert ladders.keys() == RUN_TO_THE_END
    assert [name for name, found in ladders.items() if table(found) not in README.read_text()] == []
    assert page(ladders) == PAGE.read_text()
