"""Shards in place: the bytes of an import followed by codebook inference, whatever is wrong with a shard, and kills."""

import errno
import gc
import io
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from codebook_job import kill_all, launch, read_lines, run_here, write_config
from sharding import FAST, codes, encode, lines, output, picture, problems, samples, shard_dataset, write_tar

from vision_tokenizer.tokenizer.import_annotations import main as import_main
from vistoken.errors import UserError
from vistoken.jobs import shards


def imported(tiny, base: Path, kind: str, source: Path, *more: str) -> dict[str, bytes]:
    """Import, then codebook inference over the folders: what shards in place must equal."""
    base.mkdir(parents=True)
    data_config = base / "meta.json"
    arguments = ["--format", kind, "--source", source, "--root", base / "root", "--task", "generation"]
    import_main([*map(str, [*arguments, "--data_config", data_config, "--max_failed", 1]), *more])
    assert run_here(*tiny, data_config, *FAST) == 0
    return codes(output(base))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_shards_give_the_bytes_of_an_import_and_a_run(suffix, tiny_dualvitok, tmp_path):
    talk = [{"from": "human", "value": "Draw a cup."}, {"from": "gpt", "value": "<image>"}]
    first = [
        *samples(20),
        ("./deep/a.b.png", picture(3, kind="PNG")),
        ("./deep/a.json", json.dumps({"caption": "Ein Becher"}).encode()),
        ("wide.webp", picture(4, (900, 30), "WEBP")),  # loses too much to the crop
        ("wide.txt", b"wide"),
        ("talk.jpg", picture(5)),
        ("talk.json", json.dumps({"conversations": talk}).encode()),
        ("lonely.txt", b"no image"),
        ("broken.jpg", picture(6)[:200]),
        ("broken.txt", b"cut off"),
    ]
    write_tar(tmp_path / "in" / f"000{suffix}", first)
    write_tar(tmp_path / "in" / f"001{suffix}", samples(5, first=100))
    expected = imported(tiny_dualvitok, tmp_path / "folders", "webdataset", tmp_path / "in")
    code, folder = encode(tiny_dualvitok, tmp_path / "shards", tmp_path / "in" / f"{{000..001}}{suffix}")
    assert code == 0 and codes(folder) == expected and len(expected) == 2
    assert len(read_lines(folder / "000.jsonl")) == 22
    assert problems(folder) == [
        ("wide.webp", "crop above threshold"),
        ("lonely.txt", "no image"),
        ("broken.jpg", "image unreadable"),
    ]
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["total"]["items"] == 30 and summary["total"]["done"] == 27


@pytest.mark.slow
def test_parquet_gives_the_bytes_of_an_import_and_the_images_of_the_tar(tiny_dualvitok, tmp_path):
    pictures = [picture(n) for n in range(90)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": content, "path": None} for content in [*pictures, None]], kind)
    texts = [f"Picture {n}" for n in range(91)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "in" / "000.parquet", row_group_size=40)
    write_tar(tmp_path / "tar" / "000.tar", samples(90))
    expected = imported(tiny_dualvitok, tmp_path / "folders", "parquet", tmp_path / "in")
    code, folder = encode(tiny_dualvitok, tmp_path / "parquet", tmp_path / "in" / "*.parquet")
    assert code == 0 and codes(folder) == expected
    assert problems(folder) == [("row 90", "no image")]
    _, of_tar = encode(tiny_dualvitok, tmp_path / "of_tar", tmp_path / "tar" / "000.tar")
    taken = ("image_sizes", "image_embed_inds", "matched_ratios", "conversations")
    as_parquet, as_tar = (
        [[line[field] for field in taken] for line in read_lines(each / "000.jsonl")] for each in (folder, of_tar)
    )
    assert as_parquet == as_tar


def test_every_bad_shard_is_told_and_the_rest_completes(tiny_dualvitok, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER", 100_000)
    monkeypatch.setattr("vision_tokenizer.codebook.shards.MAX_MEMBER", 100_000)
    folder = tmp_path / "in"
    write_tar(folder / "good.tar", samples(3))
    whole = write_tar(folder / "cut.tar", samples(3)).read_bytes()
    (folder / "cut.tar").write_bytes(whole[: whole.index(b"00002.jpg") + 600])
    (folder / "boundary.tar").write_bytes(whole[: whole.index(b"00001.jpg")])
    (folder / "scribbled.tar").write_bytes(whole.replace(b"00001.txt", b"00001\xff\xff\xff\xff", 1))
    (folder / "nothing.tar").write_bytes(b"")
    (folder / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(folder / "no_sample.tar", [])
    write_tar(folder / "two.tar", [("a.jpg", picture(1)), ("a.png", picture(1, kind="PNG")), ("a.txt", b"a")])
    write_tar(folder / "away.tar", [("../x.jpg", picture(1)), ("../x.txt", b"x"), *samples(1)])
    write_tar(folder / "huge.tar", [("h.jpg", picture(1) + bytes(200_000)), ("h.txt", b"h"), *samples(1)])
    write_tar(folder / "again.tar", [*samples(2), *samples(1)])
    pq.write_table(pa.table({"picture": [b""], "text": ["a"]}), folder / "column.parquet")
    empty = pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    pq.write_table(empty, folder / "rows.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    names = ",".join(sorted(path.name for path in folder.iterdir()))
    code, out = encode(tiny_dualvitok, tmp_path / "job", f"{folder}/{{{names},missing.tar,notes.txt}}")
    assert code == 1
    summary = json.loads((out / "run_summary.json").read_text())
    assert [message.partition(": ")[0].rpartition("/")[2] for message in summary["unreadable"]] == [
        "broken.parquet",
        "column.parquet",
        "missing.tar",
        "notes.txt",
        "rows.parquet",
    ]
    found = {
        path.name.partition(".")[0]: [(line["where"], line["reason"]) for line in read_lines(path)]
        for path in out.glob("*.rejected.jsonl")
    }
    assert found == {
        "cut": [("after 2 samples", "shard damaged")],
        "boundary": [("after 1 samples", "shard damaged")],
        "scribbled": [("00001.jpg", "no text"), ("after 2 samples", "shard damaged")],
        "nothing": [("after 0 samples", "shard damaged")],
        "page": [("after 0 samples", "shard damaged")],
        "no_sample": [("after 0 samples", "empty shard")],
        "two": [("a.jpg", "several images")],
        "away": [("../x.jpg", "image outside image_dir")],
        "huge": [("h.jpg", "member too large")],
        "again": [("00000.jpg", "key occurs twice")],
    }
    done = {name.removesuffix(".jsonl"): content.count(b"\n") for name, content in codes(out).items()}
    assert done["good"] == 3 and done["away"] == done["huge"] == 1 and done["again"] == 2
    assert summary["total"]["items"] == sum(done.values()) + sum(map(len, found.values()))


@pytest.mark.slow
def test_few_images_of_a_shard_are_held_at_a_time(tiny_dualvitok, tmp_path, monkeypatch):
    """However large the shard: its images are read as the encoder has room for them."""
    alive = 0
    most = 0

    class Counted(shards.NamedBytes):
        def __init__(self, *given):
            nonlocal alive, most
            super().__init__(*given)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(shards, "NamedBytes", Counted)
    write_tar(tmp_path / "in" / "0.tar", samples(120))
    code, _ = encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    gc.collect()
    assert code == 0 and alive == 0 and most < 40  # members: half of them captions


def test_a_shard_that_failed_in_part_is_read_again_for_what_failed(tiny_dualvitok, tmp_path, monkeypatch):
    from vision_tokenizer.codebook import job

    broken = [("x.jpg", picture(1)[:-100]), ("x.txt", b"x")]
    write_tar(tmp_path / "in" / "0.tar", [*samples(5), *broken, *samples(5, first=10)])
    _, folder = encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    before = lines(folder)
    prepared = []
    prepare = job.prepare
    monkeypatch.setattr(job, "prepare", lambda image, **more: prepared.append(str(image)) or prepare(image, **more))
    encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    assert prepared == ["x.jpg"] and lines(folder) == before


def test_what_a_disk_or_store_would_not_give_is_done_by_the_next_run(tiny_dualvitok, tmp_path, monkeypatch):
    content = write_tar(tmp_path / "in" / "0.tar", samples(8)).read_bytes()
    _, whole = encode(tiny_dualvitok, tmp_path / "whole", tmp_path / "in" / "0.tar")

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > content.index(b"00005.jpg"):
                raise OSError(errno.EIO, "given up after 9 attempts")
            return super().read(size)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "stream", lambda path: Failing(content))
        encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    folder = output(tmp_path / "job")
    assert len(read_lines(folder / "0.jsonl")) == 5
    (problem,) = read_lines(folder / "0.rejected.jsonl")
    assert not (folder / ".work/0").exists()  # the final files are the result, also of a shard that failed in part
    assert problem["reason"] == "shard unreadable" and "given up after 9 attempts" in problem["detail"]
    encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    assert lines(folder) == lines(whole) and len(lines(folder)) == 1


def test_a_shard_that_changed_is_refused(tiny_dualvitok, tmp_path):
    write_tar(tmp_path / "in" / "0.tar", samples(2))
    encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    write_tar(tmp_path / "in" / "0.tar", samples(3))
    with pytest.raises(UserError, match=r"begun with inputs\.0\.tar = "):
        encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar")
    code, folder = encode(tiny_dualvitok, tmp_path / "job", tmp_path / "in" / "0.tar", "--overwrite")
    assert code == 0 and len(read_lines(folder / "0.jsonl")) == 3


@pytest.mark.slow
def test_killed_at_random_and_with_three_processes_the_files_are_the_same(tiny_dualvitok, tmp_path):
    for number in range(5):
        write_tar(tmp_path / "in" / f"{number:02}.tar", samples(20 + number, first=100 * number))
    pattern = tmp_path / "in" / "{00..04}.tar"
    _, folder = encode(tiny_dualvitok, tmp_path / "whole", pattern)
    expected = lines(folder)
    base = tmp_path / "killed"
    base.mkdir()
    config = write_config(base / "meta.json", set=shard_dataset(base / "root", pattern))
    for kills in range(3):
        process = launch(*tiny_dualvitok, config, *FAST, ranks=1 + kills % 3)
        done = len(list(base.rglob("*.done.json")))
        patience = time.monotonic() + 60
        while process.poll() is None and len(list(base.rglob("*.done.json"))) <= done and time.monotonic() < patience:
            time.sleep(0.01)
        kill_all(process, config)
    process = launch(*tiny_dualvitok, config, *FAST, ranks=3)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert lines(output(base)) == expected


def test_plan_reads_headers_only_and_counts_as_the_run(tiny_dualvitok, tmp_path, monkeypatch, capsys):
    from vision_tokenizer.tokenizer.plan_codebook_inference import main as plan

    members = [*samples(6), ("wide.png", picture(4, (900, 30), "PNG")), ("wide.txt", b"w"), ("no.txt", b"no image")]
    cut = picture(7, (300, 300))
    members += [("cut.jpg", cut[:-200]), ("cut.txt", b"cut"), *samples(1)]
    write_tar(tmp_path / "in" / "0.tar", members)
    write_tar(tmp_path / "in" / "1.tar.gz", samples(2))
    (tmp_path / "in" / "2.tar").write_bytes(write_tar(tmp_path / "in" / "2.tar", samples(2)).read_bytes()[:900])
    whole = write_tar(tmp_path / "in" / "3.tar", samples(2)).read_bytes()
    (tmp_path / "in" / "3.tar").write_bytes(whole[: whole.index(b"00001.jpg")])
    code, folder = encode(tiny_dualvitok, tmp_path / "job", f"{tmp_path}/in/{{0.tar,1.tar.gz,2.tar,3.tar}}")
    assert code == 0
    read = []
    original = shards.Window.readinto
    monkeypatch.setattr(shards.Window, "readinto", lambda self, b: read.append(original(self, b)) or read[-1])
    arguments = ["--data_config", tmp_path / "job" / "meta.json", *FAST[:4], "--num_workers", 1]
    assert plan([*map(str, arguments), "--out_dir", str(tmp_path / "plan")]) == 1
    (planned,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["datasets"].values()
    total = json.loads((folder / "run_summary.json").read_text())["total"]
    assert [planned[name] for name in ("items", "done", "rejected", "failed")] == [
        total[name] for name in ("items", "done", "rejected", "failed")
    ]
    assert 0 < sum(read) < 20 * 8192 * 3
    found = read_lines(tmp_path / "plan" / "problems.jsonl")
    assert sorted((line["where"], line["reason"]) for line in found) == sorted(problems(folder))


@pytest.mark.parametrize("output_format", ["jsonl", "arrow"])
def test_verify_and_preview_of_shards(output_format, tiny_dualvitok, tmp_path, capsys):
    from vision_tokenizer.tokenizer.preview_codes import main as preview
    from vision_tokenizer.tokenizer.verify_codebook import main as verify

    write_tar(tmp_path / "in" / "0.tar", [*samples(4), ("no.txt", b"no image")])
    table = pa.table({"image": [picture(n) for n in range(4)], "text": ["a"] * 4})
    pq.write_table(table, tmp_path / "in" / "1.parquet", row_group_size=2)
    pattern = f"{tmp_path}/in/{{0.tar,1.parquet}}"
    code, folder = encode(tiny_dualvitok, tmp_path / "job", pattern, "--output_format", output_format)
    assert code == 0 and {path.name for path in folder.glob("?.*")} >= {f"0.{output_format}", f"1.{output_format}"}
    arguments = ["--model_config", tiny_dualvitok[0], "--tokenizer_checkpoint", tiny_dualvitok[1], "--device", "cpu"]
    arguments += ["--data_config", tmp_path / "job" / "meta.json", *FAST[:4]]
    assert verify([*map(str, arguments)]) == 0
    said = capsys.readouterr().out
    assert "8 images encoded again" in said and "semantic: 100.0000%" in said and "no issues" in said
    assert preview([*map(str, arguments), "--out_dir", str(tmp_path / "preview")]) == 0
    assert "no original" not in (tmp_path / "preview" / "report.html").read_text()
    write_tar(tmp_path / "in" / "0.tar", samples(6))
    assert verify([*map(str, arguments)]) == 1
    said = capsys.readouterr().out
    assert "annotations changed" in said and "item lost" in said


def test_arrow_says_what_the_lines_say(tiny_dualvitok, tmp_path):
    from vision_tokenizer.codebook.read import read_lines as lines_of

    broken = [("x.jpg", picture(1)[:-100]), ("x.txt", b"x")]
    write_tar(tmp_path / "in" / "0.tar", [*samples(9), *broken])
    _, as_lines = encode(tiny_dualvitok, tmp_path / "lines", tmp_path / "in" / "0.tar")
    _, as_arrow = encode(tiny_dualvitok, tmp_path / "arrow", tmp_path / "in" / "0.tar", "--output_format", "arrow")
    assert b"".join(line + b"\n" for line in lines_of(as_arrow / "0.arrow")) == (as_lines / "0.jsonl").read_bytes()
    assert problems(as_arrow) == problems(as_lines) == [("x.jpg", "image unreadable")]
    before = (as_arrow / "0.arrow").read_bytes()
    encode(tiny_dualvitok, tmp_path / "arrow", tmp_path / "in" / "0.tar", "--output_format", "arrow")  # tries x again
    assert (as_arrow / "0.arrow").read_bytes() == before
    with pytest.raises(UserError, match=r"begun with settings\.output_format = 'arrow'"):
        encode(tiny_dualvitok, tmp_path / "arrow", tmp_path / "in" / "0.tar")
    content = bytearray(before)
    for at in range(200, len(content), 97):
        content[at] ^= 0xFF
    (as_arrow / "0.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.arrow"):
        list(lines_of(as_arrow / "0.arrow"))


@pytest.mark.slow
def test_shards_in_a_store_are_read_by_ranges_and_give_the_same_lines(tiny_dualvitok, tmp_path, monkeypatch):
    from store_server import s3_server

    from vision_tokenizer.codebook.read import read_lines as lines_of
    from vision_tokenizer.tokenizer.plan_codebook_inference import main as plan
    from vistoken import object_store
    from vistoken.store import location

    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    names = [f"{number:02}.tar" for number in range(18)]  # enough of them for their folder to be listed
    for number, name in enumerate(names):
        write_tar(tmp_path / "in" / name, samples(2, first=10 * number))
    table = pa.table({"image": [picture(n) for n in range(4)], "text": ["a"] * 4})
    pq.write_table(table, tmp_path / "in" / "18.parquet", row_group_size=2)
    cut = tmp_path / "in" / names[3]
    cut.write_bytes(cut.read_bytes()[:3000])
    pattern = "{{{},18.parquet,99.tar}}".format(",".join(names))
    code, local = encode(tiny_dualvitok, tmp_path / "local", f"{tmp_path}/in/{pattern}")
    assert code == 1
    with s3_server("data") as server:
        for path in (tmp_path / "in").iterdir():
            (location("s3://data/in") / path.name).put(path.read_bytes())
        server.every = 10  # requests fail now and then
        code, stored = encode(tiny_dualvitok, tmp_path / "stored", f"s3://data/in/{pattern}")
        assert code == 1 and codes(stored) == codes(local)
        assert problems(stored) == problems(local) == [("after 1 samples", "shard damaged")]
        (message,) = json.loads((stored / "run_summary.json").read_text())["unreadable"]
        assert message.startswith("s3://data/in/99.tar: cannot read the shard (No such file")
        config = write_config(tmp_path / "meta.json", set=shard_dataset("s3://data/out", f"s3://data/in/{pattern}"))
        assert run_here(*tiny_dualvitok, config, *FAST, "--output_format", "arrow") == 1  # written there, too
        assert run_here(*tiny_dualvitok, config, *FAST, "--output_format", "arrow") == 1  # tries what failed
        found = {
            path.name: path for path in location("s3://data/out/jsonl_after_tokenizer/dualvitok/fixed_64").iterdir()
        }
        assert {name.replace(".jsonl", ".arrow") for name in codes(local)} <= found.keys()
        assert b"".join(line + b"\n" for line in lines_of(found["00.arrow"])) == codes(local)["00.jsonl"]
        arguments = ["--data_config", tmp_path / "stored" / "meta.json", *FAST[:4], "--num_workers", 1]
        assert plan([*map(str, arguments), "--out_dir", str(tmp_path / "plan")]) == 1
        (planned,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["datasets"].values()
        assert (planned["done"], planned["failed"]) == (39, 1)
