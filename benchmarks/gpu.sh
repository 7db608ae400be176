#!/bin/sh
# Builds the CUDA kernels for the GPU at hand, runs their tests, and measures.
#
#     benchmarks/gpu.sh RESULTS [BUILT]
#
# RESULTS: a folder that gets build.txt, tests.txt, gpu.json and measured.txt, each as soon as there
# is something in it. BUILT: use what gpu_build.py has built there. PARTS="tests measured" are run.
# Needs what gpu.py needs, pytest and hypothesis. A part that fails does not keep the others from
# running; the exit status says whether one did.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
results=${1:?usage: benchmarks/gpu.sh RESULTS [BUILT]}
python=${PYTHON:-python3}
parts=${PARTS:-tests measured}
mkdir -p "$results" && results=$(cd "$results" && pwd)
failed=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# part NAME COMMAND…: if NAME is wanted, run a command and keep what it prints in RESULTS/NAME.txt.
part() {
    name=$1
    shift
    case " build $parts " in *" $name "*) ;; *) return ;; esac
    begun=$(date +%s)
    "$@" > "$results/$name.txt" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit status $status, $(($(date +%s) - begun)) s"
    tail -n "${LINES_SHOWN:-40}" "$results/$name.txt"
}

if [ $# -ge 2 ]; then
    built=$(cd "$2" && pwd)
else
    built=$(mktemp -d)
    trap 'rm -rf "$built"' EXIT
    part build "$python" "$root/benchmarks/gpu_build.py" "$built"
    [ $failed -eq 0 ] || exit 1
fi

# Started where the package was built, so that it is found before the checkout's.
cd "$built" || exit 1
part tests "$python" -m pytest -m gpu -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider --durations=8 \
    "$root/tests/test_ops.py" "$root/tests/test_ops_cuda.py" "$root/tests/test_ops_devices.py" \
    "$root/tests/test_ops_matrix_product.py" "$root/tests/test_layers_gpu.py"
# With all of the package's dependencies, the loader's and the trainings' tests, and a training step:
# PARTS="tests training measured steps".
part training "$python" -m pytest -m gpu -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider "$root/tests/train/test_training_on_gpu.py" "$root/tests/compression/test_compression_on_gpu.py" \
    "$root/tests/pipelines/test_loader.py"
part measured "$python" "$root/benchmarks/gpu.py" --built "$built" --json "$results/gpu.json"
part steps env PYTHONPATH="$built:$root" "$python" "$root/benchmarks/gpu_training.py" \
    --json "$results/gpu-training.json"
exit $failed
