# The commands of this repository: `make demo` shows the product, `make check` and `make test` check it. CI calls only these.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
QUANT := build/quantised
SITE := build/docs-site
SUPPLY := build/supply
LM_EVAL := build/lm-eval
CHART := build/chart
PIP := $(BIN)/python -m pip
MODEL ?=
# The family of processors of a wheel.
MACHINE ?= $(shell uname -m)
ADAPTERS ?=
ARGS ?=
# Files of tests at a time on two cores. With four, fleets on a busy machine were too late for some tests.
PROCESSES ?= 3
# Modules that were compiled are kept, whatever the environment says: a test run starts hundreds of processes.
export PYTHONDONTWRITEBYTECODE =
# PyPI's torch brings 3 GB of CUDA libraries. Without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH = $(if $(TORCH_INDEX),$(PIP) install --disable-pip-version-check --no-compile torch --index-url $(TORCH_INDEX))

CONSOLE = .venv-console
PURELIB = 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: docs test-console console-pictures wheel test-wheel chart checkov demo up test test-all test-gpu bench-gpu test-models test-quantised lm-eval models-table peft-table quantised-table check coverage lock lint-fix bench chaos chaos-short chaos-bases hostile fuzz soak tour forms api-check docker-smoke lock-images audit sbom licences pin-images clean help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo  ## fetch a small model, start a fleet, ask the base and three adapters at once
	$(BIN)/lorafleet demo $(ARGS)

up: $(VENV)/.stamp-demo  ## start a fleet on this machine: make up MODEL=org/name ADAPTERS=folder
	$(BIN)/lorafleet up "$(MODEL)" $(if $(ADAPTERS),--adapters "$(ADAPTERS)") $(ARGS)

docs: $(SITE)/.stamp  ## build the documentation site from docs/ and README.md: build/docs/html/index.html
	$(SITE)/bin/python .ci/docs_site.py $(BIN)/python

test: $(VENV)/.stamp-dev  ## run all but the longest tests in random order, three files at a time: no network, GPU, Docker or Redis needed
	-$(BIN)/python -m lora_kernels.cpu --sets $(if $(findstring --thorough,$(ARGS)),all,tried)  # time limits of tests know nothing of a compiler
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all:  ## run every test: before a release
	$(MAKE) test ARGS="--thorough $(ARGS)"

coverage: $(VENV)/.stamp-dev  ## run every test and show the lines that none of them reaches, services included
	$(BIN)/coverage erase
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/coverage run -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --timeout=120 $(ARGS); status=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && $(BIN)/python .ci/coverage_table.py && exit $$status

test-console: $(CONSOLE)/.stamp  ## the console in a real Chromium (Debian's chromium), about four minutes: make test-console ARGS="-k name"
	OMP_NUM_THREADS=1 $(CONSOLE)/bin/python -m pytest -n 0 tests/gateway/console $(ARGS)

console-pictures: $(CONSOLE)/.stamp  ## pictures of the console, of a running fleet: KEY=… make console-pictures URL=http://127.0.0.1:8000 SHOTS=docs/images
	$(CONSOLE)/bin/python .ci/console_pictures.py $(URL) $(SHOTS)

$(CONSOLE)/.stamp: $(VENV)/.stamp-dev tests/gateway/console/requirements.txt .ci/console_assets.py
	python3 -m venv $(CONSOLE)
	$(CONSOLE)/bin/pip install --quiet --requirement tests/gateway/console/requirements.txt
	printf '%s\n' $(CURDIR) $(CURDIR)/kernels "$$($(BIN)/python -c $(PURELIB))" > "$$($(CONSOLE)/bin/python -c $(PURELIB))/lorafleet.pth"
	$(BIN)/python .ci/console_assets.py $(CONSOLE)/axe
	touch $@

test-gpu: $(VENV)/.stamp-dev  ## run the tests that need a CUDA device: kernels, graphs, sampling, a whole engine
	$(BIN)/python -m pytest -m gpu -n 0 $(ARGS)

test-models: $(VENV)/.stamp-dev  ## compare the engine with docs/models.md: every model type of transformers, about five minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not lm_eval" tests/oracle/test_models.py tests/oracle/test_states.py tests/oracle/test_one_by_one.py tests/oracle/test_encoder_types.py tests/oracle/adapters/test_expert_rows.py $(ARGS)

bench-gpu: $(VENV)/.stamp-dev  ## measure everything that a GPU is for, in less than ten minutes, and write docs/gpu.md
	$(BIN)/python -m benchmarks.gpu $(ARGS)

wheel: $(VENV)/.stamp-dev  ## build a wheel with the native kernels in build/wheels: make wheel MACHINE=aarch64
	LORAFLEET_WHEEL=$(MACHINE) $(BIN)/python -m hatchling build -t wheel -d build/wheels

test-wheel: $(VENV)/.stamp-dev  ## install such a wheel where no compiler is and run the demo; compare aarch64 under QEMU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m wheel -n 0 tests/wheel $(ARGS)

lock: $(VENV)/.stamp-dev  ## write the versions of the development environment to requirements-dev.lock
	$(BIN)/python .ci/lock.py > .requirements-dev.lock.part && mv .requirements-dev.lock.part requirements-dev.lock

lock-images: $(SUPPLY)/.stamp  ## write what the images install, with the hashes of its files, to requirements-*.lock
	$(SUPPLY)/bin/python .ci/lock_images.py

chart: $(CHART)/.stamp  ## check the Helm chart by Helm's engine and the schemas of the Kubernetes API, without a cluster
	$(CHART)/bin/python -m pytest tests/deploy/test_chart.py

# Rules not followed: docs/kubernetes.md says why.
checkov: $(CHART)/.stamp-checkov  ## hold what the Helm chart renders to the rules of checkov
	PYTHONPATH=. $(CHART)/bin/python .ci/chart.py $(CHART)/rendered
	$(CHART)/checkov/bin/checkov -d $(CHART)/rendered --framework kubernetes --compact --quiet --skip-download \
		--skip-check CKV_K8S_8,CKV_K8S_9,CKV_K8S_11,CKV_K8S_15,CKV_K8S_21,CKV_K8S_43

audit: $(SUPPLY)/.stamp  ## look the images' packages up among known vulnerabilities; fails where no source answers
	$(SUPPLY)/bin/python .ci/audit.py

sbom: $(SUPPLY)/.stamp $(VENV)/.stamp-dev  ## write a software bill of materials (CycloneDX) of the environment to build/sbom.cdx.json
	$(SUPPLY)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json $(BIN)/python

licences: $(VENV)/.stamp-dev  ## write the licences of all dependencies to docs/licences.md
	$(BIN)/python .ci/licences.py

pin-images:  ## write the outside images with their digests of now to .env
	deploy/pin_images.sh

models-table: $(VENV)/.stamp-dev  ## try every model type of transformers and write docs/models.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(BIN)/python -m oracle.models_table

check: $(VENV)/.stamp-dev chart  ## lint, format, types, file length, import graph, rights on the queue, links in the docs, the Helm chart
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/file_length.py
	$(BIN)/python -m pytest tests/test_packaging.py tests/protocol/queue/test_users.py tests/test_docs.py

lint-fix: $(VENV)/.stamp-dev  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-demo  ## measure whole fleets for a few minutes; flags in ARGS, see benchmarks/README.md
	$(BIN)/python -m benchmarks --short --out build/bench $(ARGS)

peft-table: $(VENV)/.stamp-dev  ## compare every kind of adapter with PEFT and write docs/peft.md
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m oracle.adapters.peft_table

test-quantised: $(QUANT)/.stamp  ## compare adapters on quantised bases with PEFT, with the libraries that need no GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(QUANT)/bin/python -m pytest tests/oracle/adapters/test_quantised.py $(ARGS)

lm-eval: $(LM_EVAL)/.stamp  ## hold lm-eval on a fleet to lm-eval on transformers and PEFT, about two minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m lm_eval tests/e2e/test_lm_eval.py $(ARGS)

quantised-table: $(QUANT)/.stamp  ## write their measurements to docs/peft.md; rows whose library is missing stay
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(QUANT)/bin/python -m oracle.adapters.quantised_table

chaos-short: $(VENV)/.stamp-dev  ## kill every kind of process under load and attack, 40 times in two minutes, check every answer
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos --faults 44 --every 2.5 --kills-only --attackers 1 --lines 40 --turns 4 --stores --out build/chaos-short $(ARGS)

chaos-bases: $(VENV)/.stamp-dev  ## the same with three bases on two workers, which are killed while they swap, in eight minutes
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos --bases 3 --workers 2 --faults 30 --every 3 --kills-only --lines 20 --out build/chaos-bases $(ARGS)

hostile: $(VENV)/.stamp-dev  ## attack a fleet in every way for ten seconds each, beside a victim; the report is build/hostile/report.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(BIN)/python -W ignore -m hostile $(ARGS)

fuzz: $(VENV)/.stamp-dev  ## try 100,000 odd inputs at everything that strangers reach; the report is build/fuzz/report.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(BIN)/python -W ignore -m hostile.fuzz $(ARGS)

soak: $(VENV)/.stamp-dev  ## an hour of load at 80 %, 200 adapters; docs/reliability.md has the flags for far too much load
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos.soak $(ARGS)

chaos: $(VENV)/.stamp-dev  ## the same with 1,000 faults, in an hour or two, with ARGS=--replicated on a queue with Sentinels; the report is build/chaos/report.md
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -W ignore -m chaos --faults 1000 $(ARGS)

tour: $(VENV)/.stamp-dev  ## run other people's programs against a fleet of its own, or against URL=: make tour ARGS="openai langchain"
	PYTHONPATH=.:kernels:tests $(BIN)/python -m examples.tours $(ARGS)

tour-%:
	$(MAKE) tour ARGS=$*

forms:  ## how often answers of a form are whole, asked by instructor and llm: make forms URL=http://127.0.0.1:8000
	test -d build/forms || $(PYTHON) -m venv build/forms
	build/forms/bin/python -m pip install --disable-pip-version-check --quiet 'instructor>=1.17,<2' 'llm>=0.36,<0.40'
	build/forms/bin/python examples/tours/tools/forms.py $(or $(URL),http://127.0.0.1:8000) $(ADAPTER)

# First everything that clients keep is met by its id, and not deleted; then ids are what schemathesis makes up.
API_CHECK = build/schemathesis/bin/schemathesis --config-file build/api-check.toml run \
  $(or $(URL),http://127.0.0.1:8000)/openapi.json --max-examples 20 --request-timeout 60 \
  --phases examples,coverage,fuzzing --exclude-path /v1/adapters/upload \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance

# Some requests ask for as many tokens as fit, so this is quick only with a short --max-model-len or a small model.
# With keys, one of each scope in turn: OPENAI_API_KEY=sk-lf-… make api-check
api-check:  ## check every route against /openapi.json with generated requests: make api-check URL=http://127.0.0.1:8000
	test -d build/schemathesis || $(PYTHON) -m venv build/schemathesis
	build/schemathesis/bin/python -m pip install --disable-pip-version-check --quiet 'schemathesis>=4.32,<5'
	$(PYTHON) .ci/api_check.py $(or $(URL),http://127.0.0.1:8000) build/api-check.toml
	$(API_CHECK) --exclude-method DELETE $(ARGS)
	$(subst build/api-check.toml,build/api-check.toml.plain,$(API_CHECK)) $(ARGS)

docker-smoke:  ## `docker compose up` in a fresh clone; then two workers, one of them killed while it answers
	deploy/smoke.sh

clean:  ## remove the virtual environment, caches and build results
	rm -rf $(VENV) .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis dist build

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip checks what is installed; the stamps save this check while the requirements are unchanged. Of what developers
# install, modules are compiled when they are first imported: most never are, and compiling all takes 55 s of CPU.
$(VENV)/.stamp-demo: pyproject.toml | $(VENV)/bin/python
	$(TORCH)
	$(PIP) install --disable-pip-version-check --progress-bar on -e '.[worker,demo,bench]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml requirements-dev.lock | $(VENV)/bin/python
	$(TORCH)
	$(PIP) install --disable-pip-version-check --quiet --no-compile -c requirements-dev.lock -e '.[worker,demo,bench,dev]'
	@touch $@ $(VENV)/.stamp-demo

# In its own environment, so that no service imports what only looks at them.
$(SUPPLY)/.stamp: | $(VENV)/bin/python
	$(BIN)/python -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --disable-pip-version-check --quiet 'uv>=0.5,<1' 'pip-audit>=2.7,<3' 'cyclonedx-bom>=5,<8'
	@touch $@

# In its own environment: MkDocs with its theme and Swagger UI are no part of the product.
$(SITE)/.stamp: Makefile | $(VENV)/.stamp-dev
	$(BIN)/python -m venv $(SITE)
	$(SITE)/bin/python -m pip install --disable-pip-version-check --quiet 'mkdocs-material>=9.6,<10' 'mkdocs-swagger-ui-tag>=0.7,<0.8'
	@touch $@

# In its own environment, which sees the packages of the other one: lm-eval brings fifty more.
$(LM_EVAL)/.stamp: pyproject.toml | $(VENV)/.stamp-dev
	$(BIN)/python -m venv $(LM_EVAL)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(LM_EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth
	$(LM_EVAL)/bin/python -m pip install --disable-pip-version-check --quiet 'lm_eval[api]==0.4.13'
	@touch $@

# In its own environment: the engine and the schemas are 350 MB, and checkov brings ninety packages.
$(CHART)/.stamp: pyproject.toml | $(VENV)/.stamp-dev
	$(BIN)/python -m venv $(CHART)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(CHART)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth
	$(CHART)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile 'helm-python-sdk>=0.2,<0.3' 'kubernetes-validate>=1.33,<2'
	@touch $@

$(CHART)/.stamp-checkov: $(CHART)/.stamp
	$(BIN)/python -m venv $(CHART)/checkov
	$(CHART)/checkov/bin/python -m pip install --disable-pip-version-check --quiet --no-compile 'checkov>=3.2,<4'
	@touch $@

# In its own environment: otherwise every worker and every PEFT model would import these libraries, which takes seconds.
$(QUANT)/.stamp: pyproject.toml | $(VENV)/.stamp-dev
	$(BIN)/python -m venv $(QUANT)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(QUANT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth
	$(BIN)/python deploy/requirements.py quant | $(QUANT)/bin/python -m pip install --disable-pip-version-check --quiet -r /dev/stdin
	@touch $@
