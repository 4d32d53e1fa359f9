# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types proofs audit dist wheel-smoke clean

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/seewhy train scenes --backbone efficientnet_lite0 --unfreeze 0 --out runs/demo
	@echo
	@echo "Open $(CURDIR)/runs/demo/report.html in a browser."

test: $(VENV)/.installed-dev $(VENV)/.mlflow $(VENV)/.moto
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not blocks'

# Every bash and python block of README and docs, page by page.
.PHONY: blocks
blocks: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m blocks tests/test_docs.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed-dev
	$(BIN)/mypy
	$(BIN)/mypy train.py predict.py

# The site, into build/site; a broken link, or a name that the reference cannot generate, is an error.
.PHONY: docs
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The short form of what docs/concepts/reliability.md promises; its numbers come from the long one.
proofs: $(VENV)/.installed-dev
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/torture.py --quick
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/fuzz.py --quick
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/crashes.py --quick

# What would be uploaded to a package index: dist/*.whl and dist/*.tar.gz.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The wheel alone, with nothing but what it asks for: it trains and predicts, and names the extra of what is not there.
SMOKE := build/smoke
wheel-smoke: dist
	rm -rf $(SMOKE)
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd $(SMOKE) && export SEEWHY_CACHE="$$PWD/cache" && bin/seewhy --help > /dev/null \
		&& bin/seewhy train scenes --backbone efficientnet_lite0 --unfreeze 0 --epochs 2 --out run \
		&& bin/seewhy predict run cache/scenes/images/*/000.jpg \
		&& bin/seewhy export run \
		&& { bin/seewhy serve run 2>&1 || true; } | grep -F 'pip install "seewhy[serve]"'

# Known vulnerabilities of the pinned versions; needs a network that reaches a vulnerability service.
audit: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --no-deps --requirement constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'seewhy needs Python 3.11 or newer; make PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

# A real MLflow server for the tests, which wants older versions of what both use: an environment of its own, found by them in there.
$(VENV)/.mlflow: tests/mlflow-server.txt | $(VENV)/.installed-dev
	rm -rf $(VENV)/mlflow
	$(BIN)/python -m venv $(VENV)/mlflow && $(VENV)/mlflow/bin/python -m pip install --quiet -r tests/mlflow-server.txt && touch $@ \
		|| { rm -rf $(VENV)/mlflow; echo "no MLflow server: its test will skip"; }

# The same for an S3 server.
$(VENV)/.moto: tests/s3-server.txt | $(VENV)/.installed-dev
	rm -rf $(VENV)/moto
	$(BIN)/python -m venv $(VENV)/moto && $(VENV)/moto/bin/python -m pip install --quiet -r tests/s3-server.txt && touch $@ \
		|| { rm -rf $(VENV)/moto; echo "no S3 server: its tests will skip"; }

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
