# `make demo` and `make test` set up what they need in .venv and run; see README.md.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TIMM := .venv-timm

.PHONY: demo test test-long test-gpu aot zoo properties test-timm test-perfetto lint clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/train_text.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long -k "not test_everything"

# The kernels on a CUDA GPU; BIN=DIR where .venv has a torch for the CPU.
test-gpu: JOBS ?= 4
test-gpu:
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "no CUDA GPU for $(BIN)/python; BIN=DIR names the bin directory of another environment"; exit 2; }
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not aot and not zoo" -k "not test_everything" tests/codegen/test_kernels.py tests/codegen/test_operators_on_gpu.py tests/backend/test_on_gpu.py

# Every generated kernel for every GPU, without one; the table is written also where one is unfit.
aot: $(STAMP)
	rm -rf out/aot
	$(BIN)/python -m pytest -n 2 --dist worksteal -m aot tests/codegen || failed=1; \
	$(BIN)/python tests/codegen/ahead.py && test -z "$$failed"

# Every check of every architecture; the table is written also where a check fails.
zoo: $(STAMP)
	rm -rf out/zoo
	$(BIN)/python -m pytest -n 2 --dist worksteal -m zoo tests/zoo || failed=1; \
	$(BIN)/python tests/zoo/table.py && test -z "$$failed"

# DRAWS random transformers (`make test` draws 200); MHC_TEST_SEED=7 draws anew.
properties: DRAWS ?= 2000
properties: $(STAMP)
	MHC_PROPERTY_DRAWS=$(DRAWS) $(BIN)/python -m pytest -n 2 --dist worksteal tests/properties

# Not part of `make test`: some 6 GB, because timm needs a torchvision that fits its torch.
test-timm: $(TIMM)/.installed
	$(TIMM)/bin/python -m pytest tests/timm_models

# Not part of `make test`: 80 MB, most of it Node, which runs Perfetto's trace processor.
test-perfetto: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt --no-build-isolation -e ".[perfetto]"
	$(BIN)/python -m pytest tests/scheduler/test_perfetto.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and by its exact version, which has a CPU build; the extras then find it installed.
$(STAMP): pyproject.toml constraints-cpu.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or run make PYTHON=python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt --no-build-isolation -e ".[dev]"
	touch $(STAMP)

$(TIMM)/.installed: pyproject.toml constraints-timm.txt
	test -x $(TIMM)/bin/python || $(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-timm.txt torch torchvision timm setuptools
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-timm.txt --no-build-isolation -e ".[dev]"
	touch $(TIMM)/.installed

clean:
	rm -rf $(VENV) $(TIMM) build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
