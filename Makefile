# Every target sets itself up from a fresh clone: a virtual environment in .venv, the package in it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: setup format check form types docs fast slow test bench demo pretrain

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[training,test,docs]'
	touch $@

# Write the code in its one form.
format: $(READY)
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

# Form, lint, types and quick tests: layering and the documents, with their examples, pictures and links, among them.
check: form types fast

form: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(READY)
	$(BIN)/pyright

# The documents as a site, site/index.html: the pictures in them are made by the code on their pages.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The tests that take no more than a moment each.
fast: $(READY)
	$(BIN)/pytest -q -n 2 -m 'not slow'

# Those that take seconds: compilers, several processes, full sizes.
slow: $(READY)
	$(BIN)/pytest -q -n 2 -m slow

# All tests.
test: fast slow

# Ours against peers, in one run; `make bench SUITES=loras` for some of it.
bench: $(READY)
	$(BIN)/python -m bench $(SUITES)

# Teach the embedded model a shape that it never saw, on this machine's CPU, and show what it learned.
demo: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/refiners demo

# Make the embedded model anew, or go on with it, in hours on a CPU: `make pretrain PART=diffusion`.
PART ?= all
pretrain: $(READY)
	$(BIN)/python -m refiners.training.pretraining $(PART)
