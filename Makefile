# The commands of this project as one line each; `make` alone makes the demo. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
DEMO   := demo
STUDY  := study

.PHONY: demo test bench study study-finite songs clean-demo help
# A file that a failed command has begun is deleted. Every rule below has as its target the last file that its command
# writes: when that file is there, the step is complete, and a repeated make goes on behind it.
.DELETE_ON_ERROR:

demo: $(DEMO)/plots/model_report.html
	@echo; echo "the demo on one page, for a browser: $(abspath $<)"

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(PY) -m pytest -n 2 --dist worksteal

bench: $(VENV)/.bench
	$(PY) bench.py

clean-demo:
	rm -rf $(DEMO)

help:
	@echo "make demo        an environment, data, a small trained model and its figures: about 4 minutes on 2 CPU cores"
	@echo "make test        the linter and the tests"
	@echo "make bench       speed tables beside other software, which is installed first (requirements-bench.txt)"
	@echo "make study       eight settings on four kinds of data, and on more and more of them: for GPUs; weeks on a CPU"
	@echo "make study-finite  21 runs on 90,000 steps, seen again and again, and their comparison: for a GPU; days on a CPU"
	@echo "make songs       three models with a mixture head, and their songs: for a GPU, 9 minutes per model on an H100"
	@echo "make clean-demo  deletes the folder of the demo"
	@echo "make help        this list"
	@echo "All but the last two make the environment $(VENV) first. demo and study go on where they were interrupted."

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

$(DEMO)/data/umap.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --data-dir $(DEMO)/data

# The last file that a training run writes is its third prediction figure. A run that was interrupted has left its last
# state, from which --resume goes on.
$(DEMO)/model_prediction_2.png: $(DEMO)/data/umap.png
	$(PY) masked_model_gpu_mamba_next.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt \
	    --fresh --mixture 8 --d-model 64 --n-layers 3 --d-state 16 --d-ff 128 --dropout 0 --seq-len 512 --stride 512 \
	    --batch-size 8 --epochs 88 --warmup-epochs 2 --lr 8e-3 --muon --ema 0.99 --no-train-eval $$(test -f $(DEMO)/model_last.pt && echo --resume)

$(DEMO)/plots/.evaluated: $(DEMO)/model_prediction_2.png
	$(PY) evaluate_representations.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots
	@touch $@

$(DEMO)/plots/.generated: $(DEMO)/model_prediction_2.png
	$(PY) generate.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots --n-samples 12 \
	    --gen-len 2048 --temperature 0.75
	@touch $@

$(DEMO)/plots/model_gates_summary_0.png: $(DEMO)/model_prediction_2.png
	$(PY) visualize_gates.py --data-dir $(DEMO)/data --checkpoint $(DEMO)/model.pt --save-dir $(DEMO)/plots

$(DEMO)/plots/.dimension: $(DEMO)/data/umap.png
	$(PY) estimate_dimension.py --data-dir $(DEMO)/data --save-dir $(DEMO)/plots
	@touch $@

$(DEMO)/plots/model_report.html: $(DEMO)/plots/.evaluated $(DEMO)/plots/model_gates_summary_0.png \
                                 $(DEMO)/plots/.dimension $(DEMO)/plots/.generated
	$(PY) report.py $(DEMO)/model.pt --save-dir $(DEMO)/plots

# The runs of the study. All have STUDY_FLAGS; what a run adds to them stands beside its name below.
STUDY_FLAGS := --d-state 32 --seq-len 1024 --stride 256 --no-compile --no-train-eval
STUDY_RUNS  := full_42 full_43 full_44 frozen_42 frozen_43 frozen_44 slow A_frozen gates_A_frozen horizon64
STUDY_BEST  := regularised averaged_42 averaged_43 averaged_44 small_42 small_43 small_44
STUDY_SUB4  := subspace4 subspace4_contrastive_42 subspace4_contrastive_43 subspace4_contrastive_44
study_run    = $(STUDY)/$(1)_prediction_2.png
$(call study_run,full_43): FLAGS := --seed 43
$(call study_run,full_44): FLAGS := --seed 44
$(call study_run,frozen_42): FLAGS := --gate-lr-factor 0
$(call study_run,frozen_43): FLAGS := --gate-lr-factor 0 --seed 43
$(call study_run,frozen_44): FLAGS := --gate-lr-factor 0 --seed 44
$(call study_run,slow): FLAGS := --gate-lr-factor 0.01
$(call study_run,A_frozen): FLAGS := --freeze-A
$(call study_run,gates_A_frozen): FLAGS := --gate-lr-factor 0 --freeze-A
$(call study_run,horizon64): FLAGS := --max-horizon 64
$(call study_run,regularised): FLAGS := --epochs 150 --max-horizon 4 --aug-noise 1
# Settings that bring the excess over the exact filter below 1 %.
BELOW_1  := --seq-len 512 --epochs 80 --warmup-epochs 2 --dropout 0.05 --max-horizon 2 --aug-noise 1.5 --ema 0.99
AVERAGED := $(BELOW_1) --batch-size 32 --lr 2e-3
SMALL    := $(BELOW_1) --batch-size 16 --lr 3e-3 --d-model 64 --n-layers 4 --d-state 16 --d-ff 128
$(call study_run,averaged_42): FLAGS := $(AVERAGED)
$(call study_run,averaged_43): FLAGS := $(AVERAGED) --seed 43
$(call study_run,averaged_44): FLAGS := $(AVERAGED) --seed 44
$(call study_run,small_42): FLAGS := $(SMALL)
$(call study_run,small_43): FLAGS := $(SMALL) --seed 43
$(call study_run,small_44): FLAGS := $(SMALL) --seed 44
$(foreach run,$(STUDY_SUB4),$(call study_run,$(run))): SERIES := data/subspace4
$(call study_run,subspace4_contrastive_42): FLAGS := --epochs 100 --contrastive-lambda 0.3
$(call study_run,subspace4_contrastive_43): FLAGS := --epochs 100 --contrastive-lambda 0.3 --seed 43
$(call study_run,subspace4_contrastive_44): FLAGS := --epochs 100 --contrastive-lambda 0.3 --seed 44

study-finite: $(STUDY)/plots/.compared
	@echo; echo "figures of the study:"; find $(STUDY) -name '*.png' | sort

$(STUDY)/plots/.compared: $(foreach run,$(STUDY_RUNS) $(STUDY_BEST) $(STUDY_SUB4),$(call study_run,$(run)))
	$(PY) evaluate_representations.py --data-dir $(STUDY)/data --save-dir $(STUDY)/plots \
	    --checkpoint $(STUDY_RUNS:%=$(STUDY)/%.pt)
	$(PY) evaluate_representations.py --data-dir $(STUDY)/data --save-dir $(STUDY)/plots \
	    --checkpoint $(STUDY_BEST:%=$(STUDY)/%.pt)
	$(PY) evaluate_representations.py --data-dir $(STUDY)/data/subspace4 --save-dir $(STUDY)/plots \
	    --checkpoint $(STUDY_SUB4:%=$(STUDY)/%.pt)
	$(PY) generate.py --data-dir $(STUDY)/data --save-dir $(STUDY)/plots --checkpoint $(STUDY)/full_42.pt \
	    --gen-len 4096 --compare
	@touch $@

# The songs: a mixture head, trained for 46,000 steps of 32 windows, with a new series of a million steps in each epoch; its
# errors on a test series; and its songs, which begin with steps that no part of the training has seen.
SONGS      := $(foreach seed,42 43 44,$(STUDY)/song_muon_$(seed))
SONG_FLAGS := --mixture 16 --dropout 0 --fresh --batch-size 32 --lr 5e-3 --muon --ema 0.998 --val-fraction 0.01 \
              --epochs 380 --warmup-epochs 1.64 --no-train-eval

songs: $(STUDY)/plots/.sung_muon

$(STUDY)/plots/.sung_muon: $(SONGS:%=%_prediction_2.png) $(STUDY)/data/songs_test/periods.png
	$(PY) masked_model_gpu_mamba_next.py --eval $(SONGS:%=%.pt) --data-dir $(STUDY)/data/songs --no-amp
	for song in $(SONGS); do \
	    $(PY) generate.py --checkpoint $$song.pt --data-dir $(STUDY)/data/songs_test --save-dir $(STUDY)/plots \
	        --n-samples 12 --gen-len 100000 --seed-offset 1000000 || exit 1; done
	@touch $@

$(STUDY)/song_muon_%_prediction_2.png: $(STUDY)/data/songs/periods.png
	$(PY) masked_model_gpu_mamba_next.py --data-dir $(STUDY)/data/songs --checkpoint $(STUDY)/song_muon_$*.pt --seed $* \
	    $(SONG_FLAGS) $$(test -f $(STUDY)/song_muon_$*_last.pt && echo --resume)

$(STUDY)/data/songs/periods.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --no-umap --uncompressed --n-steps 1000000 --data-dir $(STUDY)/data/songs

$(STUDY)/data/songs_test/periods.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --no-umap --uncompressed --n-steps 2000000 --data-dir $(STUDY)/data/songs_test

# The series that a run is trained on, unless a line above names another for it.
SERIES = data
$(STUDY)/%_prediction_2.png: $(STUDY)/data/umap.png $(STUDY)/data/subspace4/umap.png
	$(PY) masked_model_gpu_mamba_next.py --data-dir $(STUDY)/$(SERIES) --checkpoint $(STUDY)/$*.pt $(STUDY_FLAGS) \
	    $(FLAGS) $$(test -f $(STUDY)/$*_last.pt && echo --resume)

$(STUDY)/data/umap.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --data-dir $(STUDY)/data

$(STUDY)/data/subspace4/umap.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --data-dir $(STUDY)/data/subspace4 --subspace-dim 4

include study.mk
