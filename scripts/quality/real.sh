#!/usr/bin/env bash
# Measure anchored training on models that people use, then make its table: scripts/quality/real.sh TEXTS WORK [PART...]
#
# TEXTS holds perl.{train,test}.jsonl with rows of text. The models come from the package index (scripts/real_models.py;
# `pip install gguf` first). PART is smollm2, gemma3 or sections, all by default. A cell takes 2 to 10 minutes of one
# core. Results in WORK are not made again: run it again to continue, or several times at once to share the work.
set -euo pipefail
texts=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
parts=("${@:3}")
[[ ${#parts[@]} -gt 0 ]] || parts=(smollm2 gemma3 sections)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" HF_HUB_OFFLINE=1
python=(.venv/bin/python -W ignore)

language() { # MODEL SEED CELLS: 30 steps of 4 x 96 tokens at 1e-3; 5 exact steps of 32 rows at the same rate
  local model
  model=$("${python[@]}" -m scripts.real_models "$1")
  "${python[@]}" -m scripts.quality.cells --name "$1-perl" --work "$work" --model "$model" --seeds "$2" \
    --train "$texts/perl.train.jsonl" --held-out "$texts/perl.test.jsonl" --validation-rows 24 --test-rows 48 \
    --steps 30 --batch-size 4 --max-length 96 --learning-rate 1e-3 \
    --polish-steps 5 --polish-rate 1e-3 --polish-starts uncorrected "${@:3}"
}

encoder() { # SEED CELLS: 100 steps of 16 x 64 tokens at 2e-3; 5 exact steps of 32 rows at the same rate
  local task=$work/section-task
  if [[ ! -f $task/held-out.jsonl ]]; then
    "${python[@]}" -m scripts.quality.section_task "$task"
    cat "$task/validation.jsonl" "$task/test.jsonl" >"$task/held-out.partial"
    mv "$task/held-out.partial" "$task/held-out.jsonl"
  fi
  "${python[@]}" -m scripts.quality.cells --name minilm-sections --work "$work" --model "$task/model" --seeds "$1" \
    --train "$task/train.jsonl" --held-out "$task/held-out.jsonl" --validation-rows 328 --choose-rows 120 \
    --test-rows 714 --batch-size 16 --learning-rate 2e-3 --max-length 64 \
    --polish-steps 5 --polish-rate 2e-3 --polish-starts uncorrected "${@:2}"
}

# What decides comes first: codes at less than half of QLoRA's bytes, anchored, against QLoRA.
deciding=({coded,coded+anchor10}:0.12 qlora qlora+anchor10 {coded+anchor10,coded}:0.145)
for seed in 0 1 2; do
  for part in "${parts[@]}"; do
    case $part in
      sections) encoder $seed --stages uncorrected --emulators "${deciding[@]}" ;;
      *) language "$part" $seed --stages uncorrected --emulators "${deciding[@]}" ;;
    esac
  done
done
# What a refinement adds to codes: on their own inputs, on the original's, and with gradients.
refined=(coded-refined{,+anchor10}:{0.12,0.145} coded-refined-{original,gradients}{,+anchor10}:0.12)
for part in "${parts[@]}"; do
  case $part in
    sections) encoder 0 --stages uncorrected --emulators "${refined[@]}" ;;
    *) language "$part" 0 --stages uncorrected --emulators "${refined[@]}" ;;
  esac
done
other=({coded,coded+anchor10}:0.2 {nf4,nf4+anchor10}:0.145)
for part in "${parts[@]}"; do
  after=(--stages uncorrected "limit 3" --emulators coded+anchor{30,10,3}:0.12 coded:0.12 --polish coded+anchor10:{0.12,0.145})
  case $part in
    sections)
      encoder 0 --stages uncorrected --emulators "${other[@]}"
      encoder 0 "${after[@]/anchor30/anchor100}"
      ;;
    *)
      language "$part" 0 --stages uncorrected --emulators "${other[@]}"
      language "$part" 0 "${after[@]}"
      ;;
  esac
done
"${python[@]}" -m scripts.quality.anchored "$work/results.jsonl"
