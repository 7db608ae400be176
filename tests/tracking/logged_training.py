"""A training of which nothing but what it logs is there."""

from sbf_dist import tracking

POINTS = [(step, float(step)) for step in range(0, 50, 5)]  # of 50 steps


def train(stage: tracking.Run, steps: range, worker: tracking.Series | None = None) -> None:
    """Log the loss of every fifth step, as a worker does."""
    worker = worker or tracking.attach(str(stage.journals))
    for step in steps:
        if step % 5 == 0:
            worker.log_metrics({"loss": float(step)}, step)
    worker.flush()
