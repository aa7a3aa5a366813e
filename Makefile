PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VERSION := import platform; print(platform.python_version())

.PHONY: setup demo test check format clean

# PYTHON= makes the environment. Where that exists and runs another version, it is an error, not ignored.
setup: $(STAMP)
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c '$(VERSION)') && found=$$($(BIN)/python -c '$(VERSION)') && \
	{ test "$$asked" = "$$found" || { echo "$(VENV) has Python $$found, not $$asked:" \
	"name another folder (VENV=.venv-$$asked), or remove this one (make clean)" >&2; exit 1; }; }
endif

# The stamp lies in the environment, so that removing either makes both anew.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/hasten demo

# OPTIONS= are pytest's. Three workers keep two cores busy: many tests wait for other processes. Bytecode is kept, since they start hundreds.
test: export PYTHONDONTWRITEBYTECODE =
test: setup
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations 30 $(OPTIONS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
