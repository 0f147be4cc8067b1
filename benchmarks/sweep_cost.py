"""What a sweep costs over the same experiments one by one.

    python benchmarks/sweep_cost.py --pruning-percentages 30 50 --taylor-orders 1 2 3 --fine-tune-epochs 1

Wall-clock seconds of run_enhanced_pruning.py and of run_single_experiment.py at every percentage and order, in turn.
Further arguments go to both. The embedded data's dense network is trained before, so that both find it.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(script, arguments, folder):
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), "--quiet", "--output-dir", str(folder), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruning-percentages", type=float, nargs="+", default=[30, 50])
    parser.add_argument("--taylor-orders", type=int, nargs="+", default=[1, 2, 3])
    arguments, shared = parser.parse_known_args()
    percentages, orders = arguments.pruning_percentages, arguments.taylor_orders
    single = "run_single_experiment.py"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds(single, ["--pruning-percentage", percentages[0], *shared], folder / "warm-up")
        sweep = seconds("run_enhanced_pruning.py", ["--pruning-percentages", *percentages,
                        "--taylor-orders", *orders, *shared], folder / "sweep")  # fmt: skip
        print(f"sweep of {len(percentages) * len(orders)} cells: {sweep:.0f} s", flush=True)
        total = 0.0
        for percentage, order in itertools.product(percentages, orders):
            total += seconds(single, ["--pruning-percentage", percentage, "--taylor-order", order, *shared],
                             folder / f"{percentage}-{order}")  # fmt: skip
        print(f"one by one: {total:.0f} s; sweep / one by one = {sweep / total:.2f}")


if __name__ == "__main__":
    main()
