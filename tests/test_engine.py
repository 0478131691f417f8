"""The engine's promises, with a tokenizer that shows exactly what it was given."""

import gc
import threading
import weakref

import pytest
import torch

from vision_tokenizer.codebook import encoder as engine_module
from vision_tokenizer.codebook.encoder import Encoded, Engine
from vistoken.errors import Failed


class Recorder:
    """Codes are the first pixel of each image, so that every result can be traced to its image."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches = []

    def encode(self, pixels):
        self.batches.append(tuple(pixels.shape))
        return (pixels[:, :1, 0, :1].round().long(),)


def prepare(ref):
    number, side = ref
    if number < 0:
        raise Failed("image unreadable", str(ref))
    return torch.full((3, side, side), float(number)), f"info {number}"


def run(groups, batch_size=4, **options):
    recorder = Recorder()
    engine = Engine(recorder, prepare, batch_size=batch_size, num_workers=2, **options)
    return dict(engine.encode(groups)), recorder


def test_every_image_comes_back_to_its_group():
    groups = [(g, [(10 * g + i, 32 if i % 3 else 64) for i in range(10)]) for g in range(5)]
    results, _ = run(groups)
    assert list(results) == [0, 1, 2, 3, 4]
    for group, refs in groups:
        assert [results[group][ref].codes[0].tolist() for ref in refs] == [[[number]] for number, _ in refs]
        assert [results[group][ref].info for ref in refs] == [f"info {number}" for number, _ in refs]


def test_batches_have_one_shape_and_fill_across_groups():
    groups = [(g, [(10 * g + i, 32) for i in range(3)]) for g in range(4)]  # 12 images, never 4 in one group
    _, recorder = run(groups)
    assert recorder.batches == [(4, 3, 32, 32)] * 3


def test_the_last_batch_is_padded():
    results, recorder = run([("a", [(i, 32) for i in range(5)])])
    assert recorder.batches == [(4, 3, 32, 32)] * 2
    assert results["a"][4, 32].codes[0].tolist() == [[4]]


def test_an_image_named_twice_is_encoded_once():
    seen = []
    results, _ = run([("a", [(1, 32), (2, 32), (1, 32)])], on_images=seen.append)
    assert sum(seen) == 2
    assert set(results["a"]) == {(1, 32), (2, 32)}


def test_a_cpu_encodes_a_batch_per_thread_side_by_side():
    class Meeting(Recorder):
        both = threading.Barrier(2, timeout=30)

        def encode(self, pixels):
            self.both.wait()
            assert torch.get_num_threads() == 1
            return super().encode(pixels)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine = Engine(Meeting(), prepare, batch_size=1, num_workers=2)
        ((_, results),) = engine.encode([("a", [(n, 32) for n in range(8)])])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [result.codes[0].item() for result in results.values()] == list(range(8))


def test_an_unreadable_image_and_an_empty_group():
    results, _ = run([("empty", []), ("bad", [(-1, 32), (7, 32)])])
    assert results["empty"] == {}
    assert isinstance(results["bad"][-1, 32], Failed)
    assert isinstance(results["bad"][7, 32], Encoded)


def test_an_image_without_codes_fails_alone():
    def numbered(ref):
        return torch.full((3, 32, 32), float(ref)), None

    ((_, results),) = Engine(Recorder(), numbered, batch_size=4, num_workers=1).encode([("a", [3, -1, 5])])
    assert [isinstance(results[ref], Encoded) for ref in (3, -1, 5)] == [True, False, True]
    assert results[-1].reason == "not a number"


def test_errors_do_not_keep_images_alive():
    images = weakref.WeakSet()

    def broken(ref):
        image = torch.zeros(3, 32, 32)
        images.add(image)
        raise Failed("image unreadable", str(ref)) from OSError(ref)

    ((_, results),) = Engine(Recorder(), broken, batch_size=2, num_workers=1).encode([("a", range(10))])
    assert len(results) == 10
    gc.collect()
    assert not images


def test_a_defect_of_prepare_is_not_swallowed():
    def broken(ref):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        list(Engine(Recorder(), broken, batch_size=2, num_workers=1).encode([("a", [1])]))


def test_a_rare_resolution_does_not_hold_groups_back_for_ever(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_OPEN_GROUPS", 3)
    taken, held = 0, 0

    def groups():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number, [(number, 64 if number == 0 else 32)]

    returned = 0
    for _ in Engine(Recorder(), prepare, batch_size=2, num_workers=1).encode(groups()):
        returned += 1
        held = max(held, taken - returned)
    assert returned == 40
    assert held <= 12  # 3 open groups and the decode window, however long the input


def test_a_group_is_handed_out_as_soon_as_it_is_done():
    prepared = []

    def counted(ref):
        prepared.append(ref)
        return prepare(ref)

    engine = Engine(Recorder(), counted, batch_size=1, num_workers=1)
    first, _ = next(engine.encode([("a", [(0, 32)]), ("b", [(n, 32) for n in range(1, 1000)])]))
    assert first == "a" and len(prepared) < 100


def test_leaving_early_stops_the_pool():
    threads = threading.active_count()
    for _ in Engine(Recorder(), prepare, batch_size=2, num_workers=3).encode((n, [(n, 32)]) for n in range(10**6)):
        break
    assert threading.active_count() == threads
