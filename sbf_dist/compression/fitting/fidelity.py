"""How near a network is to the dense one, on images that it was not fitted to."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.compression.plan import MeasuredFidelity

SURE = 0.4  # the dense network's probability above which it counts as sure
ROUNDING = 1e-6  # of a divergence
WORTH = 1e-3  # share of a divergence that a step must take away to be worth a change
HELD = 512 * 2**20  # bytes of the dense network's outputs; what is more is computed each time


@dataclass(frozen=True)
class Fidelity:
    """What a network has in common with the dense one on some images.

    divergence: from the dense network, by which networks are compared; kl: its mean over the
    outputs that are logits, or None; error: over the others, or None; agreement: share of images
    (and positions) for which both give the same class, by the first logits; agreement_sure: of
    those where the dense network is sure, or None if there are none.
    """

    images: int
    divergence: float
    kl: float | None = None
    error: float | None = None
    agreement: float | None = None
    agreement_sure: float | None = None

    def nearer_than(self, other: "Fidelity") -> bool:
        """Whether this is nearer to the dense network, by more than rounding."""
        return self.divergence < other.divergence * (1 - WORTH) - ROUNDING

    def record(self) -> MeasuredFidelity:
        """Return it as a plan keeps it."""
        own = self.divergence not in (self.kl, self.error)
        figures = {
            "agreement": self.agreement,
            "agreement_sure": self.agreement_sure,
            "kl": self.kl,
            "error": self.error,
            "divergence": self.divergence if own else None,
        }
        return MeasuredFidelity(
            images=self.images,
            **{
                name: None if value is None else round(max(0.0, value), 6)
                for name, value in figures.items()
            },
        )


class Wanted:
    """What the dense network gives for some images, and how far others are from it.

    outputs: of the dense network, batch by batch; they are gone through anew for each comparison.
    """

    def __init__(self, outputs: Iterable[Any], yardstick: Yardstick = LOGITS) -> None:
        self._outputs = outputs
        self._yardstick = yardstick

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        dense: nn.Module,
        images: Calibration,
        yardstick: Yardstick = LOGITS,
        outputs: Iterable[Any] | None = None,
    ) -> "Wanted":
        """Run `dense`, in eval mode, on all of `images`; `outputs` are a pass that does so."""
        every = OutputsFor(dense, images)
        held: list[Any] = []
        for found in every if outputs is None else outputs:
            size = sum(tensor[0].nbytes for tensor in yardstick.tensors(found))
            if size * images.count > HELD:
                return cls(every, yardstick)
            held.append(found)
        return cls(held, yardstick)

    @torch.no_grad()
    def compare(self, outputs: Iterable[Any]) -> Fidelity:
        """Compare the outputs of another network for the same images, in the same batches."""
        sums = _Sums(self._yardstick)
        for found, wanted in zip(outputs, self._outputs, strict=True):
            sums.add(found, wanted)
        return sums.fidelity()


class OutputsFor:
    """What a network gives for images, batch by batch, as often as it is asked."""

    def __init__(self, model: nn.Module, images: Calibration) -> None:
        self._model = model
        self._images = images

    @torch.no_grad()
    def __iter__(self) -> Iterator[Any]:
        for batch in self._images.parts(self._images.part):
            yield self._model(batch)


class _Sums:
    """Sums over images of what a Fidelity is the mean of."""

    def __init__(self, yardstick: Yardstick) -> None:
        self._yardstick = yardstick
        self._images = 0
        self._distances = torch.zeros(len(yardstick.outputs), dtype=torch.double)
        self._own = 0.0
        self._classes = self._sure = self._same = self._same_sure = 0

    def add(self, found: Any, wanted: Any) -> None:
        yardstick = self._yardstick
        pairs = [
            (one.float(), other.float())
            for one, other in zip(yardstick.tensors(found), yardstick.tensors(wanted), strict=True)
        ]
        images = len(pairs[0][1])
        self._images += images
        for index, (output, pair) in enumerate(zip(yardstick.outputs, pairs, strict=True)):
            self._distances[index] += output.distances(*pair).double().sum().cpu()
        if yardstick.function is not None:
            self._own += images * float(yardstick.function(found, wanted))
        kinds = [output.kind for output in yardstick.outputs]
        if "kl" in kinds:
            logits, dense = pairs[kinds.index("kl")]
            same = logits.argmax(1) == dense.argmax(1)
            sure = dense.softmax(1).amax(1) > SURE
            self._classes += same.numel()
            self._same += int(same.sum())
            self._sure += int(sure.sum())
            self._same_sure += int((same & sure).sum())

    def fidelity(self) -> Fidelity:
        means = (self._distances / self._images).tolist()
        kinds = [output.kind for output in self._yardstick.outputs]
        own = self._yardstick.function is not None
        return Fidelity(
            images=self._images,
            divergence=_number(self._own / self._images if own else sum(means) / len(means)),
            kl=_mean_of("kl", kinds, means),
            error=_mean_of("error", kinds, means),
            agreement=self._same / self._classes if self._classes else None,
            agreement_sure=self._same_sure / self._sure if self._sure else None,
        )


def _mean_of(kind: str, kinds: Sequence[str], means: list[float]) -> float | None:
    own = [mean for mean, its_kind in zip(means, kinds, strict=True) if its_kind == kind]
    return _number(sum(own) / len(own)) if own else None


def _number(value: float) -> float:
    """A network that gives no numbers is the farthest there is."""
    return math.inf if math.isnan(value) else value


class Judge:
    """Judges a student, step by step, on images that are held out, by its outputs for these.

    fidelity: what the student reached with the last step that was kept; steps: what each step
    brought, in sentences.
    """

    def __init__(self, student: nn.Module, wanted: Wanted, outputs: Iterable[Any]) -> None:
        self._student = student
        self._wanted = wanted
        self.fidelity = self._wanted.compare(outputs)
        self.steps = [f"On images held out, layers fitted: {self.fidelity.record().in_words()}."]

    def keep_if_nearer(
        self, step: str, change: Callable[[], object], outputs: Iterable[Any]
    ) -> bool:
        """Change the student's weights in place; restore them unless it is nearer then.

        `outputs` are what it gives when it has been changed.
        """
        tensors = [*self._student.parameters(), *self._student.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        change()
        found = self._wanted.compare(outputs)
        kept = found.nearer_than(self.fidelity)
        self.steps.append(f"{step}: {found.record().in_words()}{'' if kept else ', not kept'}.")
        if kept:
            self.fidelity = found
            return True
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        return False

    def record(self) -> MeasuredFidelity:
        """Return what was reached, as a plan keeps it."""
        return self.fidelity.record()
