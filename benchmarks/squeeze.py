"""A packed data set in little more than half of its bytes, for the way to a machine behind a narrow link.

    python benchmarks/squeeze.py PACKED OUT              writes tiles of images as lossless WebP, and labels, to OUT
    python benchmarks/squeeze.py --back OUT PACKED       the inverse, to the last bit; needs torch, safetensors, pillow

CIFAR-10 takes 101 in place of 185 MB. Files are small (about 3 MB), so OUT can go in as many parts as are wanted;
put all of them into one folder there.
"""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ACROSS, TILE = 8, 2048  # images side by side, and in a file


def squeezed(images: Tensor) -> bytes:
    """uint8 [n, 3, H, W] → a picture of rows of ACROSS images."""
    n, channels, height, width = images.shape
    rows = -(-n // ACROSS)
    all_rows = images.new_zeros(rows * ACROSS, channels, height, width)
    all_rows[:n] = images
    picture = all_rows.unflatten(0, (rows, ACROSS)).permute(0, 3, 1, 4, 2).reshape(rows * height, ACROSS * width, -1)
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "webp", lossless=True, quality=80, method=4)
    return file.getvalue()


def restored(path: Path, n: int) -> Tensor:
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    width = picture.shape[1] // ACROSS
    rows = picture.unflatten(0, (-1, width)).unflatten(2, (ACROSS, width))  # square images
    return rows.permute(0, 2, 4, 1, 3).flatten(0, 1)[:n]


def squeeze(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as part:
            images, labels, about = part.get_tensor("images"), part.get_tensor("labels"), part.metadata()
        if images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            sys.exit("only square images of three channels can be squeezed")
        with ThreadPoolExecutor() as pool:
            for number, data in enumerate(pool.map(squeezed, images.split(TILE))):
                (out / f"{path.stem}.{number:03}.webp").write_bytes(data)
        (out / f"{path.stem}.json").write_text(json.dumps({"labels": labels.tolist(), "about": about}))


def unsqueeze(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for path in sorted(source.glob("*.json")):
        told = json.loads(path.read_text())
        labels = torch.tensor(told["labels"])
        tiles = sorted(source.glob(f"{path.stem}.*.webp"))
        if len(tiles) != -(-len(labels) // TILE):
            sys.exit(f"{path} has {len(labels)} images, but there are {len(tiles)} files of up to {TILE} of them")
        with ThreadPoolExecutor() as pool:
            images = torch.cat(list(pool.map(restored, tiles, [len(part) for part in labels.split(TILE)])))
        save_file({"images": images.contiguous(), "labels": labels}, out / f"{path.stem}.safetensors", told["about"])


if __name__ == "__main__":
    back = sys.argv[1:2] == ["--back"]
    if len(sys.argv) != 3 + back:
        sys.exit(__doc__)
    (unsqueeze if back else squeeze)(*map(Path, sys.argv[-2:]))
