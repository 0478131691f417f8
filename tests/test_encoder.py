"""The encoder's promises, with a tokenizer that shows exactly what it was given."""

import gc
import threading
import weakref

import pytest
import torch

from vision_tokenizer.codebook import encoder as encoder_module
from vision_tokenizer.codebook.encoder import Encoded, Encoder
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


def encode(chunks, tokenizer, prepare, **options):
    """(chunk, images) of each chunk, as the loop of a job gets them."""
    with Encoder(tokenizer, prepare, **options) as encoder:
        for chunk, refs in chunks:
            encoder.add(chunk, ((ref, ref) for ref in refs))
            yield from encoder.finished()
        yield from encoder.flush()


def run(chunks, batch_size=4, **options):
    recorder = Recorder()
    return dict(encode(chunks, recorder, prepare, batch_size=batch_size, num_workers=2, **options)), recorder


def test_every_image_comes_back_to_its_chunk():
    chunks = [(g, [(10 * g + i, 32 if i % 3 else 64) for i in range(10)]) for g in range(5)]
    results, _ = run(chunks)
    assert list(results) == [0, 1, 2, 3, 4]
    for chunk, refs in chunks:
        assert [results[chunk][ref].codes[0].tolist() for ref in refs] == [[[number]] for number, _ in refs]
        assert [results[chunk][ref].info for ref in refs] == [f"info {number}" for number, _ in refs]


def test_batches_have_one_shape_and_fill_across_chunks():
    chunks = [(g, [(10 * g + i, 32) for i in range(3)]) for g in range(4)]  # 12 images, never 4 in one chunk
    _, recorder = run(chunks)
    assert recorder.batches == [(4, 3, 32, 32)] * 3


def test_the_last_batch_is_padded():
    results, recorder = run([("a", [(i, 32) for i in range(5)])])
    assert recorder.batches == [(4, 3, 32, 32)] * 2
    assert results["a"][4, 32].codes[0].tolist() == [[4]]


def test_an_image_named_twice_is_encoded_once():
    seen = []
    results, _ = run([("a", [(1, 32), (2, 32), (1, 32)])], on_image=lambda *told: seen.append(told))
    assert sorted(seen) == [("a", (1, 32), True), ("a", (2, 32), True)]
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
        chunks = [("a", [(n, 32) for n in range(8)])]
        ((_, results),) = encode(chunks, Meeting(), prepare, batch_size=1, num_workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [result.codes[0].item() for result in results.values()] == list(range(8))


def test_an_unreadable_image_and_an_empty_chunk():
    results, _ = run([("empty", []), ("bad", [(-1, 32), (7, 32)])])
    assert results["empty"] == {}
    assert isinstance(results["bad"][-1, 32], Failed)
    assert isinstance(results["bad"][7, 32], Encoded)


def test_an_image_without_codes_fails_alone():
    def numbered(ref):
        return torch.full((3, 32, 32), float(ref)), None

    ((_, results),) = encode([("a", [3, -1, 5])], Recorder(), numbered, batch_size=4, num_workers=1)
    assert [isinstance(results[ref], Encoded) for ref in (3, -1, 5)] == [True, False, True]
    assert results[-1].reason == "not a number"


def test_errors_do_not_keep_images_alive():
    images = weakref.WeakSet()

    def broken(ref):
        image = torch.zeros(3, 32, 32)
        images.add(image)
        raise Failed("image unreadable", str(ref)) from OSError(ref)

    ((_, results),) = encode([("a", range(10))], Recorder(), broken, batch_size=2, num_workers=1)
    assert len(results) == 10
    gc.collect()
    assert not images


def test_a_defect_of_prepare_is_not_swallowed():
    def broken(ref):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        list(encode([("a", [1])], Recorder(), broken, batch_size=2, num_workers=1))


def test_a_rare_resolution_does_not_hold_chunks_back_for_ever(monkeypatch):
    monkeypatch.setattr(encoder_module, "MAX_OPEN_CHUNKS", 3)
    taken, held = 0, 0

    def chunks():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number, [(number, 64 if number == 0 else 32)]

    returned = 0
    for _ in encode(chunks(), Recorder(), prepare, batch_size=2, num_workers=1):
        returned += 1
        held = max(held, taken - returned)
    assert returned == 40
    assert held <= 12  # 3 open chunks and the decode window, however long the input


def test_large_chunks_are_held_back_by_their_images(monkeypatch):
    """A shard has thousands: a rare resolution must not keep the codes of many shards waiting for its batch."""
    monkeypatch.setattr(encoder_module, "MAX_OPEN_IMAGES", 100)
    rare = {0, 5}
    chunks = [(g, [(100 * g + i, 64 if g in rare and i == 0 else 32) for i in range(80)]) for g in range(8)]
    taken, held = 0, []

    def counted():
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    for number, (_, images) in enumerate(encode(counted(), Recorder(), prepare, batch_size=4, num_workers=1)):
        assert len(images) == 80
        held.append(taken - number)
    assert len(held) == 8 and max(held) <= 3


def test_images_of_a_chunk_are_read_as_they_are_needed():
    read = []

    def images():
        for number in range(1000):
            read.append(number)
            yield number, (number, 32)

    def slow(ref):
        ahead.append(len(read) - ref[0])
        return prepare(ref)

    ahead = []
    with Encoder(Recorder(), slow, batch_size=2, num_workers=2) as encoder:
        encoder.add("shard", images())
        ((_, results),) = [*encoder.finished(), *encoder.flush()]
    assert len(results) == 1000 and max(ahead) < 100


def test_a_chunk_is_handed_out_as_soon_as_it_is_done():
    prepared = []

    def counted(ref):
        prepared.append(ref)
        return prepare(ref)

    chunks = [("a", [(0, 32)]), ("b", [(n, 32) for n in range(1, 1000)])]
    first, _ = next(encode(chunks, Recorder(), counted, batch_size=1, num_workers=1))
    assert first == "a" and len(prepared) < 100


def test_a_fast_device_has_images_decoded_some_seconds_ahead(monkeypatch):
    monkeypatch.setattr(encoder_module, "MOST_AHEAD", 1500)
    monkeypatch.setitem(encoder_module.SECONDS_AHEAD, "cpu", 20.0)
    with Encoder(Recorder(), prepare, batch_size=4, num_workers=1) as encoder:
        at_first = encoder.window
        encoder.add("a", [(n, (n, 32)) for n in range(40)])
        assert [chunk for chunk, _ in encoder.flush()] == ["a"]
        assert at_first < 100 < encoder.window <= 20.0 * 40  # the 40 images count as done in a second at least
        encoder.add("b", [(n, (n, 32)) for n in range(400)])
        list(encoder.flush())
        assert encoder.window <= 1500


def test_leaving_early_stops_the_pool():
    threads = threading.active_count()
    loop = encode(((n, [(n, 32)]) for n in range(10**6)), Recorder(), prepare, batch_size=2, num_workers=3)
    next(loop)
    loop.close()
    assert threading.active_count() == threads
