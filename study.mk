# The study: what selectivity is worth, and how it scales with data. docs/results.md tells what comes out.
#
#   make study                 all parts, one run after the other
#   GPUS=2 make study          two GPUs side by side, each with three runs at a time
#   make study-walk            one part: study-default, study-subspace2, study-subspace4, study-walk, study-scaling
#   make study UPDATES=600 STUDY_SEEDS=42      a smaller one
#   make study STUDY=study_muon STUDY_MORE=--muon      another optimiser, in a folder of its own
#
# What is there already isn't made again, and an interrupted run goes on from its last state: repeat the command.

UPDATES        ?= 3696
WARMUP_UPDATES ?= 200
STUDY_SEEDS    ?= 42 43 44
STUDY_TRAIN    ?= --mixture 16 --batch-size 32 --seq-len 1024 --stride 256 --lr 5e-3 --ema 0.99 --dropout 0 --no-train-eval
STUDY_MORE     ?=
STUDY_TEST     ?= --test-steps 1000000
# Each part of the first kind has data of its own, of which every epoch draws a new series.
STUDY_PARTS    := default subspace2 subspace4 walk
DATA_default   :=
DATA_subspace2 := --subspace-dim 2
DATA_subspace4 := --subspace-dim 4
DATA_walk      := --center-walk-std 0.1
# Where the centre has walked to says nothing of what comes next; a model that sees it learns next to nothing.
PART_walk      := --relative
# Finite data of the default process. Training sees all steps but the last 10,000, which are validation.
STUDY_SIZES    := 90k 1M 10M
DATA_90k       := --n-steps 100000
DATA_1M        := --n-steps 1010000
DATA_10M       := --n-steps 10010000 --uncompressed
VAL_90k        := 0.1
VAL_1M         := 0.00990099
VAL_10M        := 0.000999001
# Updates per epoch: the windows that begin every 256 steps, in equal steps of at most 32.
PER_EPOCH_90k  := 11
PER_EPOCH_1M   := 122
PER_EPOCH_10M  := 1221

STUDY_SETTINGS := full frozen lti delta BC z A reservoir
FLAGS_full      :=
FLAGS_frozen    := --gate-lr-factor 0
FLAGS_lti       := --constant delta,B,C
FLAGS_delta     := --constant delta
FLAGS_BC        := --constant B,C
FLAGS_z         := --constant z
FLAGS_A         := --freeze-A
FLAGS_reservoir := --gate-lr-factor 0 --freeze-A

# A run of so few windows per step leaves a GPU idle while it starts and draws: three of them at once take two thirds of
# the time that they take one after the other.
GPUS         ?= 1
RUNS_PER_GPU ?= 3
comma     := ,
GPU_LIST  := $(or $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)),$(shell seq 0 $$(( $(GPUS) - 1 ))))
SLOTS     := $(foreach slot,$(shell seq 1 $(RUNS_PER_GPU)),$(GPU_LIST:%=%.$(slot)))
TRAINING  := $(PY) masked_model_gpu_mamba_next.py

# $(ON_A_GPU) command $(END) runs the command in the first free slot: GPU 0's slots are 0.1, 0.2, …. The lock ends with
# the command; 75 says that another one has it.
ON_A_GPU = while :; do for slot in $(SLOTS); do ( flock -n 9 || exit 75; CUDA_VISIBLE_DEVICES=$${slot%.*} exec
END      = ) 9>$(STUDY)/.slot$$slot; code=$$?; [ $$code = 75 ] || exit $$code; done; sleep 1; done

# A run: part, setting, seed, data, updates per epoch, more flags. Its last file is its third prediction figure.
define study_run_rule
$(STUDY)/$(1)/$(2)_$(3)_prediction_2.png: $(STUDY)/$(4)/data/periods.png
	$$(ON_A_GPU) $(TRAINING) --data-dir $(STUDY)/$(4)/data --checkpoint $(STUDY)/$(1)/$(2)_$(3).pt --seed $(3) \
	    $(STUDY_TRAIN) $(STUDY_MORE) --epochs $(shell echo $$(( $(UPDATES) / $(5) ))) --warmup-epochs \
	    $(shell awk 'BEGIN { print $(WARMUP_UPDATES) / $(5) }') $(6) \
	    $$$$(test -f $(STUDY)/$(1)/$(2)_$(3)_last.pt && echo --resume) $$(END)
endef
checkpoints = $(foreach setting,$(2),$(STUDY_SEEDS:%=$(STUDY)/$(1)/$(setting)_%.pt))
figure_of   = $(1:%.pt=%_prediction_2.png)

# A comparison: its file, the checkpoints, the data of the exact filter. Models of longer data validated on a
# smaller part, which on these would be shorter than a window.
define study_comparison_rule
$(STUDY)/$(1).txt: $(call figure_of,$(2))
	$$(ON_A_GPU) $(TRAINING) --data-dir $(STUDY)/$(3)/data --val-fraction 0.1 $(STUDY_TEST) --eval $(2) > $$@.part $$(END)
	mv $$@.part $$@
	@tail -n $(shell echo $$(( $(words $(2)) + 5 ))) $$@
endef

$(foreach part,$(STUDY_PARTS),$(foreach setting,$(STUDY_SETTINGS),$(foreach seed,$(STUDY_SEEDS),\
    $(eval $(call study_run_rule,$(part),$(setting),$(seed),$(part),11,$(strip --fresh $(PART_$(part)) $(FLAGS_$(setting))))))))
$(foreach part,$(STUDY_PARTS),\
    $(eval $(call study_comparison_rule,$(part)/comparison,$(call checkpoints,$(part),$(STUDY_SETTINGS)),$(part))))

$(foreach size,$(STUDY_SIZES),$(foreach setting,full lti,$(foreach seed,$(STUDY_SEEDS),\
    $(eval $(call study_run_rule,scaling,$(setting)_$(size),$(seed),scaling/$(size),$(PER_EPOCH_$(size)),\
        --val-fraction $(VAL_$(size)) $(FLAGS_$(setting)))))))
# All sizes together, and both models of each size: a difference is always from the first of a comparison.
$(eval $(call study_comparison_rule,scaling/comparison,$(foreach size,$(STUDY_SIZES),\
    $(call checkpoints,scaling,full_$(size) lti_$(size))) $(call checkpoints,default,full lti),default))
$(foreach size,$(STUDY_SIZES),$(eval $(call study_comparison_rule,scaling/comparison_$(size),\
    $(call checkpoints,scaling,full_$(size) lti_$(size)),default)))
SCALING := $(STUDY)/scaling/comparison.txt $(STUDY_SIZES:%=$(STUDY)/scaling/comparison_%.txt)

# What each layer knows, of the first seed of each setting.
$(STUDY)/%/plots/.levels: $(STUDY)/%/comparison.txt
	$(ON_A_GPU) $(PY) evaluate_representations.py --data-dir $(STUDY)/$*/data --save-dir $(STUDY)/$*/plots --no-umap \
	    $(STUDY_TEST) --checkpoint $(STUDY_SETTINGS:%=$(STUDY)/$*/%_$(firstword $(STUDY_SEEDS)).pt) $(END)
	@touch $@

define study_data_rule
$(STUDY)/$(1)/data/periods.png: | $(VENV)/.runtime
	$(PY) markov_circles_timeseries.py --no-umap $(2) --data-dir $(STUDY)/$(1)/data
endef
$(foreach part,$(STUDY_PARTS),$(eval $(call study_data_rule,$(part),$(DATA_$(part)))))
$(foreach size,$(STUDY_SIZES),$(eval $(call study_data_rule,scaling/$(size),$(DATA_$(size)))))

# A make of its own per target, with as many jobs as there are slots.
STUDY_TARGETS := $(STUDY_PARTS:%=study-%)
study:
	@mkdir -p $(STUDY)
	@$(MAKE) --no-print-directory -j $(words $(SLOTS)) $(STUDY_PARTS:%=$(STUDY)/%/plots/.levels) $(SCALING)
$(STUDY_TARGETS): study-%:
	@mkdir -p $(STUDY)
	@$(MAKE) --no-print-directory -j $(words $(SLOTS)) $(STUDY)/$*/plots/.levels
study-scaling:
	@mkdir -p $(STUDY)
	@$(MAKE) --no-print-directory -j $(words $(SLOTS)) $(SCALING)
.PHONY: $(STUDY_TARGETS) study-scaling
