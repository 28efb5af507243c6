# Every target installs what it needs: uv in .uv/, and a virtual environment in .venv/.
SHELL := /bin/bash
PYTHON ?= python3
UV := .uv/bin/uv
VENV_PYTHON := .venv/bin/python

# Limit how long idle OpenMP threads spin: long spinning takes cores from an engine's threads, and without spinning they
# wake up slowly.
export GOMP_SPINCOUNT ?= 20000
export PYTHONUNBUFFERED := 1

# The parts run in separate processes, because one process that ran all tests crashed in native code.
TEST_PARTS := tests/runtime tests/export,tests/stages tests/train,tests/rewards,tests/models,tests/score,tests/cluster,tests/demo,tests/report,tests/video,tests/docs,tests/test_*.py

.PHONY: demo run-tests test test-all test-fast bench bench-real test-gpu bench-gpu lint docs venv clean

demo: venv  ## Train the built-in tiny model end to end; results are in runs/demo/.
	.venv/bin/frostline demo

test: SELECTED := not gpu and not exhaustive
test: run-tests  ## Run the tests that need no GPU, in at most 20 minutes of CPU time (see tests/exhaustive.txt).

test-all: SELECTED := not gpu
test-all: run-tests  ## Run all tests that need no GPU, for example before a release.

run-tests: venv
	set -e; export FROSTLINE_TEST_FOLDER=$$(mktemp -d) OMP_NUM_THREADS=1; trap 'rm -rf "$$FROSTLINE_TEST_FOLDER"' EXIT; \
		for part in $(TEST_PARTS); do \
		$(VENV_PYTHON) -m pytest -q -m "$(SELECTED)" --numprocesses 2 --dist loadfile $${part//,/ }; done

test-fast: venv  ## Run the tests that take less than 0.4 seconds (see tests/slow.txt).
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m "not gpu and not slow and not exhaustive" --numprocesses 2 --dist loadfile

# Use a new cache, so that latencies are measured again instead of read from the user's cache.
bench: export FROSTLINE_CACHE_DIR := runs/bench/cache
bench: venv  ## Run the CPU benchmarks; print tables and write benchmarks/results/.
	rm -rf runs/bench/cache
	.venv/bin/frostline export tiny --backend onnxruntime,openvino --opt-shapes video:2x9x3x96x96 --engines-dir runs/bench/engines
	$(VENV_PYTHON) benchmarks/step.py --rounds 3
	$(VENV_PYTHON) benchmarks/epochs.py --rounds 3
	$(VENV_PYTHON) benchmarks/checkpointing.py --rounds 3
	$(VENV_PYTHON) benchmarks/stages.py --shapes= --rounds 3
	$(VENV_PYTHON) benchmarks/scaling.py --rounds 2
	$(VENV_PYTHON) benchmarks/cold.py --rounds 2
	$(VENV_PYTHON) benchmarks/syncs.py
	$(VENV_PYTHON) benchmarks/window.py
	$(VENV_PYTHON) benchmarks/quantization.py
	$(VENV_PYTHON) benchmarks/guard.py
	$(VENV_PYTHON) benchmarks/faces.py --rounds 2
	$(VENV_PYTHON) benchmarks/scoring.py --rounds 2
	$(VENV_PYTHON) benchmarks/table.py

# The only released model size at which two CPU cores can run a training step: it takes 22 minutes and 23 GiB.
bench-real: export FROSTLINE_CACHE_DIR := runs/bench/cache
bench-real: venv  ## Time a step of Wan2.1-1.3B's size on a CPU, with random weights (step-real.json).
	$(VENV_PYTHON) benchmarks/step.py --model wan2.1-1.3b --device cpu --precision fp32 --video 1x5x3x128x128 \
		--fixed-shapes --backends onnxruntime,openvino --stages denoiser --rounds 2 --build-apart \
		--without compile,reference_onednn,cached_window --out benchmarks/results/step-real.json

test-gpu: venv  ## Run the tests that need an NVIDIA GPU.
	$(VENV_PYTHON) -m pytest -q -m gpu --numprocesses 4 --dist loadgroup tests/runtime/backends tests/train/step/test_hybrid_on_gpu.py

# Each benchmark runs in a separate process, the quick ones first; if one fails, the others still run. Compilers take
# most of the time. The face networks always use fp32, the others bf16, which the ONNX Runtime backend does not support.
bench-gpu: ON_GPU := --model wan2.1-1.3b --device cuda --precision bf16 --video 1x17x3x256x256 --fixed-shapes
bench-gpu: RESULTS := benchmarks/results
bench-gpu: venv  ## Run the benchmarks at the size of Wan2.1-1.3B on an NVIDIA GPU.
	failed=0; \
	$(VENV_PYTHON) benchmarks/stages.py $(ON_GPU) --stages face_detector,face_embedder --shapes= \
		--backends onnxruntime,aotinductor --out $(RESULTS)/stages-faces-gpu.json || failed=1; \
	$(VENV_PYTHON) benchmarks/step.py $(ON_GPU) --backends= --torch-compile \
		--out $(RESULTS)/step-wan2.1-1.3b.json || failed=1; \
	$(VENV_PYTHON) benchmarks/step.py $(ON_GPU) --backends aotinductor --stages denoiser --without reference \
		--out $(RESULTS)/step-wan2.1-1.3b-aotinductor.json || failed=1; \
	$(VENV_PYTHON) benchmarks/stages.py $(ON_GPU) --stages denoiser,vae_encoder,vae_decoder --shapes= \
		--backends aotinductor --out $(RESULTS)/stages-wan2.1-1.3b.json || failed=1; \
	exit $$failed

lint: venv  ## Check formatting, lint and types.
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

docs: export NO_MKDOCS_2_WARNING := 1
docs: venv  ## Build the documentation in runs/site/; fails if a link is broken.
	.venv/bin/mkdocs build --strict --site-dir runs/site

venv: .venv/.installed

$(UV):
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: pyproject.toml constraints.txt | $(UV)
	test -x $(VENV_PYTHON) || $(UV) venv --quiet --python $(PYTHON) .venv
	@# Compile once: if Python cannot write bytecode, each process would otherwise compile about four thousand files.
	$(UV) pip install --quiet --compile-bytecode --python $(VENV_PYTHON) --constraint constraints.txt --editable '.[dev,all]'
	touch $@

clean:  ## Remove the files of the other targets, including built engines.
	rm -rf .venv .uv .pytest_cache .ruff_cache .hypothesis runs
	find engines -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
