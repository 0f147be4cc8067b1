#!/usr/bin/env bash
# What needs a GPU, in one go of at most 4 minutes: tests, training speed, the cost of a round, two processes on one GPU.
#
#     bash benchmarks/gpu_check.sh OUTPUT_FOLDER
#
# Every part has its own time limit and fails alone. Its lines appear as they come and are kept in OUTPUT_FOLDER, so that a
# part that is cut off keeps what it has measured; a summary stands at the end. PYTHON=... chooses the interpreter.
set -u
out=$(mkdir -p "${1:?give an output folder}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 XDG_CACHE_HOME="$out/cache"
: >"$out/summary.txt"

part() { # part NAME SECONDS COMMAND...: runs it, its output to the screen and to NAME.txt, one line to the summary
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    case $code in 0) verdict=passed ;; 124 | 137) verdict="ran out of its $limit s" ;; *) verdict="failed with code $code" ;; esac
    echo "$name: $verdict, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" | tee -a "$out/summary.txt"

part tests 50 "$python" -m pytest -q -p no:cacheprovider tests/test_devices.py tests/test_memory.py \
    tests/training/test_cuda_graphs.py
part round_vgg 30 "$python" benchmarks/round_cost.py --device cuda --models vgg16_bn --images 1000 --batch-size 100
part round_resnet 40 "$python" benchmarks/round_cost.py --device cuda --models resnet50 --images 1000 --batch-size 100
part speed_256 45 "$python" benchmarks/training_speed.py --device cuda --images 50000 --batch-sizes 256 --repeats 1
part speed_other 45 "$python" benchmarks/training_speed.py --device cuda --images 20480 --batch-sizes 64 1024 --repeats 1
part two_processes 30 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/sharded_ranking.py --device cuda

echo && cat "$out/summary.txt" && echo "$SECONDS s in all"
! grep -qE "failed|ran out" "$out/summary.txt"
