import torch
from torch import nn

from sbf_dist.settings import Optimizer
from sbf_dist.train.loop import Every, fit
from sbf_dist.train.single import SingleEngine


class Squares(nn.Module):
    """Pulls a parameter towards the mean of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        return {"loss": (self.place - batch["image"].mean(0)).square().sum()}


def batches(count: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    return [{"image": scale * torch.randn(8, 3, generator=generator)} for _ in range(count)]


def trained(optimizer: Optimizer, steps: int, scale: float = 1.0) -> Squares:
    task = Squares()
    fit(
        SingleEngine(task, optimizer),
        batches(steps, scale),
        steps=steps,
        lr_at=lambda step: 0.1 / (step + 1),
        log=Every(10, lambda record: None),
    )
    return task


def test_it_steps_as_torchs_optimizer_does_with_the_loops_learning_rates():
    expected = Squares()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for step, batch in enumerate(batches(6)):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        expected(batch)["loss"].backward()
        optimizer.step()
    task = trained(Optimizer(momentum=0.9, weight_decay=0.0), 6)
    torch.testing.assert_close(task.place, expected.place)


def test_the_gradient_is_clipped():
    free = trained(Optimizer(momentum=0.0, weight_decay=0.0), 1, scale=100.0)
    clipped = trained(Optimizer(momentum=0.0, weight_decay=0.0, clip=0.5), 1, scale=100.0)
    assert free.place.norm() > 1
    torch.testing.assert_close(clipped.place.norm(), torch.tensor(0.05))
    torch.testing.assert_close(clipped.place / clipped.place.norm(), free.place / free.place.norm())


def test_the_task_is_in_training_mode():
    task = Squares().eval()
    SingleEngine(task, Optimizer())
    assert task.training
