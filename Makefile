PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/specdec demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two stamps, so that pip runs again only after the requirements have changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV):
	$(PYTHON) -m venv $@
