# make demo    an environment, data, a small trained model, its figures   (resumes where it was interrupted)
# make test    the environment again if needed, the linter and the tests
# make bench   speed tables against the peers of requirements-bench.txt
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
# Beside each of its files a demo step leaves nothing half-made: a target is there when its last file is.
DEMO   := demo

.PHONY: demo test bench clean-demo
.DELETE_ON_ERROR:

demo: $(DEMO)/plots/model_umap.png $(DEMO)/plots/model_gates_summary_0.png $(DEMO)/plots/dimension.png \
      $(DEMO)/plots/.generated
	@echo; echo "figures of the demo:"; find $(DEMO) -name '*.png' | sort

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(PY) -m pytest

bench: $(VENV)/.bench
	$(PY) bench.py

clean-demo:
	rm -rf $(DEMO)

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.bench: requirements-bench.txt $(VENV)/.runtime
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

$(DEMO)/data/config.json: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --data-dir $(DEMO)/data

# The run's last file is its third prediction figure; a run that was interrupted goes on from its last state.
$(DEMO)/model_prediction_2.png: $(DEMO)/data/config.json
	$(PY) masked_model_gpu_mamba_next.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt \
	    --d-model 64 --n-layers 4 --d-state 16 --d-ff 128 --seq-len 512 --stride 256 --batch-size 16 --epochs 40 \
	    --warmup-epochs 2 --lr 3e-3 --no-train-eval $$(test -f $(DEMO)/model_last.pt && echo --resume)

$(DEMO)/plots/model_umap.png: $(DEMO)/model_prediction_2.png
	$(PY) evaluate_representations.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots \
	    --umap-points 3000

$(DEMO)/plots/.generated: $(DEMO)/model_prediction_2.png
	$(PY) generate.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots --gen-len 2048
	@touch $@

$(DEMO)/plots/model_gates_summary_0.png: $(DEMO)/model_prediction_2.png
	$(PY) visualize_gates.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots

$(DEMO)/plots/dimension.png: $(DEMO)/data/config.json
	$(PY) estimate_dimension.py --data-dir $(DEMO)/data --save-dir $(DEMO)/plots
