# The commands of the project. Each one makes what it needs: .venv, the pinned requirements and the
# compiled module are brought up to date first, through two stamp files in .venv.
#
#   make demo DEMO_ARGS="--epochs 5"     make test PYTEST_ARGS="-k ema" TEST_PROCESSES=4
#   make bench BENCH_ARGS="--help"       make fuzz MINUTES=30
#   make test-wheel TORCH=2.11.0

PYTHON ?= python3
# What the caller names, and nothing where the line above decides.
OWN_PYTHON := $(if $(filter file,$(origin PYTHON)),,$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS_STAMP := $(VENV)/.requirements-installed
PACKAGE_STAMP := $(VENV)/.package-installed
# Whoever watches a terminal sees how far the downloads are; a log holds only errors.
PIP_INSTALL := $(BIN)/python -m pip install $(shell test -t 2 || echo --quiet --quiet)

# A change in one of these rebuilds the module. Other Python files take effect as they are: the
# package is installed editable.
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt fused_opt/__init__.py fused_opt/_toolchain.py \
	$(shell find csrc -type f)

DEMO_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?=
SANITIZE_ARGS ?=
COVERAGE_ARGS ?=
MINUTES ?= 5
FUZZ_ARGS ?=
# The torch releases that one wheel is tested with: the oldest that it accepts, and the pinned one.
TORCH ?= 2.10.0 2.13.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-cuda test-toolchains test-upstream test-wheel sanitize coverage fuzz \
	bench bench-record lint format gpu-check clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(PACKAGE_STAMP) ## Train on handwritten digits with torch.optim.SGD and with fused_opt.SGD; compare
	@$(BIN)/python examples/digits.py $(DEMO_ARGS)

test: $(PACKAGE_STAMP) ## Run every test, doctests included; CUDA tests are skipped where there is no GPU
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) $(PYTEST_ARGS)

# atheris has no wheel for every Python; without it the inputs of the targets are random.
fuzz: $(PACKAGE_STAMP) ## Interleave what training does, and load and call damaged things, for MINUTES=5
	@$(PIP_INSTALL) --requirement tests/fuzz/requirements.txt || true
	@PYTHONPATH=.:tests $(BIN)/python -W ignore -m fuzz --minutes $(MINUTES) $(FUZZ_ARGS)

test-cuda: $(PACKAGE_STAMP) ## Run the CUDA tests; fail where there is no GPU
	@FUSED_OPT_REQUIRE_GPU=1 $(BIN)/python -m pytest -m cuda $(PYTEST_ARGS)

test-toolchains: $(PACKAGE_STAMP) ## Build with real compilers, CUDA 11.8 to 13.4 (downloads 1.3 GB, once)
	@$(BIN)/python -m pytest tests/toolchains $(PYTEST_ARGS)

test-wheel: $(REQUIREMENTS_STAMP) ## Build a wheel and test it beside each release of torch in TORCH
	@rm -rf build/wheel
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@for torch in $(TORCH); do \
		PYTHON=$(BIN)/python .ci/test-wheel build/wheel/*.whl $$torch $(PYTEST_ARGS) || exit 1; \
	done

sanitize: $(REQUIREMENTS_STAMP) ## Run the CPU path under ASan, UBSan and TSan on every ISA level; a table
	@$(BIN)/python .ci/sanitize $(SANITIZE_ARGS)

coverage: $(PACKAGE_STAMP) ## Count the lines that the tests run; fail below 95 %; HTML in build/coverage
	@$(BIN)/python .ci/coverage $(COVERAGE_ARGS)

test-upstream: $(PACKAGE_STAMP) ## Run torch's own tests of SGD with ours in its place (TORCH_SRC: torch's sources)
	@$(BIN)/python tests/upstream/run.py $(TORCH_SRC)

bench: $(PACKAGE_STAMP) ## Measure against other optimizers on this machine
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-record: $(PACKAGE_STAMP) ## Replace the measurements and plots of the README with this machine's
	@$(BIN)/python -m benchmarks --out benchmarks/results $(BENCH_ARGS)
	@$(BIN)/python -m benchmarks plot benchmarks/results --out docs
	@$(BIN)/python -m benchmarks table benchmarks/results/cpu.csv

lint: $(REQUIREMENTS_STAMP) ## Check formatting, style and types of every file that git tracks
	@PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

format: $(REQUIREMENTS_STAMP) ## Rewrite the sources in the form that lint asks for
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

# With PYTHON=python3 that interpreter is used as it is: no .venv, no download. The status is 3 where
# there is no GPU. OUT names the folder of the results.
gpu-check: $(if $(OWN_PYTHON),,$(REQUIREMENTS_STAMP)) ## Build for this GPU, test, sanitize and measure on it; a table
	@$(or $(OWN_PYTHON),$(BIN)/python) .ci/gpu-check $(if $(OUT),--out "$(OUT)")

clean: ## Remove what was built, and caches; .venv keeps the downloaded packages
	rm -rf build dist *.egg-info fused_opt/_C*.so $(PACKAGE_STAMP)
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv without a working pip (Debian without python3-venv leaves one behind) is made again.
$(REQUIREMENTS_STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fused_opt: $(PYTHON) is missing or older than 3.10; name another with PYTHON=" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "fused_opt: on Debian and Ubuntu, 'apt install python3-venv' provides venv" >&2; exit 1; }
	@echo "Installing the pinned requirements into $(VENV)"
	@$(PIP_INSTALL) --requirement requirements.txt
	@touch $@

$(PACKAGE_STAMP): $(REQUIREMENTS_STAMP) $(BUILD_INPUTS)
	@echo "Building fused_opt"
	@$(PIP_INSTALL) --no-deps --editable .
	@$(BIN)/python -c 'import fused_opt; print("Built", fused_opt.build_info())'
	@touch $@
