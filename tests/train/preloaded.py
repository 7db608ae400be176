"""What the processes of ranks.run need and takes seconds to import: loaded once, before they fork.

It must not import what test_two_ranks.py checks to be absent from a worker.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from sbf_dist.train.lean_deepspeed import load_deepspeed

load_deepspeed("cpu")
