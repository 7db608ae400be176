"""The teacher ensemble: the mean of the probabilities of several frozen networks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.distill.class_mapping import ClassMapping
from sbf_dist.distill.teacher_costs import Meter, TeacherCost
from sbf_dist.errors import UserError
from sbf_dist.settings import View


@dataclass
class Member:
    """A teacher of an ensemble, and how it is asked.

    view         how it sees an image
    weight       in the ensemble's mean
    views        1, or 2: its answers to an image and to its mirror image are averaged
    temperature  of its softmax
    mapping      of its classes to those of the images; None: they are the same
    """

    name: str
    network: nn.Module
    view: View
    weight: float = 1.0
    views: int = 1
    temperature: float = 1.0
    mapping: ClassMapping | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return its softened probabilities (N, classes) of logits (views, N, its own classes).

        UserError: it answers with another number of classes than its file of classes has.
        """
        scaled = logits / self.temperature
        if self.mapping is None:
            return scaled.softmax(2).mean(0)
        if self.mapping.size != logits.shape[2]:
            raise UserError(
                f"teacher {self.name}: predicts {logits.shape[2]} classes, its file of classes "
                f"has {self.mapping.size}"
            )
        return torch.stack([self.mapping.probabilities(view) for view in scaled]).mean(0)


class TeacherEnsemble:
    """Frozen teachers that answer together.

    It is not an nn.Module: an engine that wraps a task must never find it, and its networks never
    leave evaluation mode.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        num_classes: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`num_classes`: of the images, if known; `dtype`: of autocast, None for full precision."""
        assert members
        self.members = list(members)
        for member in self.members:
            member.network.eval()
            member.network.requires_grad_(False)
            where = next((p.device for p in member.network.parameters()), None)
            if member.mapping is not None and where is not None:
                member.mapping = member.mapping.to(where)
        self.num_classes = num_classes
        self.dtype = dtype
        self._faults: list[Tensor | None] = [None] * len(self.members)
        self._meters: list[Meter] = []

    @torch.no_grad()
    def __call__(self, images: Tensor, view: View) -> Tensor:
        """Return the ensemble's probabilities (N, classes) on images of the view `view`.

        Each teacher gets the images resized and normalised to its own view. Whether its answers are
        finite is for check(), or for faults() and refuse().
        """
        return self.average(
            [
                self.probabilities(index, translate(images, view, member.view))
                for index, member in enumerate(self.members)
            ]
        )

    @torch.no_grad()
    def probabilities(self, index: int, images: Tensor) -> Tensor:
        """Return one teacher's softened probabilities on images of its own view, (N, classes)."""
        member = self.members[index]
        if not self._meters:
            logits = self._logits(member, images)
        else:
            with self._meters[index].measured(images):
                logits = self._logits(member, images)
        self._note(index, logits)
        return member.probabilities(logits)

    @torch.no_grad()
    def logits(self, index: int, images: Tensor) -> Tensor:
        """Return one teacher's answers to images of its own view, as Member.probabilities takes."""
        return self._logits(self.members[index], images)

    def average(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of the teachers' probabilities, each (N, classes).

        UserError: they have different numbers of classes, or others than the images.
        """
        counts = [answers.shape[1] for answers in probabilities]
        if len(set(counts)) > 1 or self.num_classes not in (None, counts[0]):
            named = zip(self.members, counts, strict=True)
            found = ", ".join(f"{member.name} has {count}" for member, count in named)
            wanted = "" if self.num_classes is None else f"; the images have {self.num_classes}"
            raise UserError(
                f"teachers: their numbers of classes are not the same: {found}{wanted}; a teacher "
                "with classes of its own needs classes: FILE"
            )
        total = sum(member.weight for member in self.members)
        shares = [member.weight / total for member in self.members]
        terms = zip(shares, probabilities, strict=True)
        return torch.stack([share * term for share, term in terms]).sum(0)

    def faults(self) -> Tensor:
        """Return for each teacher whether an answer so far was not finite; the device is not read.

        bool (teachers,), where the images were.
        """
        known = next((fault for fault in self._faults if fault is not None), torch.zeros(()))
        none = torch.zeros((), dtype=torch.bool, device=known.device)
        return torch.stack([none if fault is None else fault for fault in self._faults])

    def check(self) -> None:
        """UserError, naming them, where teachers have given answers that are not finite.

        It waits for the device.
        """
        self.refuse(self.faults().tolist())

    def refuse(self, faults: Sequence[bool]) -> None:
        """UserError that names the teachers that have faults, if any."""
        wrong = [m.name for m, fault in zip(self.members, faults, strict=True) if fault]
        if wrong:
            precision = "" if self.dtype is None else f" (in {str(self.dtype).split('.')[-1]})"
            raise UserError(
                f"teacher {', '.join(wrong)}: its predictions are not finite numbers{precision}; "
                "check its weights, mean and std, or leave it out"
            )

    @property
    def views(self) -> list[View]:
        """How each teacher sees an image."""
        return [member.view for member in self.members]

    def measure(self) -> None:
        """Measure from now on what each teacher's answers cost."""
        self._meters = [Meter() for _ in self.members]

    def costs(self) -> dict[str, TeacherCost]:
        """Return what has been measured, by the names of the teachers that were asked."""
        if not self._meters:
            return {}
        named = zip(self.members, self._meters, strict=True)
        return {m.name: meter.cost(m.network) for m, meter in named if meter.images}

    def _logits(self, member: Member, images: Tensor) -> Tensor:
        """Return the answers to each view of the images, (views, N, classes of the teacher)."""
        shown = [images] if member.views == 1 else [images, images.flip(3)]
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            answers = [member.network(view) for view in shown]
        return torch.stack([answer.float() for answer in answers])

    def _note(self, index: int, logits: Tensor) -> None:
        fault = ~logits.isfinite().all()
        before = self._faults[index]
        self._faults[index] = fault if before is None else before | fault


def translate(images: Tensor, view: View, to: View) -> Tensor:
    """Turn normalised images (N, 3, H, W) of one view into those of another."""
    if to.image_size != view.image_size:
        size = (to.image_size, to.image_size)
        images = F.interpolate(
            images, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    if (to.mean, to.std) != (view.mean, view.std):
        old_mean, old_std, new_mean, new_std = (
            images.new_tensor(values)[:, None, None]
            for values in (view.mean, view.std, to.mean, to.std)
        )
        images = (images * old_std + old_mean - new_mean) / new_std
    return images
