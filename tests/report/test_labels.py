import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from sbf_dist.distill.stored_labels import StoredLabels
from sbf_dist.report.labels import BINS, describe
from sbf_dist.report.labels_chart import draw_labels

CLASSES = [f"a class with a long name {number}" for number in range(5)]


def labels_of(images: int, classes: int = 5, seed: int = 0) -> tuple[StoredLabels, np.ndarray]:
    """Random pseudo-labels, and true classes that they name as often as they are confident."""
    draw = np.random.default_rng(seed)
    predicted, confidence = draw.integers(0, classes, images), draw.uniform(0.3, 1, images)
    right = draw.uniform(size=images) < confidence
    stored = StoredLabels(
        ids=np.arange(images),
        classes=np.stack([predicted, (predicted + 1) % classes], 1).astype(np.int16),
        probabilities=np.stack([confidence, 1 - confidence], 1).astype(np.float16),
        entropy=draw.uniform(0, 1, images).astype(np.float16),
        margin=(2 * confidence - 1).astype(np.float16),
        agreement=draw.choice(np.float32([0.5, 1]), images),
    )
    return stored, np.where(right, predicted, (predicted + 1) % classes)


@pytest.fixture
def report():
    """Of 2,000 images, of which 100 are labelled, 500 for validation, 700 of the others used."""
    stored, truth = labels_of(2000)
    truth[600:1000] = -1
    ids = stored.ids
    parts = {"labelled": ids[:100], "unlabelled": ids[600:], "validation": ids[100:600]}
    report = describe(stored, parts, CLASSES, ["one", "two"], labels=truth, used=ids[900:1600])
    return report, stored, truth


def test_accuracy_and_calibration_are_over_the_images_whose_class_is_known(report):
    found, stored, truth = report
    rows = {row["part"]: row for row in found["parts"]}
    assert {name: row["images"] for name, row in rows.items()} == {
        "labelled": 100, "unlabelled": 1400, "validation": 500, "used": 700,
    }  # fmt: skip
    assert rows["unlabelled"]["known"] == 1000
    right = stored.predicted == truth
    assert rows["unlabelled"]["accuracy"] == pytest.approx(right[1000:].mean())
    assert rows["used"]["accuracy"] == pytest.approx(right[1000:1600].mean())
    assert rows["validation"]["confidence"] == pytest.approx(stored.confidence[100:600].mean())
    assert rows["unlabelled"]["agreement"] == pytest.approx(stored.agreement[600:].mean())


def test_bins_of_confidence_are_those_of_scikit_learn(report):
    found, stored, truth = report
    right, confidence = stored.predicted == truth, stored.confidence
    bins = found["reliability"]["validation"]
    accuracy, mean = calibration_curve(right[100:600], confidence[100:600], n_bins=BINS)
    np.testing.assert_allclose([one["accuracy"] for one in bins], accuracy)
    np.testing.assert_allclose([one["confidence"] for one in bins], mean, rtol=1e-6)
    shares = np.array([one["images"] for one in bins]) / 500
    ece = next(row["ece"] for row in found["parts"] if row["part"] == "validation")
    assert ece == pytest.approx((shares * np.abs(accuracy - mean)).sum())
    assert ece < 0.06  # they are right as often as they are confident


def test_classes_are_counted_over_the_images_without_labels(report):
    found, stored, _ = report
    predicted = np.bincount(stored.predicted[600:], minlength=5)
    assert found["per_class"]["predicted"] == predicted.tolist()
    assert sum(found["per_class"]["used"]) == 700
    assert [row["agreement"] for row in found["agreement"]] == [0.5, 1.0]
    assert sum(row["images"] for row in found["agreement"]) == 1400
    assert sum(found["confidence"]["labelled"]) == 100


def test_what_is_not_known_is_left_out():
    stored, _ = labels_of(50)
    old = StoredLabels(stored.ids, stored.classes, stored.probabilities, stored.entropy,
                       stored.margin)  # fmt: skip
    found = describe(old, {"all": old.ids}, CLASSES, [])
    (row,) = found["parts"]
    assert (row["accuracy"], row["ece"], row["agreement"], row["known"]) == (None, None, None, 0)
    assert (found["reliability"], found["agreement"]) == ({}, [])
    assert list(found["per_class"]) == ["predicted"]
    assert len(draw_labels(found).axes) == 4


@pytest.mark.parametrize("classes", [2, 24, 1000])
def test_few_classes_are_named_and_many_are_a_curve(classes):
    stored, truth = labels_of(300, classes)
    names = [f"class {number} with a name" for number in range(classes)]
    parts = {"unlabelled": stored.ids[:200], "validation": stored.ids[200:]}
    found = describe(stored, parts, names, ["a", "b"], labels=truth, used=stored.ids[:90])
    first, _, reliability, agreement = draw_labels(found).axes
    shown = [tick.get_text() for tick in first.get_xticklabels()]
    assert ("class 0 with a …" in shown) == (classes <= 24)
    legend = [text.get_text() for text in reliability.get_legend().get_texts()]
    assert [text.partition(",")[0] for text in legend] == ["unlabelled", "validation"]
    assert [tick.get_text() for tick in agreement.get_xticklabels()] == ["1 of 2", "2 of 2"]
