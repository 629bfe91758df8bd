# Every target prepares .venv itself; the stamp file makes that free when pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo check test bench docs wheel

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "synthquant needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[models,data,diffusion,onnx,openvino,ray,report,quality,docs,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/synthquant demo --out runs/demo

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process for each core, up to four, each with one thread: most tests are too small to share.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The figures of README.md and docs/results/; the other benchmarks take data paths, see the head of each script.
bench: $(STAMP)
	mkdir -p results/demo runs
	$(BIN)/synthquant demo --out runs/bench --json > runs/demo.json
	mv runs/demo.json results/demo/resnet20-w2a4.json
	$(BIN)/python benchmarks/tables.py

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --site-dir build/docs

# What people install, checked without the rest of the repository beside it.
wheel: $(STAMP)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python .ci/check_wheel.py build/wheel/synthquant-*.whl
