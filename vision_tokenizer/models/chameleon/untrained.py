"""Write untrained Chameleon tokenizers, so that everything can be tried without downloading any.

    python -m vision_tokenizer.models.chameleon.untrained --out output/untrained

The folder gets what a release has: `vqgan.yaml` and `vqgan.ckpt`, a VQGAN with random weights, and
`text_tokenizer.json`, the special and image tokens under their real ids and a text vocabulary of single bytes. Codes
mean nothing and decode to noise. `--size full` has the released VQGAN's sizes, for benchmarks.
"""

from pathlib import Path

from vistoken.cli import command_parser, run_command

CHANNELS = {"small": 32, "full": 128}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=CHANNELS, default="small", help="small: 32 channels instead of 128")
    args = parser.parse_args(argv)
    write_vqgan(args.out, CHANNELS[args.size])
    write_text_tokenizer(args.out / "text_tokenizer.json")
    print(f"untrained Chameleon tokenizers are in {args.out}")
    return 0


def write_vqgan(folder: Path, channels: int) -> None:
    import torch
    import yaml

    from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, read_sizes
    from vision_tokenizer.models.dualvitok.untrained import untrained_state
    from vistoken.jobs.files import atomic_write, write_bytes

    width = 2 * channels  # of the latents and the codebook
    conv = {"ch": channels, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": width}
    conv |= {"attn_resolutions": [], "resolution": 512, "in_channels": 3, "out_ch": 3, "double_z": False}
    params = {"embed_dim": width, "n_embed": 8192, "ddconfig": conv}
    write_bytes(folder / "vqgan.yaml", yaml.safe_dump({"model": {"params": params}}).encode())
    with torch.device("meta"):
        model = ChameleonVQGAN(read_sizes(folder / "vqgan.yaml"), decoder=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "vqgan.ckpt") as file:
        torch.save({"state_dict": untrained_state(shapes)}, file)


def write_text_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from vision_tokenizer.models.chameleon.vocabulary import CODEBOOK_SIZE, image_token_name
    from vistoken.jobs.files import write_bytes

    special = ["<eoss>", "<racm3:break>", *(f"<sentinel:{n}>" for n in range(512))]
    special += [f"<reserved{8706 + n:05d}>" for n in range(294)]
    begin = ["<s>", "<pad>", "</s>", "<unk>"]
    names = [
        *begin,
        *map(image_token_name, range(CODEBOOK_SIZE)),
        *special,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*begin, *special)])
    write_bytes(path, tokenizer.to_str().encode())


if __name__ == "__main__":
    run_command(main)
