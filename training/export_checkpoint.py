"""A checkpoint of a running or interrupted training as a model folder, on CPU, in one process.

    python training/export_checkpoint.py --checkpoint output/stage2/checkpoints/step_00001000 --output_dir step-1000

The folder is like the final/ of a finished run. It takes memory for one fp32 copy of the model.
"""

from pathlib import Path

from vistoken.cli import command_parser, run_command
from vistoken.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step_* folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="model folder to write")
    args = parser.parse_args(argv)
    export(args.checkpoint, args.output_dir)
    return 0


def export(checkpoint: Path, target: Path) -> None:
    import torch

    from training.assemble import open_model
    from training.models.folder import TRAINED_WITH, save_folder
    from training.parallel import process_group
    from training.state import read_stored, read_tensors

    _, _, config = read_stored(checkpoint)
    if target.exists():
        raise UserError(f"{target} exists; name a folder that does not")
    model, folder = open_model(config, resumed=True)
    tensors = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    with process_group("cpu"):
        read_tensors(checkpoint, {"model": tensors})
    told = folder.config | {TRAINED_WITH: config.told()}
    save_folder(target, tensors.items(), sum(t.nbytes for t in tensors.values()), told, folder.companions())
    print(f"the model is in {target}")


if __name__ == "__main__":
    run_command(main)
