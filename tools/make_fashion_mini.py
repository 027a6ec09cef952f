"""Make the embedded data set `fashion-mini` from the full Fashion-MNIST: python tools/make_fashion_mini.py FOLDER

FOLDER holds Fashion-MNIST as on the Hugging Face hub (zalando-datasets/fashion_mnist: train-….parquet, test-….parquet).
Takes 500 training and 100 test images of each of the 10 classes, chosen with a fixed seed and kept in their order, and
writes them to src/unitstep/fashion_mini/ in the same layout: the same pixels, the same metadata. Nothing that changes
between runs is written, so the same versions of pyarrow and Pillow write the same bytes.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SEED = 0
PER_CLASS = {"train": 500, "test": 100}
OUT = Path(__file__).resolve().parents[1] / "src" / "unitstep" / "fashion_mini"


def balanced_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows, ascending, of `count` random images of each class."""
    shuffled = np.random.Generator(np.random.PCG64(SEED)).permutation(len(labels))
    return np.sort(np.concatenate([shuffled[labels[shuffled] == label][:count] for label in np.unique(labels)]))


def stored_png(png: bytes) -> bytes:
    """The same image as an uncompressed PNG, because parquet compresses many images better than PNG does one."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(out, "PNG", compress_level=0)
    return out.getvalue()


def main() -> None:
    """Read FOLDER, write the two parquet files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    OUT.mkdir(exist_ok=True)
    for split, count in PER_CLASS.items():
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        if not shards:
            parser.error(f"no {split}-….parquet in {folder}: give the folder of the full Fashion-MNIST")
        table = pa.concat_tables([pq.read_table(shard) for shard in shards])
        table = table.take(balanced_rows(table["label"].to_numpy(), count))
        images = [{"bytes": stored_png(image["bytes"]), "path": None} for image in table["image"].to_pylist()]
        columns = [pa.array(images, table.schema.field("image").type), table["label"].combine_chunks()]
        pq.write_table(
            pa.Table.from_arrays(columns, schema=table.select(["image", "label"]).schema),
            OUT / f"{split}-00000-of-00001.parquet",
            compression="brotli",
            compression_level=11,
            use_dictionary=["label"],
            data_page_size=2**24,
        )


if __name__ == "__main__":
    main()
