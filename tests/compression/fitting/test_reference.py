import torch
from small_networks import small

from sbf_dist.compression.fitting.reference import Reference


def test_only_the_channels_that_are_left_are_selected_in_their_order():
    reference = Reference(small(), {"conv1": [3, 0]})
    outputs = torch.randn(2, 5, 4, 4)
    assert torch.equal(reference.select("conv1", outputs), outputs[:, [3, 0]])
    assert torch.equal(reference.select("conv2", outputs), outputs)
