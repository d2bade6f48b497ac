# Everything a newcomer needs: `make demo` to see it, `make test` to trust it. CI calls these targets only.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
QUANT := build/quantised
PIP := $(BIN)/python -m pip
MODEL ?=
ADAPTERS ?=
ARGS ?=
# PyPI's torch brings 3 GB of CUDA libraries. Without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH = $(if $(TORCH_INDEX),$(PIP) install --disable-pip-version-check torch --index-url $(TORCH_INDEX))

.PHONY: demo up test test-models test-quantised models-table peft-table quantised-table check lint-fix bench chaos chaos-short soak tour tour-lorax tour-tgi tour-openai tour-openai2 api-check docker-smoke clean help

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo  ## fetch a small model, start the fleet, ask the base and three adapters at once
	$(BIN)/lorafleet demo $(ARGS)

up: $(VENV)/.stamp-demo  ## make up MODEL=org/name ADAPTERS=folder: start a fleet here
	$(BIN)/lorafleet up "$(MODEL)" $(if $(ADAPTERS),--adapters "$(ADAPTERS)") $(ARGS)

test: $(VENV)/.stamp-dev  ## run every test, two files at a time: no network, GPU, Docker or Redis needed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-models: $(VENV)/.stamp-dev  ## hold the engine to docs/models.md: every model type of transformers, about two minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "" tests/oracle/test_models.py $(ARGS)

models-table: $(VENV)/.stamp-dev  ## try every model type of transformers and write docs/models.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(BIN)/python -m oracle.models_table

check: $(VENV)/.stamp-dev  ## lint, format, types, file length, import graph
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/file_length.py
	$(BIN)/python -m pytest tests/test_packaging.py

lint-fix: $(VENV)/.stamp-dev  ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-demo  ## measure whole fleets for a few minutes; ARGS= for flags, see benchmarks/README.md
	$(BIN)/python -m benchmarks --short --out build/bench $(ARGS)

peft-table: $(VENV)/.stamp-dev  ## measure every kind of adapter against PEFT, into docs/peft.md
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m oracle.peft_table

test-quantised: $(QUANT)/.stamp  ## hold adapters on quantised bases to PEFT, with the libraries that need no GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(QUANT)/bin/python -m pytest tests/oracle/test_quantised.py $(ARGS)

quantised-table: $(QUANT)/.stamp  ## measure them, into docs/peft.md; rows whose library is missing stay
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(QUANT)/bin/python -m oracle.quantised_table

chaos-short: $(VENV)/.stamp-dev  ## kill every kind of process under load, 57 times in three minutes, check every answer
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos --faults 66 --every 2.5 --kills-only --out build/chaos-short $(ARGS)

soak: $(VENV)/.stamp-dev  ## an hour of load at 80 %, 200 adapters; ARGS="--minutes 10 --share 30 --probe-clients 200 --max-queued 200 --tokens 128 --fleet-cpus 1 --client-cpus 0": far too much
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos.soak $(ARGS)

chaos: $(VENV)/.stamp-dev  ## the same, a thousand times: an hour or two; the report is build/chaos/report.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos --faults 1000 $(ARGS)

tour: tour-lorax tour-tgi tour-openai tour-openai2  ## other servers' clients against a running fleet: make tour URL=http://127.0.0.1:8000 ADAPTER=name

build/tour-%/bin/python:
	$(PYTHON) -m venv build/tour-$*

tour-lorax: build/tour-lorax/bin/python
	$< -m pip install --disable-pip-version-check --quiet lorax-client==0.6.3
	$< examples/lorax_tour.py $(or $(URL),http://127.0.0.1:8000) $(ADAPTER)

tour-tgi: build/tour-tgi/bin/python
	$< -m pip install --disable-pip-version-check --quiet text-generation==0.7.0
	$< examples/tgi_tour.py $(or $(URL),http://127.0.0.1:8000)

tour-openai: OPENAI = openai>=3,<4
tour-openai2: OPENAI = openai>=2,<3
tour-openai tour-openai2: %: build/%/bin/python
	$< -m pip install --disable-pip-version-check --quiet '$(OPENAI)' 'litellm>=1.110' 'langchain-openai>=1.7'
	$< examples/openai_tour.py $(or $(URL),http://127.0.0.1:8000) $(or $(ADAPTER),base) $(or $(KEY),any)

# Some ask for as many tokens as fit: quick with a short --max-model-len or a small model only.
api-check: build/tour-schemathesis/bin/python  ## hold every route to /openapi.json with generated requests: make api-check URL=http://127.0.0.1:8000
	$< -m pip install --disable-pip-version-check --quiet 'schemathesis>=4.32,<5'
	build/tour-schemathesis/bin/schemathesis run $(or $(URL),http://127.0.0.1:8000)/openapi.json --max-examples 20 --request-timeout 60 --phases examples,coverage,fuzzing \
	  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance $(ARGS)

docker-smoke:  ## `docker compose up` in a fresh clone; then two workers, one of them killed while it answers
	deploy/smoke.sh

clean:  ## forget the virtual environment and what tools cached
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip's own checks make these cheap to repeat; the stamp spares them while pyproject.toml is unchanged.
$(VENV)/.stamp-demo: pyproject.toml | $(VENV)/bin/python
	$(TORCH)
	$(PIP) install --disable-pip-version-check --progress-bar on -e '.[worker,demo,bench]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/bin/python
	$(TORCH)
	$(PIP) install --disable-pip-version-check --quiet -e '.[worker,demo,bench,dev]'
	@touch $@ $(VENV)/.stamp-demo

# Apart from the others: every worker and every PEFT model would import these libraries, which takes seconds.
$(QUANT)/.stamp: pyproject.toml | $(VENV)/.stamp-dev
	$(BIN)/python -m venv $(QUANT)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(QUANT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth
	$(BIN)/python deploy/requirements.py quant | $(QUANT)/bin/python -m pip install --disable-pip-version-check --quiet -r /dev/stdin
	@touch $@
