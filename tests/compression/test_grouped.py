"""Grouped convolutions that are not depthwise: each group keeps as many of its channels."""

import pytest
import torch
from small_networks import Small, pictures
from torch import nn

from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.planning.criteria import CRITERIA, Ranking
from sbf_dist.compression.planning.latency import Form, build_form
from sbf_dist.compression.planning.options import Search
from sbf_dist.compression.progressive import shrink
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.layers import SBFConv2d
from sbf_dist.peers.ghost import ghost
from sbf_dist.peers.low_rank import low_rank
from sbf_dist.settings import Compression
from sbf_dist.weights import load_state

SHAPE = (3, 10, 10)


def grouped(groups=4):
    torch.manual_seed(0)
    network = Small()
    network.conv1 = nn.Conv2d(8, 32, 3, padding=1, groups=groups, bias=False)
    network.norm1 = nn.BatchNorm2d(32)
    network.conv2 = nn.Conv2d(32, 16, 3, stride=2, padding=1, groups=groups, bias=False)
    nn.init.normal_(network.head.weight)
    measure_batch_norm(network, pictures(64), 64)
    return network


def of_groups(layer):
    width = layer.out_channels // layer.groups
    return [sum(c // width == group for c in layer.kept) for group in range(layer.groups)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_group_keeps_as_many_and_the_budget_is_met(criterion):
    model, images = grouped(), pictures(64)
    student, plan = compress(model, images, Compression(macs=0.6, criterion=criterion), name="g")
    assert count(student, SHAPE).macs == plan.macs_after <= 0.6 * plan.macs_before
    layers = [module for module in student.modules() if isinstance(module, SBFConv2d)]
    assert layers
    for layer in layers:
        assert layer.groups == 4
        assert len(set(of_groups(layer))) == 1
    again = convert(model, plan)
    load_state(again, dict(student.state_dict()))
    assert torch.equal(again.eval()(images), student(images))


def test_a_grouped_student_is_near_to_the_dense_network_optimized_exported_and_shrunk(tmp_path):
    model, images = grouped(), pictures(128)
    student, plan = compress(model, images, macs=0.7, name="g")
    assert plan.fidelity.kl < 0.05
    wanted = student(images[:8]).detach()
    most = 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(optimize(student)(images[:8]), wanted, rtol=0, atol=most)
    export_onnx(student, tmp_path / "student.onnx")
    assert verify_onnx(tmp_path / "student.onnx", student, images[:8]) < most
    smaller, plan = shrink(student, plan, images, Compression(macs=0.5))
    assert count(smaller, SHAPE).macs == plan.macs_after <= 0.5 * plan.macs_before
    for layer in smaller.modules():
        if isinstance(layer, SBFConv2d):
            assert len(set(of_groups(layer))) == 1


def test_channels_come_in_turns_so_that_each_prefix_of_whole_rows_is_even():
    ranking = Ranking("l1", torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), groups=2)
    assert ranking.order(None, torch.ones(8)) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert ranking.restrict([0, 2, 5, 7]).order(None, torch.ones(8)) == [0, 5, 2, 7]


def test_numbers_that_are_tried_are_multiples_of_groups_and_of_round_to():
    search = Search(Compression(macs=0.5, round_to=4))
    assert set(search.kept(48, groups=6)) == {12, 24, 36}


def test_forms_that_are_timed_have_even_groups():
    conv = nn.Conv2d(8, 32, 3, groups=4)
    layer = build_form(conv, Form(12, 2, 1))
    assert of_groups(layer) == [3, 3, 3, 3]


def test_peers_leave_grouped_convolutions_alone():
    model, images = grouped(2), pictures(8)
    model.between = nn.Conv2d(32, 32, 3, padding=1)
    model.norm1 = nn.Sequential(model.norm1, model.between)
    for peer in (low_rank, ghost):
        made = peer(model.eval(), 0.8, images)
        assert type(made.conv1) is type(made.conv2) is nn.Conv2d
