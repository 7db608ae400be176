"""Students and plans that were written before settings became one object load as they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sbf_dist
from sbf_dist import models
from sbf_dist.compression.plan import Plan
from sbf_dist.export.saved import load_card, load_student
from sbf_dist.weights import load_weights

BEFORE = Path(__file__).parent / "before"
DIGESTS = json.loads((BEFORE / "digests.json").read_text())
LOGITS = load_file(BEFORE / "logits.safetensors")


def test_a_saved_student_gives_the_logits_that_it_gave():
    student = load_student(BEFORE / "student")
    with torch.no_grad():
        found = student(LOGITS["images"])
    torch.testing.assert_close(found, LOGITS["student"], rtol=1e-4, atol=1e-5)
    plan = Plan.load(BEFORE / "student" / "plan.json")
    assert plan.removed
    assert any(layer.kind == "sbf" and layer.between for layer in plan.layers.values())
    card = load_card(BEFORE / "student")
    assert (card.classes, card.mean, card.top1) == (list("abcde"), [0.5] * 3, 0.75)


def test_a_saved_student_is_saved_again_as_the_same(tmp_path):
    sbf_dist.save(sbf_dist.load(BEFORE / "student"), tmp_path / "again")
    for name in ("plan.json", "weights.safetensors"):
        again, before = ((f / name).read_bytes() for f in (tmp_path / "again", BEFORE / "student"))
        assert again == before


def test_a_plan_of_the_first_format_makes_its_network():
    plan = Plan.load(BEFORE / "plan-format-1.json")
    student = sbf_dist.convert(models.build(plan.model, plan.classes), plan)
    load_weights(student, BEFORE / "weights-format-1.safetensors")
    with torch.no_grad():
        found = student.eval()(LOGITS["images"])
    torch.testing.assert_close(found, LOGITS["format-1"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path"), [("student", "student/plan.json"), ("format-1", "plan-format-1.json")]
)
def test_plans_keep_their_identity_and_their_text(name, path, tmp_path):
    plan = Plan.load(BEFORE / path)
    assert plan.digest() == DIGESTS[name]
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == (BEFORE / path).read_text()
