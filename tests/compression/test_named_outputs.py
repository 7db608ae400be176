"""Tensors in a network's outputs, by name."""

from collections import OrderedDict, namedtuple

import torch
from networks_of_all_kinds import Found

from sbf_dist.compression.named_outputs import named_tensors

Named = namedtuple("Named", ["logits", "aux"])


def test_tensors_are_named_by_their_place_in_any_structure():
    a, b, c = torch.zeros(3, 1), torch.zeros(3, 2), torch.zeros(3, 3)
    names = {
        "": a,
        "x.0 x.1": {"x": [a, b]},
        "0 1.y": (a, OrderedDict(y=b, z=None)),
        "logits aux": Named(a, b),
        "logits box more.0": Found(a, b, (c,)),
    }
    for wanted, outputs in names.items():
        assert " ".join(named_tensors(outputs)) == wanted
    assert named_tensors(Named(a, b))["aux"] is b
    assert named_tensors({"n": 3, "name": "none"}) == {}
