# The two commands are `make quickstart` and `make test`; both make .venv and install what they need.
#
#   make quickstart      the whole idea on real pictures, some minutes on two cores; QUICKSTART_ARGS="--seeds 0,1,2"
#   make test            linters, layers of imports, types, doctests and the tests that are not slow; PYTEST_ARGS="-x -k views",
#                        WORKERS=8 processes in place of 2
#   make test-all        the slow ones too
#   make test EXTRAS=dev,ffcv     those of FFCV's .beton files too, which are skipped without it: it is built from source
#                        and needs apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++
#                        Those that open pages in a browser are skipped without Debian's chromium: apt-get install chromium
#                        Those of a real Slurm are skipped without it: apt-get install slurm-wlm munge
#   make docs            builds the site of the documentation into site/; python -m http.server -d site shows it
#   make clean           removes what these made, but not .venv; make distclean removes that as well
#
# PYTHON is the interpreter that .venv is made with: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARKS ?= not slow and not gpu
PYTEST_ARGS ?=
# Processes that tests run in, each with a file of them at a time; some take 7 GB of memory. Files begin in
# the order of their folders: by default those of few tests would come last, however long they take.
WORKERS ?= 2
EXTRAS ?= dev
QUICKSTART_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: quickstart test test-all docs clean distclean

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m pipelines.quickstart $(QUICKSTART_ARGS)

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m '$(MARKS)' --doctest-modules featcache student pipelines tests $(PYTEST_ARGS)

test-all:
	$(MAKE) test MARKS='not gpu'

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; python3 -m http.server -d site shows it"

# pip runs again only when pyproject.toml is newer than the stamp of the last installation.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing .[$*] into $(VENV) (the first time: some minutes, torch is large)"
	$(BIN)/python -m pip install -qq --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	'error: python is %d.%d, 3.11 or 3.12 is needed: make PYTHON=python3.12' % sys.version_info[:2])"
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf quickstart site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find featcache student pipelines tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
