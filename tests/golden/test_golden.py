"""Results of small runs are those of `values.json`, which was written before the inside was last changed.

A case that fails after a change that is meant to change results is written anew:
``python -m tests.golden.cases --write tests/golden/values.json --portable``.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.cases import CASES, VALUES, differences, run_case


@pytest.fixture(scope="module")
def values() -> dict[str, dict[str, object]]:
    written: dict[str, dict[str, object]] = json.loads(VALUES.read_text("utf-8"))
    return written


@pytest.mark.parametrize("name", CASES)
def test_results_are_what_they_were(name: str, values: dict[str, dict[str, object]], tmp_path: Path) -> None:
    result: dict[str, Any] = run_case(name, tmp_path)
    expected: dict[str, Any] = values[name]
    found = differences(result.get("exact", {}), expected.get("exact", {}), "exact")
    found += differences(result.get("close", {}), expected.get("close", {}), "close", tolerance=True)
    for group, names in expected.get("present", {}).items():
        found += [f"{group}: {missing} is gone" for missing in sorted(set(names) - set(result["present"][group]))]
    assert not found, "\n".join(found)


def test_the_table_holds_every_case(values: dict[str, dict[str, object]]) -> None:
    assert sorted(values) == sorted(CASES)
