"""Fitting the layers of a student in forward order, each on what the student gives it."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import convolution
from sbf_dist.compression.fitting.layerwise import Draw, Targets, draws
from sbf_dist.compression.fitting.mixture import MixtureSpace, best_space, install_mixture
from sbf_dist.compression.fitting.norms import movable, running_statistics
from sbf_dist.compression.fitting.prior import with_prior
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import (
    best_solution,
    filter_moments,
    obstacle,
    output_moments,
    solve,
)
from sbf_dist.compression.fitting.resuming import Passes, Route, Side
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.fitting.statistics import Moments, MomentSums
from sbf_dist.compression.fitting.transforms import install
from sbf_dist.compression.plan import SBFLayer
from sbf_dist.compression.recognition import as_plain, make_plain

SAMPLES_PER_WEIGHT = 3  # of a filter, at least, for it to be solved anew
INPUTS = 512 * 2**20  # bytes of a layer's inputs up to which a second use costs no second pass


class SequentialFit:
    """Fits layers of `student`, in place and in forward order, to the outputs of `reference`.

    `sizes` are the m of the layers that will be fitted, 1 for those that stay dense, in forward
    order; each is fitted once, in that order. With `refit`, filters are first solved anew on the
    inputs that the student now gives (`refit`). How far they leave the old ones, and a mixture the
    layer's own outputs, is chosen by the error on images that are `held` out. Where none are,
    filters are solved anew only with samples enough. `priors` say of layers how much their inputs
    varied in training (`prior`), `route` where passes can go on. `sides` are the passes over the
    images to fit to and over those held out, as far as they have come.
    """

    def __init__(
        self,
        student: nn.Module,
        reference: Reference,
        sizes: dict[str, int],
        images: Calibration,
        *,
        refit: bool,
        held: Calibration | None = None,
        priors: Mapping[str, Tensor] | None = None,
        route: Route | None = None,
    ) -> None:
        self._student = student
        self._sizes = sizes
        self._refit = refit
        self._statistics = running_statistics(reference)
        self._norms = movable(student, images.first(2))
        self._priors = priors or {}
        self.route = route or Route()
        shelf = Shelf(self.route.memory)

        def side(images: Calibration) -> _Side:
            passes = Side(
                Passes(student, images, self.route.student, shelf),
                Passes(reference.module, images, self.route.reference, shelf),
            )
            return _Side(draws(student, sizes, images) if sizes else {}, reference, passes)

        self._fit = side(images)
        self._held = None if held is None else side(held)
        self.sides: tuple[Side | None, Side | None] = (
            self._fit.passes,
            None if self._held is None else self._held.passes,
        )

    def forget(self) -> None:
        """Forget the passes: layers that they have passed have been changed."""
        self.sides = (None, None)

    def fits(self, name: str) -> bool:
        """Whether a layer is one of those to fit."""
        return name in self._sizes

    def skip(self, name: str) -> None:
        """Pass over a layer that is left as it is."""
        self._fit.skip(name)

    def moments(self, name: str) -> Moments:
        """Gather what the filters of a layer give, to be compared with the reference's outputs."""
        return self._candidates(name, self._fit.batches(name))

    def mend(self, name: str) -> None:
        """Solve the filters of a layer that stays dense anew, if the images are enough for it.

        Means are left to its bias, or to the batch norm that reads its output.
        """
        conv = convolution(self._student, name)
        if not self._can_solve(name):
            self._fit.skip(name)
            return
        norm = self._restored_norm(name)
        centred = conv.bias is not None or norm is not None
        held = None if self._held is None else self._held.batches(name)
        seen = self._seen(name, self._fit.batches(name), held)
        weight, bias = self._solved(name, seen, centred=centred)
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.copy_(bias)
        elif norm is not None:
            assert norm.running_mean is not None
            norm.running_mean -= bias.to(norm.running_mean)

    def convert(
        self,
        name: str,
        rank: Callable[[Moments], list[int]],
        kept: int,
        sources: int,
        macs: int,
    ) -> SBFLayer:
        """Make an SBF layer of a convolution: the first `kept` channels of `rank` are its basis."""
        moments, _ = self._moments(name)
        return install(self._student, name, moments, sorted(rank(moments)[:kept]), sources, macs)

    def convert_whole_basis(
        self, name: str, kept: int, weights: Tensor, among: Collection[int] | None, macs: int
    ) -> SBFLayer:
        """Make a convolution an SBF layer whose rebuilt channels read the whole basis of `kept`.

        Errors of channels count by `weights` (C,); `among` are those that may be kept, None all.
        """
        moments, held = self._moments(name, with_held=True)
        space = (
            MixtureSpace(moments, weights)
            if held is None
            else best_space(moments, held, weights, kept)
        )
        return install_mixture(self._student, name, space.fit(kept, among), moments, macs)

    def _restored_norm(self, name: str) -> _BatchNorm | None:
        """Give the batch norm behind a layer the statistics of the reference again, and return it.

        The layer is fitted to what the reference's batch norm reads. An earlier fit may have left
        the means of its outputs there, which would count twice.
        """
        if name not in self._norms:
            return None
        own = self._norms[name]
        norm = self._student.get_submodule(own)
        assert isinstance(norm, _BatchNorm)
        if own in self._statistics:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, variance = self._statistics[own]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        return norm

    def _moments(self, name: str, *, with_held: bool = False) -> tuple[Moments, Moments | None]:
        """Solve a layer's filters anew, if that can be done, and gather what they then give.

        On the images to fit to and, if asked for, on those held out.
        """
        conv = make_plain(convolution(self._student, name), name)
        self._restored_norm(name)
        batches, solves = self._fit.batches(name), self._refit and self._can_solve(name)
        held = None
        if self._held is not None and (solves or with_held):  # else a pass for nothing
            held = self._held.batches(name)
        sides = [batches] if held is None or not with_held else [batches, held]
        found: list[Moments] = []
        if solves:
            seen = self._seen(name, batches, held)
            weight, bias = self._solved(name, seen, centred=True)
            conv.weight.copy_(weight)
            if conv.bias is not None:
                conv.bias.copy_(bias)
            if self._sizes[name] == 1:  # they follow from what the filters see: no pass is needed
                found = [output_moments(side, conv.weight) for side in seen[: len(sides)]]
            del seen  # hundreds of megabytes in a wide layer
        found = found or [self._candidates(name, side) for side in sides]
        moments = with_prior(found[0], conv.weight, self._priors.get(name))
        return moments, found[1] if len(sides) > 1 else None

    def _seen(self, name: str, batches: "_Batches", held: "_Batches | None") -> list[Moments]:
        """Gather what a layer's filters see, with their targets: of images to fit to, and held."""
        conv = as_plain(convolution(self._student, name))
        sides = [batches] if held is None else [batches, held]
        return [filter_moments(conv, side, side.draw) for side in sides]

    def _solved(self, name: str, seen: list[Moments], *, centred: bool) -> tuple[Tensor, Tensor]:
        weight = as_plain(convolution(self._student, name)).weight
        prior = self._priors.get(name)
        if len(seen) == 1:
            return solve(seen[0], weight, centred=centred, prior=prior)
        return best_solution(seen[0], seen[1], weight, centred=centred, prior=prior)

    def _candidates(self, name: str, batches: "_Batches") -> Moments:
        """Gather what the filters of a convolution give, as candidates for its basis."""
        conv, size = convolution(self._student, name), self._sizes[name]
        sums = MomentSums(size)
        for start, inputs, rows in batches:
            # The basis of an SBF layer has no bias, so the candidates have none either. Inputs are
            # of another type where the network runs under an autocast of its own.
            candidates = conv._conv_forward(inputs.to(conv.weight), conv.weight, None)
            sums.add(batches.draw.rows(candidates, size, start), rows)
        return sums.moments(name)

    def _can_solve(self, name: str) -> bool:
        # Behind global pooling an image is one sample: filters would be fitted to chance, which
        # images that are held out show.
        conv, draw = convolution(self._student, name), self._fit.draws[name]
        enough = draw.images * draw.per_image >= SAMPLES_PER_WEIGHT * conv.weight[0].numel()
        return obstacle(conv) is None and (enough or self._held is not None)


class _Side:
    """Images to fit to or to judge by, with what the reference's layers give for them."""

    def __init__(self, chosen: dict[str, Draw], reference: Reference, passes: Side) -> None:
        self.draws = chosen
        self.passes = passes
        self._targets = Targets(reference, chosen, passes.reference)

    def skip(self, name: str) -> None:
        """Pass over a layer that is not fitted."""
        self._targets.pop(name)

    def batches(self, name: str) -> "_Batches":
        """Return a layer's inputs and targets."""
        return _Batches(name, self.passes.student, self.draws[name], self._targets.pop(name))


class _Batches:
    """First image's number, a layer's inputs and target rows, batch by batch, more than once."""

    def __init__(self, name: str, passes: Passes, draw: Draw, targets: Tensor) -> None:
        self._name = name
        self._passes = passes
        self.draw = draw
        self._targets = targets
        self._held: Tensor | None = None  # inputs of all images, once they have been seen
        self._sizes: list[int] = []  # of the parts in which they came

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        start, per_image = 0, self.draw.per_image
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
        start, images = 0, self.draw.images
        for batch in self._passes.inputs(self._name, images):
            inputs = batch[: images - start]
            if start == 0 and inputs[0].nbytes * images <= INPUTS:
                held = inputs.new_empty(images, *inputs.shape[1:])
            if held is not None:
                held[start : start + len(inputs)] = inputs
            start += len(inputs)
            self._sizes.append(len(inputs))
            yield inputs
        self._held = held
