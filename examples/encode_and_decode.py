"""The Python interface: an image becomes codes, and the codes an image again.

    python examples/encode_and_decode.py configs/example/dualvitok/dualvitok_anyres_max512.py checkpoints/dualvitok \\
        photo.jpg again.png

Without a checkpoint at hand, take the small trained one of this repository:
    python examples/encode_and_decode.py configs/example/dualvitok/dualvitok_small.py checkpoints/dualvitok_small \\
        photo.jpg again.png
"""

import sys

from PIL import Image

from vision_tokenizer import load_tokenizer


def main(config: str, checkpoint: str, source: str, target: str) -> None:
    tokenizer = load_tokenizer(config, checkpoint)
    with Image.open(source) as image:
        semantic, pixel = tokenizer.encode(image)  # two grids of codes, (h, w) and (H, W), int64
    print(f"{source}: {image.width} x {image.height} pixels")
    print(f"semantic codes: {semantic.shape[0]} rows of {semantic.shape[1]}, the first is {semantic[0, 0]}")
    print(f"pixel codes: {pixel.shape[0]} rows of {pixel.shape[1]}, the first is {pixel[0, 0]}")
    tokenizer.decode((semantic, pixel)).save(target)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
