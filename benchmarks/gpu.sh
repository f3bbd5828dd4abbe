#!/usr/bin/env bash
# All measurements on a GPU, unattended, in parts:
#
#     benchmarks/gpu.sh [part_minutes=30] [data=FOLDER_OF_CIFAR100] [teacher=WEIGHTS_OF_RESNET32X4] [seeds=3]
#         [device=cuda]
#
# A call works for at most part_minutes, and ends with exit code 75 if something is left: call it again, with the same
# words, until it ends otherwise. What is done is known by its output in benchmarks/results/DEVICE; a measurement that
# was cut is made anew, a training that was cut is resumed. What fails, or takes longer than a whole part, is passed
# over: its output lies in benchmarks/results/DEVICE/failed, and the last call names it and ends with exit code 1.
# Remove that folder to try again.
#
# Measured are, what matters most first: a step of KD and VRM in each precision, each option of a step against
# the step without it, the tests that need a GPU, views, relations, the usual loop, the teacher's cache,
# streams and packs, a step of every method; and, given data, training over 240 epochs: the teacher (if no teacher is
# given), then VRM and KD in each precision with each seed, compiled, with channels last or both if the steps of VRM
# were fastest so. Then their table with mean and sd: accuracy in bfloat16 and TF32
# against float32.
#
# device=cpu makes everything tiny, on the digits, to try the script itself: that takes minutes and measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

part_minutes=30 data="" teacher="${TEACHER:-}" seeds=3 device=cuda
for word in "$@"; do
  case "$word" in
    part_minutes=* | data=* | teacher=* | seeds=* | device=*) declare "${word%%=*}=${word#*=}" ;;
    *) echo "unknown word $word; known: part_minutes= data= teacher= seeds= device=" >&2; exit 2 ;;
  esac
done
for number in "$part_minutes" "$seeds"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "part_minutes and seeds are whole numbers from 1, not $number" >&2; exit 2; }
done
case "$device" in cuda | cpu) ;; *) echo "device=$device: give cuda or cpu" >&2; exit 2 ;; esac
if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif [ -x .venv/bin/python ]; then python=.venv/bin/python
else python=python3; fi
deadline=$((SECONDS + part_minutes * 60))
worked="" # whether this call has done something

name=$("$python" -c '
import sys, torch
from vrm.engine.devices import device_name
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("device=cuda: no CUDA device is visible here")
words = device_name(torch.device(sys.argv[1])).lower()
print("-".join("".join(c if c.isalnum() else " " for c in words).split()))' "$device")
out=${RESULTS:-benchmarks/results}/$name
runs=${RUNS:-runs}/$name
mkdir -p "$out" "$runs"

left() { echo $((deadline - SECONDS)); }
stop() { echo "time is up before $1: call again to go on"; exit 75; }

# wants NAME SECONDS: stop, unless so many are left.
wants() {
  if [ "$2" -ge $((part_minutes * 60)) ]; then
    echo "$1 wants $2 seconds: give part_minutes=$(($2 / 60 + 1)) or more" >&2
    exit 2
  fi
  [ "$(left)" -gt "$2" ] || stop "$1"
}
vrm=("$python" -c 'from vrm.cli import main; main()')

# failing NAME WHY LOG: note it, and go on with what is next.
failing() {
  mkdir -p "$out/failed"
  mv "$3" "$out/failed/$1.log"
  echo "$1 failed ($2): $out/failed/$1.log" >&2
}

# measure FILE SECONDS COMMAND..: make $out/FILE, if it is not there, by a command that writes to the path OUT; it wants
# so many seconds to be left, and gets no more than are.
measure() {
  local name=$1 needed=$2; shift 2
  if [ -e "$out/$name" ] || [ -e "$out/failed/$name.log" ]; then return 0; fi
  wants "$name" "$needed"
  echo "== $name"
  local partial="$out/.partial-$name" log="$out/.log-$name" code=0
  rm -f "$partial"
  timeout --signal=TERM --kill-after=30 "$(left)" "${@//OUT/$partial}" > "$log" 2>&1 || code=$?
  tail -n 40 "$log"
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    if [ -n "$worked" ]; then stop "the end of $name"; fi
    failing "$name" "it takes longer than a part of $part_minutes minutes" "$log"
  elif [ "$code" != 0 ] || [ ! -e "$partial" ]; then
    failing "$name" "exit code $code" "$log"
  else
    mv "$partial" "$out/$name"
    rm -f "$log"
  fi
  worked=yes
}

# train RUN WORDS..: start a run or resume it; it stops in time, with a checkpoint. Its records go to the results.
train() {
  local name=$1 run=$runs/$1 log="$out/.log-$1" record; shift
  if [ -e "$out/failed/$name.log" ]; then return 0; fi
  if [ ! -e "$run/model.json" ]; then
    wants "$name" "$((2 * patience))"
    echo "== $name"
    worked=yes
    local command=("$@" "run=$run") code=0
    [ ! -e "$run/config.yaml" ] || command=(resume "$run")
    timeout --signal=TERM --kill-after=60 "$(($(left) - patience / 2))" "${vrm[@]}" "${command[@]}" > "$log" 2>&1 ||
      code=$?
    tail -n 40 "$log"
    if [ "$code" = 75 ] || [ "$code" = 124 ]; then stop "the end of $name"; fi
    if [ "$code" != 0 ]; then failing "$name" "exit code $code" "$log"; return 0; fi
    rm -f "$log"
  fi
  mkdir -p "$out/$name"
  for record in config.yaml environment.json metrics.jsonl timings.jsonl teacher.json taps.json model.json; do
    [ ! -e "$run/$record" ] || cp "$run/$record" "$out/$name/"
  done
}

# bench FILE SECONDS WORDS..: a record of vrm bench step.
bench() {
  local name=$1 needed=$2; shift 2
  measure "$name" "$needed" "${vrm[@]}" bench step "$recipe" "pair=$pair" "device=$device" "${sizes[@]}" "$@" out=OUT
}

# finish TEXT: the end of all; exit code 1 if something failed.
finish() {
  if [ ! -d "$out/failed" ]; then echo "$1: $out"; exit 0; fi
  echo "$1 but what failed: $(cd "$out/failed" && echo *) (in $out/failed; remove it to try again)" >&2
  exit 1
}

if [ "$device" = cpu ]; then
  recipe=digits pair=resnet8/resnet8 precisions=(float32 bfloat16) methods='[ce,kd,vrm]' seeds=1
  sizes=(steps=1 rounds=1 batch_size=8 data.labels_per_class=2 memory=false threads=1)
  common=(data.labels_per_class=10 batch_size=10 threads=1) short=(epochs=6)
  options='[ema=0.999,accumulate=2]' loop=(--steps 1 --rounds 1 --workers 1) small=(samples=64 batch_size=8 threads=1)
  views=(--images 64 --repeats 1) relations=(--sizes 16x10 --seconds 0.1 --threads 1)
  cache=(--steps 2 --epochs 2 --batch 8) throughput=(--images 40 --batch 8 --workers 0 1)
  patience=10
else
  recipe=cifar100 pair=resnet32x4/resnet8x4 precisions=(bfloat16 tf32 float32) methods=all
  sizes=(steps=50 rounds=10)
  common=("data.root=$data") short=()
  options='[capture=off,channels_last=true,data.placement=host,precision=float16,ema=0.999,accumulate=2'
  options+=',deterministic=true]'
  loop=(--steps 100 --rounds 7 --workers 8) small=()
  views=(--images 4096) relations=(--seconds 0.5)
  cache=(--steps 200 --epochs 4 --precision bfloat16) throughput=(--workers 0 4 16)
  patience=60
fi

for precision in "${precisions[@]}"; do
  bench "step-$precision.json" $((2 * patience)) 'methods=[kd,vrm]' against=naive "precision=$precision"
done
bench step-options.json $((4 * patience)) 'methods=[kd,vrm]' "against=$options" "precision=${precisions[0]}"
if [ "$device" = cuda ]; then
  bench step-compile.json $((7 * patience)) 'methods=[kd,vrm]' 'against=[compile=true,compile=true+channels_last=true]' \
    "precision=${precisions[0]}"
  measure relations_compiled.json $((3 * patience)) "$python" benchmarks/relations.py --device cuda --sizes 64x100 \
    --seconds 0.5 --compile --out OUT
  measure tests-training.xml $((5 * patience)) "$python" -m pytest -q -m cuda -n 4 tests/engine tests/runs --junitxml=OUT
  measure tests-others.xml $((3 * patience)) "$python" -m pytest -q -m cuda -n 4 tests --ignore=tests/engine \
    --ignore=tests/runs --junitxml=OUT
fi
measure views.json $((2 * patience)) "$python" benchmarks/views.py --device "$device" "${views[@]}" --out OUT
measure relations.json $((3 * patience)) "$python" benchmarks/relations.py --device "$device" "${relations[@]}" \
  --out OUT
for precision in "${precisions[@]}"; do
  measure "reference_loop-$precision.json" $((3 * patience)) "$python" benchmarks/reference_loop.py "pair=$pair" \
    "precision=$precision" "device=$device" "${small[@]}" "${loop[@]}" --out OUT
done
measure teacher_cache.json $((3 * patience)) "$python" benchmarks/teacher_cache.py --device "$device" \
  --teacher "${pair%/*}" --student "${pair#*/}" "${cache[@]}" --out OUT
measure throughput.json $((4 * patience)) "$python" benchmarks/throughput.py --device "$device" "${throughput[@]}" \
  --out OUT
for precision in "${precisions[@]}"; do
  bench "step-all-$precision.json" $((5 * patience)) "methods=$methods" "precision=$precision"
done

if [ "$device" = cuda ] && [ -z "$data" ]; then finish "measured is all but training (goes on with data=FOLDER)"; fi
if [ -n "$teacher" ]; then
  taught=("teacher=${pair%/*}" "teacher.weights=$teacher")
else
  train teacher train "$recipe" "model=${pair%/*}" "device=$device" "precision=${precisions[-1]}" "${common[@]}" \
    "${short[@]}"
  [ -e "$runs/teacher/model.json" ] || finish "measured is all but what needs a teacher"
  taught=("teacher=$runs/teacher/")
fi
[ "$device" = cuda ] || taught+=(teacher.allow_weak=true)
mapfile -t fastest < <("$python" -c '
import json, sys
from pathlib import Path
found = [(float("inf"), "")]
for name in ("step-" + sys.argv[2], "step-options", "step-compile"):
    path = Path(sys.argv[1], name + ".json")
    for row in json.loads(path.read_text()).get("rows", []) if path.is_file() else []:
        words = set(filter(None, (row["change"] or "").split("+")))
        if row["method"] == "vrm" and words <= {"channels_last=true", "compile=true"}:
            found.append((row["median_ms"], "\n".join(sorted(words))))
print(min(found)[1])' "$out" "${precisions[0]}")
[ -n "${fastest[0]}" ] || fastest=()
for ((seed = 0; seed < seeds; seed++)); do
  for method in vrm kd; do
    for precision in "${precisions[@]}"; do
      train "$method-$precision-$seed" distill "$recipe" "student=${pair#*/}" "${taught[@]}" "method=$method" \
        "precision=$precision" "device=$device" "seed=$seed" "${fastest[@]}" "${common[@]}" "${short[@]}"
    done
  done
done
"$python" - "$out" "$runs" <<'PYTHON'
import sys
from pathlib import Path

from rich.console import Console

from vrm.report import summarise, table, verdict
from vrm.runs.folder import read_run

out, runs = map(Path, sys.argv[1:])
finished = [path for path in sorted(runs.iterdir()) if path.name.count("-") == 2 and (path / "model.json").is_file()]
records = [read_run(path) for path in finished]
rows = summarise(records, label=lambda record: " ".join(record.path.name.split("-")[:2]))
console = Console(record=True, width=120)
console.print(table(rows))
for line in verdict(rows):
    console.print(line, highlight=False, markup=False)
(out / "accuracy.txt").write_text(console.export_text(), encoding="utf-8")
PYTHON
finish "all is measured"
