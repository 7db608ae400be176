# Each target does all the set-up it needs; a second call re-uses it.
PYTHON ?= python3
BIN := .venv/bin
SHELL_SCRIPTS := .ci/run $(wildcard benchmarks/*.sh launchers/*.sbatch launchers/*/*.sh)

.PHONY: setup demo test lint docs bench clean

setup: .venv/built

# Packages: installed again when a lock changes.
.venv/installed: requirements.lock requirements.build.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-build-isolation --requirement requirements.build.lock
	$(BIN)/pip install --quiet --no-build-isolation --requirement requirements.lock
	touch $@

# The extension: built again when a source changes.
.venv/built: .venv/installed setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/pip install --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c "import torch; from sbf_dist import _C; info = _C.build_info(); print( \
	    f'CUDA kernels: built for {info[\"cuda_archs\"]}' if info['cuda'] else \
	    'CUDA kernels: NOT built; SBF_DIST_CUDA=1 make setup says why')"
	touch $@

demo: setup
	$(BIN)/sbf run recipes/digits.yaml

# One thread: the tests' tensors are small, and threads cost more than they bring. Three processes,
# as one mostly waits for Ray: tests/conftest.py says which tests are run beside which.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/csrc/*.cpp
	$(BIN)/mypy
	$(BIN)/shellcheck -x $(SHELL_SCRIPTS)

# The documentation, as pages in build/site that need no network. It has its own small environment.
# Without --quiet, which would hide warnings from the strict mode too.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo 'Documentation: build/site/index.html'

.venv-docs/installed: requirements.docs.lock
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --requirement requirements.docs.lock
	touch $@

# quality.py goes on where it was cut: remove runs/quality after a change of the methods.
bench: setup
	$(BIN)/python benchmarks/digits.py --json benchmarks/results/digits.json
	$(BIN)/python benchmarks/layer.py --json benchmarks/results/layer.json
	$(BIN)/python benchmarks/network.py --json benchmarks/results/network.json
	$(BIN)/python benchmarks/fitting.py errors --trained cifar_resnet14 \
	    --json benchmarks/results/fitting-errors.json
	$(BIN)/python benchmarks/overhead.py --json benchmarks/results/overhead.json
	$(BIN)/python benchmarks/fitting.py cost --json benchmarks/results/fitting-cost.json
	$(BIN)/python benchmarks/models.py --json benchmarks/results/models.json \
	    --markdown docs/models.md
	$(BIN)/python benchmarks/joint.py --json benchmarks/results/joint.json
	$(BIN)/python benchmarks/loader.py --json benchmarks/results/loader.json
	$(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json
	$(BIN)/python benchmarks/quality_latency.py --json benchmarks/results/quality-latency.json
	$(BIN)/python benchmarks/mixtures.py --json benchmarks/results/mixtures.json
	$(BIN)/python benchmarks/label_store.py --json benchmarks/results/label-store.json
	$(BIN)/python benchmarks/labelling.py --json benchmarks/results/labelling.json
	$(BIN)/python benchmarks/student_step.py --json benchmarks/results/student-step.json
	$(BIN)/python benchmarks/distillation.py --json benchmarks/results/distillation.json \
	    --picture docs/distillation.png runs/distillation
	$(BIN)/python benchmarks/stored_targets.py --json benchmarks/results/stored-targets.json
	$(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json
	$(BIN)/python benchmarks/faults.py --json benchmarks/results/faults.json
	$(BIN)/python benchmarks/zero_memory.py --json benchmarks/results/zero-memory.json
	$(BIN)/python benchmarks/object_data.py --json benchmarks/results/object-data.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json \
	    --plot docs/scaling.png
	@if nvidia-smi > /dev/null 2>&1; then \
	    $(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json; \
	else echo 'benchmarks/gpu.py: left out, no GPU here'; fi

clean:
	rm -rf build *.egg-info .venv .venv-docs sbf_dist/*.so
