# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint format bench bench-moe bench-monitor bench-data bench-curriculum bench-retrieval bench-saving bench-latency gpu gpu-count step-model pythons chaos mutants reference

INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
# On all cores, where pip uses one; some packages ship files that do not compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(BIN)/steptron: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	$(COMPILE)
	@touch $(BIN)/steptron $@

demo: $(BIN)/steptron  ## Tokenise, pretrain through three stages on two processes, report.
	$(BIN)/steptron data build demo --out data/demo
	PYTHON=$(BIN)/python launch/local.sh 2 demo

test: lint  ## All checks and tests. Two cores: three files at a time, of which one often waits, and pyright, which has one thread, beside the first; each rank with one thread; workers share bytecode.
	@$(BIN)/pyright > $(VENV)/pyright.txt 2>&1 & types=$$!; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long"; tests=$$?; \
	wait $$types; types=$$?; \
	echo "pyright:"; cat $(VENV)/pyright.txt; \
	exit $$((tests | types))

check: lint  ## Format, lint, import arrows, types.
	$(BIN)/pyright

lint: $(VENV)/.dev  ## What is checked in seconds: format, lint, import arrows.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(VENV)/.dev  ## Generate docs/recipe.md from the docstrings of the recipe's fields.
	$(BIN)/python -m steptron.config.reference > docs/recipe.md

bench: $(VENV)/.dev  ## The step beside transformers; ranks of this machine; bytes on the wire; native beside DeepSpeed.
	$(BIN)/python benchmarks/step.py; step=$$?; \
	$(BIN)/python benchmarks/scaling.py; scaling=$$?; \
	$(BIN)/python benchmarks/wire.py; wire=$$?; \
	$(BIN)/python benchmarks/engines.py; engines=$$?; \
	exit $$((step | scaling | wire | engines))

bench-moe: $(VENV)/.dev  ## One MoE layer beside transformers' block, a loop and the dense product; what balances experts.
	$(BIN)/python benchmarks/moe.py; moe=$$?; \
	$(BIN)/python benchmarks/balance.py; balance=$$?; \
	exit $$((moe | balance))

gpu: $(VENV)/.dev  ## What only a GPU can show: parity, speed, a training step; without one, all that needs none.
	$(BIN)/python benchmarks/gpu.py

gpu-count: $(VENV)/.dev  ## Rows, kernels, bytes and host waits of an expert layer of the 196B on a GPU, counted without one; waits by layout.
	$(BIN)/python benchmarks/gpu_count.py; layer=$$?; \
	$(BIN)/python benchmarks/gpu_waits.py; waits=$$?; \
	exit $$((layer | waits))

step-model: $(VENV)/.dev  ## A model of a step of the 196B on 4,096 H800: time and MFU before, after each change and after all.
	$(BIN)/python benchmarks/step_model.py

bench-monitor: $(VENV)/.dev  ## Six million values a step beside wandb, TensorBoard and SQLite; what watching costs a step; what grows with a run.
	$(BIN)/python benchmarks/monitor.py; plane=$$?; \
	$(BIN)/python benchmarks/watching.py; watching=$$?; \
	$(BIN)/python benchmarks/growth.py; growth=$$?; \
	$(BIN)/python benchmarks/long_run.py; long_run=$$?; \
	exit $$((plane | watching | growth | long_run))

bench-data: $(VENV)/.dev build/peers  ## Shards to packed tensors beside Megatron-core, mosaicml-streaming and datasets; building beside datasets.map.
	$(BIN)/python benchmarks/data.py --peer build/peers/bin/python; reading=$$?; \
	$(BIN)/python benchmarks/building.py; building=$$?; \
	exit $$((reading | building))

build/peers: $(VENV)/.dev  ## The other readers, in an environment of their own over the packages of this one.
	$(PYTHON) -m venv $@
	cd $(VENV)/lib/python*/site-packages && pwd > $(CURDIR)/build/peers.pth
	mv build/peers.pth $@/lib/python*/site-packages/
	$@/bin/python -m pip install --quiet --no-deps megatron-core==0.16.1 mosaicml-streaming==0.13.0 \
		brotli python-snappy cramjam zstd catalogue

bench-curriculum: $(VENV)/.dev  ## 4,096 → 32,768 → 131,072 tokens on two processes: time, loss and memory by stage.
	$(BIN)/python benchmarks/curriculum.py

bench-saving: $(VENV)/.dev  ## What a checkpoint costs training.
	$(BIN)/python benchmarks/saving.py

bench-retrieval: $(VENV)/.dev  ## What the long stages of a curriculum teach: a model finds a key more than 8,192 tokens back.
	$(BIN)/python benchmarks/retrieval.py

pythons: $(VENV)/.dev  ## Checkpoints of every Python on this machine, read by every other one; an environment of several GB for each.
	$(BIN)/python benchmarks/pythons.py --folder build/pythons

bench-latency: $(VENV)/.dev  ## --help, detectors, hand-over to a metrics server, building the published model: as ratios in one run.
	$(BIN)/python benchmarks/latency.py

chaos: $(VENV)/.dev  ## 30 rounds of kills, full disks and damaged files; faults planted in real runs, and 2,000 quiet steps.
	OMP_NUM_THREADS=1 STEPTRON_CHAOS_ROUNDS=30 $(BIN)/python -m pytest --timeout 9000 tests/train/test_train_chaos.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long
	OMP_NUM_THREADS=1 STEPTRON_QUIET_STEPS=2000 $(BIN)/python -m pytest --timeout 9000 tests/train/test_train_faults.py tests/train/test_train_rewind.py

mutants: $(VENV)/.dev  ## Plant one fault at a time in a copy of the tree: the tests named beside it must fail.
	$(BIN)/python benchmarks/mutants.py
