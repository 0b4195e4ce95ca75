# `make demo`, `make test`, `make check`, `make bench`: each makes .venv first if it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
INPUTS := pyproject.toml constraints.txt
# For images and clusters: `make install EXTRAS=deepspeed,wandb TORCH_INDEX=https://download.pytorch.org/whl/cu130`.
EXTRAS      ?=
TORCH_INDEX ?=
# Other trainers for `make bench`: a checkout of nanoGPT, the python of an environment with litgpt and transformers.
NANOGPT      ?=
PEERS_PYTHON ?=
# Other ways to deliver data: the python of an environment with megatron-core, litdata, mosaicml-streaming, datasets; and
# to prepare it, with gigatoken, awkward and triton in it: a checkout of Megatron-LM.
DATA_PEERS_PYTHON ?=
MEGATRON          ?=

.PHONY: install demo test test-fast check bench docker-test clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; torch comes first, so that nothing else decides which build is taken.
$(VENV)/.installed-base: $(BIN)/python $(INPUTS)
	$(PIP) install $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@
$(VENV)/.installed-test: $(VENV)/.installed-base
	$(PIP) install -c constraints.txt -e .[test]
	touch $@
$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) install -c constraints.txt -e .[dev]
	touch $@

install: $(VENV)/.installed-base
	$(if $(EXTRAS),$(PIP) install -c constraints.txt -e .[$(EXTRAS)])

demo: $(VENV)/.installed-base
	$(BIN)/llmtrain prepare --input stdlib --out data/stdlib
	# An interruption on purpose, half way: exit code 75 means "saved, run me again".
	$(BIN)/llmtrain train --config configs/demo.yaml training.stop_after=250 || [ $$? -eq 75 ]
	$(BIN)/llmtrain train --config configs/demo.yaml
	$(BIN)/llmtrain generate checkpoints/demo --prompt "def " --max-new-tokens 120 --temperature 0.8
	@echo
	@echo "The curves are in checkpoints/demo/training_curve.png and checkpoints/demo/loss_by_epoch.png."

# Two files at a time, for most tests start processes and wait for them.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run_all $(if $(NANOGPT),--nanogpt "$(NANOGPT)") $(if $(PEERS_PYTHON),--peers-python "$(PEERS_PYTHON)") $(if $(DATA_PEERS_PYTHON),--data-peers-python "$(DATA_PEERS_PYTHON)") $(if $(MEGATRON),--megatron "$(MEGATRON)")

# Builds the CPU image for real and trains in it; needs root, buildah, debootstrap. The tests in tests/docker do without.
docker-test: $(BIN)/python
	PYTHON=$(abspath $(BIN)/python) docker/test.sh

clean:
	rm -rf $(VENV) build *.egg-info
