"""Confusions counted, and the pictures that stand for them."""

import numpy as np

from sbf_dist.report.confusion import commonest, confusion_chart, count, worst_images
from sbf_dist.report.contents import Predictions

LABELS = np.array([0, 0, 1, 1, 1, 2])
PREDICTED = np.array([0, 1, 2, 2, 1, 0])
CONFIDENCE = np.array([0.9, 0.99, 0.5, 0.8, 0.7, 0.6], np.float32)
COUNTS = count(LABELS, PREDICTED, 3)


def test_rows_are_true_classes_and_columns_predicted_ones():
    assert COUNTS.tolist() == [[1, 1, 0], [0, 1, 2], [1, 0, 0]]


def test_the_commonest_confusions_come_first_and_right_answers_never():
    assert commonest(COUNTS, 5) == [(1, 2, 2), (0, 1, 1), (2, 0, 1)]
    assert commonest(COUNTS, 1) == [(1, 2, 2)]
    assert commonest(np.eye(3, dtype=np.int64), 5) == []


def test_pictures_are_of_the_commonest_confusion_and_there_of_the_surest_answer():
    assert worst_images(LABELS, PREDICTED, CONFIDENCE, COUNTS, 3) == [3, 2, 1]


def test_one_confusion_does_not_take_the_place_of_the_others():
    labels, predicted = np.array([0] * 9 + [1]), np.array([1] * 9 + [0])
    confidence = np.linspace(0.1, 1, 10, dtype=np.float32)
    found = worst_images(labels, predicted, confidence, count(labels, predicted, 2), 8)
    assert found == [8, 7, 6, 5, 9]


def predictions(counts: np.ndarray) -> Predictions:
    names = [f"class {n}" for n in range(len(counts))]
    return Predictions("network", names, counts, int(counts.sum()), 100, [])


def test_the_chart_shows_numbers_and_shares_of_each_true_class():
    chart = confusion_chart(predictions(COUNTS), "run0")
    heat = chart.figure.data[0]
    assert [list(row) for row in heat.customdata] == COUNTS.tolist()
    assert list(heat.z[1]) == [0.0, 33.3, 66.7]
    assert chart.figure.layout.yaxis.ticktext == ("class 0", "class 1", "class 2")


def test_of_many_classes_those_with_the_most_mistakes_are_shown():
    counts = np.diag(np.full(30, 5))
    counts[28, 29] = 4
    chart = confusion_chart(predictions(counts), "run0")
    assert len(chart.figure.data[0].z) == 20
    assert {"class 28", "class 29"} <= set(chart.figure.layout.yaxis.ticktext)
    assert "Of 30 classes, the 20 with the most mistakes." in chart.reading
