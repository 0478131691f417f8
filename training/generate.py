"""Ask a trained model: text to pictures, pictures and text to text, pictures to pictures.

One picture of a UniToken model, on a GPU if there is one (`--device cpu --precision fp32` without):
    python training/generate.py --model output/UniToken-AnyRes-stage2/final --tokenizer_dir ckpts/chameleon/tokenizer \\
        --prompt "Generate an image of a red barn." --out pictures/
A question about an image, or an edit of it (`--answer image`):
    python training/generate.py ... --image cat.png --prompt "<|image|> What is this?" --out answers/
Many prompts, in the input format of pre_tokenize.py; the last gpt turn is what is asked for. On several GPUs:
    torchrun --nproc_per_node 8 training/generate.py ... --prompts prompts.jsonl --n 4 --out answers/
A language model with DualViTok's words; the decoder of pictures is DualViTok's:
    python training/generate.py --variant lm --model output/ILLUME-lm/final --model_config dualvitok_anyres_max512.py \\
        --tokenizer_checkpoint ckpts/DualViTok/pytorch_model.bin --out pictures/ \\
        --prompt "Generate an image of {resolution_tag}, the content of image is a red barn."

Writes answers.jsonl (a line an answer: text, tokens, codes, files, settings), images/*.png and report.html. Stop it
whenever you like: the same command goes on from there. Images can only be what the sequence format allows, so every
picture decodes. `--seed`, the number of the prompt and that of the sample decide an answer's noise, whatever else is in
the batch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken.cli import (
    BAD_DATA,
    DTYPES,
    OK,
    above_zero,
    add_device,
    add_max_failed,
    at_least,
    command_parser,
    note,
    run_command,
    share,
)
from vistoken.errors import UserError

if TYPE_CHECKING:
    import torch

    from pre_tokenize.sequences import ProcessItem
    from training.generation.cache import LanguageModel
    from training.generation.interpreter import Interpreter, Wishes

CHAMELEON = "ckpts/chameleon/tokenizer"
# flags that decide the answers: how they are drawn, which are published numbers where they are not given, and the rest
DRAWING = (
    *("guidance", "temperature", "image_top_k", "image_top_p"),
    *("text_temperature", "text_top_k", "text_top_p", "greedy"),
)
ASKED = (
    *("answer", "ratio", "before_image", "n", "max_new_tokens", "seed"),
    *("target_size", "crop", "published", "batch_size", "precision"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    model = parser.add_argument_group("model").add_argument
    model("--model", type=Path, required=True, help="model folder, or the output folder of a finished run")
    model("--variant", choices=("base", "anyres", "lm"), help="as it was trained (default: what its config.json says)")
    model("--tokenizer_dir", help=f"text_tokenizer.json, vqgan.yaml, vqgan.ckpt (default: {CHAMELEON}); "
          "with lm a folder with tokenizer.json (default: the model's)")  # fmt: skip
    model("--text_tokenizer", help="another folder, file or hub id for the text (default: --tokenizer_dir)")
    model("--model_config", type=Path, help="with lm: DualViTok's .py config (code: it is run)")
    model("--tokenizer_checkpoint", help="with lm: DualViTok's .bin, .pt, .safetensors, a folder or a hub id")
    asked = parser.add_argument_group("what is asked").add_argument
    asked("--prompt", help="text of the human turn; images stand where its marks are, or come first")
    asked("--image", action="append", default=[], help="an image for --prompt; may be given several times")
    asked("--prompts", type=Path, help="conversations, .json or .jsonl, instead of --prompt")
    asked("--image_dir", type=Path, default=Path(), help="where relative image paths begin (default: here)")
    asked("--item_processor", metavar="FILE.py:Class", help="as for pre_tokenize.py")
    asked("--answer", choices=("image", "text", "free"), help="default: what the last gpt turn has; without one an "
          "image where none is given, else text")  # fmt: skip
    asked("--height", type=at_least(32), help="of pictures, in pixels (default: a prompt's own `size`, its input "
          "image's, or 512)")  # fmt: skip
    asked("--width", type=at_least(32))
    asked("--ratio", help="W:H, instead of them: the nearest of the sizes that models are trained on")
    asked("--n", type=at_least(1), default=1, help="answers to each prompt")
    asked("--before_image", type=at_least(0), nargs="*", default=[], help="ids between the prompt and the picture; "
          "the released UniToken writes 16853")  # fmt: skip
    asked("--target_size", type=at_least(32), default=512, help="input images: as for pre_tokenize.py")
    asked("--crop", choices=("square", "variable"), default="square", help="input images: as for pre_tokenize.py")
    draw = parser.add_argument_group("how it is drawn").add_argument
    draw("--greedy", action="store_true", help="always the most probable token")
    draw("--guidance", type=above_zero, help="scale of classifier-free guidance, 1 is off (default: 3, with lm 2)")
    draw("--temperature", type=above_zero, default=1.0, help="of codes")
    draw("--image_top_k", type=at_least(0), help="codes to draw from (default: 4000; with lm 2048, pixel codes thrice)")
    draw("--image_top_p", type=share, default=1.0)
    draw("--text_temperature", type=above_zero, default=1.0)
    draw("--text_top_k", type=at_least(0), help="words to draw from, 0 is all (default: 5; with lm 128)")
    draw("--text_top_p", type=share, default=1.0)
    draw("--max_new_tokens", type=at_least(1), default=1024, help="of text; a picture has as many as its size needs")
    draw("--seed", type=at_least(0), default=0)
    draw("--published", action="store_true", help="UniToken's own rules: nothing is barred outside of images, and no "
         "continuous tokens follow generated ones")  # fmt: skip
    job = parser.add_argument_group("job")
    job.add_argument("--out", type=Path, required=True, help="folder of the answers")
    job.add_argument("--batch_size", type=at_least(1), default=8, help="answers at a time; guidance doubles the rows")
    job.add_argument("--precision", choices=DTYPES, default="bf16", help="of the model")
    job.add_argument("--no_cache", action="store_true", help="go through the whole sequence for every token: slow")
    add_device(job)
    add_max_failed(job, of="prompts")
    job.add_argument("--overwrite", action="store_true", help="delete what is in --out and begin anew")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        parser.error("name either --prompt or --prompts")
    if args.image and args.prompts:
        parser.error("--image goes with --prompt; in --prompts, images are in the lines")
    if (args.height is None) != (args.width is None) or (args.height and args.ratio):
        parser.error("--height and --width belong together, and --ratio stands for both")
    if (args.model_config is None) != (args.tokenizer_checkpoint is None):
        parser.error("--model_config and --tokenizer_checkpoint belong together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from pre_tokenize.job import images_sought
    from pre_tokenize.pre_tokenize import load_item_processor
    from training.generation.cache import Recomputing
    from training.generation.decode import PUBLISHED, Settings
    from training.generation.interpreter import Wishes
    from training.generation.job import AnswerOutput, run_generation, summary
    from training.generation.load import model_digest, trained_with
    from vistoken.device import float32_products, local_device
    from vistoken.jobs.workers import launched_workers

    processor, processor_hash = load_item_processor(args.item_processor)
    trained = trained_with(args.model)
    args.variant = args.variant or trained.get("variant")
    if args.variant is None:
        raise UserError(f"{args.model}/config.json does not say how it was trained: add --variant base, anyres or lm")
    lm = args.variant == "lm"

    drawing = PUBLISHED[lm] | {name: value for name in DRAWING if (value := getattr(args, name)) is not None}
    settings = Settings.of(lm=lm, **drawing)
    size, limit = wanted_size(args, lm=lm), trained.get("max_seq_len")
    wishes = Wishes(args.answer, size, tuple(args.before_image), args.max_new_tokens, limit, args.seed)
    tell(settings.guidance, trained)

    open_model = open_lm if lm else open_unitoken
    model, interpreter = open_model(args, wishes, processor.process_item, local_device(args.device))
    if args.no_cache:
        model = Recomputing(model)

    prompts = args.prompts or write_prompt(args, interpreter.symbol, "images" if lm else "image")
    manifest = {
        "format": "vistoken-answers-1",
        "model": {"path": str(args.model), "digest": model_digest(args.model), "variant": args.variant},
        "settings": {name: getattr(args, name) for name in ASKED} | drawing | {"size": size and list(size)},
        "item_processor": processor_hash,
        "device": model.device.type,
    }
    output = AnswerOutput(args.out, manifest, prompts, chunk_items=max(args.batch_size // args.n, 1))
    with float32_products(tf32=args.precision != "fp32"):
        counts = run_generation(
            output, interpreter, model, settings, args.n, args.batch_size, launched_workers(), overwrite=args.overwrite
        )
    if counts is None:
        return OK
    print(summary(output, counts))
    if hint := images_sought(counts, args.image_dir):
        print(hint)
    if counts.failed_share > args.max_failed:
        print(f"more than --max_failed {args.max_failed:g} of the prompts failed", file=sys.stderr)
        return BAD_DATA
    return OK


def wanted_size(args: argparse.Namespace, *, lm: bool) -> tuple[int, int] | None:
    """(height, width) of pictures, if the flags say so. Raises `UserError` for one that no model has words for."""
    from training.generation.sizes import check_size, nearest_size
    from vision_tokenizer.images.chameleon import crop_sizes

    if args.ratio:
        width, _, height = args.ratio.partition(":")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise UserError(f"--ratio {args.ratio}: expected width and height, such as 16:9")
        return nearest_size(int(width), int(height), lm=lm)
    if args.height is None:
        return None
    size = (args.height, args.width)
    try:
        check_size(size, lm=lm)
    except ValueError as error:
        raise UserError(f"--height {size[0]} --width {size[1]}: {error}") from error
    if not lm and size[::-1] not in crop_sizes(512, "variable"):
        note(f"note: {size[0]} x {size[1]} is none of the sizes that models for 512 x 512 are trained on")
    return size


def tell(guidance: float, trained: dict[str, Any]) -> None:
    """What the model's training means for its answers."""
    if guidance != 1 and not trained.get("condition_dropout"):
        note(
            f"note: --guidance {guidance:g} compares with images without a prompt, which a model trained "
            "without --condition_dropout has not seen; --guidance 1 is off"
        )
    if limit := trained.get("max_seq_len"):
        note(f"a prompt and its answer end at {limit:,} ids, the length that the model was trained on")


def open_unitoken(
    args: argparse.Namespace, wishes: "Wishes", process_item: "ProcessItem", device: "torch.device"
) -> tuple["LanguageModel", "Interpreter"]:
    from pre_tokenize.chameleon import ChameleonFormat
    from pre_tokenize.text import TextTokenizer
    from training.data.loading import ImageReader
    from training.generation.interpreter import UniTokenInterpreter
    from training.generation.load import check_vocabulary, load_unitoken, load_vqgan
    from vision_tokenizer.images.chameleon import crop_sizes

    folder = args.tokenizer_dir or CHAMELEON
    model, vision = load_unitoken(args.model, device, args.precision)
    text = TextTokenizer(args.text_tokenizer or folder)
    check_vocabulary(args.model, text, model.vocab_size)
    format = ChameleonFormat(text, image_dir=args.image_dir)
    vqgan = load_vqgan(folder, format, device)
    reader = ImageReader(vision.image_size, vision.grid, args.variant == "anyres")
    crops = crop_sizes(args.target_size, args.crop)
    interpreter = UniTokenInterpreter(
        format, model.vocab_size, vqgan, reader, crops, wishes, process_item, args.published
    )
    return model, interpreter


def open_lm(
    args: argparse.Namespace, wishes: "Wishes", process_item: "ProcessItem", device: "torch.device"
) -> tuple["LanguageModel", "Interpreter"]:
    from pre_tokenize.dualvitok import DualViTokFormat
    from pre_tokenize.text import TextTokenizer
    from training.generation.interpreter import LMInterpreter
    from training.generation.load import check_vocabulary, load_image_tokenizer, load_lm
    from training.models.folder import read_config

    model = load_lm(args.model, device, args.precision)
    text = TextTokenizer(args.text_tokenizer or args.tokenizer_dir or read_config(args.model)[0])
    check_vocabulary(args.model, text, model.vocab_size)
    format, tokenizer = DualViTokFormat(text), None
    if args.model_config:
        tokenizer = load_image_tokenizer(args.model_config, args.tokenizer_checkpoint, format, device)
    return model, LMInterpreter(format, model.vocab_size, tokenizer, wishes, process_item, args.image_dir)


def write_prompt(args: argparse.Namespace, symbol: str, column: str) -> Path:
    """The prompt of the command line as a file like --prompts."""
    text = args.prompt
    if args.image and symbol not in text and column == "images":
        text = symbol * len(args.image) + "\n" + text
    item: dict[str, Any] = {"conversations": [{"from": "human", "value": text}]}
    if args.image:
        item[column] = [str((args.image_dir / image).absolute()) for image in args.image]
    path, content = args.out / "prompt.jsonl", json.dumps(item, ensure_ascii=False) + "\n"
    if path.exists() and path.read_text() != content and not args.overwrite:
        raise UserError(f"{args.out}: holds the answers to another prompt. Choose another --out, or add --overwrite.")

    from vistoken.jobs.files import write_bytes

    write_bytes(path, content.encode())
    return path


if __name__ == "__main__":
    run_command(main, resumes=True)
