"""How many things a training step, or sampling, asks a GPU to do, counted without one: it is traced on tensors without values.

Our ops go through the launchers of their Triton kernels, whose kernels are counted instead of run, so that the figures are the
launchers' own, whatever the sizes. Those of the CUDA C++ extension, which cannot run here, come from a table (NATIVE) that the
tests of its sources assert. What torch does itself counts once for an operation that is no view and no allocation; a
gradient of a convolution once for each of its outputs; an operation on lists once for as many tensors as one of torch's
multi-tensor launches takes. cuDNN's changes of layout, and a second kernel of a long sum, are not seen: a GPU has no fewer.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast import cells, kernels
from nvae_fast import model as model_module
from nvae_fast.benchmarks.plain import plain
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import RunError
from nvae_fast.estimate import channels_last
from nvae_fast.folding import folded
from nvae_fast.kernels import _auto, _constant, _impl, _lists, _triton
from nvae_fast.model import NVAE
from nvae_fast.optim import FusedAdamax
from nvae_fast.regularization import SpectralState
from nvae_fast.sampling import draw
from nvae_fast.training.step import PRECISIONS, TrainingStep

GOAL = 2500
"""Launches of a step that every published configuration should stay below."""
NATIVE = {"depthwise_conv_cuda_fwd": 1, "depthwise_conv_cuda_bwd": 1}
"""Launches of an op in CUDA C++, by its schema; an image that is not channels-last is copied first."""
UPLOAD = "upload of a table"
LISTS = (110, 64, 48, 36)  # tensors of one multi-tensor launch, by the number of lists (torch's MultiTensorApply.cuh)
QUIET = {"_unsafe_view", "detach", "lift_fresh", "_reshape_alias", "set_", "promote_types", "empty", "new_empty", "empty_like",
         "empty_strided", "new_empty_strided", "empty_permuted", "sym_size", "sym_stride", "result_type", "scalar_tensor",
         "_local_scalar_dense"}  # fmt: skip
"""Operations of torch that only look at a tensor, allocate one, or move one number; views are told by their schema."""


class Launches(TorchDispatchMode):
    """Inside, `names` counts what would be launched, by the name of the kernel or, of torch's own, by "torch.<operation>".

    Ops of ours run their launchers with kernels that do nothing: tensors hold no results, so they should be fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        launcher = launchers().get(name) if func.namespace == "nvae_fast" else None
        if launcher is not None:
            with self:  # what it has torch do counts as well
                return launcher(*args, **(kwargs or {}))
        if func.namespace == "nvae_fast" and name in NATIVE:
            images = [t for t in args if isinstance(t, Tensor) and t.dim() == 4]
            self.names["torch.clone"] += sum(not t.is_contiguous(memory_format=torch.channels_last) for t in images)
            self.names[f"{name}_kernel"] += NATIVE[name]
            return func(*args, **(kwargs or {}))
        if _is_made_of_others(func):  # as it would have been above autograd, which a launcher is below
            with self:
                return func.decompose(*args, **(kwargs or {}))
        count = weight(func, args)
        if count:
            self.names[f"torch.{name}"] += count
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def on_gpu(self, extension: bool = True) -> Iterator[Launches]:
        """`auto` takes what it takes on a GPU, with the CUDA C++ `extension` or without: kernels are counted here."""
        from triton.runtime.jit import KernelInterface

        def counted(kernel: Any, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                inner = kernel
                while not hasattr(inner, "__name__"):  # an autotuner has the kernel inside
                    inner = inner.fn
                self.names[inner.__name__] += 1

            return launch

        def upload(values: bytes, device: torch.device) -> Tensor:
            self.names[UPLOAD] += 1
            return torch.empty(max(len(values) // 8, 1), dtype=torch.int64, device=device)

        def there_already(build: Callable[[], Tensor], device: torch.device) -> Tensor:
            before = self.names.copy()
            made = build().to(device)
            self.names.clear()
            self.names.update(before)
            return made

        kinds = ("cuda", "triton") if extension else ("triton",)
        ops = {op: {kind: _always for kind in impls if kind in kinds} for op, impls in _impl._ops.items()}
        with (
            patch.object(_impl, "_ops", ops),
            patch.object(_auto, "choose", lambda op, impl, *rest, **options: impl),
            patch.object(_lists, "upload", upload),
            patch.object(_lists, "standing", lambda values, device: torch.empty(1, dtype=torch.int64)),  # there already
            patch.object(_constant, "built", there_already),
            patch.object(model_module, "drawn_at_once", lambda device: True),
            patch.object(cells, "by_products", lambda device: True),
            patch.object(KernelInterface, "__getitem__", counted),
            self,
        ):
            yield self


def weight(func: Any, args: tuple) -> int:
    """Launches of one operation of torch."""
    name = func.overloadpacket.__name__
    if func.namespace in ("prim", "profiler") or name in QUIET or _is_view(func):
        return 0
    if name == "convolution_backward":
        return sum(args[-1])
    if name.startswith("_foreach_"):
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        return -(-len(lists[0]) // LISTS[min(len(lists), 4) - 1]) if lists else 0
    return 1


@cache
def _is_made_of_others(func: Any) -> bool:
    """Whether torch runs it as other operations, having no kernel for it: some with a kernel (silu_backward) can be taken apart
    as well. Those with one for CUDA have one for the CPU, which any build of torch knows of."""
    if func.namespace != "aten" or not func._can_decompose():
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


@cache
def _is_view(func: Any) -> bool:
    """Every tensor it returns is a view of one that it was given and does not write to."""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


@cache
def launchers() -> dict[str, Callable[..., Any]]:
    """Launcher by the name of its schema. RunError without Triton, which they are written in."""
    if importlib.util.find_spec("triton") is None:
        raise RunError("launches are counted with Triton's launchers, and triton is not installed: pip install 'triton>=3.6'")
    found = {}
    for op in pkgutil.iter_modules(kernels.__path__):
        if op.ispkg and any((Path(folder) / op.name / "triton.py").is_file() for folder in kernels.__path__):
            module = importlib.import_module(f"{kernels.__name__}.{op.name}.triton")
            found |= {name: f for name, f in vars(module).items() if hasattr(torch.ops.nvae_fast, name) and callable(f)}
    return found


class Counts(NamedTuple):
    """Launches by name: ours where the extension was built with CUDA, and where it was not, and the plain model's."""

    ours: Counter[str]
    without_extension: Counter[str]
    plain: Counter[str]


def count(config: NVAEConfig, *, precision: str = "bf16", batch: int | None = None, memory: str = "balanced") -> Counts:
    """Of a training step in the memory mode `memory`. Ours is the step of the trainer, with all that makes it skippable, the
    plain model's has torch's multi-tensor Adamax. RunError without Triton."""
    batch = config.training.batch_size if batch is None else batch
    launchers()
    both = (ours(config, precision, batch, memory, extension) for extension in (True, False))
    return Counts(*both, rival(config, precision, batch))


def ours(config: NVAEConfig, precision: str, batch: int, memory: str = "balanced", extension: bool = True) -> Counter[str]:
    """Of a step of the trainer."""
    with _fakes():
        model = channels_last(NVAE(config)).train().set_memory(memory)
        x = _images(config, batch)
        stand_in: Any = _Decides(model)
        step = TrainingStep(model, stand_in, SpectralState(), precision=precision)
        coefficient = torch.empty(())  # a tensor, as a recorded step has it
        for mode in (Launches(), found := Launches()):  # the first step of a run is longer
            with mode.on_gpu(extension):
                step(x, rate=coefficient, kl_coeff=coefficient, norm_coeff=coefficient)
    # small ones, as easy to read 16 bytes at a time as theirs
    parameters = [nn.Parameter(torch.zeros(p.numel() % 4 or 4)) for p in model.parameters()]
    optimizer = FusedAdamax(parameters, weight_decay=1e-4, foreach=True)
    rate = torch.tensor(1e-3, dtype=torch.float64)
    take = torch.tensor(True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for mode in (Launches(), last := Launches()):
        with mode.on_gpu(), torch.no_grad():
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step(decide=lambda squares: (None, take))
    return found.names + last.names


def rival(config: NVAEConfig, precision: str, batch: int) -> Counter[str]:
    """Of a step of the plain model."""
    low = precision != "fp32"
    with _fakes(), _impl.use_impl("reference"):
        model, x = plain(channels_last(NVAE(config)).train()), _images(config, batch)
        spectral = SpectralState()
        for mode in (Launches(), found := Launches()):
            model.zero_grad(set_to_none=True)
            with mode:
                with torch.autocast("cpu", PRECISIONS[precision] if low else torch.bfloat16, enabled=low):
                    total = model.loss(x, kl_coeff=0.5, spectral_coeff=1e-2, spectral=spectral)["total"]
                total.backward()
    parameters = [nn.Parameter(torch.zeros(1)) for _ in model.parameters()]
    optimizer = torch.optim.Adamax(parameters, weight_decay=1e-4, foreach=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for mode in (Launches(), last := Launches()):
        with mode:
            optimizer.step()
    return found.names + last.names


def count_sampling(config: NVAEConfig, *, batch: int = 16, extension: bool = True) -> tuple[Counter[str], Counter[str]]:
    """Launches of a batch of samples, from the prior's noise to pixels, by name: of the folded model and of the plain one.
    RunError without Triton."""
    launchers()
    with _fakes():
        for mode in (Launches(), found := Launches()):
            with mode.on_gpu(extension):
                model = folded(channels_last(NVAE(config)).eval())
                mode.names.clear()
                draw(model, None, 0.7, False, batch)
        with _impl.use_impl("reference"):
            model = plain(channels_last(NVAE(config)).eval())
            with Launches() as rival:
                draw(model, None, 0.7, False, batch)
    return found.names, rival.names


class _Decides:
    """In the place of an optimiser, which needs memory that tensors without values lack: it is counted apart."""

    def __init__(self, model: NVAE) -> None:
        self.model, self.param_groups = model, [{}]

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)

    def step(self, decide: Callable[[Tensor], Any]) -> None:
        decide(torch.empty((), dtype=torch.float64))


def _images(config: NVAEConfig, batch: int) -> Tensor:
    return torch.empty(batch, config.channels, *config.image_size).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _fakes() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # A trainer reads on the CPU, and on a GPU does not, whether to skip a step: here it is told to do as on a GPU.
    with (
        warnings.catch_warnings(),
        patch.object(FakeTensor, "numpy", lambda t: False),
        FakeTensorMode(),
        patch.object(_triton, "_tickets", {}),
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # launchers put them in tables
        yield


def _always(tensors: Any) -> None:
    """A predicate: it can run."""
