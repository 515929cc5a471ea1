"""The published code as a rival: a user's own checkout of NVlabs/NVAE, run as it is, in this process, with our weights.

Nothing of it is copied or kept here. Its modules (`model`, `utils`, `distributions` ...) are importable only while it runs, so
modules of the same names elsewhere stay what they are; in one process its rounds alternate with everybody's. Two things are
given to it: the noise of every latent, as to all contenders, and a world of one process without NCCL. On a machine without a
GPU its calls of `.cuda()` do nothing, and its batch norm, which refuses tensors of a CPU, is told that they are of a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from nvae_fast.benchmarks.sampling import Draw
from nvae_fast.benchmarks.steps import KL_COEFF, SPECTRAL_COEFF, Step
from nvae_fast.checkpoint.nvlabs import to_nvlabs_args, to_nvlabs_state_dict
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.model import NVAE
from nvae_fast.regularization import SpectralState

NEEDED = {
    "model": ("AutoEncoder",),
    "distributions": ("Normal",),
    "utils": ("get_arch_cells", "pre_process", "kl_balancer_coeff", "kl_balancer", "reconstruction_loss"),
}
"""What is called, by module."""
UNUSED = ("tensorboardX", "lmdb")  # packages that it imports for logs and data; an empty module will do
BALANCE = "square"  # the only one that its training uses


class Checkout:
    """The code at `path`. InputError where it is none, or cannot be imported."""

    def __init__(self, path: str | Path) -> None:
        root = Path(path)
        files = [f"{name}.py" for name in NEEDED]
        absent = [name for name in files if not (root / name).is_file()]
        if absent:
            raise InputError(
                f"--nvlabs '{path}' is no checkout of NVlabs/NVAE: expected a folder with {', '.join(files)}, found no "
                f"{', '.join(absent)}; git clone https://github.com/NVlabs/NVAE"
            )
        try:
            self._modules = _imported(root.resolve())
        except Exception as error:  # whatever its code does
            raise InputError(f"--nvlabs '{path}' cannot be imported: {said(error)}") from None
        missing = [f"{m}.{n}" for m, names in NEEDED.items() for n in names if not hasattr(self._modules[m], n)]
        if missing:
            raise InputError(f"--nvlabs '{path}' is no checkout of NVlabs/NVAE: it lacks {', '.join(missing)}")
        self.utils = self._modules["utils"]
        self._noise: Iterator[Tensor] = iter(())
        self._modules["distributions"].Normal.sample = lambda normal: self._given(normal)

    @contextlib.contextmanager
    def running(self, device: torch.device, noise: Sequence[Tensor] = ()) -> Iterator[None]:
        """Inside, its code can run on `device` and draws `noise`, in this order."""
        self._noise = iter(noise)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_in_place(self._modules))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # it was written for torch 1.6
            stack.enter_context(patch.object(torch.distributed, "get_world_size", lambda *args, **kwargs: 1))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            else:
                for owner in (Tensor, nn.Module):
                    stack.enter_context(patch.object(owner, "cuda", lambda self, *args, **kwargs: self))
                stack.enter_context(patch.object(Tensor, "is_cuda", property(lambda self: True)))
            yield

    def build(self, ours: NVAE) -> nn.Module:
        """Its model of our configuration, with our weights and statistics, on their device. InputError where it has no such
        model."""
        args = arguments(ours.config)
        device = ours.prior_ftr0.device
        with self.running(device), contextlib.redirect_stdout(io.StringIO()):
            theirs = self._modules["model"].AutoEncoder(args, None, self.utils.get_arch_cells(args.arch_instance)).cuda()
        theirs.load_state_dict(to_nvlabs_state_dict(ours))
        return theirs

    def step(self, ours: Step, dtype: torch.dtype, say: Callable[[str], None]) -> Step | None:
        """Its training step beside `ours`; None, and a line, where its code fails on this machine."""

        def make() -> Step:
            step = Published(self, ours, dtype)
            step.backward()
            step.warm(ours.spectral)
            return step

        return _working(make, say)

    def draw(self, ours: Draw, say: Callable[[str], None]) -> Draw | None:
        """Its sampling beside `ours`; None, and a line, where its code fails on this machine."""

        def make() -> Draw:
            theirs = self.build(ours.model)
            noise = [t.contiguous() for t in ours.noise]
            device = noise[0].device

            def sample(n: int, temperature: float, noise: list[Tensor]) -> Tensor:
                with self.running(device, noise):
                    return theirs.sample(n, temperature)

            draw = Draw(theirs, noise, "reference", sample, precision(device, torch.float32))
            draw()
            return draw

        return _working(make, say)

    def _given(self, normal: Any) -> tuple[Tensor, Tensor]:
        """Instead of its Normal's `sample`: (draw, noise) in the type that it draws in."""
        eps = next(self._noise).to(normal.mu.dtype)
        return normal.sample_given_eps(eps).to(normal.mu.dtype), eps


class Published(Step):
    """A step of its training: forward and loss with both regularisers under autocast, backward, torch's Adamax; a loss scale in
    float16. Its averages over processes, which change nothing for one, are left out."""

    def __init__(self, checkout: Checkout, ours: Step, dtype: torch.dtype) -> None:
        theirs = checkout.build(ours.model).train()
        device = ours.x.device
        super().__init__(
            theirs, ours.spectral, ours.x.contiguous(), ours.noise, "reference", precision(device, dtype), ours.config
        )
        self.checkout = checkout
        self.warm(ours.spectral)
        with checkout.running(device):
            self.alpha = checkout.utils.kl_balancer_coeff(
                num_scales=theirs.num_latent_scales, groups_per_scale=theirs.groups_per_scale, fun=BALANCE
            )

    def make_optimizer(self) -> torch.optim.Optimizer:
        training = self.config.training
        return torch.optim.Adamax(self.model.parameters(), training.learning_rate, eps=training.adamax_eps,
                                  weight_decay=training.weight_decay)  # fmt: skip

    def warm(self, spectral: SpectralState) -> None:
        """Its regulariser goes on from our singular vectors."""
        for place, vectors in ((self.model.sr_u, spectral.u), (self.model.sr_v, spectral.v)):
            place.update({torch.Size(map(int, key.split("x"))): t.clone() for key, t in vectors.items()})

    def backward(self) -> Tensor:
        with self.checkout.running(self.x.device, self.noise):
            return super().backward()

    def _total(self) -> Tensor:
        utils, theirs = self.checkout.utils, self.model
        x = utils.pre_process(self.x, self.config.num_x_bits)
        logits, _, _, kl_all, _ = theirs(x)
        recon = utils.reconstruction_loss(theirs.decoder_output(logits), x, crop=theirs.crop_output)
        balanced, _, _ = utils.kl_balancer(kl_all, KL_COEFF, kl_balance=True, alpha_i=self.alpha)
        regularisers = theirs.spectral_norm_parallel() + theirs.batchnorm_loss()
        return (recon + balanced).mean() + SPECTRAL_COEFF * regularisers


def arguments(config: NVAEConfig) -> Namespace:
    """Its command line's flags for our configuration; InputError where it has no such model."""
    if config.training.kl_balance != BALANCE:
        raise InputError(f"--nvlabs: its KL balance is '{BALANCE}', that of {config.name} is '{config.training.kl_balance}'")
    return Namespace(**to_nvlabs_args(config))


def precision(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What it computes in: float16 on a GPU, as shipped; on a CPU, for which it knows nothing, as everybody else."""
    return torch.float16 if device.type == "cuda" else dtype


def _working(make: Callable[[], Any], say: Callable[[str], None]) -> Any:
    """What `make` returns; None, and a line, where that fails. InputErrors pass."""
    try:
        return make()
    except InputError:
        raise
    except Exception as error:  # of code that was written for another version of torch
        say(f"  no row for nvlabs: {said(error)}")
        return None


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _imported(root: Path) -> dict[str, ModuleType]:
    """Its modules by name, as `import` finds them with `root` in front; nothing stays in sys.modules, no file is written."""
    names = {entry.stem for entry in root.iterdir() if entry.suffix == ".py" or entry.is_dir()}

    def own(name: str) -> bool:
        return name.partition(".")[0] in names

    absent = {name: ModuleType(name) for name in UNUSED if importlib.util.find_spec(name) is None}
    for module in absent.values():
        module.__getattr__ = lambda name: object
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if own(name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "path", [str(root), *sys.path]))
        stack.enter_context(patch.object(sys, "dont_write_bytecode", True))
        stack.enter_context(_in_place(absent))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        importlib.invalidate_caches()
        try:
            for name in NEEDED:
                importlib.import_module(name)
        finally:
            found = {name: sys.modules.pop(name) for name in [*sys.modules] if own(name)}
            sys.modules.update(hidden)
    return found


@contextlib.contextmanager
def _in_place(modules: dict[str, ModuleType]) -> Iterator[None]:
    """`modules` in sys.modules, for imports inside functions. As patch.dict, which would copy all of it at every call."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
