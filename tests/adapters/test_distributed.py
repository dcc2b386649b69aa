"""Adapted trees train on several processes: DDP and FSDP2 see the names and compute the gradients of one process.

Each case runs as this file, in processes of its own, that talk by gloo; rank 0 compares with the tree alone.
"""

import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from adapter_specimens import WIDTH, Deep, Gain, Side, lora_on, randomize

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter, LoraAdapter

pytestmark = pytest.mark.slow
PROCESSES = 2
TIMEOUT_S = 120


def block() -> fl.Chain:
    return fl.Chain(
        fl.Residual(fl.LayerNorm(WIDTH), fl.Linear(WIDTH, WIDTH), fl.SiLU(), fl.Linear(WIDTH, WIDTH)),
        fl.Sum(fl.Identity(), fl.UseContext("time", "embedding")),
    )


def make_tree() -> fl.Chain:
    """Two blocks under adapters of several kinds, stacked LoRAs among them; the same in every process."""
    torch.manual_seed(0)
    model = fl.Chain(fl.Linear(WIDTH, WIDTH), block(), block(), fl.Linear(WIDTH, WIDTH))
    for layer in list(model.layers(fl.Linear))[1:4]:
        for rank in (2, 3):
            lora_on(layer, rank=rank, scale=0.5).inject()
    Gain(model.Chain_1.Residual).inject()
    Side(model.Linear_2).inject()
    Deep(model.Linear_2).inject()
    randomize(model)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context, wanted = (torch.randn(2 * PROCESSES, WIDTH, generator=generator) for _ in range(3))
    return x, context, wanted


def loss_of(call: Callable[[Tensor], Tensor], tree: fl.Chain, part: slice) -> Tensor:
    x, context, wanted = (tensor[part] for tensor in batch())
    tree.set_context("time", {"embedding": context})
    return (call(x) - wanted).square().mean()


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part() -> slice:
    return slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def names_of(tree: nn.Module) -> list[list[str]]:
    listings = (tree.named_parameters(), tree.named_buffers(), tree.named_modules())
    return [list(tree.state_dict()), *([name for name, _ in listing] for listing in listings)]


def assert_trains_as_alone(call: Any, tree: fl.Chain) -> None:
    """Compare loss, gradients and, after a step, weights with those of one process that sees the whole batch."""
    alone = make_tree()
    expected = loss_of(alone, alone, slice(None))
    expected.backward()
    loss = loss_of(call, tree, own_part())
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / PROCESSES, expected.detach(), rtol=1e-5, atol=1e-6)
    gradients = {name: full(parameter.grad) for name, parameter in tree.named_parameters()}
    assert list(gradients) == [name for name, _ in alone.named_parameters()]
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    for module in (alone, tree):
        torch.optim.AdamW(module.parameters(), lr=0.01).step()
    for (name, parameter), (_, other) in zip(tree.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(full(parameter), other, rtol=1e-4, atol=1e-5, msg=name)
    again, reference = loss_of(call, tree, own_part()), loss_of(alone, alone, own_part())
    torch.testing.assert_close(again, reference, rtol=1e-4, atol=1e-5)


def assert_checkpoints_keep_names(tree: fl.Chain, keys: list[str]) -> None:
    """Distributed checkpoints have the names of the tree, each with its tensor, and go to a disk and back."""
    whole = get_model_state_dict(tree, options=StateDictOptions(full_state_dict=True))
    assert list(whole) == list(get_model_state_dict(tree)) == keys
    for key, value in tree.state_dict().items():
        torch.testing.assert_close(full(value), whole[key], rtol=0, atol=0)
    place = [tempfile.mkdtemp()]
    dist.broadcast_object_list(place, src=0)
    with warnings.catch_warnings(action="ignore"):
        checkpoint.save(get_model_state_dict(tree), checkpoint_id=place[0])
        with torch.no_grad():
            for parameter in tree.parameters():
                parameter.zero_()
        state = get_model_state_dict(tree)
        checkpoint.load(state, checkpoint_id=place[0])
    set_model_state_dict(tree, state)
    for key, value in tree.state_dict().items():
        torch.testing.assert_close(full(value), whole[key], rtol=0, atol=0, msg=key)


# -- cases, run in each process


def ddp() -> None:
    tree = make_tree()
    names = names_of(tree)
    model = nn.parallel.DistributedDataParallel(tree)
    assert [name.removeprefix("module.") for name in model.state_dict()] == names[0]
    assert_trains_as_alone(model, tree)
    assert names_of(tree) == names
    assert list(get_model_state_dict(model)) == names[0]
    assert_checkpoints_keep_names(tree, names[0])


def ddp_of_loras_alone() -> None:
    """Only the LoRAs train, as in fine-tuning; then all adapters are ejected, and the base is as it was."""
    tree = make_tree()
    base = copy.deepcopy(tree)
    eject_all(base)
    tree.requires_grad_(False)
    for adapter in tree.layers(LoraAdapter, recurse=True):
        for lora in adapter.loras.values():
            lora.requires_grad_(True)
    model = nn.parallel.DistributedDataParallel(tree)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses: list[float] = []
    for _ in range(5):
        loss = loss_of(model, tree, own_part())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    assert losses[-1] < losses[0]
    for parameter in model.parameters():
        mine = parameter.detach().clone()
        dist.broadcast(mine, src=0)
        assert torch.equal(mine, parameter)
    eject_all(tree)
    assert list(tree.state_dict()) == list(base.state_dict())
    assert all(map(torch.equal, tree.state_dict().values(), base.state_dict().values()))
    assert torch.equal(loss_of(tree, tree, own_part()), loss_of(base, base, own_part()))


def fsdp_of_blocks() -> None:
    tree = make_tree()
    names = names_of(tree)
    for part in (tree.Chain_1, tree.Chain_2, tree):
        shard(part)
    assert_sharded(tree, names)


def fsdp_of_every_linear() -> None:
    """Each Linear is sharded on its own: the base's, the adapters' and the two of each LoRA."""
    tree = make_tree()
    names = names_of(tree)
    for part in [module for module in tree.modules() if isinstance(module, nn.Linear)]:
        shard(part)
    shard(tree)
    assert_sharded(tree, names)


def fsdp_of_adapters() -> None:
    """Each adapter is sharded as a whole, its target with it."""
    tree = make_tree()
    names = names_of(tree)
    adapters = [module for module in tree.modules() if isinstance(module, Adapter)]
    for part in [*reversed(adapters), tree]:
        shard(part)
    assert_sharded(tree, names)


def fsdp_ejects() -> None:
    """Adapters leave a sharded tree; the base goes on in its shards and computes what the base computes."""
    tree, base = make_tree(), make_tree()
    eject_all(base)
    for part in (tree.Chain_1, tree.Chain_2, tree):
        shard(part)
    loss_of(tree, tree, own_part())
    eject_all(tree)
    assert list(tree.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(loss_of(tree, tree, own_part()), loss_of(base, base, own_part()), rtol=1e-5, atol=1e-6)


def shard(module: nn.Module) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (PROCESSES,)))


def assert_sharded(tree: fl.Chain, names: list[list[str]]) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in tree.parameters())
    assert names_of(tree) == names
    assert_trains_as_alone(tree, tree)
    assert names_of(tree) == names
    assert_checkpoints_keep_names(tree, names[0])


def eject_all(tree: fl.Chain) -> None:
    for adapter in [module for module in tree.modules() if isinstance(module, Adapter)]:
        adapter.eject()


CASES = [ddp, ddp_of_loras_alone, fsdp_of_blocks, fsdp_of_every_linear, fsdp_of_adapters, fsdp_ejects]


def main(rank: int, file: str) -> None:
    """Run the cases one after the other; the first that fails is the last, since the processes go in step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT_S / 2)
    )
    for case in CASES:
        case()
        print(f"passed {case.__name__}", flush=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each process printed; they are ended after TIMEOUT_S, or soon after one of them has failed."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    outputs = [folder / f"output{rank}" for rank in range(PROCESSES)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, __file__, str(rank), str(folder / "meeting")]
            with output.open("wb") as file:
                workers.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIMEOUT_S
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.poll() for worker in workers):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [output.read_text() for output in outputs]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_an_adapted_tree_trains_on_two_processes_as_on_one(case: str, told: list[str]) -> None:
    for rank, output in enumerate(told):
        assert f"passed {case}\n" in output, f"process {rank}:\n{output}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
