"""One pruning experiment: dense network -> Taylor scores -> smaller network -> fine-tuning, in one results folder.

    python run_single_experiment.py
    python run_single_experiment.py --model vgg16 --pruning-percentage 30 --taylor-order 2 \
        --fine-tune-epochs 5 --data-path imagenet-mini
    torchrun --nproc-per-node 2 run_single_experiment.py --model resnet50 --data-path imagenet-mini
    python run_single_experiment.py --resume runs/run_single_experiment-vgg16    # an interrupted run
"""

from taylor_pruning.interruption import ended_by_ctrl_c

with ended_by_ctrl_c():  # importing torch takes seconds
    import dataclasses
    import sys
    from pathlib import Path

    import torch

    from EnhancedPruning import EnhancedPruning, PruningResult, save_pruned
    from taylor_pruning.distributed import barrier, is_main
    from taylor_pruning.experiment.arguments import parse
    from taylor_pruning.experiment.command import Command, ExperimentTask
    from taylor_pruning.experiment.export import check_exporter, export_model
    from taylor_pruning.experiment.models import BuiltModel
    from taylor_pruning.experiment.pruned_file import load_pruned_and_extra
    from taylor_pruning.experiment.run import run_guarded
    from taylor_pruning.experiment.setup import Experiment, environment, prepare, progress, warn_of_chance
    from taylor_pruning.report.closing import experiment_closing
    from taylor_pruning.report.experiment_plots import write_experiment_plots
    from taylor_pruning.report.json_files import read_json, write_json
    from taylor_pruning.report.tables import rounds_table, summary_table

DESCRIPTION = """Prune one network by Taylor scores, fine-tune it and report.

  %(prog)s
  %(prog)s --model vgg16 --pruning-percentage 30 \\
      --taylor-order 2 --fine-tune-epochs 5 --data-path imagenet-mini
"""
ROUNDS, PRUNED, CHECKPOINT = "rounds_checkpoint.pt", "pruned_before_fine_tuning.pt", "fine_tuning_checkpoint.pt"


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment that the command line describes; returns the exit code."""
    with ended_by_ctrl_c():
        command = parse(ExperimentTask, DESCRIPTION, argv)
    return run_guarded(command, run)


def run(command: Command, folder: Path, device: torch.device) -> int:
    finished = read_json(folder / "results.json", {"stages": list}) is not None and not (folder / PRUNED).exists()
    barrier()
    if command.run.resume and finished:
        if is_main():
            print(f"the run in {folder} is finished; nothing was changed")
        return 0
    for kind in command.task.export:  # before the hours of a run
        check_exporter(kind)
    experiment = prepare(command, folder, device, [command.task.pruning_percentage])
    pruning = EnhancedPruning(**experiment.pipeline_arguments(command.pruning.seed))
    result = pruned(command, pruning, experiment, folder)
    result = pruning.fine_tune(result, checkpoint=folder / CHECKPOINT, resume=command.run.resume is not None)
    if is_main():
        report(command, experiment, result, folder)
    return 0


def pruned(command: Command, pruning: EnhancedPruning, experiment: Experiment, folder: Path) -> PruningResult:
    """The pruned network before fine-tuning; kept on disk, so that an interrupted run need not prune again."""
    kept = folder / PRUNED
    if command.run.resume and kept.exists():
        model, values = load_pruned_and_extra(kept, device=experiment.device, remedy="remove the file to prune again")
        return PruningResult(model=model, **values)
    warn_of_chance(pruning.dense_stage(), experiment.data)
    result = pruning.prune(
        command.task.pruning_percentage,
        command.task.taylor_order,
        command.task.use_gradient_flow,
        oracle_samples=command.task.oracle_samples,
        checkpoint=folder / ROUNDS,
        resume=command.run.resume is not None,
    )
    if is_main():
        save(kept, result, experiment.built)
        if progress(command):
            print(curvature_line(result.curvature))
    return result


def save(path: Path, result: PruningResult, built: BuiltModel) -> None:
    save_pruned(
        path,
        result.model,
        name=built.name,
        num_classes=built.num_classes,
        image_size=built.image_size,
        extra=result.as_dict(),
    )


def curvature_line(curvature: dict) -> str:
    """What the derivatives of the scores were computed with, in one line."""
    if curvature["path"] is None:
        return f"curvature: none ({curvature['reason']})"
    sampled = (
        f"; {100 * curvature['sampled']:.3g} % of it is estimated from random directions"
        if curvature["sampled"]
        else ""
    )
    return f"curvature: {curvature['path']} ({curvature['reason']}){sampled}"


def report(command: Command, experiment: Experiment, result: PruningResult, folder: Path) -> None:
    """Writes the results folder and prints what a user wants to know first."""
    data = experiment.data
    results = {
        "arguments": command.as_dict(),
        "environment": environment(experiment.device),
        "model": {k: v for k, v in vars(experiment.built).items() if k != "model"},
        "data": {k: getattr(data, k) for k in ("name", "classes", "image_size", "mean", "std")}
        | {"skipped": list(map(str, data.skipped))},
        **result.as_dict(),
    }  # fmt: skip
    save(folder / "pruned_model.pt", dataclasses.replace(result, scores={}, oracle=None, gradient_flow=None),
         experiment.built)  # fmt: skip
    write_json(folder / "results.json", results)
    if result.gradient_flow:
        write_json(folder / "gradient_flow.json", result.gradient_flow)
        findings = result.gradient_flow["reports"]["dense"]["findings"]
        print("\n".join(findings[:10] or ["gradient flow: nothing remarkable"]))
    write_experiment_plots(results, folder)
    for kind in command.task.export:
        model = result.model.cpu().eval()
        example = experiment.calibration(2, command.pruning.seed)[0][0][:2].cpu()
        export_model(model, example, folder / f"pruned_model.{kind}", kind)
    for name in (ROUNDS, CHECKPOINT, PRUNED):  # the last one's absence marks a finished run
        (folder / name).unlink(missing_ok=True)
    print(rounds_table(results["rounds"]))
    print(f"\n{summary_table(results)}")
    print(f"\n{experiment_closing(results, folder)}")


if __name__ == "__main__":
    sys.exit(main())
