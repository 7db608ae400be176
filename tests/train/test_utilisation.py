import pytest
import torch

from sbf_dist.train.utilisation import peak_macs_per_s


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_matrix_product_is_timed_in_the_precision_of_the_training(precision: str) -> None:
    found = peak_macs_per_s(torch.device("cpu"), precision)
    assert 1e8 < found < 1e15  # anything from a small processor to more than there is
