# Everything runs in an environment of its own, made when it is missing: only Python (>= 3.10), pip and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers of one thread each: small models gain nothing from more threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help env demo test test-slow test-upstream test-versions test-wheel test-vllm test-serving test-app docs test-docs audit \
	bench study figures lint format types check clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY)  ## Make the environment

# torch comes first and alone, as the pinned build; the constraints then keep it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[training,serving,dev]"
	touch $(READY)

demo: $(READY)  ## A quarter of the cache: merge, heal, measure, save and load the shipped checkpoint (under 3 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/groupformer demo

test: $(READY)  ## Run the fast tests
	$(PYTEST) -n $(WORKERS)

test-slow: $(READY)  ## Run the slow tests
	$(PYTEST) -n $(WORKERS) -m "slow and not vllm"

test-upstream: $(READY)  ## Run transformers' own common tests on GroupFormer, and on Llama beside it
	$(BIN)/python scripts/upstream_tests.py --workers $(WORKERS)

test-versions: $(READY)  ## Run the fast tests with the oldest and the newest transformers and peft
	$(BIN)/python scripts/version_tests.py --workers $(WORKERS)

BUILD_VENV ?= .venv-build
test-wheel: $(READY)  ## Build the package, and run the fast tests on its wheel alone, in an environment of its own
	$(BIN)/python -m venv $(BUILD_VENV)
	$(BUILD_VENV)/bin/python -m pip install --quiet build twine packaging
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BUILD_VENV)/bin/python scripts/wheel_tests.py newest

# vLLM needs other versions than we do, so it has an environment of its own; its torch is the pinned one.
VLLM_VENV ?= .venv-vllm
test-vllm: $(READY)  ## Run the tests in vLLM itself, in an environment of its own
	test -x $(VLLM_VENV)/bin/vllm || $(BIN)/python scripts/make_vllm_environment.py $(VLLM_VENV)
	VLLM_PYTHON=$(VLLM_VENV)/bin/python $(PYTEST) -m vllm tests/test_vllm*.py

# Packages that only some tests need go into an environment of their own, which reads all others from ours.
SERVING_VENV ?= .venv-serving
# optimum-quanto compiles C++ on its first use, for some minutes.
test-serving: $(READY)  ## Run the tests of other engines and formats, in an environment of their own
	$(BIN)/python -m venv $(SERVING_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(SERVING_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(SERVING_VENV)/bin/python -m pip install --quiet --constraint constraints.txt onnx onnxruntime onnxscript openvino \
		ruamel.yaml flatbuffers tabulate einops termcolor ninja fastapi uvicorn openai lm-eval
	$(SERVING_VENV)/bin/python -m pip install --quiet --no-deps torchao bitsandbytes executorch hqq optimum-quanto
	OMP_NUM_THREADS=1 $(SERVING_VENV)/bin/python -m pytest -m slow tests/test_engines.py tests/test_export.py \
		tests/test_transformers_serve.py tests/test_lm_eval.py

APP_VENV ?= .venv-app
test-app: $(READY)  ## Run the tests of the app, in an environment of its own and in a browser
	$(BIN)/python -m venv $(APP_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(APP_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(APP_VENV)/bin/python -m pip install --quiet "gradio>=6.31" playwright
	command -v chromium || $(APP_VENV)/bin/python -m playwright install chromium
	OMP_NUM_THREADS=1 $(APP_VENV)/bin/python -m pytest -m "slow or not slow" tests/test_app.py tests/test_app_browser.py

audit: $(READY)  ## Check the pinned packages against the known vulnerabilities
	$(BIN)/python -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# The site, likewise. Nothing is fetched while it is built, nor when it is read; its search works from files too.
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
$(DOCS_READY): $(READY)
	$(BIN)/python -m venv $(DOCS_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(DOCS_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $(DOCS_READY)

docs: $(DOCS_READY)  ## Build the documentation site in site/, its links and anchors checked
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

test-docs: $(DOCS_READY)  ## Run every command and program of the README, the tutorial and the guides, and the notebook
	OMP_NUM_THREADS=1 $(DOCS_VENV)/bin/python -m pytest -n $(WORKERS) -m "slow or not slow" tests/test_docs.py tests/test_readme.py

bench: $(READY)  ## Time GroupFormer beside its peers on this machine (half an hour on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.speed

# The textbooks' folder, with train-, validation- and test-*.parquet; days on a CPU, and it goes on where it stopped.
# On a GPU: benchmarks/study_on_gpu.py.
DATA ?= ../shared/data/textbooks
STUDY := HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/study.py --data $(DATA) --batch-size 16 --output runs/study
study: $(READY)  ## Measure what fewer KV heads cost, before and after uptraining
	test -d runs/tokenizer-4096 || $(BIN)/groupformer tokenizer train --prose '$(DATA)/train-*.parquet' \
		--vocab-size 4096 --output runs/tokenizer-4096
	HF_HUB_OFFLINE=1 $(BIN)/groupformer pretrain recipes/learned.yaml --train-file '$(DATA)/train-*.parquet' \
		--validation-file '$(DATA)/validation-*.parquet' --output runs/learned --resume
	$(STUDY) --checkpoint runs/learned --recipe recipes/learned.yaml
	$(STUDY) --checkpoint hub_card --recipe recipes/reference.yaml --pretraining-tokens 36569088
	$(MAKE) figures

figures: $(READY)  ## Draw the study's pictures and write its tables, from the measured results
	$(BIN)/python scripts/figures.py

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)  ## Check types
	$(BIN)/mypy

check: test lint types test-slow  ## All of the above checks

clean:  ## Remove the environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
