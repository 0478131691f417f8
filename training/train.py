"""Train on token files: UniToken in stage I (tower and adapter) and stage II (everything), or a language model.

One process, on a GPU or without one:
    python training/train.py --stage I --variant anyres --init_from ckpts/Lumina-mGPT-7B-512 --vit_from ckpts/SigLIP \\
        --data_config configs/data/stage1.yaml --output_dir output/stage1 --unmask_image_logits --checkpointing
All GPUs of a node (several nodes: add --nnodes, --node_rank, --master_addr, --master_port):
    torchrun --nproc_per_node 8 training/train.py ... --batch_size 4 --global_batch_size 128
On CPU, add --precision fp32.
A language model alone, of any kind that transformers knows, on text and image codes (exps/ILLUME-lm.sh):
    torchrun --nproc_per_node 8 training/train.py --variant lm --init_from ckpts/Qwen2.5-7B-Instruct \\
        --tokenizer_from ckpts/Qwen2.5-dualvitok --data_config configs/data/illume.yaml --output_dir output/ILLUME-lm

Stage II starts from stage I's --output_dir. Running the same command again goes on from the newest checkpoint, with
any number of processes as long as --global_batch_size stays. The output folder gets config.yaml (the whole
configuration; --config reads it), metrics.jsonl, skipped.jsonl, tensorboard/, loss.png, checkpoints/, with
--prompt_sheet samples/ and, at the end, final/: a model folder with config.json, safetensors and tokenizer files.
"""

from vistoken.cli import leave_at_once, run_command


def main(argv: list[str] | None = None) -> int:
    from training.config import build_parser, resolve

    config = resolve(vars(build_parser(__doc__).parse_args(argv)))
    from training.parallel import launched
    from training.run import run  # PyTorch comes in here

    run(config, *launched())
    return 0


if __name__ == "__main__":
    run_command(main, leave_at_once, resumes=True)
