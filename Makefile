# Everything runs inside .venv, made once; it is remade when the packaging files change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := $(shell find csrc protos -type f)

.DEFAULT_GOAL := test
.PHONY: demo test test-slow lint check bench assets cards clean

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

# What is shipped, from text: hours of two cores. TEXTS holds general_text.jsonl.gz and tweets_labelled.jsonl.gz, which
# docs/lab.md describes. Interrupted, it goes on where it stopped. `make cards` takes the packs as they are.
TEXTS ?= texts
RUN := build/assets
SHIPPED := $(CURDIR)/steerserve/assets
STEERSERVE := cd $(RUN) && $(CURDIR)/$(BIN)/steerserve
LAYERS := 8 16 24
GENERAL := general_text.jsonl.gz
TWEETS := tweets_labelled.jsonl.gz
ALL_TEXTS := --texts $(GENERAL) --texts $(TWEETS)

$(RUN): $(STAMP)
	mkdir -p $@
	cp $(TEXTS)/$(GENERAL) $(TEXTS)/$(TWEETS) $@

assets: $(RUN)
	$(STEERSERVE) lab harvest $(ALL_TEXTS) $(LAYERS:%=--site blocks.%.hook_resid_post) --out activations --max-tokens 4456448
	set -e; for layer in $(LAYERS); do \
	  sae=$(SHIPPED)/saes/smollm2-135m-instruct-l$$layer-4k; \
	  ($(STEERSERVE) lab train --activations activations --site blocks.$$layer.hook_resid_post --k 48 --steps 3600 --out $$sae); \
	  ($(STEERSERVE) lab eval $$sae $(ALL_TEXTS) --activations activations --labelled $(TWEETS) --held-out-tokens 50000); \
	done
	$(STEERSERVE) concept build profanity --words profanity --judge profanity \
	  --sae $(SHIPPED)/saes/smollm2-135m-instruct-l24-4k --positive $(TWEETS) --negative $(TWEETS) --negative $(GENERAL) \
	  --out $(SHIPPED)/packs/profanity
	$(MAKE) cards

cards: $(RUN)
	$(STEERSERVE) concept eval $(SHIPPED)/packs/profanity --work profanity.arms \
	  --positive $(TWEETS) --negative $(TWEETS) --negative $(GENERAL)

clean:
	rm -rf .venv build dist *.egg-info steerserve/v1 steerserve/kernels/_*.so

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,lab]'
	touch $@
