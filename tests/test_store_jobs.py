"""Both jobs with every input and output in a store: the same bytes as on a disk, whatever the store does in between."""

import io
import json
import time

import pytest
from codebook_job import dataset, kill_all, kill_one_rank, launch, run_here, write_config
from lm_small import extended_tokenizer, write_model
from PIL import Image
from sharding import samples, write_tar
from store_server import s3_server
from train_small import train

from pre_tokenize import concat_record, pre_tokenize, preview_tokens, verify_tokens
from pre_tokenize.token_file import TokenFiles
from training.data.loading import ImageReader
from vision_tokenizer.codebook import output as codebook_output
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer import plan_codebook_inference, preview_codes, verify_codebook
from vision_tokenizer.tokenizer.tokenizer_codebook_inference import main as codebook_inference
from vistoken import object_store
from vistoken.errors import Failed, UserError
from vistoken.store import Location, Url, local_copy, remove_tree

FIXED = ("--resolution_type", "fixed", "--resolution", "32")
TINY = (*FIXED, "--batch_size", "2", "--max_failed", "1", "--crop_percent_thresh", "0.5")


@pytest.fixture(scope="module")
def server():
    with s3_server("lab") as server:
        yield server


@pytest.fixture
def bucket(server, request, monkeypatch):
    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    yield Url(f"s3://lab/{request.node.name}")
    server.every = 0


def fill(where: Location) -> None:
    """Twelve pictures, one of them damaged and one too long, in two annotation files."""
    for folder in (where / "images", where / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(10):
        picture = where / f"images/{number}.png"
        picture.write_bytes(png((40 + number, 48), (20 * number, 90, 7)))
    (where / "images/10.png").write_bytes(b"no picture")
    (where / "images/11.png").write_bytes(png((400, 48), (0, 0, 0)))
    for name, numbers in (("a", range(8)), ("b", range(8, 13))):  # 12 does not exist
        lines = [json.dumps({"id": number, "images": [f"{number}.png"]}) for number in numbers]
        (where / f"annotations/{name}.jsonl").write_bytes("\n".join(lines).encode())


def png(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def final_bytes(root: Location, prefix: Location) -> dict[str, bytes]:
    """The final files below `root`; what they say of `prefix` is left out."""
    found = {}
    for path in root.iterdir():
        if path.is_dir() and path.name != ".work":
            found |= {f"{path.name}/{name}": content for name, content in final_bytes(path, prefix).items()}
        elif path.is_file() and not path.name.endswith("summary.json"):  # these have seconds
            found[path.name] = path.read_bytes().replace(str(prefix).encode(), b"")
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_dualvitok):
    return load_dualvitok(*tiny_dualvitok, device="cpu")


@pytest.fixture
def encode(tmp_path, tiny_dualvitok, tokenizer, monkeypatch):
    """`encode(where)` runs codebook inference on what lies there, in chunks of three items -> its exit code."""
    monkeypatch.setitem(codebook_output.CHUNK_ITEMS, "cpu", 3)
    monkeypatch.setattr("vision_tokenizer.models.dualvitok.model.load_dualvitok", lambda *args, **options: tokenizer)

    def run(where, *flags):
        config = write_config(
            tmp_path / "meta.json", birds=dataset(where / "out", where / "images", where / "annotations")
        )
        return run_here(*tiny_dualvitok, config, *TINY, *flags)

    return run


@pytest.fixture
def expected(tmp_path, encode) -> dict[str, bytes]:
    fill(tmp_path)
    assert encode(tmp_path) == 0
    files = final_bytes(tmp_path / "out", tmp_path)
    assert sum(content.count(b"\n") for name, content in files.items() if name.endswith(".rejected.jsonl")) == 3
    return files


def test_a_bucket_gets_the_bytes_of_a_disk(bucket, encode, expected):
    fill(bucket)
    assert encode(bucket) == 0
    assert final_bytes(bucket / "out", bucket) == expected
    (bucket / "images/10.png").write_bytes((bucket / "images/1.png").read_bytes())
    assert encode(bucket) == 0  # tries again what failed, and nothing else
    summary = json.loads((bucket / "out/jsonl_after_tokenizer/dualvitok/fixed_32/run_summary.json").read_bytes())
    assert (summary["total"]["done"], summary["total"]["failed"], summary["total"]["rejected"]) == (11, 1, 1)


def test_a_store_that_fails_every_tenth_request_changes_no_byte(server, bucket, encode, expected, capsys):
    fill(bucket)
    server.every, failed = 10, server.failed
    assert encode(bucket) == 0
    assert server.failed > failed + 5
    server.every = 0
    assert final_bytes(bucket / "out", bucket) == expected
    assert f"{server.failed - failed} requests to a store were made again" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_every_put_and_begun_again(bucket, encode, expected, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_after(steps: int) -> bool:
        left = iter(range(steps))

        def put(*args):
            if next(left, None) is None:
                raise Killed
            return whole(*args)

        with monkeypatch.context() as patch:
            whole = Url.put
            patch.setattr(Url, "put", put)
            try:
                encode(bucket)
                return False
            except Killed:
                return True

    fill(bucket)
    steps = 0
    while killed_after(steps):
        encode(bucket)
        assert final_bytes(bucket / "out", bucket) == expected
        remove_tree(bucket / "out")
        steps += 4
    assert steps > 16


@pytest.mark.slow
def test_one_rank_killed_then_all_three_and_the_bytes_are_the_same(server, bucket, tmp_path, tiny_dualvitok):
    """The store answers 500 to every tenth request meanwhile."""
    for where in (tmp_path, bucket):
        fill(where)
        lines = [json.dumps({"id": number, "images": [f"{number % 10}.png"]}) for number in range(500)]
        (where / "annotations/b.jsonl").write_bytes("\n".join(lines).encode())
    flags = [flag if flag != "2" else "4" for flag in TINY]

    def given(where):
        folders = dataset(where / "out", where / "images", where / "annotations")
        return *tiny_dualvitok, write_config(tmp_path / f"{type(where).__name__}.json", birds=folders), *flags

    assert run_here(*given(tmp_path)) == 0
    server.every = 10

    def results() -> int:
        return len(list((bucket / "out").glob("*/*/*/.work/b/0*.json")))

    for kill in (kill_one_rank, kill_all):
        before = results()
        job = launch(*given(bucket), ranks=3)
        while results() == before:
            assert job.poll() is None
            time.sleep(0.05)
        kill(job, tmp_path / "Url.json")
        assert job.returncode, "ended before it was killed"
    last = launch(*given(bucket), ranks=3)
    _, stderr = last.communicate(timeout=300)
    assert last.returncode == 0, stderr
    server.every = 0
    assert final_bytes(bucket / "out", bucket) == final_bytes(tmp_path / "out", tmp_path)


@pytest.mark.slow
def test_other_settings_are_refused_in_a_bucket(bucket, encode):
    fill(bucket)
    encode(bucket)
    with pytest.raises(UserError, match="batch_size = 2, now it is 3"):
        encode(bucket, "--batch_size", "3")
    assert encode(bucket, "--batch_size", "3", "--overwrite") == 0


def test_of_two_runs_that_begin_at_once_with_other_settings_one_is_refused(bucket, encode, monkeypatch):
    """The second one begins between the first one's look for a manifest and its put."""
    fill(bucket)
    monkeypatch.setattr("vistoken.jobs.manifest.read_manifest", lambda folder: None)
    encode(bucket)
    with pytest.raises(UserError, match="batch_size = 2, now it is 3"):
        encode(bucket, "--batch_size", "3")


@pytest.mark.parametrize("annotations", ["s3://lab/nowhere", "s3://no-such-bucket/x"])
def test_a_url_that_does_not_exist_is_a_message(bucket, tmp_path, tiny_dualvitok, annotations, capsys):
    fill(bucket)
    lost = dataset(bucket / "lost", bucket / "images", Url(annotations))
    birds = dataset(bucket / "out", bucket / "images", bucket / "annotations")
    config = write_config(tmp_path / "meta.json", lost=lost, birds=birds)
    assert run_here(*tiny_dualvitok, config, *TINY) == 1
    assert annotations in capsys.readouterr().out
    assert (bucket / "out/jsonl_after_tokenizer/dualvitok/fixed_32/a.jsonl").exists()  # the rest is done


def test_tokenizer_and_config_may_lie_in_a_bucket(bucket, tiny_dualvitok):
    urls = []
    for path in tiny_dualvitok:
        (bucket / path.name).write_bytes(path.read_bytes())
        urls.append(bucket / path.name)
    assert load_dualvitok(*urls, device="cpu").fingerprint == load_dualvitok(*tiny_dualvitok, device="cpu").fingerprint
    with pytest.raises(UserError, match=f"{bucket}/none.bin: cannot read it"):
        load_dualvitok(urls[0], bucket / "none.bin", device="cpu")


@pytest.mark.slow
def test_plan_and_verify_read_a_bucket(bucket, encode, tmp_path, tiny_dualvitok):
    fill(bucket)
    encode(bucket)
    config = ["--data_config", str(tmp_path / "meta.json"), *FIXED, "--crop_percent_thresh", "0.5"]
    assert plan_codebook_inference.main([*config, "--out_dir", str(tmp_path / "plan")]) == 1  # two images are bad
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert plan
    model, checkpoint = map(str, tiny_dualvitok)
    files = ["--model_config", model, "--tokenizer_checkpoint", checkpoint, "--device", "cpu"]
    assert verify_codebook.main([*config[:-2], *files]) == 0


@pytest.mark.slow
def test_conversations_become_token_files_in_a_bucket(bucket, tmp_path, chameleon_folder):
    for path in chameleon_folder.iterdir():
        (bucket / "tokenizer" / path.name).write_bytes(path.read_bytes())
    for number in range(6):
        (bucket / f"images/{number}.png").write_bytes(png((80, 70), (40 * number, 90, 30)))
    turns = [{"from": "human", "value": "<|image|> What is it?"}, {"from": "gpt", "value": "A cat."}]
    names = [f"{number}.png" for number in range(7)]  # the last one is missing
    items = [{"conversations": turns, "image": [name]} for name in names]
    items[2]["image"] = [str(bucket / "images/2.png")]
    records = {}
    for where in (tmp_path, bucket):
        (where / "data.json").write_bytes(json.dumps(items).encode())
        command = ["--in_filename", where / "data.json", "--out_dir", where / "out", "--items_per_file", "4"]
        command += ["--tokenizer_dir", bucket / "tokenizer", "--image_dir", bucket / "images", "--target_size", "64"]
        assert pre_tokenize.main([*map(str, command), "--device", "cpu", "--max_failed", "1"]) == 0
        files = [where / "out", where / "out/record.json"]
        concat_record.main(["--sub_record_dir", str(files[0]), "--save_path", str(files[1])])
        records[where] = final_bytes(where / "out", where / "data.json")
        assert [len(sample.tokens) for sample in TokenFiles(files[1])] == list(TokenFiles(files[1]).lengths)
        tokenizer = ["--tokenizer_dir", str(bucket / "tokenizer"), "--in_filename", str(where / "data.json")]
        assert verify_tokens.main(["--record", str(files[1]), *tokenizer, "--device", "cpu"]) == 0
    assert records[bucket] == records[tmp_path]
    assert {"files/0-4.arrow", "files/4-7.arrow", "record.json", "record.rejected.jsonl"} <= records[bucket].keys()


def test_the_trainer_reads_images_and_members_of_tar_files_by_url(bucket, tmp_path):
    picture = png((60, 40), (200, 90, 7))
    tar = write_tar(tmp_path / "0.tar", [("deep/0.png", picture)])
    (tmp_path / "0.png").write_bytes(picture)
    for name in ("0.png", "0.tar"):
        (bucket / name).write_bytes((tmp_path / name).read_bytes())
    reader = ImageReader(64, 4, False, tmp_path / "members")
    places = (tmp_path / "0.png", tar / "deep/0.png", bucket / "0.png", bucket / "0.tar/deep/0.png")
    tiles = [reader(str(place)).tiles for place in places]
    assert tiles[0].std() and all((one == tiles[0]).all() for one in tiles)
    with pytest.raises(Failed, match=r"0\.tar has no member deep/1\.png"):
        reader(str(bucket / "0.tar/deep/1.png"))


@pytest.mark.slow
def test_from_tars_to_trained_steps_by_urls_alone(bucket, tmp_path, tiny_dualvitok):
    """Plan, codes, token files, each of them verified and looked at, then some steps of training on them."""
    tokenizer = extended_tokenizer(tmp_path, (256, 512))
    for path in (*tiny_dualvitok, *tokenizer.iterdir()):
        (bucket / "models" / path.name).write_bytes(path.read_bytes())
    for number in range(2):
        tar = write_tar(tmp_path / f"{number}.tar", samples(6, first=10 * number))
        (bucket / f"in/{number}.tar").write_bytes(tar.read_bytes())
    entry = {"root": str(bucket / "out"), "shards": f"{bucket}/in/{{0..1}}.tar", "tokenizer_inference": True}
    (bucket / "meta.json").write_bytes(json.dumps({"set": entry}).encode())
    (bucket / "train.yaml").write_bytes(b"META: [{path: tokens0/record.json}, {path: tokens1/record.json}]")

    def call(main, **given):
        flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        assert not main(flags), main.__module__

    data = {"data_config": bucket / "meta.json", "resolution_type": "fixed", "resolution": 64}
    model = {"model_config": bucket / "models/tiny.py", "device": "cpu"}
    model["tokenizer_checkpoint"] = bucket / "models/pytorch_model.bin"
    call(
        plan_codebook_inference.main, **data, model_config=model["model_config"], out_dir=bucket / "plan", num_workers=1
    )
    call(codebook_inference, **data, **model)
    call(verify_codebook.main, **data, **model)
    call(preview_codes.main, **data, **model, out_dir=bucket / "preview")
    for number in range(2):
        tokens = bucket / f"tokens{number}"
        source = {"tokenizer_dir": bucket / "models", "device": "cpu"}
        source["in_filename"] = bucket / f"out/jsonl_after_tokenizer/dualvitok/fixed_64/{number}.jsonl"
        call(pre_tokenize.main, image_tokenizer="dualvitok", **source, out_dir=tokens)
        call(concat_record.main, sub_record_dir=tokens, save_path=tokens / "record.json")
        call(verify_tokens.main, record=tokens / "record.json", **source)
    shown = {"record": bucket / "tokens0/record.json", "tokenizer_dir": bucket / "models", "out_dir": bucket / "shown"}
    call(preview_tokens.main, **shown, **model, data_config=bucket / "meta.json")
    for page in ("preview/report.html", "shown/report.html"):
        assert "PSNR" in (bucket / page).read_text() and "no original" not in (bucket / page).read_text()

    small = write_model(tmp_path / "small", vocab_size=303)
    settings = {"variant": "lm", "dropout": 0, "unmask_image_logits": False, "batch_size": 2, "epochs": 2}
    settings |= {"tokenizer_from": tokenizer, "num_workers": 1}
    with pytest.raises(UserError, match=r"tokens0/record\.json: its token files lie in a store.* --token_cache"):
        train(small, bucket / "train.yaml", tmp_path / "refused", **settings)
    found = train(small, bucket / "train.yaml", tmp_path / "by-url", **settings, token_cache=tmp_path / "cache")
    assert len(found) == 12 and len(list((tmp_path / "cache").glob("*/*.arrow"))) == 2
    with local_copy(bucket) as copy:
        on_disk = train(small, copy / "train.yaml", tmp_path / "on-disk", **settings)
    assert [step["c_loss"] for step in found] == [step["c_loss"] for step in on_disk]
