"""Fitting the layers of a student in forward order, each on what the student gives it."""

from collections.abc import Callable, Collection, Iterator

from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import convolution
from sbf_dist.compression.fitting.layerwise import Draw, Targets, draws
from sbf_dist.compression.fitting.mixture import MixtureSpace, install_mixture
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import obstacle, refit_filters
from sbf_dist.compression.fitting.statistics import Moments, MomentSums, run_until
from sbf_dist.compression.fitting.transforms import install
from sbf_dist.compression.plan import SBFLayer

SAMPLES_PER_WEIGHT = 3  # of a filter, at least, for it to be solved anew
INPUTS = 512 * 2**20  # bytes of a layer's inputs up to which a second use costs no second pass


class SequentialFit:
    """Fits layers of `student`, in place and in forward order, to the outputs of `reference`.

    `sizes` are the m of the layers that will be fitted, 1 for those that stay dense, in forward
    order; each is fitted once, in that order. With `refit`, filters are first solved anew on the
    inputs that the student now gives (`refit`).
    """

    def __init__(
        self,
        student: nn.Module,
        reference: Reference,
        sizes: dict[str, int],
        images: Calibration,
        *,
        refit: bool,
    ) -> None:
        self._student = student
        self._images = images
        self._sizes = sizes
        self._draws = draws(student, sizes, images) if sizes else {}
        self._targets = Targets(reference, self._draws, images)
        self._refit = refit

    def mend(self, name: str) -> None:
        """Solve the filters of a layer that stays dense anew, if there are samples enough."""
        conv = convolution(self._student, name)
        if not self._can_solve(name):
            self._targets.pop(name)
            return
        refit_filters(conv, self._batches(name), self._draws[name], centred=conv.bias is not None)

    def convert(
        self,
        name: str,
        rank: Callable[[Moments], list[int]],
        kept: int,
        sources: int,
        macs: int,
    ) -> SBFLayer:
        """Make an SBF layer of a convolution: the first `kept` channels of `rank` are its basis."""
        moments = self._moments(name)
        return install(self._student, name, moments, sorted(rank(moments)[:kept]), sources, macs)

    def convert_whole_basis(
        self, name: str, kept: int, weights: Tensor, among: Collection[int] | None, macs: int
    ) -> SBFLayer:
        """Make a convolution an SBF layer whose rebuilt channels read the whole basis of `kept`.

        Errors of channels count by `weights` (C,); `among` are those that may be kept, None all.
        """
        moments = self._moments(name)
        mixture = MixtureSpace(moments, weights).fit(kept, among)
        return install_mixture(self._student, name, mixture, moments, macs)

    def _moments(self, name: str) -> Moments:
        """Solve a layer's filters anew, if that can be done, and gather what they then give."""
        conv = convolution(self._student, name)
        draw, size = self._draws[name], self._sizes[name]
        batches = self._batches(name)
        if self._refit and self._can_solve(name):
            refit_filters(conv, batches, draw, centred=True)
        sums = MomentSums(size)
        for start, inputs, rows in batches:
            # The basis of an SBF layer has no bias, so the candidates have none either.
            candidates = conv._conv_forward(inputs, conv.weight, None)
            sums.add(draw.rows(candidates, size, start), rows)
        return sums.moments()

    def _can_solve(self, name: str) -> bool:
        # Behind global pooling an image is one sample: filters would be fitted to chance.
        conv, draw = convolution(self._student, name), self._draws[name]
        samples = draw.images * draw.per_image
        return obstacle(conv) is None and samples >= SAMPLES_PER_WEIGHT * conv.weight[0].numel()

    def _batches(self, name: str) -> "_Batches":
        return _Batches(
            self._student, name, self._images, self._draws[name], self._targets.pop(name)
        )


class _Batches:
    """First image's number, a layer's inputs and target rows, batch by batch, more than once."""

    def __init__(
        self,
        student: nn.Module,
        name: str,
        images: Calibration,
        draw: Draw,
        targets: Tensor,
    ) -> None:
        self._student = student
        self._name = name
        self._images = images
        self._draw = draw
        self._targets = targets
        self._held: Tensor | None = None  # inputs of all images, once they have been seen
        self._sizes: list[int] = []  # of the parts in which they came

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        start, per_image = 0, self._draw.per_image
        for inputs in self._inputs():
            end = start + len(inputs)
            yield start, inputs, self._targets[start * per_image : end * per_image]
            start = end

    def _inputs(self) -> Iterator[Tensor]:
        if self._held is not None:
            yield from self._held.split(self._sizes)
            return
        held: Tensor | None = None
        self._sizes = []
        start, images = 0, self._draw.images
        for batch in self._images.parts(self._images.part, images):
            inputs = run_until(self._student, self._name, batch, output=False)[: images - start]
            if start == 0 and inputs[0].nbytes * images <= INPUTS:
                held = inputs.new_empty(images, *inputs.shape[1:])
            if held is not None:
                held[start : start + len(inputs)] = inputs
            start += len(inputs)
            self._sizes.append(len(inputs))
            yield inputs
        self._held = held
