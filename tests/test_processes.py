"""Two processes under `accelerate launch` compute what one does. They talk by gloo, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from helpers_freezing import check_trained, half, same, snapshot

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
PLAIN = "--num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no".split()
LOOPBACK = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
FLOAT64 = {"rtol": 0, "atol": 1e-10}
LIMITS = {  # both have steps in float32
    "attribution": {"rtol": 1e-6, "atol": 0},
    "dpo": {"rtol": 0, "atol": 1e-8},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    "What each of the two processes has found."
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("launched")
    script = Path(__file__).with_name("launched.py")
    done = subprocess.run(
        [*LAUNCH, *PLAIN, str(script), str(folder)],
        env=os.environ | LOOPBACK,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", launched.TOGETHER)
def test_two_processes_equal_one(name, both):
    alone = launched.TOGETHER[name](1)
    first, second = (found[name] for found in both)
    assert same(first, second) and first.keys() == alone.keys()
    for key, tensor in alone.items():
        assert torch.allclose(first[key], tensor, **LIMITS.get(name, FLOAT64)), key


@pytest.mark.parametrize("name", ["frozen", "dpo"])
def test_frozen_bits_stay(name, both):
    check_trained(both[0][name], snapshot(launched.model_of()), half())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_frozen_model_is_trained_in_shards(architecture, both):
    alone = launched.trained_alone(architecture)
    limit = 1e-10 if architecture == "llama" else 1e-5  # float64, float32
    for found in both:
        states = found[f"sharded {architecture}"]
        assert same(states["gathered"], states["loaded"])
        assert same(states["gathered"], states["merged"])
        for name, weight in alone.items():
            assert torch.allclose(states["gathered"][name], weight, rtol=0, atol=limit), name
    if architecture == "llama":
        check_trained(states["merged"], snapshot(launched.model_of()), half())


def test_what_needs_whole_weights_refuses_shards(both):
    words = {name: "SsahError: this model is sharded" for name in both[0]["refused"]}
    words |= {
        "flattened views": "SsahError: FullyShardedDataParallel (FSDP 1) flattens",
        "flattened whole": "ValueError: Must flatten tensors with uniform `requires_grad`",
        "meta": "SsahError: a frozen model cannot move to the meta device",
    }
    for found in both:
        for name, message in found["refused"].items():
            assert message.startswith(words[name]) and "\n" not in message, (name, message)
