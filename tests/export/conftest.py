import pytest
from students import half_of_every_block, make_student
from torch import nn

from sbf_dist.compression.plan import Plan
from sbf_dist.export.saved import Card


@pytest.fixture(scope="session")
def plan() -> Plan:
    return half_of_every_block(sources=4)


@pytest.fixture
def student(plan: Plan) -> nn.Module:
    return make_student(plan)


@pytest.fixture(scope="session")
def card(plan: Plan) -> Card:
    return Card.of(
        plan,
        classes=[f"digit {i}" for i in range(10)],
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.25, 0.3],
        top1=0.5,
    )
