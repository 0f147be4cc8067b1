#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, benchmarks, two processes on one GPU, and a whole run.
#
#     bash benchmarks/gpu_check.sh OUTPUT_FOLDER [IMAGE_FOLDER]
#
# OUTPUT_FOLDER gets one text file a part; IMAGE_FOLDER (train/ and val/ or test/, one folder a class in each), for instance
# CIFAR-10, is pruned and fine-tuned with vgg16_bn as documented. Every part has its own time limit and fails alone; a
# summary stands at the end. At most 8 minutes on one H100 with 16 cores; no network; PYTHON=... chooses the interpreter.
# Timed parts have the machine for themselves; only then the test suite begins, which runs beside the last parts.
set -u
out=$(mkdir -p "${1:?give an output folder}" && cd "$1" && pwd)
images=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$out/cache"
: >"$out/summary.txt"

part() { # part NAME SECONDS COMMAND...: runs it, its output to NAME.txt, one line to the summary
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    case $code in 0) verdict=passed ;; 124 | 137) verdict="ran out of its $limit s" ;; *) verdict="failed with code $code" ;; esac
    echo "$name: $verdict, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

suite() { # one process a test file, eight at a time; fails if one of them does
    export CUDA_VISIBLE_DEVICES=
    ls -S tests/*/test_*.py tests/test_*.py 2>/dev/null |
        xargs -P 8 -I FILE sh -c '"$0" -m pytest -q -p no:cacheprovider --tb=short FILE >"$1/suite/$(basename FILE).txt" 2>&1
            code=$?; [ $code -eq 0 ] || [ $code -eq 5 ] || { echo "FILE: code $code" && exit 1; }' "$python" "$out"
}
export -f suite
export python out
mkdir -p "$out/suite"

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" | tee -a "$out/summary.txt"

part speed_256 75 "$python" benchmarks/training_speed.py --device cuda --images 50000 --batch-sizes 256 --repeats 3
part speed_other 75 "$python" benchmarks/training_speed.py --device cuda --images 20480 --batch-sizes 64 1024 --repeats 2
part scoring 40 "$python" benchmarks/scoring_cost.py --device cuda --images 1024 --batch-size 256 --repeats 2
part scoring_repairs 40 "$python" benchmarks/scoring_cost.py --device cuda --images 1024 --batch-size 256 --repeats 2 --repairs
part compensation 40 "$python" benchmarks/compensation_cost.py --device cuda --images 1000 --repeats 2

part suite 190 bash -c suite &
suite_process=$!
part gpu_tests 70 "$python" -m pytest -q -p no:cacheprovider tests/training
part two_processes 30 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/sharded_ranking.py --device cuda
if [ -n "$images" ]; then
    part single_run 110 "$python" run_single_experiment.py --model vgg16_bn --pruning-percentage 30 --taylor-order 2 \
        --fine-tune-epochs 5 --data-path "$images" --output-dir "$out/run"
fi
wait "$suite_process"

echo
for file in speed_256 speed_other scoring scoring_repairs compensation two_processes gpu_tests; do
    echo "== $file" && tail -n 12 "$out/$file.txt"
done
echo "== suite" && cat "$out/suite.txt" && grep -hE "^(FAILED|ERROR)" "$out"/suite/*.txt | head -n 40
[ -n "$images" ] && echo "== single_run" && tail -n 12 "$out/single_run.txt"
echo && cat "$out/summary.txt" && echo "$SECONDS s in all"
! grep -qE "failed|ran out" "$out/summary.txt"
