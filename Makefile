# Everything a developer or a newcomer runs. The Python that makes the environment, and where pip looks for torch's
# CPU build beside its own index, can be set: make install PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
ACCEL ?= cpu
TAG ?= dev
VENV := .venv
BIN := $(VENV)/bin
TESTS_AT_ONCE ?= 2
BUF := .tools/node_modules/.bin/buf
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install dev demo run test test-full lint format protos bench triton train-demo eval-demo finetune-demo wheel images simulate clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /'

install: $(VENV)/.installed ## create .venv and install imagemesh with all services

dev: $(VENV)/.dev ## install what tests, lint and training need as well

$(VENV)/.installed: pyproject.toml
	$(PYTHON) deploy/install.py --venv $(VENV) --extras all --index "$(TORCH_INDEX)"
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) deploy/install.py --venv $(VENV) --extras dev --index "$(TORCH_INDEX)"
	@touch $@ $(VENV)/.installed

demo: install ## start the mesh, generate a picture into out/, classify it, print what each hop cost, stop
	$(BIN)/imagemesh demo --out out

run: install ## run the whole mesh in one process (imagemesh up)
	$(BIN)/imagemesh up

test: dev ## all tests, two files at a time
	$(BIN)/python -m pytest tests --ignore=tests/bench --ignore=tests/full -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder \
	  --max-worker-restart 2 --durations 30

test-full: test ## all tests, then the long campaigns (25 minutes more), with a report in docs/reports/
	$(BIN)/python -m tests.full

lint: dev $(BUF) ## ruff, mypy, import-linter, buf, file and function sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/support/sizes.py
	cd protos && ../$(BUF) lint

format: dev ## format the code
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

protos: dev ## regenerate protos/gen
	$(BIN)/python protos/generate.py

bench: dev ## measure: ratios with their spread, out/bench.json beside the table
	$(BIN)/python -m tests.bench --out out/bench.json

triton: dev ## install a real Triton server (a CPU's) into .tools/triton, for the bench against it
	$(BIN)/python -m tests.support.triton

train-demo: dev ## train the shipped models (hours; resumes)
	$(BIN)/python -m imagemesh_training

eval-demo: dev ## measure the shipped models
	$(BIN)/python -m imagemesh_training.evaluate

finetune-demo: dev ## teach the shipped ViT 20 things that it doesn't know, 20 pictures of each, and measure it (minutes)
	$(BIN)/python -m imagemesh_training.unseen_things --out out/unseen
	rm -rf out/models/unseen-vit
	$(BIN)/imagemesh finetune emoji-vit --data out/unseen --tune all -o out/models/unseen-vit

wheel: dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist

images: ## build the services' images: ACCEL=cpu (cuda, rocm, xpu), TAG=dev; needs Docker with BuildKit
	@command -v docker >/dev/null || { echo "make images needs Docker with BuildKit"; exit 1; }
	for service in gateway text-encoder diffusion vae controlnet vit; do \
	  tag=$(TAG)$$([ $$service = gateway ] || echo -$(ACCEL)); \
	  docker build -f deploy/docker/Dockerfile --build-arg SERVICE=$$service --build-arg ACCEL=$(ACCEL) -t imagemesh/$$service:$$tag . || exit 1; \
	done

simulate: dev ## what Kubernetes' autoscaler would do with a rush, a line a target; a picture in out/
	$(BIN)/python -m deploy.simulate --out out/simulate.svg

$(BUF):
	npm install --silent --no-audit --no-fund --prefix .tools @bufbuild/buf@1.75.0

clean: ## remove what make made
	rm -rf $(VENV) .tools out dist
