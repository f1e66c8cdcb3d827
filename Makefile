# Two commands do all set-up: `make demo` and `make test`. Each makes .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of processes import torch and transformers here; without compiled modules each takes seconds longer.
export PYTHONDONTWRITEBYTECODE :=

NATIVE := distquant/kernels/cpu/native
SANITIZE = $(BIN)/cmake -S $(NATIVE) -B build/$@ -DCMAKE_BUILD_TYPE=Debug -DDISTQUANT_NATIVE=ON \
	-DDISTQUANT_DRIVER=$(CURDIR)/tests/unit/kernels/native/driver.cpp -DDISTQUANT_SANITIZE=

.PHONY: demo test test-wide soak test-versions check lint types docs format clean venv sanitize sanitize-memory sanitize-threads

demo: venv
	$(BIN)/distquant demo examples/models/kjv-tiny

# Two files at a time: most of a test is one thread's work. A file's tests share their models and ranks. Threads of
# OpenMP that wait give way, because there are more of them than cores.
test test-wide test-versions: export OMP_WAIT_POLICY := passive
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not wide"

# The sweeps: every family, method and width. They find the odd one out, and take as long as all else. Trials of a soak are
# forks, which need a process without threads: no other test has run in it.
test-wide: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m wide --ignore tests/soak
	$(BIN)/python -m pytest -m wide tests/soak

# Hostile inputs, faults of files, kills of ranks and launchers: for about an hour. Tables are printed, and written to build/soak.
soak: export OMP_WAIT_POLICY := passive
soak: venv
	$(BIN)/python tests/soak/soak.py build/soak

# Tests of what depends on transformers' version, with the pins of a file of constraints/ in place of ours.
CONSTRAINTS ?= constraints/transformers-5.24.txt
OTHER = build/venv-$(notdir $(basename $(CONSTRAINTS)))
VERSIONED = tests/unit/model tests/unit/planning tests/unit/config tests/test_moe_models.py tests/dist/test_logits.py \
	$(wildcard tests/dist/test_moe_*.py) tests/dist/test_adapters.py tests/dist/test_generate.py
test-versions:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	sed -E "s/^([A-Za-z0-9_-]+)==.*/^\1==/; /^\^/!d" $(CONSTRAINTS) | grep -v -f - constraints.txt > $(OTHER)/constraints.txt
	cat $(CONSTRAINTS) >> $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(OTHER)/constraints.txt torch -e '.[dev]'
	$(OTHER)/bin/python -m pytest -n 2 --dist loadfile $(VERSIONED)

check: lint types docs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python benchmarks/summarize.py --check

types: venv
	$(BIN)/mypy

# The documentation site, build/site. A link to a file, page or heading that is not there fails it.
docs: venv
	$(BIN)/python docs/build_site.py

# The native kernels under sanitizers, on buffers of exact sizes. The run that reads too far must be stopped.
sanitize: sanitize-memory sanitize-threads

sanitize-memory: venv
	$(SANITIZE)address,undefined
	$(BIN)/cmake --build build/$@ --parallel --target driver
	build/$@/driver
	! build/$@/driver overrun 2> build/$@/overrun.txt
	grep -q heap-buffer-overflow build/$@/overrun.txt

sanitize-threads: venv
	$(SANITIZE)thread
	$(BIN)/cmake --build build/$@ --parallel --target driver
	build/$@/driver quick

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python benchmarks/summarize.py

venv: $(READY)

# torch comes first and pinned: without it other packages would pull the newest build with all of CUDA. Modules are
# compiled when they are first imported: most of them never are.
$(READY): pyproject.toml constraints.txt $(NATIVE)/CMakeLists.txt $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.hpp)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info distquant/kernels/cpu/_native.so
	cd $(NATIVE) && rm -rf .cmake .ninja* .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt *.cmake *.ninja
