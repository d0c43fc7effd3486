# Everything runs in .venv, which is made on first use with exactly the versions of constraints.txt.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs gallery bench instructions compare probe fuzz sweep soak mutate compat others \
	clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/installed-demo ## a WGAN with a silent mistake: unguarded, under strict(), and put right
	@$(BIN)/python examples/demo.py

test: $(VENV)/installed-dev ## run the tests (ARGS="-k name" goes to pytest)
	$(BIN)/python -m pytest -q -n 2 --timeout 600 $(ARGS)

lint: $(VENV)/installed-dev ## ruff (format and rules) and mypy, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed-dev ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)

gallery: $(VENV)/installed-dev ## run the scripts of the gallery and write docs/gallery.md (ARGS=--check)
	@$(BIN)/python tools/gallery.py $(ARGS)

bench: $(VENV)/installed-dev ## how much slower each workload is under the guard, in a quarter of an hour (ARGS="--device cuda")
	$(BIN)/python -m benchmarks.ratios $(ARGS)

instructions: $(VENV)/installed-dev ## have the hot paths grown? (ARGS=--callgrind counts the processor's instructions, too)
	$(BIN)/python -m benchmarks.instructions $(ARGS)

compare: $(VENV)/installed-dev ## how many programs of the catalogue PyTorch's own tools and the guard catch
	@$(BIN)/python tools/compare.py $(ARGS)

probe: $(VENV)/installed-dev ## run every writer of torch and write down which move no version counter (ARGS=--check)
	@$(BIN)/python tools/probe_counters.py $(ARGS)

fuzz: $(VENV)/installed-dev ## programs that nobody wrote, for 10 minutes (ARGS="--minutes 60 --seed 1 --keep DIR")
	@$(BIN)/python tools/fuzz.py $(ARGS)

sweep: $(VENV)/installed-dev ## every operator of PyTorch's database, written to between forward and backward (ARGS="--only exp")
	@$(BIN)/python tools/sweep.py $(ARGS)

soak: $(VENV)/installed-dev ## an hour of training, threads and guards that come and go (ARGS="--minutes 5")
	@$(BIN)/python tools/soak.py $(ARGS)

mutate: $(VENV)/installed-mutation ## which small changes to a judging module does no test notice? (ARGS="--module _overlap")
	@$(BIN)/python tools/mutate.py $(ARGS)

compat: $(VENV)/installed-dev ## demo and tests with another torch in a throw-away environment (ARGS="--torch 2.5.0")
	@$(BIN)/python tools/compat.py $(ARGS)

others: $(VENV)/installed-dev ## other people's packages with and without the guard, in an environment of their own (ARGS="--only timm")
	@$(BIN)/python tools/others.py $(ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) .venv-others torchguard/_native.*.so torchguard/_native.*.pyd build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.benchmarks .mutation
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo 'torchguard needs Python 3.10 or newer; "$(PYTHON)" is not: try make PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What an editable install is made from: where one of these changes, it is made anew.
PACKAGE := pyproject.toml constraints.txt hatch_build.py torchguard/_native.c

$(VENV)/installed-demo: $(PACKAGE) | $(VENV)/created
	@echo 'installing what the demo needs into $(VENV): minutes the first time'
	@$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/installed-dev: $(PACKAGE) | $(VENV)/created
	@echo 'installing what the tests and checks need into $(VENV): minutes the first time'
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/installed-demo

$(VENV)/installed-mutation: $(PACKAGE) | $(VENV)/created
	@$(INSTALL) -e '.[dev,mutation]'
	@touch $@ $(VENV)/installed-dev $(VENV)/installed-demo
