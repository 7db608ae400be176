import numpy as np
import pytest
import scipy.stats
import torch
from stores import distributions

from sbf_dist.distill.summaries import Summary


def of(*each: np.ndarray, k: int = 3) -> Summary:
    teachers = [torch.tensor(one) for one in each]
    return Summary.of(torch.stack(teachers).mean(0), teachers, k)


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9])
def test_the_most_probable_classes_are_kept_descending_and_all_where_there_are_fewer(k):
    said = distributions(6, 7)
    found = of(said, k=k)
    order = np.argsort(-said, axis=1)[:, :k]
    assert found.classes.tolist() == order.tolist()
    np.testing.assert_array_equal(found.probabilities, np.take_along_axis(said, order, 1))


def test_entropy_and_margin_are_those_of_the_whole_distribution_however_few_classes_are_kept():
    said = distributions(6, 7)
    found = of(said, k=1)
    np.testing.assert_allclose(found.entropy, scipy.stats.entropy(said, axis=1), rtol=1e-5)
    top = -np.sort(-said, axis=1)
    np.testing.assert_allclose(found.margin, top[:, 0] - top[:, 1], rtol=1e-6)


def test_certainty_has_no_entropy_and_uniform_has_the_most():
    found = of(np.array([[0, 1, 0, 0], [0.25] * 4], np.float32))
    np.testing.assert_allclose(found.entropy, [0, np.log(4)], atol=1e-6)
    np.testing.assert_allclose(found.margin, [1, 0])


def test_agreement_is_the_share_of_the_teachers_whose_first_class_is_the_ensembles():
    one, two, three = (np.zeros((3, 4), np.float32) for _ in range(3))
    for teacher, classes in ((one, [0, 1, 2]), (two, [0, 1, 1]), (three, [0, 2, 3])):
        teacher[range(3), classes] = 1
    two[2] = [0, 0.6, 0.4, 0]  # with the first, the third image is of class 2
    found = of(one, two, three)
    assert found.classes[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.agreement, [1, 2 / 3, 1 / 3])


def test_one_class_alone_is_certain():
    found = of(np.ones((2, 1), np.float32))
    assert found.classes.tolist() == [[0], [0]]
    assert found.margin.tolist() == [1, 1]


def test_summaries_of_batches_are_joined_and_cut():
    said = distributions(5, 4)
    whole = of(said)
    joined = Summary.joined([of(said[:2]), of(said[2:])])
    assert len(joined) == 5
    for name in ("classes", "probabilities", "entropy", "margin", "agreement"):
        assert torch.equal(getattr(joined[1:4], name), getattr(whole, name)[1:4])
