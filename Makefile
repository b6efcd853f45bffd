# make demo     install into .venv (once), then train the digits example on an embedded cluster
# make test     the whole test suite          make test ARGS='tests/unit -k codec'     JOBS=0 one test at a time
# make check    what to run before a commit: the unit tests that are not slow, and lint (under two minutes)
# make bench    the benchmarks                make bench ARGS='--help'     make bench-cache  the cache's alone
# make fuzz     ten thousand inputs for each parser of what others may have written   make fuzz ARGS='--fuzz 1000 -k URL'
# make lint     style, types, import direction and sizes        make format  rewrite to the style, draw the rooms
# make licences what is installed is under licences that .ci/licences.toml allows    make sbom  a list of it, CycloneDX
# make lock     requirements/: hashes of what constraints.txt pins (asks the index, minutes)
# make audit    known faults of the pinned versions (asks the index of advisories)
# make ranges   unit tests and demo with the lowest and newest versions on each Python (long; docs/dependencies.md)
# make docs     the documentation as a site, in build/site     make docs-serve  at http://localhost:8000, anew after each change
# make pictures the pictures of the pages, taken anew (needs Chromium)
# make clean    remove caches and build leftovers        make distclean  .venv too
#
# PYTHON=python3.12         the interpreter that .venv is made with (3.11 or newer)
# TORCH_INDEX=https://...   an extra package index for torch, e.g. https://download.pytorch.org/whl/cpu
#                           for the small CPU build on Linux (see docs/deployment.md)
# HASHES=1                  install nothing but files whose hashes are in requirements/ (see docs/dependencies.md)

VENV  ?= .venv
# Test files that run at a time: most of what tests with real workers take is waiting.
JOBS  ?= 2
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
# The first interpreter that is new enough; looked up only when .venv is made.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
INSTALL = $(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# For torch TORCH_INDEX alone is asked, an index or a folder of wheels: pip would prefer PyPI's build to that of a folder.
TORCH_FROM = $(if $(TORCH_INDEX),$(if $(findstring ://,$(TORCH_INDEX)),--index-url,--no-index --find-links) $(TORCH_INDEX), \
	$(if $(filter Linux,$(shell uname)),-r requirements/cuda.txt))
HASHED = $(PIP) install -qq --require-hashes --no-deps -r requirements/torch.txt $(TORCH_FROM) && \
	$(PIP) install -qq --require-hashes --no-deps -r requirements/$(1).txt && \
	$(PIP) install -qq --no-deps --no-build-isolation -e .
# One install at a time, whatever `-j` says.
.NOTPARALLEL:

.PHONY: demo test docs docs-serve pictures ranges fuzz bench bench-cache lint lint-style lint-format lint-types lint-imports lint-sizes lint-lock licences sbom lock audit format clean distclean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed-demo
	$(BIN)/python -m examples.digits $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --times $(ARGS)

# What to run before a commit: no test that starts workers, none that takes more than some seconds.
check: lint $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow" tests/unit $(ARGS)

ranges: $(VENV)/.installed-dev
	$(BIN)/python -m tests.ranges $(ARGS)

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo build/site/index.html

docs-serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

pictures: $(VENV)/.installed-dev
	$(BIN)/python -m tests.pictures

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(JOBS) --fuzz 10000 --timeout 3600 tests/security/test_fuzzing.py $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

bench-cache: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks cache

# `make lint --keep-going` tells all that is wrong at once.
lint: lint-style lint-format lint-types lint-imports lint-sizes lint-lock licences

lint-style: $(VENV)/.installed-dev
	$(BIN)/ruff check .

lint-format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint-types: $(VENV)/.installed-dev
	$(BIN)/mypy

lint-imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

lint-sizes: $(VENV)/.installed-dev
	$(BIN)/python .ci/sizes.py

lint-lock: $(VENV)/.installed-dev
	$(BIN)/python .ci/lock.py --check

licences: $(VENV)/.installed-dev
	$(BIN)/python .ci/sbom.py --licences

sbom: $(VENV)/.installed-dev
	@mkdir -p build
	$(BIN)/python .ci/sbom.py build/sbom.json

lock: $(VENV)/.installed-dev
	$(BIN)/python .ci/lock.py $(if $(TORCH_INDEX),--torch $(TORCH_INDEX)) $(ARGS)

audit: | $(BIN)/pip
	@test -x $(VENV)-audit/bin/pip-audit || { $(BIN)/python -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install -q pip-audit; }
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/dev.txt -r requirements/torch.txt $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python .ci/rooms.py

# A stamp is as new as the two files that decide what is installed; a second run installs nothing.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "torchord: installing PyTorch, Celery and the demo's libraries into $(VENV) (once; a few minutes) ..."
	@$(if $(HASHES),$(call HASHED,run),$(INSTALL) -e '.[demo]')
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "torchord: installing torchord with its test and lint tools into $(VENV) (once; a few minutes) ..."
	@$(if $(HASHES),$(call HASHED,dev),$(INSTALL) -e '.[demo,dev,docs,images,keys,models,store,sweeps]')
	@touch $@ $(VENV)/.installed-demo

# pip is the last thing that venv writes: an interrupted or failed attempt is made again.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "torchord needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "torchord needs Python 3.11 or newer; $(PYTHON) is older. Name one with make PYTHON=..." >&2; exit 1; }
	@echo "torchord: making $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "torchord: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-audit
