# Everything runs inside .venv, made once; it is remade when the packaging files change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := $(shell find csrc protos -type f)

.DEFAULT_GOAL := test
.PHONY: demo test test-slow lint check bench clean

demo: $(STAMP)
	$(BIN)/steerserve demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	CXXFLAGS=-Werror $(BIN)/python setup.py -q build_ext --build-temp build/lint --build-lib build/lint

check: lint test

bench: $(STAMP)
	for bench in bench/bench_*.py; do $(BIN)/python $$bench || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info steerserve/v1 steerserve/kernels/_*.so

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,lab]'
	touch $@
