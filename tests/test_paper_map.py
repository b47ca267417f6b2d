"""docs/paper-to-code.md is true: each statement has its function, its tag and a marked test."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| (Eq\. \d|Fig\. \d+|§\d\.\d) [^|]*\| `([^`]+)` \| `([^`]+)` \|$",
    (ROOT / "docs" / "paper-to-code.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def resolved(path):
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def test_the_table_is_read():
    assert {tag for tag, _, _ in ROWS} >= {f"Eq. {n}" for n in range(1, 6)}


@pytest.mark.parametrize(("tag", "function", "test"), ROWS)
def test_statement_has_function_tag_and_test(tag, function, test):
    found = resolved(function)
    own = found.__doc__ or ""
    assert re.search(rf"{re.escape(tag)}\b", own), f"{function} does not say {tag}"
    marks = re.findall(r"pytest\.mark\.paper\(([^)]*)\)", (ROOT / test).read_text("utf-8"))
    assert any(f'"{tag}"' in mark for mark in marks), f"no test marked {tag} in {test}"


def tags_in_the_code():
    """(tag, place) of each public function and class whose first docstring line has a tag."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            first = (ast.get_docstring(node) or "").split("\n")[0]
            for inside in re.findall(r"\(([^()]*)\)", first):
                for tag in re.findall(r"Eq\. \d|Fig\. \d+|§\d\.\d", inside):
                    yield tag, f"{path.name}: {node.name}"


def test_each_tag_in_the_code_is_in_the_table():
    found = list(tags_in_the_code())
    assert len(found) > len(ROWS) / 2  # the search finds something at all
    known = {tag for tag, _, _ in ROWS}
    assert [place for place in found if place[0] not in known] == []


@pytest.mark.parametrize("n", range(1, 6))
def test_each_equation_is_implemented_once(n):
    tag = re.compile(rf"\(Eq\. {n}\)")
    places = [
        path
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if tag.search(line) and '"""' in line
    ]
    assert len(places) == 1, f"Eq. {n} is tagged in {places}"
