# Two commands matter: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_samplers.py --check
	$(BIN)/python docs/make_schedules.py --check
	$(BIN)/python docs/make_names.py --check
	$(BIN)/python docs/make_plan_scheduler.py --check
	$(BIN)/python docs/make_models.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each peer in a folder of its own, without its dependencies: what they share is in .venv already.
PEERS := benchmarks/.peers
PEER = $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)
$(PEERS)/.installed: $(STAMP) Makefile
	rm -rf $(PEERS)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet matplotlib
	$(PEER)/k_diffusion k-diffusion==0.1.1.post1 torchsde==0.2.6 torchdiffeq==0.2.5 trampoline==0.1.2 \
	  scikit-image==0.26.0 lazy_loader==0.6 imageio==2.38.1 tifffile==2026.3.3
	$(PEER)/diffusers diffusers==0.42.1 importlib_metadata zipp regex requests urllib3 idna \
	  certifi charset_normalizer
	$(PEER)/azula azula==0.11.1 einops==0.8.2
	$(PEER)/smalldiffusion smalldiffusion==0.5.0 einops==0.8.2
	$(PEER)/denoising_diffusion_pytorch denoising_diffusion_pytorch==2.3.4 einops==0.8.2 \
	  ema-pytorch==0.8.3
	$(PEER)/webdataset webdataset==1.0.2 braceexpand==0.1.7
	touch $@

bench: $(STAMP) $(PEERS)/.installed
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/samplers.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/around.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/augmentation.py

clean:
	rm -rf $(VENV) build dist *.egg-info
