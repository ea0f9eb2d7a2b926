"""Several processes' way of sharing, with one process: that nccl takes what is given to it, and how fast."""

import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist

import tl_circuitlasso as tcl
from benchmarks.gpu.device import Device, seconds
from benchmarks.gpu.parts import Figures, Size
from tl_circuitlasso.data.sharing import Ranks, as_ranks

NUMBERS = 1 << 27  # of the tensor that is summed: a GiB in float64


def one_rank(device: Device, size: Size) -> Iterator[Figures]:
    """Sums, broadcasts and gathered bytes, and a graph of a job that is shared with nobody."""
    backend = "nccl" if device.kind == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            numbers = torch.ones(NUMBERS // size.shrink**2, dtype=torch.float64, device=device.kind)
            for name, call in (("all_reduce", dist.all_reduce), ("broadcast", _broadcast)):
                spent = seconds(device.kind, lambda call=call: call(numbers))
                yield {"backend": backend, "what": name, "GB": numbers.nbytes / 1e9, "s": spent}
            group = Ranks(0, 1, dist.group.WORLD)
            packed = group.gather_bytes(b"circuit")
            yield {"backend": backend, "what": "gathered bytes", "equal": "yes" if packed == [b"circuit"] else "NO"}
            demo = tcl.load_demo(prompts=32)
            model = demo.model.to(device.kind)
            options = {"positions": "last", "progress": False, "refined": False}
            shared = tcl.circuit_lasso(model, demo.tokens, process_group=as_ranks("world"), **options)
            alone = tcl.circuit_lasso(model, demo.tokens, **options)
            same = torch.equal(shared.score, alone.score)
            yield {"backend": backend, "what": "circuit_lasso", "equal": "yes" if same else "NO"}
        finally:
            dist.destroy_process_group()


def _broadcast(numbers: torch.Tensor) -> None:
    dist.broadcast(numbers, 0)
