"""An item processor: LLaVA's conversations, brought to the form that pre_tokenize.py reads.

    python -u pre_tokenize/pre_tokenize.py --in_filename llava.json --out_dir tokens --image_dir images \\
        --item_processor examples/llava_items.py:LlavaItems

LLaVA writes `<image>` where the document has `<|image|>`, its items may have `system` turns, and an item without an
image has no `image` field.
"""

from typing import Any

from vistoken.errors import Rejected


class LlavaItems:
    """Built once, without arguments. A KeyError, TypeError and the like fail this item and no other."""

    def process_item(self, item: dict[str, Any]) -> dict[str, Any]:
        """One object of the input file -> `{"conversations": [...], "image": [...]}`."""
        image = item.get("image")
        if image and image.endswith(".gif"):
            raise Rejected("animation", image)  # left out on purpose, and counted as rejected
        turns = [
            {"from": turn["from"], "value": turn["value"].replace("<image>", "<|image|>")}
            for turn in item["conversations"]
            if turn["from"] != "system"
        ]
        return {"conversations": turns, "image": [image] if image else []}
