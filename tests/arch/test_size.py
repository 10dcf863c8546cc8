"""Files and functions short enough to read in one go."""

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
PACKAGES = ("migrate", "runtime", "transport")
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60

SOURCES = sorted(path for package in PACKAGES for path in (TOP / package).rglob("*.py"))


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    long = [f"{path.relative_to(TOP)}:{n}: {n} lines" for path, n in lengths.items() if n > MOST_LINES_OF_A_FILE]
    if long:
        pytest.fail("\n".join(long), pytrace=False)


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path.relative_to(TOP)}:{node.lineno}: {node.name} has {lines} lines")
    if long:
        pytest.fail("\n".join(long), pytrace=False)
