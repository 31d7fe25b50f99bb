# `make demo` and `make test` need Python and make, nothing else: they build .venv from pinned versions.

VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python

# The first Python that is new enough
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
PIP_ARGS ?=
ARGS ?=

# The environment knows the folder that it was built in: where that was moved or copied, it is stale.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench examples clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..." is passed on (make test ARGS="tests/test_spec.py -x"), PYTHON=python3.12 chooses the Python for'
	@echo '  .venv, and PIP_ARGS="..." is for pip.'

demo: $(READY) ## images of the lab's pipelines without and with each operator, as a picture in out/ (30 seconds)
	@$(RUN) examples/demo.py $(ARGS)

test: $(READY) ## run the tests
	@$(RUN) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY) ## let ruff tidy the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(READY) ## run the benchmarks, which write docs/benchmarks.md (half an hour on a CPU)
	@$(RUN) benchmarks/run_all.py $(ARGS)

examples: $(READY) ## run the examples on tiny models
	@set -e; for script in examples/[!_]*.py; do echo "== $$script"; $(RUN) $$script --tiny; done

clean: ## remove what was generated, except .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv, too
	rm -rf $(VENV)

$(READY): requirements/constraints.txt requirements/venv.sh pyproject.toml
	@requirements/venv.sh '$(PYTHON)' $(VENV) $(PIP_ARGS)
