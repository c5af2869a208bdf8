# Two commands are all that a newcomer needs: `make demo` and `make test`. Each sets up what it lacks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lint sanitize bench bench-optim docs reference clean

help:
	@echo "make demo    fit a model into a memory budget it does not fit into, and see it measured"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make sanitize  run the tests of the compiled kernels with address and undefined-behaviour checks"
	@echo "make bench   run the benchmarks that fill results/ (long)"
	@echo "make bench-optim  only the optimizers' (goes on where it stopped)"
	@echo "make docs    write the generated technique tables in docs/"
	@echo "make clean   remove the environment and caches"

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard src/pintpot/kernels/csrc/*)
	@echo "==> Setting up $(VENV) (once; a few minutes, most of it downloading and unpacking PyTorch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pintpot needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> 1/3 PyTorch"
	@$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt torch
	@echo "==> 2/3 the other libraries and the development tools"
	@$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e ".[dev,bench]"
	@echo "==> 3/3 checking the installation"
	@$(BIN)/pintpot --version
	@touch $@

demo: $(STAMP)
	@echo "==> Running the demo (a few minutes)"
	@$(BIN)/pintpot demo --out out/demo

test: $(STAMP)
	@echo "==> Running the tests (some minutes on 2 cores)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto

lint: $(STAMP)
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

# The checks are in a library of their own; Python itself is not built with them, so their runtime is loaded first.
sanitize: SANITIZED := $(CURDIR)/build/sanitize/pintpot/kernels/libpintpot.so
sanitize: CXX ?= c++
sanitize: $(STAMP)
	@echo "==> building the kernels with sanitizers"
	@rm -f $(SANITIZED)
	@CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	@test -f $(SANITIZED)
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PINTPOT_KERNELS=$(SANITIZED) $(BIN)/python -m pytest -s tests/kernels --ignore=tests/kernels/triton

bench: $(STAMP)
	@for file in $$(grep -l __main__ benchmarks/[a-z]*.py | grep -v _kvpress.py); do \
		name=$$(basename $$file .py); echo "==> benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name || exit 1; done

bench-optim: $(STAMP)
	@$(BIN)/python -m benchmarks.optim

docs: $(STAMP)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
	rm -f src/pintpot/kernels/libpintpot.so
