# Everything starts from a fresh clone with Python >= 3.11 (and its headers), gcc and make.
# pip takes its settings (an index, a local wheel) from its own configuration, as always.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Passed on, e.g. `make test ARGS="-k rouge"` or `make demo ARGS="distil.train.steps=20"`.
ARGS ?=

# DeepSpeed's launcher and compiler runs look for `deepspeed` and `ninja` on the PATH.
export PATH := $(abspath $(BIN)):$(PATH)
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-slurm test-report test-ecosystem check bench gpu format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make .venv and install into it the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: no '$(PYTHON)' found; install Python 3.11 or later, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(PYTHON) is $$($(PYTHON) -V), but 3.11 or later is needed; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) has no venv module; install it (Debian, Ubuntu: python3-venv)" >&2; exit 2; }
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "setup: $(PYTHON) comes without its headers, which DeepSpeed compiles against; install them (Debian, Ubuntu: python3-dev)" >&2; exit 2; }
	@command -v gcc >/dev/null && command -v g++ >/dev/null || { echo "setup: no gcc and g++ found, with which DeepSpeed compiles its operators; install them (Debian, Ubuntu: build-essential)" >&2; exit 2; }
	@echo "setup: making $(VENV) with $$($(PYTHON) -V) and installing into it (some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "setup: compiling DeepSpeed's operator for messages between CPU processes (once)"
	@DS_ACCELERATOR=cpu $(BIN)/python -c 'from makd_llm import distributed; distributed.init()' >$(VENV)/operators.log 2>&1 || { cat $(VENV)/operators.log >&2; exit 1; }
	@touch $@

demo: $(INSTALLED) ## distil the demo's teacher into a low-rank student and print the table
	@ranks=$$($(BIN)/python -c 'import torch; n = torch.cuda.device_count() or 2; print(max(r for r in (1, 2, 4, 8) if r <= n))'); \
	set -x; $(BIN)/deepspeed --num_accelerators $$ranks train.py --ds ds_configs/zero3.json $(ARGS)

test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: $(INSTALLED) ## break runs in every way there is, and print what was lost
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/pytest -m faults tests/faults $(ARGS)

# Debian's packages, installed as root where they are missing; RUNLEVEL=1 keeps their services from
# being started.
SLURM_TOOLS := slurmctld slurmd sbatch munged ip
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2
test-slurm: $(INSTALLED) ## two SLURM nodes and two network namespaces on this machine: pre-emption, a cut link (as root)
	@test "$$(id -u)" = 0 || { echo "test-slurm: needs root, for munged's user, slurmd and network namespaces" >&2; exit 2; }
	@export PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
	for tool in $(SLURM_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -n "$$missing" || exit 0; \
	command -v apt-get >/dev/null || { echo "test-slurm: not found:$$missing; and no apt-get to install $(SLURM_PACKAGES) with" >&2; exit 2; }; \
	echo "test-slurm: installing $(SLURM_PACKAGES)"; log=$$(mktemp); \
	{ apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(SLURM_PACKAGES); } >$$log 2>&1 \
	|| { tail -n 20 $$log; echo "test-slurm: apt-get could not install $(SLURM_PACKAGES); its words are in $$log" >&2; exit 2; }
	PATH="$$PATH:/usr/sbin:/sbin" MAKD_TEST_CLUSTER=1 OMP_NUM_THREADS=1 $(BIN)/pytest -v -m cluster tests/slurm $(ARGS)

# Debian's Chromium, installed as root where none is found; screenshots go to $(SHOTS).
SHOTS ?= runs/screenshots
test-report: $(INSTALLED) ## look at the report in Chromium, wide and phone-sized, light and dark, with screenshots
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { echo "test-report: no chromium found, and it takes root and apt-get to install it; install it (Debian: chromium)" >&2; exit 2; }; \
	echo "test-report: installing chromium"; log=$$(mktemp); \
	{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >$$log 2>&1 \
	|| { tail -n 20 $$log; echo "test-report: apt-get could not install chromium; its words are in $$log" >&2; exit 2; }; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	MAKD_TEST_BROWSER=1 MAKD_SHOTS="$(abspath $(SHOTS))" $(BIN)/pytest -m browser tests/report $(ARGS)
	@echo "test-report: screenshots in $(SHOTS)"

# What scikit-learn, which lm-eval brings, would slow down in .venv: see pyproject.toml. This one sees
# the libraries of .venv and adds to them.
ECOSYSTEM := .venv-ecosystem
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(ECOSYSTEM)/.installed: $(INSTALLED)
	@echo "test-ecosystem: making $(ECOSYSTEM) with lm-eval and wandb (once)"
	@$(BIN)/python -m venv $(ECOSYSTEM)
	@$(BIN)/python $(SITE) >"$$($(ECOSYSTEM)/bin/python $(SITE))/libraries.pth"
	@$(ECOSYSTEM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ecosystem]'
	@touch $@

test-ecosystem: $(ECOSYSTEM)/.installed ## a student under lm-eval, and a run with W&B (offline)
	OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest -v tests/ecosystem $(ARGS)

check: $(INSTALLED) ## format, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py
	$(BIN)/python benchmarks/compiled.py

bench: $(INSTALLED) ## time the operations on this CPU and write benchmarks/results
	$(BIN)/python benchmarks/run.py --suite cpu $(ARGS)

# A GPU machine brings its own torch and Triton, so nothing is installed for it.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu: export PYTHONPATH := .:kernels:$(PYTHONPATH)
gpu: ## on a machine with a CUDA GPU: check the kernels there, then time them
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu: torch sees no CUDA device here" >&2; exit 2; }
	$(GPU_PYTHON) -m pytest -q tests/makd_kernels
	@if command -v compute-sanitizer >/dev/null; then set -x; compute-sanitizer --error-exitcode 1 $(GPU_PYTHON) -m pytest -q tests/makd_kernels -k "kernel and padding_on_either_side"; else echo "gpu: no compute-sanitizer here; left out"; fi
	$(GPU_PYTHON) benchmarks/run.py --suite gpu $(ARGS)

format: $(INSTALLED) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything built; runs/ stays
	rm -rf $(VENV) $(ECOSYSTEM) build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
