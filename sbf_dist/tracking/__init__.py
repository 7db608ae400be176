"""Experiment tracking with MLflow that neither stops a training nor loses what it says.

What a run has to say is appended to journals in its folder (`journal`). In the driver alone, a
`courier` brings it to MLflow (`store`) in the background, and keeps a note of how far it is in
tracking.json (`state`). A store that is away is tried again until it answers, at the latest at the
next start of the run. Workers append to journals of their own; they know neither MLflow nor its
address. MLflow is imported in `store` and `model`, when the courier starts.
"""

from sbf_dist.tracking.address import Address, tracking_address
from sbf_dist.tracking.machine import measured_node
from sbf_dist.tracking.run import Run, Series, attach, start
from sbf_dist.tracking.state import begin_anew, recover

__all__ = [
    "Address",
    "Run",
    "Series",
    "attach",
    "begin_anew",
    "measured_node",
    "recover",
    "start",
    "tracking_address",
]
