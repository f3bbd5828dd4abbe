#!/usr/bin/env bash
# All measurements on a GPU, unattended, in parts that can be called again:
#
#     benchmarks/gpu.sh [part_minutes=8] [data=FOLDER_WITH_CIFAR100] [teacher=RESNET32X4_WEIGHTS] [device=cuda]
#
# A call works for at most about part_minutes, then stops with exit code 75 if something is left; the next call goes on. What
# is done is known by its output under benchmarks/results/DEVICE; runs of training stop with a checkpoint and are resumed.
# Without data= the parts that train are left out; without teacher= one is trained first. device=cpu makes everything tiny, to
# try the script itself.
set -euo pipefail
cd "$(dirname "$0")/.."
part_minutes=8 data="" teacher="" device=cuda
for word in "$@"; do
  case "$word" in
    part_minutes=*|data=*|teacher=*|device=*) declare "${word%%=*}=${word#*=}" ;;
    *) echo "unknown word $word; known: part_minutes= data= teacher= device=" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python}
deadline=$((SECONDS + part_minutes * 60))
name=$($python -c "
import sys, torch
from vrm.training import device_name
name = device_name(torch.device(sys.argv[1]))
print('-'.join(''.join(c if c.isalnum() else ' ' for c in name.lower()).split()))" "$device")
out=benchmarks/results/$name
mkdir -p "$out"

left() { echo $((deadline - SECONDS)); }
stop() { echo "time is up before: $1; call again to go on"; exit 75; }

# measure OUTPUT SECONDS COMMAND..: run the command unless its output is there; wants so many seconds left.
measure() {
  local file=$out/$1 needed=$2; shift 2
  [ -e "$file" ] && return 0
  [ "$(left)" -lt "$needed" ] && stop "$file"
  echo "== $file"
  "$@"
  [ -e "$file" ] || { echo "$file was not written" >&2; exit 1; }
}

# train RUN WORDS..: start or resume a run; stops it in time with a checkpoint.
train() {
  local run=$1; shift
  [ -e "$run/model.json" ] && return 0
  [ "$(left)" -lt 60 ] && stop "$run"
  echo "== $run"
  local command=("$@")
  [ -e "$run/config.yaml" ] && command=(resume "$run")
  local code=0
  timeout --signal=TERM --kill-after=60 "$(($(left) - 30))" "$python" -c "from vrm.cli import main; main()" "${command[@]}" || code=$?
  [ -e "$run/model.json" ] && return 0
  { [ "$code" = 124 ] || [ "$code" = 75 ]; } && stop "$run"
  exit "$code"
}
vrm() { "$python" -c "from vrm.cli import main; main()" "$@"; }

if [ "$device" = cpu ]; then
  pair=resnet20/resnet8 precisions=(float32) steps=1 rounds=1 epochs=1 methods='[kd]' batch=8
else
  pair=resnet32x4/resnet8x4 precisions=(float32 tf32 bfloat16) steps=50 rounds=7 epochs=240 methods=all batch=64
fi

if [ "$device" != cpu ]; then
  measure tests.txt 200 bash -c "$python -m pytest -q -m cuda -p no:cacheprovider tests 2>&1 | tee $out/tests.partial && mv $out/tests.partial $out/tests.txt"
  measure relations.json 120 "$python" benchmarks/relations.py --device cuda --out "$out/relations.json"
  measure views.json 60 "$python" benchmarks/views.py --out "$out/views.json"
  measure teacher_cache.json 120 "$python" benchmarks/teacher_cache.py --device cuda --precision bfloat16 --steps 200 --epochs 4 --out "$out/teacher_cache.json"
fi
for precision in "${precisions[@]}"; do
  measure "step-$precision.json" 240 vrm bench step cifar100 "pair=$pair" "methods=$methods" "precision=$precision" \
    "batch_size=$batch" "steps=$steps" "rounds=$rounds" "device=$device" memory=true "out=$out/step-$precision.json"
done
if [ "$device" != cpu ]; then
  measure step-options.json 240 vrm bench step cifar100 "pair=$pair" 'methods=[kd,vrm]' precision=bfloat16 \
    'against=[explicit,compile=true,channels_last=true,capture=off]' "steps=$steps" "rounds=$rounds" "out=$out/step-options.json"
fi
measure reference_loop.json 180 "$python" benchmarks/reference_loop.py --device "$device" --pair "$pair" --batch "$batch" \
  --steps "$steps" --rounds "$rounds" --out "$out/reference_loop.json"

if [ -n "$data" ]; then
  common=("data.root=$data" "device=$device" "epochs=$epochs") weak=()
  [ "$device" = cpu ] && common+=("steps=2" "batch_size=$batch" "schedule.milestones=[]") weak=(teacher.allow_weak=true)
  if [ -z "$teacher" ]; then
    train runs/gpu/teacher train cifar100 "model=${pair%/*}" "${common[@]}" run=runs/gpu/teacher
    taught=("teacher=runs/gpu/teacher/")
  else
    taught=("teacher=${pair%/*}" "teacher.weights=$teacher")
  fi
  for precision in "${precisions[@]}"; do
    for method in kd vrm; do
      for seed in 0 1 2; do
        run=runs/gpu/$method-$precision-$seed
        train "$run" distill cifar100 "student=${pair#*/}" "${taught[@]}" "method=$method" "precision=$precision" "seed=$seed" "${common[@]}" "${weak[@]}" "run=$run"
        mkdir -p "$out/${run##*/}"
        cp "$run"/{config.yaml,environment.json,metrics.jsonl,timings.jsonl,model.json} "$out/${run##*/}/"
      done
    done
  done
fi
echo "all is measured: $out"
