"""Collect photographs from Debian packages for a small tokenizer.

    python exps/collect_photographs.py --out output/photographs

Fetches the packages below with `apt-get download` (no root needed, nothing is installed), unpacks them, keeps what
looks like a photograph, once, and saves it with a shorter side of at most 640 pixels. Needs Debian or Ubuntu.
The packages' licences are printed first; the pictures themselves are not redistributed.
"""

import argparse
import hashlib
import io
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# package -> licences of its pictures, from its debian/copyright
PACKAGES = {
    "gcompris-qt-data": "CC BY-SA 2.0 to 4.0, CC BY 1.0 to 3.0, CC0, public domain, GFDL; per picture",
    "gnome-backgrounds": "CC BY-SA 3.0, CC BY-SA 2.0, CC BY 2.0",
    "lomiri-wallpapers-16.04": "CC BY-SA 3.0, CC BY-SA 4.0, CC BY 4.0",
    "lomiri-wallpapers-20.04": "CC BY-SA 4.0, CC BY 4.0, CC0 1.0",
    "mate-backgrounds": "GPL 2+, CC BY-SA 4.0",
    "opencv-doc": "Apache 2.0, BSD (documentation and sample pictures of OpenCV)",
    "plasma-workspace-wallpapers": "GPL 2+ (as packaged; KDE's own: CC BY-SA 4.0)",
    "ukui-wallpapers": "CC BY-SA 3.0",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LEAST_SIDE, SHORTER_SIDE = 208, 640
LEFT_OUT = ("lena", "lenna")  # no free licence


def looks_photographic(image: Image.Image) -> bool:
    """Not a diagram, a screenshot, a drawing with flat areas or a mask: few neighbours are equal, colours are many."""
    pixels = np.asarray(image, np.int16)
    small = pixels[::3, ::3]
    equal = (np.abs(np.diff(pixels, axis=1)).sum(2) == 0).mean()
    white = (small.min(2) > 248).mean()
    colours = len(np.unique((small // 8).reshape(-1, 3), axis=0))
    return equal < 0.35 and white < 0.35 and colours > 200


def thumbnail_key(image: Image.Image) -> bytes:
    """Equal for the same picture at another size or quality."""
    tiny = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)
    return hashlib.sha256((tiny > tiny.mean()).tobytes()).digest()


def fetch(folder: Path) -> None:
    for name in PACKAGES:
        print(f"fetching {name}", flush=True)
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / name)], check=True)
        archive.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the photographs")
    parser.add_argument("--packages_dir", type=Path, help="folder of packages unpacked already (one folder each)")
    args = parser.parse_args()
    print("photographs come from these packages, under these licences:")
    for name, licences in PACKAGES.items():
        print(f"  {name}: {licences}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.packages_dir or Path(scratch)
        if args.packages_dir is None:
            fetch(root)
        kept = collect(root, args.out)
    print(f"{kept} photographs are in {args.out}")
    return 0 if kept else 1


def pictures(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """(name, opened image) of every picture in an unpacked package, those inside Qt's resource files included."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        if path.suffix == ".rcc":
            content, start = path.read_bytes(), -1
            while (start := content.find(b"RIFF", start + 1)) >= 0:
                (size,) = struct.unpack("<I", content[start + 4 : start + 8])
                if content[start + 8 : start + 12] == b"WEBP":
                    yield path.stem, Image.open(io.BytesIO(content[start : start + size + 8]))
        elif path.suffix.lower() in SUFFIXES and not path.name.lower().startswith(LEFT_OUT):
            try:
                yield path.stem, Image.open(path)
            except OSError as error:
                print(f"left out: {path.name}: {error}", file=sys.stderr)


def collect(root: Path, out: Path) -> int:
    Image.MAX_IMAGE_PIXELS = None
    seen: set[bytes] = set()
    for package in PACKAGES:
        for name, image in pictures(root / package):
            shorter, longer = sorted(image.size)
            if shorter < LEAST_SIDE or longer > 3 * shorter or image.mode != "RGB":
                continue
            scale = min(1, SHORTER_SIDE / shorter)
            size = (round(image.width * scale), round(image.height * scale))
            image.draft("RGB", size)
            image = image.resize(size, Image.Resampling.LANCZOS)
            key = thumbnail_key(image)
            if key in seen or not looks_photographic(image):
                continue
            seen.add(key)
            image.save(out / f"{package}_{len(seen):04d}_{name}.jpg", quality=95)
    return len(seen)


if __name__ == "__main__":
    sys.exit(main())
