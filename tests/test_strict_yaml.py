import time

import pytest
import yaml

from sbf_dist import strict_yaml
from sbf_dist.strict_yaml import NotARecipeError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, {c: null}]",
        "",
        "a: &a {b: 1}\nc: *a\nd: {<<: *a, b: 2}",
        "1: one\n'1': another",
        "[]",
        "2026-01-01",
    ],
)
def test_ordinary_yaml_is_read_as_by_anyone(text: str) -> None:
    assert strict_yaml.load(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: {c: 1, d: 2,\n c: 3}", "says 'c' a second time in line 3; keep one"),
        ("a: &a [*a]", "has an alias of itself in line 1"),
        ("a: &a {b: {c: *a}}", "has an alias of itself in line 1"),
        ("[" * 900 + "]" * 900, "is nested deeper than 32 levels"),
        ("".join(f"{' ' * n}a:\n" for n in range(900)), "is nested deeper than 32 levels"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200)),
            "is nested deeper than 32 levels",
        ),
        (BOMB, "has aliases that stand for more than 100000 values"),
        ("a: [", "while parsing a flow node expected the node content"),
        ("a: b: c", "mapping values are not allowed here"),
        ("a: *b", "found undefined alias 'b'"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: \x07", "special characters are not allowed"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("---\na: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_recipe_is_refused_at_once_with_one_line(text: str, reason: str) -> None:
    start = time.thread_time()
    with pytest.raises(NotARecipeError) as caught:
        strict_yaml.load(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < 5
