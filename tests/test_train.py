"""Training through the command line."""

import pytest
from train_small import golden_samples, train, write_data_config, write_model, write_record
from unitoken_small import golden


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", golden_samples()))


@pytest.mark.parametrize("variant", ["base", "anyres"])
def test_stage2_trajectory(tmp_path, model, data, variant):
    expected = golden("training/stage2_trajectory.json")[f"stage2_{variant}"]
    found = train(model, data, tmp_path, variant=variant, checkpointing=True)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4), (step, name)
