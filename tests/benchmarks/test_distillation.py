import sys
from pathlib import Path

import pytest

# As for a script, its folder is where it finds its own modules.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import distillation
from distillation_table import summarise


def test_a_row_is_the_mean_over_the_seeds_of_its_method_alone():
    cells = [
        {"data": "photos", "labels_per_class": 4, "seed": seed, "method": method, "top1": top1}
        for seed, method, top1 in [(0, "a", 0.4), (0, "b", 0.1), (1, "a", 0.6)]
    ]
    first, second = summarise(cells)
    assert (first["method"], first["top1_mean"], first["seeds"]) == ("a", 50.0, [0, 1])
    assert first["top1_std"] == pytest.approx(14.14)
    assert (second["method"], second["top1_mean"], second["top1_std"]) == ("b", 10.0, 0.0)


def test_all_students_but_those_at_a_quarter_have_half_the_multiply_adds():
    shares = {method.macs for name, method in distillation.METHODS.items() if "quarter" not in name}
    assert shares == {0.5}


def test_methods_differ_in_what_their_names_say():
    methods = {name: method.distill for name, method in distillation.METHODS.items()}
    assert methods["supervised"] is None
    assert methods["ensemble, stored"].targets == "stored"
    assert not methods["FixMatch"].asks_teachers
    assert methods["ensemble, live + features"].features is not None
    assert methods["ensemble, live + labels last"].labels_last is not None
    assert distillation.METHODS["one teacher, live"].members == (0,)


@pytest.mark.parametrize("name", distillation.SETS)
def test_a_set_has_the_labels_and_the_size_that_the_rows_say(name, tmp_path):
    lengths = distillation.Lengths(1, 1)
    given = distillation.setting(tmp_path, name, 4, 0, 0.1, lengths)
    assert given.data.labelled_per_class == 4
    assert given.data.image_size == distillation.SETS[name]
