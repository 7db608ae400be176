"""Students that torch.jit.trace and torch.export record."""

import pytest
import torch
from students import half_of_every_block, make_student

from sbf_dist.export.optimize import optimize

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")

STUDENTS = {
    "m = 3": half_of_every_block(sources=4),
    "mixtures": half_of_every_block(sources=8, transform_size=1),
}


@pytest.fixture(params=STUDENTS)
def any_student(request):
    return make_student(STUDENTS[request.param])


@pytest.mark.parametrize("prepare", [lambda student: student, optimize], ids=["plain", "optimized"])
@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_recorded_computes_the_same_for_other_batches(any_student, prepare, gradients):
    network = prepare(any_student)
    few, more = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = network(more)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(network, few)  # which checks itself, without gradients
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network, (few,), dynamic_shapes=batch).module()
    for recorded in (traced, program):
        with torch.no_grad():
            torch.testing.assert_close(recorded(more), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_recorded_without_gradients_can_have_them(any_student):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        traced = torch.jit.trace(any_student, images)
        program = torch.export.export(any_student, (images,)).module()
    for recorded in (traced, program):
        given = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(recorded(given).sum(), given)
        given = images.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(any_student(given).sum(), given)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
