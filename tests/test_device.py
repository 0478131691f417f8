"""What this process computes with: which GPU, which number format, how many threads, and how it runs out of memory."""

import os
import subprocess
import sys

import pytest
import torch

from vistoken.cli import DTYPES as DTYPE_NAMES
from vistoken.device import DTYPES, device_facts, local_device, memory_named
from vistoken.errors import UserError


def test_flags_name_the_number_formats_that_there_are():
    assert tuple(DTYPES) == DTYPE_NAMES


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that so many GPUs are visible, with these variables set."""

    def pretend(count: int, **variables: str) -> None:
        for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return pretend


def test_a_process_takes_the_gpu_of_its_local_rank(gpus):
    gpus(8, LOCAL_RANK="5", TORCHELASTIC_RUN_ID="x")
    assert local_device("cuda") == torch.device("cuda", 5)


def test_where_each_process_sees_its_own_gpu_alone_it_takes_that(gpus):
    gpus(1, LOCAL_RANK="5")
    assert local_device("auto") == torch.device("cuda", 0)


def test_more_processes_of_one_torchrun_than_gpus_are_refused(gpus):
    gpus(1, LOCAL_RANK="1", TORCHELASTIC_RUN_ID="x")
    with pytest.raises(UserError, match="local rank 1 has no GPU of its own: only 1 are visible"):
        local_device("cuda")


NEW_SWITCHES = """
import torch
from vistoken.device import float32_products

torch.backends.cuda.matmul.fp32_precision = "tf32"  # now reading matmul.allow_tf32 raises
torch.backends.cudnn.conv.fp32_precision = "ieee"
for tf32 in (True, False):
    with float32_products(tf32=tf32):
        wanted = "tf32" if tf32 else "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == wanted
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
assert torch.backends.cudnn.conv.fp32_precision == "ieee"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the old switches only")
def test_the_number_format_can_be_set_after_somebody_used_the_newer_switches():
    subprocess.run([sys.executable, "-W", "error", "-c", NEW_SWITCHES], check=True, timeout=120)


DECODE = """
import os
import sys
import threading
from pathlib import Path

import torch

from vision_tokenizer.codebook.encoder import Encoder
from vision_tokenizer.images import chameleon, dualvitok

start, image = threading.Barrier(8), Path(sys.argv[1])

class Tokenizer:
    device = torch.device("cpu")
    weight = torch.randn(8, 3, 3, 3)

    def encode(self, pixels):
        return (torch.conv2d(pixels, self.weight).argmax(1),)

def prepare(sizes):
    start.wait()  # so that every worker takes one
    chameleon.prepare(image, chameleon.crop_sizes(512))
    return dualvitok.prepare(image, sizes, 0)

def others():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.randn(512, 512) @ torch.randn(512, 512)  # the main thread may have a team
torch.zeros(1 << 22).add_(1)
before = others()
with Encoder(Tokenizer(), prepare, batch_size=2, num_workers=8) as encoder:
    encoder.add("chunk", ((number, ((512, 512),)) for number in range(16)))
    ((_, images),) = encoder.flush()
    names = [thread.name for thread in threading.enumerate()]
    print(torch.get_num_threads(), len(images), sum(name.startswith("decode") for name in names), others() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.skipif(os.cpu_count() == 1, reason="on one core a team is one thread")
def test_a_decoding_worker_is_one_thread(golden):
    """OpenMP would start a team of its own, as large as the machine has cores, for every thread that computes."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", DECODE, str(golden / "images" / "photo.jpg")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    cores, images, workers, others = map(int, done.stdout.split())
    assert cores > 1 and (images, workers) == (16, 8)
    assert others == 0, "threads that are not Python's"


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(ALLOCATOR), MemoryError()],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_names_the_flag_and_a_size_to_try(error):
    told = r"cpu .*for 32 images, with --batch_size 32. Try --batch_size 16"
    with pytest.raises(UserError, match=told), memory_named(torch.device("cpu"), "--batch_size", 32, "32 images"):
        raise error


def test_other_errors_than_of_memory_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_named(torch.device("cpu"), "--batch_size", 32, "images"):
        raise RuntimeError("shapes cannot be multiplied")


def test_what_the_cpu_says_when_it_has_too_little_memory_is_recognised():
    with pytest.raises(UserError, match="too little memory"), memory_named(torch.device("cpu"), "--x", 1, "it"):
        torch.empty(2**62, dtype=torch.uint8)


def test_a_gpu_is_known_by_its_model_and_by_what_computes_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    found = device_facts(torch.device("cuda", 3))  # which of a machine's GPUs makes no difference
    known = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "cuda": "13.0", "cudnn": "91002"}
    assert found == {"type": "cuda", **known}


def test_a_cpu_is_known_by_what_it_computes_with():
    ours = device_facts(torch.device("cpu"))
    assert ours["type"] == "cpu" and ours["capability"]
