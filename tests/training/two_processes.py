"""Forks two processes that train together and compares single steps of theirs with those of one process that has the joined
batch and the same noise, from shared states. Run with the name of a file to write the largest errors to."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import sys

import torch
import torch._dynamo  # before the fork: the optimiser imports it at its first step

from nvae_fast import NVAE, PRESETS
from nvae_fast.layers import shared
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.training.distributed import joined
from nvae_fast.training.loop import convert_sync_batch_norm
from nvae_fast.training.parallel import parallel_loss
from nvae_fast.training.step import TrainingStep

BATCH = 6
SETTINGS = {"kl_coeff": 0.3, "norm_coeff": 1e-2, "rate": 5e-3}


def config(compat: str):
    demo = PRESETS["demo"]
    return dataclasses.replace(
        demo, image_size=(16, 16), padding=0, num_channels_enc=4, num_channels_dec=4, num_latent_per_group=2, num_nf=1,
        num_groups_per_scale=1, num_latent_scales=2, compat=compat,
        training=dataclasses.replace(demo.training, weight_decay_norm=1e-2),
    )  # fmt: skip


def batch(i: int, shapes) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images [BATCH, 1, 16, 16] and their noise."""
    g = torch.Generator().manual_seed(i)
    y = torch.linspace(0, 3, 16)
    waves = torch.sin(y[:, None] * torch.rand(BATCH, 1, 1, 1, generator=g) * 4 + y * torch.rand(BATCH, 1, 1, 1, generator=g))
    x = (torch.rand(BATCH, 1, 16, 16, generator=g) < waves.abs()).float()
    return x, [torch.randn(BATCH, *shape, generator=g) for shape in shapes]


def build(cfg, memory: str):
    torch.manual_seed(0)
    model = NVAE(cfg).to(memory_format=torch.channels_last)
    model.set_memory(memory)
    return model, make_optimizer(model), SpectralState(0)


def one_step(model, optimizer, spectral, x, noise, processes=None):
    """(terms, gradients, BN statistics) of a step; leaves the model behind that step."""
    rows = slice(0, len(x))
    if processes is not None:
        convert_sync_batch_norm(model)
        half = len(x) // processes.size
        rows = slice(processes.rank * half, (processes.rank + 1) * half)
    model.loss = functools.partial(type(model).loss, model, noise=[n[rows] for n in noise])
    loss = model.loss if processes is None else parallel_loss(model, processes)
    step = TrainingStep(model, optimizer, spectral, loss=loss)
    terms = step(x[rows], **SETTINGS)
    del model.loss
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return terms, grads, {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def states(cfg, compared):
    """The state of one process before each of the steps `compared`, and what it finds in them."""
    model, optimizer, spectral = build(cfg, "balanced")
    for i in range(max(compared) + 1):
        x, noise = batch(i, cfg.latent_shapes)
        before = [{k: v.clone() for k, v in part.state_dict().items()} for part in (model, spectral)]
        found = one_step(model, optimizer, spectral, x, noise)
        if i in compared:
            yield i, before, found


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12)).item()


def compare(processes, compat: str, compared: tuple[int, ...], memories: tuple[str, ...]) -> dict[str, float]:
    """Relative errors by what was compared. Gradients: of the norm of all of them together; means: of the deviations."""
    cfg, errors = config(compat), {}
    for i, (weights, vectors), (terms, grads, statistics) in states(cfg, compared):
        scale = torch.stack([g.double().norm() for g in grads.values()]).norm()
        x, noise = batch(i, cfg.latent_shapes)
        for memory in memories:
            model, optimizer, spectral = build(cfg, memory)
            model.load_state_dict(weights)
            spectral.load_state_dict(vectors)
            ours, our_grads, our_statistics = one_step(model, optimizer, spectral, x, noise, processes)
            key = f"{compat} {memory} {i}"
            errors[f"{key} loss"] = relative(processes.mean(ours["total"]), terms["total"])
            assert our_grads.keys() == grads.keys()
            errors[f"{key} gradients"] = max(((our_grads[k] - g).double().norm() / scale).item() for k, g in grads.items())
            size = {k: statistics[k.replace("running_mean", "running_var")] for k in statistics}
            size = {k: (s.sqrt() if k.endswith("running_mean") else s).norm() for k, s in size.items()}
            errors[f"{key} statistics"] = max(float((our_statistics[k] - s).norm() / size[k]) for k, s in statistics.items())
            for name, p in model.named_parameters():  # bit for bit the same on both
                assert len({t.numpy().tobytes() for t in processes.gather(p.detach())}) == 1, name
    return errors


def agree(processes) -> None:
    """Weights that the first batch initialises, and a model with a parameter that nothing depends on: the same everywhere."""
    vanilla = {"num_latent_scales": 1, "num_groups_per_scale": 1, "num_nf": 0}
    for changes in ({"arch_instance": "res_elu"}, vanilla):
        cfg = dataclasses.replace(config("fixed"), **changes)
        model, optimizer, spectral = build(cfg, "balanced")
        step = TrainingStep(model, optimizer, spectral, loss=parallel_loss(convert_sync_batch_norm(model), processes))
        torch.manual_seed(processes.rank)
        for _ in range(2):
            step(torch.rand(4, 1, 16, 16), **SETTINGS)
        for name, p in model.named_parameters():
            assert len({t.numpy().tobytes() for t in processes.gather(p.detach())}) == 1, (changes, name)


def main(path: str) -> None:
    shared.BUCKETS = 2**12, 2**14  # bytes: several nodes in the small model too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
            os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            with joined(torch.device("cpu")) as processes:
                agree(processes)
                errors = compare(processes, "fixed", (0, 10, 20), ("fast", "balanced", "low"))
                errors |= compare(processes, "nvlabs", (0,), ("balanced",))
            if rank == 0:
                with open(path, "w") as file:
                    json.dump(errors, file)
            os._exit(0)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids))


if __name__ == "__main__":
    main(sys.argv[1])
