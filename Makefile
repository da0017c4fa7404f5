# make demo: from nothing to a verified face recognition model on a CPU
# make test: lint and tests
# make lint: ruff and pyright
# make docs: the site, docs/_build/index.html
# make gpu: on a machine with a GPU, the tests that need one and what is to be measured there
# make mxnet: mxnet in an environment of its own, for the tests that compare with it

PYTHON ?= python3
BIN := .venv/bin
DEMO := data/f2c_demo
# Where this is set, no process would keep what it compiles, and each would compile all of PyTorch's source again.
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: demo test lint docs gpu mxnet clean

demo: .venv/ready-demo $(DEMO)/train.rec
	$(BIN)/python -m f2c_plugin.train f2c_demo
	@echo
	$(BIN)/f2c-plugin report work_dirs/f2c_demo
	@echo $(DEMO)/contact_sheet.png

$(DEMO)/train.rec: | .venv/ready-demo
	$(BIN)/f2c-plugin synth $(DEMO) --identities 800 --images-per-identity 20 --pairs 2000

test: .venv/ready-test lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/ready-docs
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build
	@echo docs/_build/index.html

gpu: .venv/ready-test
	$(BIN)/python -m pytest -m gpu tests/method/test_gpu.py
	$(BIN)/python benchmarks/gpu.py

# torch comes first and by itself: the version in constraints.txt, not the one that an extra would draw in.
# Nothing is byte-compiled that no test or demo imports, because that takes longer than the download.
.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt torch

.venv/ready-%: setup.cfg constraints.txt | .venv/bin/python
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[$*]'
	touch $@

mxnet: .venv-mxnet/bin/python
.venv-mxnet/bin/python:
	$(PYTHON) -m venv .venv-mxnet
	.venv-mxnet/bin/pip install -q 'mxnet==1.9.1' 'numpy<1.24' 'opencv-python-headless<4.9'

clean:
	rm -rf .venv .venv-mxnet work_dirs docs/_build $(DEMO)
