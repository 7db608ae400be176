"""How near a network is to the dense one, on images that it was not fitted to."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.plan import MeasuredFidelity

SURE = 0.4  # the dense network's probability above which it counts as sure
ROUNDING = 1e-6  # of a divergence
WORTH = 1e-3  # share of a divergence that a step must take away to be worth a change


@dataclass(frozen=True)
class Fidelity:
    """What a network has in common with the dense one on some images.

    agreement: share of images of which both give the same class; agreement_sure: of those where
    the dense network is sure, or None if there are none; kl: mean divergence of the predictions.
    """

    images: int
    agreement: float
    agreement_sure: float | None
    kl: float

    def nearer_than(self, other: "Fidelity") -> bool:
        """Whether this is nearer to the dense network, by more than rounding."""
        return self.kl < other.kl * (1 - WORTH) - ROUNDING


class Wanted:
    """What the dense network predicts on some images."""

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self._logs = torch.cat([batch.float().log_softmax(1) for batch in outputs])

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Module, images: Calibration) -> "Wanted":
        """Run `dense`, in eval mode, on all of `images`."""
        return cls(dense(batch) for batch in images.parts(images.part))

    @torch.no_grad()
    def compare(self, outputs: Iterable[Tensor]) -> Fidelity:
        """Compare the outputs of another network for the same images in the same order."""
        logs = torch.cat([batch.float().log_softmax(1) for batch in outputs])
        probability = self._logs.exp()
        same = (logs.argmax(1) == self._logs.argmax(1)).double()
        sure = probability.amax(1) > SURE
        kl = float((probability * (self._logs - logs)).sum(1).double().mean())
        return Fidelity(
            images=len(logs),
            agreement=float(same.mean()),
            agreement_sure=float(same[sure].mean()) if sure.any() else None,
            # A network that gives no numbers is the farthest there is.
            kl=math.inf if math.isnan(kl) else kl,
        )


class Judge:
    """Judges a student, step by step, on images that are held out.

    fidelity: what the student reached with the last step that was kept; steps: what each step
    brought, in sentences.
    """

    def __init__(self, student: nn.Module, reference: Reference, held: Calibration) -> None:
        self._student = student
        self._held = held
        self._wanted = Wanted.of(reference.module, held)
        self.fidelity = self.measure()
        self.steps = [f"On images held out, layers fitted: {_in_words(self.fidelity)}."]

    @torch.no_grad()
    def measure(self) -> Fidelity:
        """Compare the student, as it is now, with the dense network."""
        parts = self._held.parts(self._held.part)
        return self._wanted.compare(self._student(batch) for batch in parts)

    def keep_if_nearer(self, step: str, change: Callable[[], object]) -> bool:
        """Change the student's weights in place; restore them unless it is nearer then."""
        tensors = [*self._student.parameters(), *self._student.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        change()
        found = self.measure()
        kept = found.nearer_than(self.fidelity)
        self.steps.append(f"{step}: {_in_words(found)}{'' if kept else ', not kept'}.")
        if kept:
            self.fidelity = found
            return True
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        return False

    def record(self) -> MeasuredFidelity:
        """Return what was reached, as a plan keeps it."""
        found = self.fidelity
        sure = found.agreement_sure
        return MeasuredFidelity(
            images=found.images,
            agreement=round(found.agreement, 6),
            agreement_sure=None if sure is None else round(sure, 6),
            kl=round(max(0.0, found.kl), 6),
        )


def _in_words(fidelity: Fidelity) -> str:
    return f"{fidelity.agreement:.1%} of the dense network's classes, KL {fidelity.kl:.3g}"
