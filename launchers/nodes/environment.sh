# shellcheck shell=bash
# The environment of Ray's processes on a machine of a cluster, and of whoever uses them there: for
# bash to source, from a checkout that `make setup` has built. What is the head's own
# (MLFLOW_TRACKING_URI, credentials) is set before.
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PATH="$checkout/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# A job is a copy of the sources without the compiled extension: this is the one that it loads.
for built in "$checkout"/sbf_dist/_C.*.so; do
    if [ -e "$built" ]; then export SBF_DIST_EXTENSION=$built; fi
done
# Ray's own default is one thread; workers of a training have workers.cpus.
OMP_NUM_THREADS=$(nproc)
export OMP_NUM_THREADS
# Seconds that `sbf stop` leaves a run for its last checkpoint: more than workers.stop_within.
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60}
unset checkout built
