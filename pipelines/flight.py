"""The batches that DALI is working on."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline

from pipelines.reader import Reader
from pipelines.samples import Samples
from sbf_dist.errors import UserError


class Flight:
    """The batches that one DALI pipeline is working on, first in, first out.

    The reader's `prefetch` is how many batches must be submitted before the first is taken.
    `finish` makes a batch of the pipeline's images where these are not yet of one size; it is also
    given what was kept aside for them.
    """

    def __init__(
        self,
        pipe: Pipeline,
        samples: Samples,
        reader: Reader,
        *,
        finish: Callable[[Sequence[torch.Tensor], Any], torch.Tensor] | None = None,
    ) -> None:
        self._pipe, self._samples, self._reader = pipe, samples, reader
        self._finish = finish
        self._pending: deque[tuple[NDArray[np.int64], Any]] = deque()
        self._started = False

    def submit(
        self, ids: NDArray[np.int64], inputs: dict[str, NDArray[Any]], aside: Any = None
    ) -> None:
        self._pipe.feed_input(self._samples.source, self._samples.take(ids))
        for name, values in inputs.items():
            self._pipe.feed_input(name, values)
        self._pending.append((ids, aside))
        # DALI's first schedule_run runs the pipeline as often as its queue is deep.
        if self._started or len(self._pending) == self._reader.prefetch:
            self._pipe.schedule_run()
            self._started = True

    def take(self) -> tuple[NDArray[np.int64], list[torch.Tensor]]:
        """The ids, and each output's images (b, 3, s, s), of the oldest batch."""
        if self._finish is not None:
            (images,) = self._outputs()
            ids, aside = self._pending.popleft()
            pieces = [torch.from_dlpack(images[place]) for place in range(len(ids))]
            batch = self._finish(pieces, aside)
            self._pipe.release_outputs()
            return ids, [batch]
        # No copy: the tensor keeps DALI's buffer, which goes back to DALI when the tensor dies.
        tensors = [torch.from_dlpack(images.as_tensor()) for images in self._outputs()]
        self._pipe.release_outputs()
        # Channels last in memory, as DALI leaves them; only the view is the other way round.
        return self._pending.popleft()[0], [tensor.permute(0, 3, 1, 2) for tensor in tensors]

    def take_apart(self) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
        """The ids and images of the oldest batch, each image of its own size, on the CPU."""
        (images,) = self._outputs()
        arrays = [np.array(images.at(place)) for place in range(len(images))]
        self._pipe.release_outputs()
        return self._pending.popleft()[0], arrays

    def _outputs(self) -> Any:
        try:
            if self._reader.on_cpu:
                return self._pipe.share_outputs()
            return self._pipe.share_outputs(torch.cuda.current_stream(self._reader.device))
        except RuntimeError as error:
            # In the user's terms: the file that is at fault, if one is.
            for ids, _ in self._pending:
                for sample in ids:
                    fault = self._samples.explain(int(sample))
                    if fault is not None:
                        raise UserError(fault) from error
            raise
