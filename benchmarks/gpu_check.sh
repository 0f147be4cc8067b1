#!/usr/bin/env bash
# What needs a GPU, in one go of at most 10 minutes: tests, training speed, the cost of a round, a run, two processes.
#
#     bash benchmarks/gpu_check.sh OUTPUT_FOLDER [IMAGE_FOLDER]
#     DEVICE=cpu PATIENCE=5 bash benchmarks/gpu_check.sh OUTPUT_FOLDER    # tiny sizes, five times the limits: tries the script
#
# Every part has its own time limit and fails alone. Its lines appear as they come and are kept in OUTPUT_FOLDER, so that a
# part that is cut off keeps what it has measured; a summary stands at the end, and the exit code is 1 where a part failed.
# IMAGE_FOLDER (CIFAR-10 as train/ and test/) is for the documented single run; without one it takes the embedded images.
# PYTHON=... chooses the interpreter.
set -u
out=$(mkdir -p "${1:?give an output folder}" && cd "$1" && pwd)
run=(--fine-tune-epochs 1) # of run_single_experiment.py
[ -z "${2:-}" ] || run=(--model vgg16_bn --data-path "$(realpath "$2")" --pruning-percentage 50 --budget macs --train-epochs 5)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
device=${DEVICE:-cuda}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1 XDG_CACHE_HOME="$out/cache"
: >"$out/summary.txt"
failed=0

part() { # part NAME SECONDS COMMAND...: runs it, its output to the screen and to NAME.txt, one line to the summary
    local name=$1 limit=$(($2 * ${PATIENCE:-1})) start=$SECONDS code verdict
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    case $code in 0) verdict=passed ;; 124 | 137) verdict="ran out of its $limit s" ;; *) verdict="failed with code $code" ;; esac
    [ "$code" = 0 ] || failed=1
    echo "$name: $verdict, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

many=50000 some=20480 round="--images 1000 --batch-size 100" sizes="64 1024" epochs=3 pairs=1024 training=tests/training
if [ "$device" = cpu ]; then
    many=64 some=64 round="--images 8 --batch-size 4" sizes=16 epochs=2 pairs=16 training=tests/training/test_throughput.py
    run+=(--train-epochs 1)
fi
"$python" -c "import torch; d = '$device'; print(torch.__version__, torch.cuda.get_device_name() if d == 'cuda' else d)" |
    tee -a "$out/summary.txt"
speed=("$python" benchmarks/training_speed.py --device "$device" --epochs "$epochs" --repeats 1)

part tests 120 "$python" -m pytest -q -p no:cacheprovider tests/test_devices.py tests/test_memory.py $training
part round_vgg 40 "$python" benchmarks/round_cost.py --device "$device" --models vgg16_bn $round --whole
part round_resnet 50 "$python" benchmarks/round_cost.py --device "$device" --models resnet50 $round
part speed_256 60 "${speed[@]}" --images "$many" --batch-sizes 256 --distil
part speed_other 50 "${speed[@]}" --images "$some" --batch-sizes $sizes
part single_run 200 "$python" run_single_experiment.py --device "$device" --quiet --output-dir "$out/run-$$" "${run[@]}"
part two_processes 40 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/sharded_ranking.py \
    --device "$device" --images "$pairs" --batch-size "$((pairs / 8))"

echo && cat "$out/summary.txt" && echo "$SECONDS s in all"
exit "$failed"
