from pathlib import Path

import pytest
import yaml

from sbf_dist.compare_recipe import Comparison, Dense, Recovery, load
from sbf_dist.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "name": "small",
    "model": "cifar_resnet8",
    "data": {"source": "digits"},
    "dense": {"steps": 10},
    "recovery": {"steps": [5, 10]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/compare-*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_project_are_valid(path):
    recipe = load(path)
    assert recipe.name == path.stem
    assert {"sbf", "ghost", "depgraph", "low-rank", "magnitude"} <= set(recipe.methods)
    assert len(recipe.seeds) >= 3


def test_the_defaults_compare_all_kinds_at_four_costs(path):
    recipe = load(path)
    assert recipe.macs == [0.75, 0.5, 0.33, 0.25]
    assert recipe.methods[-1] == "sbf"


@pytest.mark.parametrize("section", [Comparison, Dense, Recovery], ids=lambda s: s.__name__)
def test_every_field_says_what_it_is(section):
    for name, field in section.model_fields.items():
        nested = hasattr(field.annotation, "model_fields")
        assert nested or field.description, name


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("macs=[0.5,1.5]", r"macs.1 = 1.5 must be less than or equal to 1"),
        ("macs=[0.5,0.5]", r"macs: \[0.5, 0.5\] must not repeat an entry"),
        ("seeds=[0,-1]", r"seeds.1 = -1 must be greater than or equal to 0"),
        ("methods=[magnitud]", r"methods.0 = 'magnitud' must be 'magnitude', .*'sbf'"),
        ("methods=[]", r"methods = \[\] .*at least 1"),
        ("recovery.steps=[20,10]", r"recovery.steps: \[20, 10\] must be in ascending order"),
        ("recovery.warmup=5", r"recovery: warmup = 5 must be less than steps = \[5, 10\]"),
        ("dense.warmup=10", r"dense: warmup = 10 must be less than steps = 10"),
        ("recovery.step=[5]", r"recovery.step is not a known key; did you mean 'steps'\?"),
        ("seed=1", r"seed is not a known key; did you mean 'seeds'\?"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_its_value_and_what_would_be_right(
    path, override, refused
):
    with pytest.raises(UserError, match=f"recipe .*small.yaml: {refused}") as error:
        load(path, [override])
    assert "\n" not in str(error.value)
