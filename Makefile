# Everything a newcomer or a developer runs. `make demo` and `make test` need Python 3.11 or 3.12, a C++ compiler and git.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# What needs no installation takes PYTHON if that is given, else .venv's where there is one.
ANY = $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(RUN))),$(RUN),$(PYTHON))
NEEDS = @$(ANY) -c 'import sys; from importlib.util import find_spec; no = [n for n in ("torch", "yaml") if not find_spec(n)]; \
	sys.exit(f"$@ needs {no[0]}, which {sys.executable} does not have: make install, or set PYTHON" if no else 0)'
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-images demo-molecules test test-faults attack soak check check-kernels bench gpu-pack gpu-check gpu-report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv and install the project and its tools into it

$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}; set PYTHON=")'
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # an earlier start may have been cut short
	@echo "installing PyTorch and the tools into $(VENV): some 6 GB, minutes; an interrupted start goes on when repeated"
	$(RUN) -m pip install -c constraints.txt torch setuptools wheel
	$(RUN) -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# One thread: the matrices are too small to share.
demo: install  ## train, reconstruct and sample real images on this CPU, in minutes
	OMP_NUM_THREADS=1 $(RUN) train.py --config configs/digits.yaml
	OMP_NUM_THREADS=1 $(RUN) -m unite_fast.evaluation.digits runs/digits
	OMP_NUM_THREADS=1 $(RUN) -m unite_fast analyse runs/digits --only alignment
	$(RUN) -m unite_fast.report runs/digits

demo-images: install  ## train on 60,000 real images of clothes, reconstruct and sample some, in a dozen CPU minutes
	$(RUN) -m unite_fast fetch fashion-mnist
	OMP_NUM_THREADS=1 $(RUN) train.py --config configs/clothes.yaml
	OMP_NUM_THREADS=1 $(RUN) -m unite_fast small runs/clothes --classifier runs/clothes/classifier.safetensors
	OMP_NUM_THREADS=1 $(RUN) -m unite_fast gallery nearest runs/clothes
	$(RUN) -m unite_fast.report runs/clothes

demo-molecules: install  ## train on real molecules on two cores, generate and reconstruct some, in a quarter of an hour
	OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc_per_node=2 train.py --config configs/molecules.yaml
	OMP_NUM_THREADS=1 $(RUN) -m unite_fast evaluate atoms --checkpoint runs/molecules
	$(RUN) -m unite_fast.report runs/molecules

test: install  ## every test that needs no GPU; EXCEPT: a file that has just been run
	$(RUN) -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(EXCEPT:%=--ignore=%)

test-faults: install  ## what a cluster does to a run: two ranks on this CPU, a table of faults and outcomes at the end
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 tests/faults

attack: install  ## hundreds of kills, refused file operations, damaged files and inputs; a table of tried and survived
	OMP_NUM_THREADS=1 PYTHONPATH=. $(RUN) tests/faults/attack.py

soak: install  ## 300 steps with random faults; the end must equal the undisturbed run bit for bit
	OMP_NUM_THREADS=1 $(RUN) tests/faults/soak.py

check: install  ## lint, format, types, layout
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright
	$(RUN) -m pytest tests/test_layout.py

check-kernels: install  ## compile every kernel for sm_90 without a GPU; registers, spills, shared memory
	$(RUN) benchmarks/check_kernels.py

bench: install  ## kernels of this machine's device against eager and torch.compile
	$(RUN) benchmarks/bench_kernels.py

gpu-pack:  ## make gpu-pack/, which travels to a lent GPU; OFFICIAL_DIR: a clone of the official code
	$(NEEDS)
	$(ANY) benchmarks/gpu_pack.py

gpu-report:  ## from ROWS=rows.jsonl to README, RECORDS.md and the tables that the code reads
	$(NEEDS)
	$(ANY) benchmarks/gpu_report.py --write $(ROWS)

gpu-check:  ## fifteen minutes of a lent GPU (benchmarks/GPU_BACKLOG.md); REHEARSE=1 without one
	$(ANY) benchmarks/gpu_check.py $(if $(AGAIN),--again) $(if $(REHEARSE),--rehearse)

clean:  ## remove what was built; runs/ stays
	rm -rf $(VENV) build *.egg-info kernels/unite_kernels/*.so kernels/unite_kernels/*.sources
