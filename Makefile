# make            prints the targets
# make demo       a three-hospital study, end to end, with a report
# make test       the whole test suite
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export FLWR_TELEMETRY_ENABLED=0
export FLWR_DISABLE_UPDATE_CHECK=1
export RAY_USAGE_STATS_ENABLED=0
# Options of the benchmarks, as in: make bench BENCH="--only W2,W3"
BENCH ?=
# Two workers fit the smallest machine; Flower's and Ray's tests start processes too.
JOBS ?= 3

help: ## Print the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Make the virtual environment and install.

demo: $(STAMP) ## Compare four strategies on three phantom hospitals.
	$(BIN)/fedmed compare studies/prostate_demo.yaml \
	  --strategies separate,joint,fedavg,fedbn --out runs/demo

# Thousands of small files are written and synced: in memory, where 4 GB are free.
test: check ## Check the code, then run every test.
	@free=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}'); \
	where=$${TMPDIR:-/tmp}; \
	[ "$${free:-0}" -gt 4000000 ] && [ -w /dev/shm ] && where=/dev/shm; \
	scratch=$$(mktemp -d -p "$$where" fm.XXXX) \
	  && trap 'rm -rf "$$scratch"' EXIT INT TERM \
	  && TMPDIR=$$scratch OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: $(STAMP) ## Format, lint, types and import contracts.
	$(BIN)/ruff format --check fedmed sites strategies tests
	$(BIN)/ruff check fedmed sites strategies tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code.
	$(BIN)/ruff format fedmed sites strategies tests
	$(BIN)/ruff check --fix fedmed sites strategies tests

golden: $(STAMP) ## Only the tests of the numbers.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/golden tests/reference

integration: $(STAMP) ## Only the tests of the whole.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration

fab: $(STAMP) ## Build the Flower bundle and check what is in it.
	rm -f *.fab && $(BIN)/flwr build && $(BIN)/python deploy/check_bundle.py *.fab

bench: $(STAMP) ## Measure speed beside bare PyTorch; writes benchmarks/results.md.
	$(BIN)/python -m benchmarks.bench $(BENCH)

bench-peers: $(STAMP) ## Measure other frameworks beside bare PyTorch.
	$(BIN)/python benchmarks/peers/compare.py $(BENCH)

clean: ## Remove the environment and run folders.
	rm -rf $(VENV) runs dist build *.fab

.PHONY: help setup demo test check format golden integration fab bench \
  bench-peers clean
