import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^- `(.+)`$", PAGE, re.MULTILINE)


@cache
def strings_of_the_program() -> list[str]:
    """Return all strings of the code, `…` for what is put into them."""
    found = [(ROOT / "Makefile").read_text().replace("\\", "")]
    for package in ("sbf_dist", "pipelines", "launchers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[-.\d]*[srdgf]", "…", node.value))
    return found


def is_said(message: str) -> bool:
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in strings_of_the_program())


def test_the_page_has_messages_of_all_parts():
    assert len(MESSAGES) > 50
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_program(message):
    assert is_said(message)


@pytest.mark.parametrize("other", ["recipe … is of no use at all", "data … has no class today"])
def test_a_message_that_the_program_does_not_have_is_seen(other):
    assert not is_said(other)
