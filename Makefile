# make run    environment, build and the main job; prints where the report is
# make test   environment, build, linters and every test
# Both work first on a fresh clone. Needs Python >= 3.11, a C++20 compiler and make.

PYTHON ?= python3
VENV ?= .venv
RUN_CMD ?= $(PY) -m experiments.report --run
REPORT ?= outputs/report/index.html
PYTEST_ARGS ?= -n 2 --durations=15

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LOCK := requirements.lock
ENV_STAMP := $(VENV)/.llmsys-env

CPP_FILES := $(sort $(wildcard csrc/*/*.cpp csrc/*/*.h))
# An editable install holds a map of module names to files, so the stamp's name changes with the list of files.
TREE_ID := $(shell find llmsys csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' 2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
BUILD_STAMP := $(VENV)/.built-$(TREE_ID)

# pyproject.toml is the one list of what the project needs; the lock only says which versions.
define PRINT_REQUIREMENTS
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["experiments"], *extras["test"], *extras["dev"], sep="\n")
endef
export PRINT_REQUIREMENTS

# ninja and cmake of the environment are found by the build through PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env build run test lint format sanitize tsan clean

help:
	@echo "make run       environment, build and the main job; prints where the report is"
	@echo "make test      environment, build, linters and every test"
	@echo "make env build lint format sanitize tsan clean: the single steps (clean keeps outputs)"

env: $(ENV_STAMP)

# torch goes first and alone: a later package that asks for any torch must find this one already there. A CUDA build
# of torch brings the one triton it works with; a CPU build brings none, and then the lock's is installed.
$(ENV_STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(0 if v >= (3, 11) else f"llmsys needs Python >= 3.11, found {v}: set PYTHON=/path/to/python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	grep -v '^triton==' $(LOCK) > $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt torch
	$(PY) -c 'import importlib.util as u; raise SystemExit(u.find_spec("triton") is None)' || cp $(LOCK) $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt scikit-build-core nanobind ninja
	cmake --version 2>/dev/null | grep -qE 'version (3\.(2[2-9]|[3-9][0-9])|[4-9])' || $(PIP) install --quiet -c $(VENV)/constraints.txt cmake
	$(PY) -c "$$PRINT_REQUIREMENTS" > $(VENV)/requirements.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt
	@$(PIP) install --quiet --no-deps -c $(VENV)/constraints.txt nixl-cu12 || echo "no NIXL here: comparisons leave it out"
	@$(PIP) install --quiet --no-deps -c $(VENV)/constraints.txt megatron-core || echo "no megatron-core here: its tests skip"
	@touch $@

build: $(BUILD_STAMP)

$(BUILD_STAMP): $(ENV_STAMP) $(CPP_FILES) csrc/CMakeLists.txt pyproject.toml
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.built-* && touch $@

run: build
	$(RUN_CMD)
	@echo "report: $(abspath $(REPORT))"

test: build lint
	$(PY) -m pytest $(PYTEST_ARGS)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: env
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# The native tests once more, against a module built with sanitizers. Python itself is not instrumented, so the
# runtime is preloaded (with libstdc++, which it must see to intercept exceptions) and leaks are not reported.
# pytest must not capture: a report ends the process.
sanitize: build
	cmake -S csrc -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLLMSYS_CUDA=OFF \
	    -DLLMSYS_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(PY))
	cmake --build build/sanitize
	LLMSYS_NATIVE_DIR=build/sanitize ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(PY) -m pytest -m native -p no:cacheprovider -s

# The same for the communication engine under ThreadSanitizer, which gcc's runtime cannot do with addresses at random.
# UCX's memory hooks take locks in threads that have ended already, where the runtime crashes: they stay out. So does
# UCX's own CMA, which the engine does not use: the runtime crashes in its probe of a peer.
tsan: build
	cmake -S csrc -B build/tsan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLLMSYS_CUDA=OFF \
	    -DLLMSYS_SANITIZE=thread -DPython_EXECUTABLE=$(abspath $(PY))
	cmake --build build/tsan
	LLMSYS_NATIVE_DIR=build/tsan TSAN_OPTIONS=halt_on_error=1 UCX_MEM_MMAP_HOOK_MODE=none UCX_TLS=^cma setarch -R \
	    env LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(PY) -m pytest tests/comm -m native -p no:cacheprovider -s

clean:
	rm -rf build dist multirun .mypy_cache .ruff_cache .pytest_cache
	find llmsys experiments tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
