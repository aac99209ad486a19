# `make run` and `make test` do all set-up on a fresh machine: virtual environment, compiled kernels, install, then the job.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find src/memwall/kernels/cpp -type f)

.PHONY: run test lint native clean

run: $(VENV)/core
	$(BIN)/memwall run --memory 200MB --temperature 0.8 --seed 2 "The history of the city begins"

test: $(VENV)/everything
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# quick turns on kernels: compile in place, beside the Python sources
native: $(VENV)/core
	$(BIN)/pip install --quiet nanobind cmake ninja
	$(BIN)/cmake -S . -B build/inplace -G Ninja -DMW_INPLACE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/inplace

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/core: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

# torch alone and first: see constraints.txt
$(VENV)/torch: $(BIN)/python constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/everything: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[torch,plot,serve,test]"
	touch $@ $(VENV)/core

$(VENV)/lint: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet ruff==0.17.6 mypy==2.4.1 numpy typer rich
	touch $@

clean:
	rm -rf build $(VENV) src/memwall/_native*.so
