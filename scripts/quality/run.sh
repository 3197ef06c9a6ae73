#!/usr/bin/env bash
# Make every cell of the quality tables, then the tables and the picture: scripts/quality/run.sh MODELS WORK
#
# MODELS holds tinylm-7m, a trained causal language model, and texts/{perl,cheader}.{train,test}.jsonl with rows of text.
# The script makes the encoder and its task itself (scripts/quality/section_task.py). It takes about nine hours of one
# core. Results in WORK are not made again: run it again to continue, or several times at once to share the work.
set -euo pipefail
models=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" HF_HUB_OFFLINE=1
python=(.venv/bin/python -W ignore)

task=$work/section-task
if [[ ! -f $task/held-out.jsonl ]]; then
  "${python[@]}" -m scripts.quality.section_task "$task"
  cat "$task/validation.jsonl" "$task/test.jsonl" >"$task/held-out.partial"
  mv "$task/held-out.partial" "$task/held-out.jsonl"
fi

language() { # TASK CELLS: 100 steps of 4 x 128 tokens at 4e-3; exact steps of 32 rows at 5e-3, alone at 1.2e-2
  local name=$1 texts=$models/texts
  shift
  "${python[@]}" -m scripts.quality.cells --name "$name" --work "$work" --model "$models/tinylm-7m" \
    --train "$texts/$name.train.jsonl" --held-out "$texts/$name.test.jsonl" --validation-rows 40 --test-rows 100 \
    --batch-size 4 "$@"
}

encoder() { # CELLS: 100 steps of 16 x 64 tokens at 2e-3; exact steps of 32 rows at 2e-3, alone at 4e-3
  "${python[@]}" -m scripts.quality.cells --name sections --work "$work" --model "$task/model" \
    --train "$task/train.jsonl" --held-out "$task/held-out.jsonl" --validation-rows 328 --choose-rows 120 \
    --test-rows 714 --batch-size 16 --learning-rate 2e-3 --max-length 64 --polish-rate 2e-3 --scratch-rate 4e-3 "$@"
}

cells=(qlora published:{0.5,0.25,0.12} int8:0.5 {bf16,int8,nf4}:{0.25,0.12,0.06} nf4:0.135 {nf4,published}-refined:{0.25,0.12}
  nf4-refined:0.06 {int8,published}-refined:0.5)
other=({plain-svd,dropped}:{0.5,0.25,0.12} {sequential,rescaled,published+elastic,nf4+sublayer}:0.25)
exact=(scratch published:{0.5,0.25,0.12})
for seed in 0 1 2; do
  language perl --seeds $seed --emulators "${cells[@]}" "${other[@]}" --polish "${exact[@]}"
  language cheader --seeds $seed --emulators published:{0.5,0.25,0.12} int8:0.5 nf4:{0.25,0.12} nf4-refined:0.12
  encoder --seeds $seed --emulators "${cells[@]}" "${other[@]}" --polish "${exact[@]}"
done
"${python[@]}" -m scripts.quality.tables "$work/results.jsonl" --plot "$work/quality.png"
"${python[@]}" -m scripts.quality.tables "$work/results.jsonl" --summary
