"""Conversations with images become token files, on any number of GPUs.

One process, on a GPU if there is one:
    python -u pre_tokenize/pre_tokenize.py --in_filename data.json --out_dir tokens --target_size 512
Eight processes that share the work as they go (`--nnodes` and a shared folder for more machines):
    torchrun --nproc_per_node=8 pre_tokenize/pre_tokenize.py --in_filename data.json --out_dir tokens --target_size 512
Eight processes of a shell loop, each with its own share (`--splits=8 --rank=0` ... `--rank=7`):
    CUDA_VISIBLE_DEVICES=0 python -u pre_tokenize/pre_tokenize.py --splits=8 --rank=0 --in_filename data.json ...
Without a GPU: add `--device cpu`.

Stop it whenever you like: the same command, with any number of processes or splits, goes on from there, and tries items
that failed again. Then join the records: `python -u pre_tokenize/concat_record.py --sub_record_dir tokens --save_path
tokens/record.json`.

The input is a `.json` list, or a `.jsonl`, of objects `{"conversations": [{"from": "human", "value": "<|image|> What is
this?"}, {"from": "gpt", "value": "A cat."}], "image": ["cat.png"]}`. Data in a format of your own: see `ItemProcessor`.
An image may lie in a tar file, `"image": ["shard-00012.tar/0001234.jpg"]`: its members are looked up once a file.
Special tokens that somebody wrote in a text are tokenised as the words they are.

With `--image_tokenizer dualvitok` the input is what codebook inference wrote (`jsonl_after_tokenizer/.../0000.jsonl`,
not its `.rejected.jsonl`), and the output is for a language model whose tokenizer extend_tokenizer.py has extended:
    python -u pre_tokenize/pre_tokenize.py --image_tokenizer dualvitok --tokenizer_dir ckpts/Qwen2.5-dualvitok \\
        --in_filename 0000.jsonl --out_dir tokens
No device is needed then. Images become their codes, those of human turns, too: this model has no vision tower.
"""

import argparse
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vision_tokenizer.tokenizer.flags import add_exif_orientation
from vistoken.cli import (
    Outcome,
    add_batches,
    add_device,
    add_dtype,
    add_max_failed,
    add_other_devices,
    add_speed,
    add_workers,
    at_least,
    check_workers,
    command_parser,
    note,
    run_command,
    settings_of,
)
from vistoken.errors import UserError
from vistoken.store import location

if TYPE_CHECKING:
    from pre_tokenize.job import MakeEncoder
    from pre_tokenize.sequences import ProcessItem, SequenceFormat
    from vistoken.jobs.run import Table
    from vistoken.jobs.workers import Workers

    Parts = tuple[SequenceFormat, MakeEncoder, Callable[[Table], dict[str, Any]]]

if __name__ == "pre_tokenize":  # started as a file, a command has this folder first on its path, and this file for the
    __path__ = [str(Path(__file__).parent)]  # package of its name: so it is the package


class ItemProcessor:
    """Brings data points of your own format to the document's: change `process_item` here, or put a class of this
    kind into a file of your own and name it, `--item_processor my_data.py:LlavaItems`.

    A LLaVA-style item has `<image>` where the document has `<|image|>`, and may have `system` turns:

        class LlavaItems:
            def process_item(self, item):
                if item["image"].endswith(".gif"):
                    raise Rejected("animation", item["image"])  # from vistoken.errors import Rejected
                turns = [turn for turn in item["conversations"] if turn["from"] != "system"]
                for turn in turns:
                    turn["value"] = turn["value"].replace("<image>", "<|image|>")
                return {"conversations": turns, "image": item["image"]}

    The class is built once, without arguments. `Rejected` leaves an item out on purpose; a KeyError, TypeError and the
    like fail this item and no other.
    """

    def process_item(self, item: dict[str, Any]) -> dict[str, Any]:
        """One object of the input file -> `{"conversations": [...], "image": [...]}`."""
        return item


def load_item_processor(spec: str | None) -> tuple[Any, str]:
    """`FILE.py:Class` (None: the one above) -> an instance, and the hash of its source for the manifest."""
    if spec is None:
        source = inspect.getsource(ItemProcessor.process_item)
        return ItemProcessor(), hashlib.sha256(source.encode()).hexdigest()
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file:
        raise UserError(f"--item_processor {spec}: expected FILE.py:Class, without the class nobody knows which")
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--item_processor {spec}: expected FILE.py:Class, and {file} does not exist")
    module = ModuleType("vistoken_item_processor")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # a dataclass looks its module up there
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # it is somebody else's program
        raise UserError(f"--item_processor {spec}: {path} does not run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None or not hasattr(found, "process_item"):
        classes = [key for key, value in vars(module).items() if hasattr(value, "process_item")]
        raise UserError(
            f"--item_processor {spec}: no class {name} with a `process_item` in {path}; "
            f"it has {', '.join(classes) or 'none at all'}"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UserError(f"--item_processor {spec}: {name} is built without arguments, but {error}") from error
    return found(), hashlib.sha256(path.read_text().encode()).hexdigest()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    data = parser.add_argument_group("data").add_argument
    data("--in_filename", type=location, required=True, help="conversations, .json or .jsonl")
    data("--out_dir", type=location, required=True, help="folder of the token files and records")
    data(
        "--image_dir",
        type=location,
        help="where relative image paths begin (default: the current folder; for dualvitok, where codebook inference "
        "found the images)",
    )
    data("--item_processor", metavar="FILE.py:Class", help="your own (default: the `ItemProcessor` here)")
    data("--format", choices=("arrow", "pkl"), default="arrow", help="pkl: the published form")
    data("--items_per_file", type=at_least(1), default=512, help="items of one Arrow file, done at a time")
    data("--max_seq_len", type=at_least(1), default=4096, help="only counts longer sequences; nothing is cut")
    model = parser.add_argument_group("tokenizers").add_argument
    model("--image_tokenizer", choices=("chameleon", "dualvitok"), default="chameleon", help="whose codes images get")
    model(
        "--tokenizer_dir",
        help="text_tokenizer.json, vqgan.yaml and vqgan.ckpt (default: ckpts/chameleon/tokenizer); for dualvitok an "
        "extended tokenizer.json",
    )
    chameleon = parser.add_argument_group("Chameleon")
    add = chameleon.add_argument
    add("--text_tokenizer", help="another folder, file or hub id for the text (default: --tokenizer_dir)")
    add("--target_size", type=int, default=512, help="crops have the area of this square, in pixels")
    add("--crop", choices=("square", "variable"), default="square", help="variable: keep the shape")
    add_exif_orientation(chameleon)
    add_dtype(chameleon)
    add_speed(chameleon)
    add_device(chameleon)
    job = parser.add_argument_group("job")
    add_batches(job)
    add_max_failed(job)
    add_other_devices(job)
    job.add_argument("--overwrite", action="store_true", help="delete what is in --out_dir and begin anew")
    add_workers(job)
    args = parser.parse_args(argv)
    _check(args, parser)
    args.tokenizer_dir = args.tokenizer_dir or "ckpts/chameleon/tokenizer"
    args.image_dir = args.image_dir.absolute() if args.image_dir else Path()
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check_workers(args, parser)
    if args.target_size < 32 or args.target_size % 32 or args.target_size > 1024:
        parser.error(f"--target_size must be a multiple of 32 from 32 to 1024, not {args.target_size}")
    if args.image_tokenizer != "dualvitok":
        return
    if args.tokenizer_dir is None:
        parser.error("--image_tokenizer dualvitok needs --tokenizer_dir, the folder that extend_tokenizer.py wrote")
    if args.text_tokenizer is not None:
        parser.error("--text_tokenizer is Chameleon's; for dualvitok, --tokenizer_dir names the text tokenizer")
    if args.in_filename.name.endswith(".rejected.jsonl"):
        parser.error(f"{args.in_filename} lists items without codes; name the .jsonl beside it")


def chameleon_parts(args: argparse.Namespace, process_item: "ProcessItem") -> "Parts":
    """How items become sequences, what makes the encoder of their images, and what makes the input's manifest."""
    from pre_tokenize.chameleon import ChameleonFormat, Settings, load_tokenizers, make_encoder, make_manifest
    from vision_tokenizer.codebook.graphs import check_graphs
    from vistoken.device import default_batch_size, default_workers, local_device

    num_workers = args.num_workers or default_workers()
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_workers))  # of the text tokenizer
    device = local_device(args.device)
    check_graphs(args.cuda_graphs, device)
    args.batch_size = args.batch_size or default_batch_size(device)
    settings = settings_of(Settings, args)
    text, vqgan = load_tokenizers(args.text_tokenizer, args.tokenizer_dir, device, settings)
    sequences = ChameleonFormat(text, process_item, args.image_dir)
    return sequences, partial(make_encoder, vqgan, settings, num_workers), partial(make_manifest, settings, text, vqgan)


def dualvitok_parts(args: argparse.Namespace, process_item: "ProcessItem") -> "Parts":
    """The same for codes that codebook inference has written: there is nothing left to encode."""
    from pre_tokenize.dualvitok import DualViTokFormat, encoded_images, make_manifest
    from pre_tokenize.job import NoImages
    from pre_tokenize.text import TextTokenizer
    from vistoken.device import default_workers

    os.environ.setdefault("RAYON_NUM_THREADS", str(args.num_workers or default_workers()))
    if args.image_dir == Path():
        args.image_dir = encoded_images(args.in_filename)
    text = TextTokenizer(args.tokenizer_dir)
    sequences = DualViTokFormat(text, process_item)
    manifest = partial(make_manifest, args.items_per_file, text, sequences)
    return sequences, lambda progress: nullcontext(NoImages()), manifest


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from vistoken.jobs.workers import run_job

    return run_job(run, "pre_tokenize.pre_tokenize", args, "tokens", totals=("tokens",))


def run(args: argparse.Namespace, make_workers: "Callable[[], Workers]") -> Outcome:
    """The job as one of its workers."""
    processor, processor_hash = load_item_processor(args.item_processor)

    from pre_tokenize.job import images_sought, report, run_pre_tokenization
    from pre_tokenize.output import TokenOutput, open_source
    from vistoken.jobs.members import indexes
    from vistoken.jobs.run import WORK

    indexes.folder = args.out_dir / WORK / "members"
    parts = dualvitok_parts if args.image_tokenizer == "dualvitok" else chameleon_parts
    sequences, make_encoder, make_manifest = parts(args, processor.process_item)
    source = open_source(args.in_filename, args.out_dir, args.items_per_file)
    manifest = make_manifest(source.table)
    manifest |= {"token_files": args.format, "image_dir": str(args.image_dir), "item_processor": processor_hash}
    workers, chunks = make_workers(), len(source.table)
    if chunks < workers.world_size:
        note(
            f"{args.in_filename.name}: so few items that only {chunks} of {workers.world_size} processes have work; a "
            f"smaller --items_per_file than {args.items_per_file} shares them out"
        )
    finished = run_pre_tokenization(
        TokenOutput(args.out_dir, manifest, source),
        sequences,
        make_encoder,
        workers,
        overwrite=args.overwrite,
        other_devices=args.allow_other_devices,
    )
    if finished is None:
        return Outcome()
    record, counts, lengths = finished
    too_many = counts.failed_share > args.max_failed
    warning = f"more than --max_failed {args.max_failed:g} of the items failed" if too_many else ""
    told = [report(args.in_filename, record, counts, lengths, args.max_seq_len), images_sought(counts, args.image_dir)]
    return Outcome("\n".join(filter(None, told)), warning, int(too_many))


if __name__ == "__main__":
    run_command(main, resumes=True)
