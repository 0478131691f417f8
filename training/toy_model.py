"""A small untrained model, to try the trainer without a checkpoint of gigabytes.

    python training/toy_model.py --tokenizer text_tokenizer.json --output_dir output/toy
    python training/toy_model.py --output_dir output/toy
    python training/toy_model.py --tokenizer output/toy-words --output_dir output/toy

The first writes llm/ (a Chameleon language model for that tokenizer's vocabulary) and siglip/ (a vision tower), which
are what --init_from and --vit_from of training/train.py take. The second writes lm/, a Qwen2 with a tokenizer of bytes
and ChatML's marks, for --variant lm. The third, given what pre_tokenize/extend_tokenizer.py made of that tokenizer,
writes lm/ with all of its words. Training could grow the model instead (--tokenizer_from), but new words begin almost
alike then, as a pretrained model needs it, and a toy takes long to tell them apart.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistoken.cli import command_parser, run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pre_tokenize.text import TextTokenizer

LLM: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TILE = {"image_size": 112, "patch_size": 14}  # 64 continuous tokens an image


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="Chameleon's text_tokenizer.json or an extended tokenizer.json, or a folder that holds it (default: a "
        "tokenizer of bytes is made)",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the models' folders go")
    args = parser.parse_args(argv)
    from pre_tokenize.text import TextTokenizer
    from vision_tokenizer.models.dualvitok.vocabulary import IMAGE_START

    text = TextTokenizer(args.tokenizer) if args.tokenizer else None
    if text and IMAGE_START not in text.ids:
        write_toy(text, args.output_dir)
    else:
        write_toy_lm(args.output_dir / "lm", text)
    return 0


def write_toy(text: "TextTokenizer", output: Path) -> None:
    import torch
    from torch import nn

    from training.models.folder import save_folder
    from training.models.llm import LLMConfig
    from training.models.siglip import VisionConfig
    from training.models.unitoken import UniToken

    vision = VISION | TILE
    torch.manual_seed(0)
    model = UniToken(LLMConfig(vocab_size=text.size, num_key_value_heads=4, **LLM), VisionConfig(**vision), z_weight=0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    state = model.state_dict()
    llm = {name: tensor for name, tensor in state.items() if name.startswith(("model.", "lm_head."))}
    prefix = "vit."
    tower = {
        f"vision_model.{name.removeprefix(prefix)}": tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    llm_config = {"model_type": "chameleon", "vocab_size": text.size, **LLM}
    save_folder(output / "llm", llm.items(), sum(t.nbytes for t in llm.values()), llm_config, [text.path])
    tower_config = {"model_type": "siglip", "vision_config": vision}
    save_folder(output / "siglip", tower.items(), sum(t.nbytes for t in tower.values()), tower_config, [])
    print(f"a toy language model is in {output / 'llm'}, a toy vision tower in {output / 'siglip'}")


def write_toy_lm(folder: Path, text: "TextTokenizer | None") -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = text.path.read_text() if text else bytes_tokenizer().to_str()
    vocab_size = text.size if text else bytes_tokenizer().get_vocab_size()
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, num_key_value_heads=2, **LLM)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    print(f"a toy language model of {vocab_size:,} words is in {folder}")


def bytes_tokenizer() -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return tokenizer


if __name__ == "__main__":
    run_command(main)
