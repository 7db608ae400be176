"""Pseudo-labels of a run, on every rank: what the teachers predict on all images."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from launchers.run.folder import RunFolder
from launchers.run.read_files import weights_digests
from launchers.run.temperatures import fit_temperatures
from launchers.run.worker import Batch, Context, ensemble_of, evaluation_loader
from pipelines.agreement import check_workers_agree
from pipelines.index import DataIndex
from pipelines.loader import EvalLoader
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.summaries import Summary
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.settings import View

Ids = NDArray[np.int64]


def write_pseudo_labels(config: dict[str, Any]) -> dict[str, Any]:
    """Write what the teachers predict on every image; chunks that are there are kept.

    The chunks that are missing are shared out over the workers that there are now, so those that
    are left do the work of one that died.
    """
    from launchers.on_ray import ray_train

    here = Context.of(config)
    check_workers_agree(here.index, here.device)  # the first stage with workers, perhaps
    folder = here.folder.pseudo_labels
    ids = labelled_ids(here.index)
    chunks = pseudo_labels.chunks(ids)
    left: list[Any] = [None]
    if here.rank == 0:
        weights = weights_digests(here.networks.teachers)
        origin = pseudo_labels.origin(here.recipe, here.index.digest, weights)
        pseudo_labels.begin(folder, origin)
        left = [pseudo_labels.missing(folder, len(chunks))]
        here.folder.publish(folder.name)
    dist.broadcast_object_list(left, 0, device=here.device)
    here.fetch(folder.name)
    fit_temperatures(here, here.networks.teachers)
    ensemble = ensemble_of(here)
    ensemble.measure()
    # Neighbours to one worker: they lie in the same shards.
    own = np.array_split(np.array(left[0], dtype=np.int64), here.world_size)[here.rank].tolist()
    start, done = time.monotonic(), 0

    def on_chunk(number: int) -> None:
        nonlocal done
        done += 1
        here.folder.publish(folder.name)
        images = min(done * pseudo_labels.CHUNK_IMAGES, len(ids)) * here.world_size
        before = len(chunks) - len(left[0])
        ray_train.progress(
            {
                "title": "pseudo-labels",
                # What the others have done by now is a guess.
                "step": min(before + done * here.world_size, len(chunks)),
                "steps": len(chunks),
                "rate": f"{images / (time.monotonic() - start):.0f} images/s",
            }
        )

    write_chunks(here, ensemble, {number: chunks[number] for number in own}, on_chunk)
    dist.barrier()
    if here.rank == 0:
        here.fetch(folder.name)
        finish(here)
        here.folder.publish(folder.name)
    costs = {name: dataclasses.asdict(cost) for name, cost in ensemble.costs().items()}
    return {"teachers": costs}


def written_chunks(folder: RunFolder) -> set[str]:
    """Return the chunks that there are by now, for the driver."""
    folder.fetch(folder.pseudo_labels.name)
    return {path.name for path in folder.pseudo_labels.glob("chunk-*.parquet")}


def labelled_ids(index: DataIndex) -> Ids:
    """Return the images of all parts, ascending.

    Those with labels are among them: on the validation part the predictions can be judged.
    """
    return np.sort(np.concatenate(list(index.parts.values())))


def finish(here: Context) -> None:
    """Write the manifest of a store all of whose chunks are there."""
    pseudo_labels.finish(
        here.folder.pseudo_labels,
        labelled_ids(here.index),
        classes=here.index.classes,
        teachers=[teacher.name for teacher in here.networks.teachers],
    )


def write_chunks(
    here: Context,
    ensemble: TeacherEnsemble,
    chunks: Mapping[int, Ids],
    on_chunk: Callable[[int], None] = lambda number: None,
) -> None:
    """Write some chunks, by their number; `on_chunk` is called when one is written.

    All are one stream of batches: a decoder is started once, and is never idle between them.
    """
    if not chunks:
        return
    waiting: list[Summary] = []
    rest = iter(chunks.items())
    number, ids = next(rest)
    for summary in _summaries(here, ensemble, np.concatenate(list(chunks.values()))):
        waiting.append(summary)
        while sum(map(len, waiting)) >= len(ids):
            together = Summary.joined(waiting)
            ensemble.check()
            pseudo_labels.write_chunk(here.folder.pseudo_labels, number, ids, together[: len(ids)])
            on_chunk(number)
            waiting = [together[len(ids) :]]
            number, ids = next(rest, (-1, ids))
            if number == -1:
                break


def _summaries(here: Context, ensemble: TeacherEnsemble, ids: Ids) -> Iterator[Summary]:
    """Give what the teachers predict on the images `ids`, batch by batch, in their order.

    Images are decoded once for all teachers with the same view.
    """
    views = list(dict.fromkeys(ensemble.views))
    loaders = [loader_of(here, view, ids) for view in views]
    seen = 0
    for batches in zip(*loaders, strict=True):
        of_view: dict[View, Batch] = dict(zip(views, batches, strict=True))
        for batch in batches:
            assert (batch["id"].cpu().numpy() == ids[seen : seen + len(batch["id"])]).all()
        seen += len(batches[0]["id"])
        each = [
            ensemble.probabilities(teacher, of_view[view]["image"])
            for teacher, view in enumerate(ensemble.views)
        ]
        yield Summary.of(ensemble.average(each), each, here.recipe.pseudo_labels.top_k)
    assert seen == len(ids)


def loader_of(here: Context, view: View, ids: Ids) -> EvalLoader:
    """Return the images `ids`, whatever part they are of, in their order, for this rank alone."""
    none = ids[:0]
    index = dataclasses.replace(
        here.index, parts={"labelled": none, "unlabelled": ids, "validation": none}
    )
    alone = dataclasses.replace(here, index=index, rank=0, world_size=1)
    return evaluation_loader(alone, view, "unlabelled")
