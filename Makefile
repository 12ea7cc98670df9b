# Foldwise. `make help` lists the targets; each runs `python run.py ...`, which works without make too.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
CALL   := $(BIN)/python run.py
READY  := $(VENV)/.installed

COMP   ?= aspicv
EXP    ?=
SET    ?=
NAME   :=
FOLDS  ?=
SPLIT  ?=
TRIALS ?=
WORKERS ?=
REPLAY ?=
SMOKE  ?=
FRESH  ?=
FROM   :=
KAGGLE ?=
RUNS   ?=
IDS    ?=
ON     ?=
MAP    ?=
PART   ?=
REPO   ?=
PRIVATE ?=
LICENSE ?=
N      ?=
SCORE  ?=
IMAGES ?=
OF     ?=
MESSAGE ?=
FORCE  ?=
JSON   ?=
CSV    ?=
HTML   ?=
PICTURES ?=
RUN    ?=
TO     :=
SOURCE ?=
WRITE  ?=
CAMERA ?=
OUT    :=
WHEELS ?=
HOST   :=
PORT   :=
FACES  ?=
ALL    ?=
ENGINE ?=
FORMAT ?=
FOLD   ?=
VIEWS  ?=
INT8   ?=
METHOD ?=
PRIOR  ?=
export DEVICE TRACK WANDB_PROJECT STORAGE RAY_ADDRESS

COMMA := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo data check exp tune report plot explain compare drift leaks results eval publish predict serve export mirror weights kernel submit submissions sync test lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv and install what requirements.lock pins

# A lock of hashes: what is installed is what was tested.
$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 6 GB on Linux, where torch brings CUDA; a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)  ## draw a demo competition, train two experiments on it, blend and score: no data needed
	@$(CALL) demo $(if $(FRESH),--fresh)

data: $(READY)  ## take in a competition's files, in any usual form: COMP=aspicv FROM=<folder|hf:owner/name> or KAGGLE=<slug>
	@$(if $(FROM)$(KAGGLE),,$(error say where the files are: make data COMP=$(COMP) FROM=<folder> or KAGGLE=<slug>))$(CALL) data --comp $(COMP) $(if $(KAGGLE),--kaggle "$(KAGGLE)",--from "$(FROM)")

check: $(READY)  ## say everything that is wrong with experiment files: [EXP=<name>] [SET="a.b=v"]
	@$(CALL) check $(EXP) $(if $(SET),--set '$(SET)') $(if $(NAME),--name $(NAME))

exp: $(READY)  ## train an experiment, or go on: EXP=<name|all> [SET="a.b=v c=w" NAME=] [FOLDS=0,1] [SPLIT=1] [ON=processes|ray] [SMOKE=1] [FRESH=1]
	@$(if $(EXP),,$(error say which: make exp EXP=baseline_cnn))$(CALL) exp $(EXP) $(if $(SET),--set '$(SET)') $(if $(NAME),--name $(NAME)) \
	  $(if $(FOLDS),--folds $(FOLDS)) $(if $(SPLIT),--split $(SPLIT)) $(if $(SMOKE),--smoke) $(if $(FRESH),--fresh) \
	  $(if $(ON),--on $(ON)) $(if $(WORKERS),--workers $(WORKERS))

tune: $(READY)  ## search an experiment's `tune.space`, or go on: EXP=<name> [TRIALS=30] [ON=processes|ray] [STORAGE=<url>] [REPLAY=1] [FRESH=1]
	@$(if $(EXP),,$(error say which: make tune EXP=baseline_cnn))$(CALL) tune $(EXP) $(if $(SET),--set '$(SET)') $(if $(NAME),--name $(NAME)) \
	  $(if $(TRIALS),--trials $(TRIALS)) $(if $(ON),--on $(ON)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(REPLAY),--replay) $(if $(FRESH),--fresh)

report: $(READY)  ## draw the report of a kept run anew, into oof/<exp>/report/: EXP=<name>
	@$(if $(EXP),,$(error say which: make report EXP=baseline_cnn))$(CALL) report $(EXP)

plot: $(READY)  ## draw kept runs side by side, into oof/comparison.png: RUNS=a,b
	@$(if $(RUNS),,$(error say which: make plot RUNS=a,b))$(CALL) plot $(subst $(COMMA), ,$(RUNS))

compare: $(READY)  ## tell kept runs apart, which differences are real and what blends: [COMP=aspicv] [RUNS=a,b] [JSON=1|CSV=1|HTML=1 PICTURES=0]
	@$(CALL) compare --comp $(COMP) $(if $(RUNS),--runs $(RUNS)) $(if $(JSON),--json) $(if $(CSV),--csv) \
	  $(if $(HTML),--html $(if $(filter-out 1,$(HTML)),"$(HTML)")) $(if $(filter 0,$(PICTURES)),--no-pictures)

leaks: $(READY)  ## show which images of a data set are copies of a competition's: SOURCE=<name> [COMP=aspicv]
	@$(if $(SOURCE),,$(error say which data set: make leaks COMP=aspicv SOURCE=fer2013_full))$(CALL) leaks $(COMP) $(SOURCE)

results: $(READY)  ## write docs/RESULTS.md from the kept runs, and what each choice in docs/ablations.yaml was worth: [COMP=aspicv]
	@$(CALL) results $(COMP)

drift: $(READY)  ## ask whether training and test images can be told apart: [COMP=aspicv]
	@$(CALL) drift --comp $(COMP)

explain: $(READY)  ## draw what a kept run looks at, into oof/<exp>/report/explain.png: EXP=<name> [IDS=1,2,3] [N=16]
	@$(if $(EXP),,$(error say which: make explain EXP=baseline_cnn))$(CALL) explain $(EXP) $(if $(IDS),--ids '$(IDS)') $(if $(N),--count $(N))

eval: $(READY)  ## score a kept run on another labelled set: EXP=<name> ON=<folder|hf:..|competition> [MAP="a=b c="] [PART=test]
	@$(if $(and $(EXP),$(ON)),,$(error say which run, and on what: make eval EXP=baseline_cnn ON=<folder>))$(CALL) eval $(EXP) --on "$(ON)" \
	  $(foreach pair,$(MAP),--map "$(pair)") $(if $(PART),--part "$(PART)") $(if $(NAME),--name $(NAME))

publish: $(READY)  ## push a kept run to the Hugging Face Hub: EXP=<name> REPO=<owner/name> [PRIVATE=1] [LICENSE=mit]
	@$(if $(and $(EXP),$(REPO)),,$(error say what and where: make publish EXP=baseline_cnn REPO=<owner>/<name>))$(CALL) publish $(EXP) --repo $(REPO) \
	  $(if $(PRIVATE),--private) $(if $(LICENSE),--license $(LICENSE))

predict: $(READY)  ## say what a run or a blend sees in pictures: RUN=<run|best|strict|hash> OF="a.jpg folder" [FACES=1] [ALL=1] [JSON=1] [FOLD=3] [ENGINE=onnx]
	@$(if $(and $(RUN),$(OF)),,$(error say who, and of what: make predict RUN=best OF="a.jpg b.png"))$(CALL) predict $(RUN) $(OF) \
	  $(if $(FACES),--faces) $(if $(ALL),--show-all) $(if $(JSON),--json) $(if $(FOLD),--fold $(FOLD)) $(if $(ENGINE),--engine $(ENGINE))

export: $(READY)  ## write a run or a blend as one file, checked against PyTorch: RUN=<run|best|strict|hash> [FORMAT=onnx|torchscript] [OUT=] [FOLD=0] [VIEWS=identity] [INT8=1]
	@$(if $(RUN),,$(error say which: make export RUN=best))$(CALL) export $(RUN) $(if $(FORMAT),--format $(FORMAT)) $(if $(OUT),--out "$(OUT)") \
	  $(if $(FOLD),--fold $(FOLD)) $(if $(VIEWS),--views $(VIEWS)) $(if $(INT8),--int8)

serve: $(READY)  ## answer for faces over HTTP, with a page to try it and a mirror: [RUN=<run|best|strict|hash>] [PORT=8000] [HOST=127.0.0.1] [ENGINE=onnx]
	@$(CALL) serve $(RUN) $(if $(PORT),--port $(PORT)) $(if $(HOST),--host $(HOST)) $(if $(ENGINE),--engine $(ENGINE))

mirror: $(READY)  ## an emoji on each face of the camera, or of a video: [RUN=<run|best|strict>] [CAMERA=0] [SOURCE=in.mp4 [WRITE=out.mp4]]
	@$(CALL) mirror $(RUN) $(if $(CAMERA),--camera $(CAMERA)) $(if $(SOURCE),--source "$(SOURCE)") $(if $(WRITE),--write "$(WRITE)")

weights: $(READY)  ## carry weights between machines by their hash: TO=<folder|wandb:entity/project> pushes, FROM=<..> fetches, neither lists; [EXP=a,b]
	@$(if $(and $(TO),$(FROM)),$(error one after the other: make weights TO=<..>, or FROM=<..>))$(CALL) weights $(if $(TO),push,$(if $(FROM),pull,list)) \
	  $(subst $(COMMA), ,$(EXP)) $(if $(TO),--to "$(TO)") $(if $(FROM),--from "$(FROM)")

kernel: $(READY)  ## pack a run or a blend into a folder that predicts offline: RUN=<run|best|strict|hash> [OUT=<folder>] [WHEELS=1]
	@$(if $(RUN),,$(error say which: make kernel RUN=best))$(CALL) kernel $(RUN) $(if $(OUT),--out "$(OUT)") $(if $(WHEELS),--wheels)

# TRACK of the environment is where runs are followed; here it is told on the command line alone.
submit: $(READY)  ## blend the kept runs into submissions/submission.csv, and strict.csv without external data: [COMP=aspicv] [RUNS=a,b] [METHOD=stack] [PRIOR=train|test] [TRACK=best|strict] [KAGGLE=<slug> MESSAGE= FORCE=1]; or record a score: SCORE=0.64|kaggle [IMAGES=30%] [OF=<hash>]
	@$(CALL) submit --comp $(COMP) $(if $(RUNS),--runs $(RUNS)) $(if $(METHOD),--method $(METHOD)) $(if $(PRIOR),--prior $(PRIOR)) $(if $(findstring command,$(origin TRACK)),--track "$(TRACK)") \
	  $(if $(SCORE),--score "$(SCORE)") $(if $(IMAGES),--images "$(IMAGES)") $(if $(OF),--of "$(OF)") $(if $(KAGGLE),--kaggle "$(KAGGLE)") $(if $(MESSAGE),--message "$(MESSAGE)") $(if $(FORCE),--force)

submissions: $(READY)  ## list the submissions, what was expected and what they scored: [COMP=aspicv] [JSON=1]
	@$(CALL) submissions --comp $(COMP) $(if $(JSON),--json)

sync: $(READY)  ## send to W&B what runs kept on disk: [EXP=<name>]
	@$(CALL) sync $(EXP)

test: $(READY)  ## what CI runs: lint, types, layers and all tests
	@$(MAKE) --no-print-directory lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY)  ## ruff, mypy, import-linter, and every experiment file
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	@$(CALL) check

bench: $(READY)  ## speed as ratios: an epoch against its bare arithmetic, the blend, the checks
	@$(BIN)/python tests/bench.py

clean:  ## delete caches and smoke runs; runs, data and .venv stay
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist oof/.smoke
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
