"""Sources with the images inside their files: tar shards and parquet. The images are written to the new data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from vision_tokenizer.codebook.annotations import image_path
from vision_tokenizer.codebook.shards import ShardRules, ShardTable, shard_table
from vision_tokenizer.importers.formats import Format
from vistoken.errors import UserError
from vistoken.files import is_text
from vistoken.jobs.chunks import Chunk, Item
from vistoken.jobs.files import write_bytes
from vistoken.jobs.shards import PARQUET, TAR, shard_stem


class _Shards(Format):
    """A shard or a folder of shards."""

    embeds_images: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]]

    def files(self) -> list[Path]:
        if self.source.is_file():
            return [self.source]
        files = sorted(file for file in self.source.iterdir() if file.name.endswith(self.suffixes))
        stems = [shard_stem(file.name) for file in files]
        if strange := [file.name for file in files if not is_text(file.name)]:
            raise UserError(f"{self.source}: not UTF-8: {strange[0]!r}. Rename the file.")
        if not files:
            raise UserError(f"{self.source}: no file in it ends in {' or '.join(self.suffixes)}")
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise UserError(f"{self.source}: two files would both become {twice[0]}.jsonl. Rename one of them.")
        return files

    def chunks(self, file: Path) -> ShardTable:
        return shard_table(file, ShardRules(self.task, self.text_field, self.image_field), chunk_rows=1)

    def items(self, file: Path, chunk: Chunk) -> Iterator[Item]:
        for item in self.chunks(file).read(chunk):
            for name, image in item.attached.items():
                path = image_path(self.image_dir, name)
                if not path.exists() or path.stat().st_size != image.size:  # else an interrupted run wrote it
                    write_bytes(path, image.read(), sync=False)  # the job syncs once a chunk: each takes milliseconds
            item.attached.clear()
            yield item


class WebDataset(_Shards):
    """Tar files whose members come in groups of one key: `000.jpg` with `000.txt` or `000.json`."""

    suffixes = TAR


class Parquet(_Shards):
    """Hugging Face parquet files: a text column and an image column."""

    suffixes = PARQUET
