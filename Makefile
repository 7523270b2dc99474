# Every target works alone on a fresh machine with Python 3.11 or 3.12, make, g++ and git.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test check static compare recall paper-data rl-data recall-data marathon needle context test-faults test-containers fuzz bench lint lock setup clean

# Prepare the demo's text, train on it, report. Interrupted, the same command goes on.
train: setup
	$(RUN) -m data_prep stdlib --out data/stdlib --held-out 0.08
	$(RUN) -m launch train configs/demo.yaml

# The proofs, a file of tests at a time in each of two processes: 20 minutes on two fast cores, 40 on
# slow ones.
TESTS := $(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25
test: setup static
	$(TESTS) -m "not soak"

# What to run while working, two to four minutes: lint, types, and all tests of one process.
check: setup static
	$(TESTS) -m "not slow and not soak"

static: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Recurrences beside a Transformer, 1K to 64K tokens, each at its best rate over three seeds: 45 minutes.
compare: setup
	$(RUN) -m data_prep stdlib --out data/stdlib --held-out 0.08
	$(RUN) -m launch compare configs/compare_cpu.yaml

# The same mixers on selective copying and on a needle at several distances: some hours.
recall: setup
	$(RUN) -m data_prep.synthetic copy --out data/copy --length 128 --tokens 8 --train 100000
	$(RUN) -m data_prep.synthetic needle --out data/needle --length 256 --tokens 2 \
		--distances 8,32,128,250 --train 100000
	$(RUN) -m launch compare configs/compare_recall.yaml

# What configs/paper trains on, but for Hopper (rl-data) and Shakespeare's text, which is nanoGPT's.
TASK := $(RUN) -m data_prep.synthetic
paper-data: setup
	$(TASK) parity --out data/paper/parity --length 40 --train 40000
	$(TASK) parity --out data/paper/parity_128 --length 256 --train 1 --held-out 256
	$(TASK) copy --out data/paper/copy --length 4113 --tokens 16 --train 20000
	$(TASK) copy --alphabet 8 --out data/paper/copy_small --length 69 --tokens 4 --train 40000
	$(TASK) s5 --alphabet 2 --out data/paper/s5 --length 40 --train 40000
	$(TASK) s5 --alphabet 2 --out data/paper/s5_128 --length 256 --train 1 --held-out 256
	for task in cycle even-pairs majority; do \
		$(TASK) $$task --alphabet 4 --out data/paper/$$task --length 42 --distances 3..40 \
			--train 40000 && \
		$(TASK) $$task --alphabet 4 --out data/paper/$${task}_256 --length 258 \
			--distances 40,64,128,256 --train 1 --held-out 512 || exit 1; \
	done

# What configs/paper/hopper.yaml trains on: ten to twenty minutes on one core.
rl-data: setup
	$(RUN) -m data_prep.trajectories Hopper-v5 --out data/paper/hopper

# What configs/recall trains on, 256 to 65,536 tokens, each sequence twice: an estimated 0.8 GB.
recall-data: setup
	for length in 256 1024 4096 16384 65536; do \
		count=$$((16777216 / length > 2048 ? 16777216 / length : 2048)); \
		$(TASK) mqar --alphabet 32 --out data/recall/mqar-$$length --length $$length --tokens 16 \
			--train $$count --held-out 64 && \
		$(TASK) needle --out data/recall/needle-$$length --length $$length --tokens 2 --train $$count \
			--distances $$((length/8)),$$((length/4)),$$((length/2)),$$((length-4)) --held-out 64 && \
		$(TASK) variables --out data/recall/variables-$$length --length $$length --tokens 4 \
			--train $$count --held-out 64 || exit 1; \
	done

# One step at 100 million tokens, killed once and resumed within, beside an undisturbed one.
marathon: setup
	$(RUN) -m tests.benchmarks.marathon

# A needle a million tokens back, learned over growing lengths, streamed and truncated: about an hour.
needle: setup
	$(RUN) -m tests.benchmarks.long_needle

# Losses by position to 256K of models that were trained at 2K, 16K and 128K: under an hour.
context: setup
	$(RUN) -m data_prep stdlib --out data/stdlib --held-out 0.08
	$(RUN) -m launch compare configs/compare_context.yaml

# Workers, machines and Ray itself lost at random moments: about half an hour.
test-faults: setup
	$(RUN) -m pytest -m soak tests/launch/test_faults.py

# A Ray cluster of two containers, with Docker or podman: the image is built first (docker/README.md).
test-containers: setup
	$(RUN) -m pip install --quiet podman-compose==1.6.0
	$(RUN) -m pytest -m soak -s tests/launch/test_containers.py

# Texts, tokenizers, configurations, prepared folders and run folders made at random: ten minutes.
fuzz: setup
	LONGHAUL_FUZZ=1000 $(RUN) -m pytest -m "soak or not slow" tests/data_prep/test_sources.py \
		tests/data_prep/test_split.py tests/data_prep/test_tokenizer.py tests/data_prep/test_at_rest.py \
		tests/launch/test_generate.py tests/trainer/test_config.py tests/trainer/test_run_folder.py

# Most figures of tests/benchmarks/results, measured again: over half an hour of two quiet cores.
bench: setup
	$(RUN) -m pip install --quiet --no-deps mingru-pytorch==0.2.1 pararnn-torch==0.17.4
	$(RUN) -m tests.benchmarks.bench_scan
	$(RUN) -m tests.benchmarks.bench_exchange
	$(RUN) -m tests.benchmarks.bench_sharding
	$(RUN) -m tests.benchmarks.bench_context
	$(RUN) -m tests.benchmarks.bench_llama
	$(RUN) -m tests.benchmarks.bench_prep
	$(RUN) -m data_prep stdlib --out data/stdlib --held-out 0.08
	$(RUN) -m tests.benchmarks.bench_step

lint: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m mypy

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv found;" \
		"install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make" \
		"a virtual environment; on Debian and Ubuntu: apt install $(notdir $(PYTHON))-venv"; exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

# Write the lock file anew from pyproject.toml.
lock: setup
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile pyproject.toml --extra dev --extra rl --universal --python-version 3.11 \
		--generate-hashes --no-header --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
