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
GENERAL := general_text.jsonl.gz
TWEETS := tweets_labelled.jsonl.gz
ALL_TEXTS := --texts $(GENERAL) --texts $(TWEETS)

PACK_TEXTS := --positive $(TWEETS) --negative $(TWEETS) --negative $(GENERAL)

$(RUN): $(STAMP)
	mkdir -p $@
	cp $(TEXTS)/$(GENERAL) $(TEXTS)/$(TWEETS) $@

# An SAE from text, and what of it is shipped: $(call sae,layer,tokens,steps)
define sae
	$(STEERSERVE) lab harvest $(ALL_TEXTS) --site blocks.$(1).hook_resid_post --out activations-$(1) --max-tokens $(2)
	$(STEERSERVE) lab train --activations activations-$(1) --site blocks.$(1).hook_resid_post --k 48 --steps $(3) \
	  --out smollm2-135m-instruct-l$(1)-4k
	$(STEERSERVE) lab eval smollm2-135m-instruct-l$(1)-4k $(ALL_TEXTS) --activations activations-$(1) \
	  --labelled $(TWEETS) --held-out-tokens 50000
	mkdir -p $(SHIPPED)/saes/smollm2-135m-instruct-l$(1)-4k
	cd $(RUN)/smollm2-135m-instruct-l$(1)-4k && cp *.json sae_weights.safetensors max_activation.safetensors \
	  $(SHIPPED)/saes/smollm2-135m-instruct-l$(1)-4k
endef

assets: $(RUN)
	$(call sae,8,1572864,2400)
	$(call sae,16,1572864,2400)
	$(call sae,24,4456448,3600)
	$(STEERSERVE) concept build profanity --words profanity --judge profanity $(PACK_TEXTS) \
	  --sae $(SHIPPED)/saes/smollm2-135m-instruct-l24-4k --detector-site blocks.5.hook_resid_post \
	  --out $(SHIPPED)/packs/profanity
	$(MAKE) cards

cards: $(RUN)
	$(STEERSERVE) concept eval $(SHIPPED)/packs/profanity --work profanity.arms --ladder 1 $(PACK_TEXTS)

clean:
	rm -rf .venv build dist *.egg-info steerserve/v1 steerserve/kernels/_*.so

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,lab,sidecar]'
	touch $@
