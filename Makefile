# Two commands: `make train` learns digits from an empty machine, `make test` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -q -c constraints.txt
RANKS ?= 2
ARGS ?=
# more extras of pyproject.toml for a new environment, such as s3,wandb
EXTRAS ?=
PORT ?= 29500
# processes that run the tests; those of the integration tests start their own, and wait for them
TESTERS ?= 2

.PHONY: help env train tensorboard test test-slow test-oldest lint schema bench gpu clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# DeepSpeed is source only and looks at the installed torch while it installs: torch first, and no
# build isolation. DS_BUILD_OPS=0: nothing of it is compiled, here or at the first step.
$(VENV)/train.stamp: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (7 GB, most of it torch and its CUDA libraries: a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel
	@$(PIP) torch torchvision
	@$(PIP) --no-build-isolation -e '.[train,quickstart$(EXTRAS:%=,%)]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	@$(PIP) --no-build-isolation -e '.[train,quickstart,dev]'
	@touch $@

env: $(VENV)/train.stamp  ## make the environment in .venv

shards/mnist/val/manifest.json: $(VENV)/train.stamp
	@$(BIN)/python -m data.write --source mnist --out shards/mnist

train: shards/mnist/val/manifest.json  ## pretrain on MNIST digits with two CPU ranks (ARGS="--fresh")
	@PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu deepspeed --log_level critical --num_accelerators $(RANKS) \
		--master_port $(PORT) train.py --config configs/quickstart.json $(ARGS)

tensorboard: $(VENV)/train.stamp  ## open the curves and the pictures of all runs
	@$(BIN)/tensorboard --logdir runs

lint: $(VENV)/dev.stamp  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint  ## lint, types, unit and integration tests (what CI runs)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n $(TESTERS) --dist worksteal tests/unit
	@$(BIN)/pytest -m "not slow and not gpu" -n $(TESTERS) --dist loadfile tests/integration tests/gpu

test-slow: $(VENV)/dev.stamp  ## the tests that take longer
	@$(BIN)/pytest -m "slow and not gpu"

# numpy: Triton 3.6 interprets kernels with scalars that 2.4 has done away with
OLDEST := .venv-oldest
$(OLDEST)/stamp: pyproject.toml
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --progress-bar off -q -e . \
		'torch==2.11.*' torchvision 'triton==3.6.*' 'numpy<2.4' 'timm==1.0.31' \
		colt5-attention==0.11.2 hypothesis onnx onnxruntime onnxscript pytest pytest-timeout pytest-xdist
	@touch $@

test-oldest: $(OLDEST)/stamp  ## tests of the model on the oldest torch that it runs on (6 GB more)
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -m "not slow and not gpu" -n $(TESTERS) --dist worksteal \
		tests/unit/ops tests/unit/layers tests/unit/models

schema: $(VENV)/train.stamp  ## write configs/schema.json anew from the config models
	@$(BIN)/python train.py --write-schema configs/schema.json

bench: $(VENV)/dev.stamp  ## kernels, block and training step beside their baselines, on this machine's CPU
	@$(BIN)/python -m benchmarks.router
	@$(BIN)/python -m benchmarks.tokens
	@$(BIN)/python -m benchmarks.block --rounds 5
	@$(BIN)/python -m benchmarks.train_step
	@$(BIN)/python -m benchmarks.capacity --plot docs/capacity.png

gpu: $(VENV)/dev.stamp  ## tests and benchmarks that need a GPU
	@$(BIN)/python -m benchmarks.gpu

clean:  ## remove caches and the environment, never runs or shards
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
