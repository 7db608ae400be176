import pytest
import torch
from torch.nn import functional as F

from sbf_dist.distill.consistency import consistency


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_cross_entropy_on_the_confident_images_over_all_images(threshold):
    generator = torch.Generator().manual_seed(0)
    weak = (3 * torch.randn(20, 4, generator=generator)).softmax(1)
    logits = torch.randn(20, 4, generator=generator)
    loss, share = consistency(logits.log_softmax(1), weak, threshold)
    chosen = [row for row in range(20) if weak[row].max() >= threshold]
    assert share.item() == pytest.approx(len(chosen) / 20)
    expected = sum(F.cross_entropy(logits[row], weak[row].argmax()) for row in chosen) / 20
    assert loss.item() == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


def test_no_gradient_reaches_the_weak_view():
    weak = torch.tensor([[0.9, 0.1]], requires_grad=True)
    strong = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss, _ = consistency(strong.log_softmax(1), weak, 0.5)
    loss.backward()
    assert weak.grad is None
    assert strong.grad.any()
