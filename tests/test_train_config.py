"""What a run is told before its first step: settings, data configs and model folders, and which are refused."""

import json
import shutil

import pytest
import yaml
from train_small import (
    TEXT,
    flags,
    golden_samples,
    metrics,
    text_samples,
    train,
    write_data_config,
    write_images,
    write_model,
    write_record,
    write_texts,
)

from training.config import build_parser, resolve
from training.data.loading import read_data_config
from training.loop import learning_rate
from training.models.folder import open_unitoken
from training.train import main
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


def test_a_budget_of_tokens_wants_the_sizes_of_images(tmp_path, model):
    samples = [sample._replace(image_sizes=None) for sample in golden_samples()]
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    way = {"batch_tokens": 600, "global_batch_size": 4, "batch_size": False}
    with pytest.raises(UserError, match="lacks the image sizes of 4 samples"):
        train(model, data, tmp_path / "output", **way)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": "nowhere"}, "nowhere: no such folder"),
        ({"init_from": "tests"}, "no config.json, so this is no model folder; it holds"),
        ({"data_config": "nowhere.yaml"}, "nowhere.yaml: cannot read"),
        ({"global_batch_size": 7}, "--global_batch_size 7 cannot be made of 4 .* x 1"),
        ({"batch_size": 400}, "too few for one step of 400"),
        ({"lr": -1}, "--lr must be above 0"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"trainable_params": "vit,lora"}, "no tensor's name contains 'lora'"),
        ({"trainable_params": "vit.head"}, "nothing would be trained"),
        ({"dropout": 1.5}, "--dropout"),
        ({"unmask_image_logits": False}, "--unmask_image_logits"),
        ({"resume_path": "nowhere"}, "not a complete checkpoint"),
    ],
)
def test_bad_input(tmp_path, model, images, change, message):
    with pytest.raises(UserError, match=message):
        main(flags(model, images, tmp_path / "output", **change))
    assert not list(tmp_path.glob("output/metrics.jsonl")) or metrics(tmp_path / "output") == []


def test_a_model_that_does_not_fit_its_config(tmp_path, model, text):
    for change, message in (
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"hidden_size": 128}, "model.embed_tokens.weight"),
        ({"swin_norm": True}, "swin_norm"),
        ({"vocab_size": "many"}, "vocab_size must be a positive number"),
    ):
        folder = tmp_path / message.split()[0]
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            train(folder, text, tmp_path / "output")


def test_a_model_without_a_tower_names_the_flag_that_brings_one(tmp_path, text):
    folder = write_model(tmp_path / "model", ("model.", "lm_head."))
    with pytest.raises(UserError, match=r"model: holds no vision tower.*--vit_from nowhere: no such folder"):
        train(folder, text, tmp_path / "output", vit_from="nowhere")


def test_an_unfinished_run_is_no_model(tmp_path, text):
    (tmp_path / "stage1" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has not finished"):
        train(tmp_path / "stage1", text, tmp_path / "output")


def test_configuration_comes_from_stage_then_file_then_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("stage: I\nlr: 0.5\ninit_from: a\ndata_config: b\noutput_dir: c\nclip_grad: 1\n")
    parser = build_parser("")
    config = resolve(vars(parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--lr", "0.25"])))
    assert (config.lr, config.clip_grad, config.vit_lr_scale, config.trainable_params) == (0.25, 1, 1e-2, "vit,adapter")
    config.dump(tmp_path / "again.yaml")
    assert resolve({"config": tmp_path / "again.yaml"}) == config
    (tmp_path / "c.yaml").write_text("lerning_rate: 1")
    with pytest.raises(UserError, match="unknown field 'lerning_rate'"):
        resolve({"config": tmp_path / "c.yaml"})
    (tmp_path / "c.yaml").write_text("lr: fast\ninit_from: a\ndata_config: b\noutput_dir: c\n")
    with pytest.raises(UserError, match=r"c\.yaml: --lr: expected float, found 'fast'"):
        resolve({"config": tmp_path / "c.yaml"})
    (tmp_path / "c.yaml").write_text("lr: 2e-5\ninit_from: a\ndata_config: b\noutput_dir: c\n")  # text to YAML
    assert resolve({"config": tmp_path / "c.yaml"}).lr == 2e-5
    (tmp_path / "c.yaml").write_text("stage: [I]\ninit_from: a\ndata_config: b\noutput_dir: c\n")
    with pytest.raises(UserError, match=r"--stage: expected str, found \['I'\]"):
        resolve({"config": tmp_path / "c.yaml"})


def test_learning_rate_rises_then_falls_along_half_a_cosine():
    config = resolve({"init_from": "a", "data_config": "b", "output_dir": "c", "lr": 1.0, "min_lr": 0.1, "epochs": 2})
    assert learning_rate(0, config) == 0
    assert learning_rate(0.005, config) == pytest.approx(0.5)
    assert learning_rate(0.01, config) == pytest.approx(1)
    assert learning_rate(1.005, config) == pytest.approx(0.55)
    assert learning_rate(2, config) == pytest.approx(0.1)


def test_images_that_have_moved_are_found_where_the_data_config_says(tmp_path, model):
    sample = golden_samples(["caption"])[0]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(sample.images[0], moved / "picture.png")
    record = write_record(
        tmp_path / "tokens", [sample._replace(images=("picture.png",))], manifest={"image_dir": "/gone"}
    )
    settings = {"batch_size": 1, "epochs": 1}
    with pytest.raises(UserError, match=r"/gone/picture\.png"):
        train(model, write_data_config(tmp_path / "data.yaml", record), tmp_path / "output", **settings)
    assert train(
        model, write_data_config(tmp_path / "data.yaml", record, image_dir="moved"), tmp_path / "output", **settings
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2.0),
        ("vocab_size", 1e9),
        ("vocab_size", 10**30),
        ("hidden_size", True),
        ("rms_norm_eps", float("nan")),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_its_field(tmp_path, model, name, value):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"config\.json: {name.replace('parameters', 'type')} "):
        open_unitoken(tmp_path / "model", tmp_path, 0)


def test_positions_are_read_where_transformers_5_writes_them(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "rope_theta"}
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}))
    assert open_unitoken(tmp_path / "model", tmp_path, 0).llm.rope_theta == 5e5


def test_a_model_without_a_tokenizer_file_is_told(tmp_path, model, text, capsys):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    train(tmp_path / "model", text, tmp_path / "output", **TEXT, max_steps=1)
    assert f"{tmp_path / 'model'}: no tokenizer file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("lr", float("inf")), ("lr", float("nan")), ("seed", 10**23), ("wd", 1e30)]
)
def test_numbers_that_nothing_can_hold_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} must be .* below 2"):
        resolve({"init_from": "a", "data_config": "b", "output_dir": "c", name: value})


def test_a_world_size_that_is_not_torchruns_is_left_alone(tmp_path, model, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "a lot")
    train(model, text, tmp_path, **TEXT, max_steps=1)


@pytest.mark.parametrize("entry", [{"validation": 1.0}, {"validation": "x"}, {"split": "test"}])
def test_a_wrong_share_for_validation_is_refused(tmp_path, entry):
    record = write_record(tmp_path / "a", text_samples(4))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": [{"path": str(record), **entry}]}))
    with pytest.raises(UserError, match=r"META entry 0: (validation is a share|split is validation)"):
        read_data_config(tmp_path / "data.yaml")
