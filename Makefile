# The course's commands. `make help` lists them.
# Any Python that runs may start the set-up; course_lib/bootstrap.py looks for a newer one if needed.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 1 >/dev/null 2>&1 && { echo $$p; break; }; done)
LAB_ARGS ?=
# Arguments for pytest, as in: make test-package TESTS=tests/test_masks.py PYTEST_ARGS=-x
TESTS ?= tests
PYTEST_ARGS ?=
WORKERS ?= 2

ifeq ($(OS),Windows_NT)
PY := .venv/Scripts/python.exe
else
PY := .venv/bin/python
endif
STAGES := package exercises notebooks browser
NOTEBOOKS = $(or $(sort $(dir $(wildcard notebooks/*.ipynb solutions/*.ipynb))),notebooks)
CODE := course_lib tests benchmarks notebooks solutions exercises

.DEFAULT_GOAL := help
.PHONY: help setup lab test $(STAGES:%=test-%) lint format render race bench bench-chapters clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*##/\1#/p' $(MAKEFILE_LIST) | awk -F'#' '{ printf "  make %-16s%s\n", $$1, $$2 }'

setup:  ## create .venv and install the pinned packages (does nothing if they are there)
	@python="$(PYTHON)"; if [ -z "$$python" ]; then \
	  echo "Set-up stopped: no Python found. Install Python 3.11 or newer." >&2; exit 1; fi; \
	$$python -I course_lib/bootstrap.py $(if $(filter command line environment,$(origin PYTHON)),--this-python)

lab: setup  ## open the course in JupyterLab; LAB_ARGS are passed on
	@$(PY) -m course_lib.cli lab $(LAB_ARGS)

# Every stage runs, also after one has failed, and each ends in pytest's own summary line.
test: setup  ## run every test: package, exercises, notebooks, browser
	@failed=; for stage in $(STAGES); do \
	  $(MAKE) --no-print-directory test-$$stage || failed="$$failed $$stage"; done; \
	if [ -n "$$failed" ]; then echo "make test: failed:$$failed"; exit 1; fi; \
	echo "make test: every stage passed"

# What runs notebooks or checks keeps its progress in a folder of its own, never in the learner's.
apart := home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && COURSE_HOME="$$home"

# Two workers, one thread each: they share the cores and do not fight for them.
define pytest
	@printf '\n== %s ==\n' "$(1)"; $(apart) OMP_NUM_THREADS=1 $(PY) -m pytest $(2) $(PYTEST_ARGS)
endef

test-package: setup  ## the package, the set-up and the house rules
	$(call pytest,package,$(TESTS) -m "not exercises and not browser" -n $(WORKERS) --dist loadfile)

test-exercises: setup  ## the exercises' checks, and the tests of those checks
	$(call pytest,exercises,$(TESTS) -m exercises -n $(WORKERS) --dist loadfile)

test-notebooks: setup  ## run all chapters and solutions and compare their stored outputs
	$(call pytest,notebooks,--nbval --nbval-current-env $(NOTEBOOKS) -n $(WORKERS) --dist loadfile)

test-browser: setup  ## drive JupyterLab in a headless browser (skipped where there is none)
	$(call pytest,browser,$(TESTS) -m browser -n $(WORKERS) --dist loadgroup)

lint: setup  ## what the tests demand of style, import floors and types
	$(PY) -m ruff check $(wildcard $(CODE))
	$(PY) -m ruff format --check $(wildcard $(CODE))
	.venv/bin/lint-imports
	.venv/bin/pyrefly check

format: setup  ## put code and notebooks into the one style
	$(PY) -m ruff check --fix $(wildcard $(CODE))
	$(PY) -m ruff format $(wildcard $(CODE))

render: setup  ## make exercises and solutions from their source; run and store every notebook
	$(PY) -m course_lib.cli build
	@$(apart) $(PY) -m course_lib.render $(wildcard notebooks/*.ipynb solutions/*.ipynb)

race: setup  ## race to the loss of nanoGPT's CPU recipe: three seeds, ten minutes
	@$(PY) -m course_lib.cli fetch shakespeare && $(apart) $(PY) benchmarks/race.py --write && $(apart) $(PY) -m course_lib.plots.readme

bench: setup  ## measure the efficient kinds of attention against dense attention: five minutes
	@$(apart) $(PY) benchmarks/efficient.py --write && $(apart) $(PY) -m course_lib.plots.readme

bench-chapters: setup  ## measure how long each chapter takes (course doctor scales these seconds)
	@$(apart) $(PY) benchmarks/chapters.py

clean:  ## remove .venv and what tools left behind; notebooks and progress stay
	rm -rf .venv .venv.old build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
