"""One job shared among processes: who takes which part, and how the parts come together.

A `Ranks` is handed down to whoever can share work; `ALONE`, the default everywhere, is one process that shares with
nobody, so the code reads the same either way. Batches and regressions are dealt out in turn, sums are all-reduced,
and what doesn't add up is gathered as safetensors bytes (nothing is ever unpickled). Works under gloo and nccl.

What fails in one process must fail in all, or the others wait for it for ever. So a public function that shares its
work stands in one `with ranks.together()`, and nothing below it has to think of that: every operation that needs the
others (`sum`, `sum_to`, `count`, `add_up`, `largest`, `first`, `gather`, `gather_data`, `agree`, `map`) begins with a
meeting of all, to which one that has failed comes, too, to say why. One that was killed doesn't come: that's an error
in all others as well.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from jaxtyping import Int, UInt8
from torch import Tensor

from tl_circuitlasso.errors import CircuitLassoError, InputError

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share a job, and which of them this one is.

    >>> [number for number in range(4) if ALONE.mine(number)]
    [0, 1, 2, 3]
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def mine(self, number: int) -> bool:
        """Whether the part of this number falls to this process."""
        return number % self.size == self.rank

    def dealt(self, count: int) -> Int[Tensor, " mine"]:
        """Which of `count` parts fall to this process; none where processes are more than parts.

        >>> Ranks(1, 3).dealt(7).tolist(), Ranks(2, 3).dealt(2).tolist()
        ([1, 4], [])
        """
        return torch.arange(self.rank, max(count, self.rank), self.size)

    def map(
        self,
        items: Iterable[Item],
        work: Callable[[Item], Mapping[str, Tensor]],
        join: Callable[[dict[str, Tensor]], Made],
    ) -> list[Made]:
        """What `work` makes of every item, in their order, on every process: items are dealt out in turn.

        What is made travels as tensors by name, and `join` makes of them what is wanted. Every process walks through
        all of `items`, which must be the same on each.

        >>> ALONE.map([1, 2], lambda n: {"square": torch.tensor(n * n)}, lambda made: int(made["square"]))
        [1, 4]
        """
        own: dict[str, Tensor] = {}
        count = 0
        for number, item in enumerate(items):
            count += 1
            if self.mine(number):
                own |= {f"{number}/{name}": tensor for name, tensor in work(item).items()}
        made: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for part in self.gather(own):
            for key, tensor in part.items():
                number, _, name = key.partition("/")
                made[int(number)][name] = tensor
        return [join(part) for part in made]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each; `tensor` itself where there is one only."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def count(self, own: int) -> int:
        """The sum of a whole number over all processes."""
        return int(self.sum(torch.tensor(own)))

    def add_up(self, tensor: Tensor) -> None:
        """`sum`, in place and strip by strip: for matrices of which a second copy has no room."""
        if self.size == 1 or not tensor.numel():
            return
        self._meet()
        rows = STRIP * len(tensor) // tensor.nbytes if tensor.ndim else 1
        for strip in tensor.split(max(rows, 1)) if tensor.ndim else (tensor,):
            total = strip.contiguous().to(self._device)
            dist.all_reduce(total, group=self.group)
            strip.copy_(total)

    def sum_to(self, owner: int, tensor: Tensor) -> None:
        """`add_up` on one process alone: elsewhere nothing of use is left in `tensor`."""
        if self.size == 1 or not tensor.numel():
            return
        self._meet()
        target = owner if self.group is None else dist.get_global_rank(self.group, owner)
        for strip in tensor.split(max(STRIP * len(tensor) // tensor.nbytes, 1)):
            total = strip.contiguous().to(self._device)
            dist.reduce(total, target, group=self.group)
            strip.copy_(total)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, entry by entry."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        self._meet()
        common = tensor.detach().to(self._device).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(common, how, group=self.group)
        return common.to(tensor.device)

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of process 0, whose shape and type all must share."""
        if self.size == 1:
            return tensor
        self._meet()
        common = tensor.detach().to(self._device).clone(memory_format=torch.contiguous_format)
        dist.broadcast(common, 0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)
        return common.to(tensor.device)

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every process passed, in the order of the processes; names, shapes and types may differ."""
        if self.size == 1:
            return [dict(tensors)]
        self._meet()
        packed = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        )
        return [safetensors.torch.load(part) for part in self._all_bytes(packed)]

    def gather_data(self, data: Any) -> list[Any]:
        """Plain data (anything that JSON can hold) of every process."""
        if self.size == 1:
            return [data]
        self._meet()
        return [json.loads(part) for part in self._all_bytes(json.dumps(data).encode())]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise an InputError, on every process, where they differ in any of some plain `facts`."""
        known = self.gather_data(dict(facts))
        differ = sorted(key for key in known[0] if any(one.get(key) != known[0][key] for one in known))
        if differ:
            raise InputError(
                f"the processes differ in {', '.join(differ)}: give each the same model, `tokens` and arguments"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """One job of all processes: it stands around the whole of it, once, where it begins.

        Whoever fails inside comes to the next meeting of the others, which is their next operation here or the end of
        the job, and says why: the error is raised in every process, and none waits for one that is gone.

        Raises
        ------
        CircuitLassoError: another process failed; the message says which, and why.
        """
        try:
            yield
        except Exception as error:
            if not getattr(error, _ANNOUNCED, False):
                self._meet(error)
            raise
        self._meet()

    def _meet(self, failure: Exception | None = None) -> None:
        """Every process says that it's well, or why not; every operation begins with that."""
        if self.size == 1:
            return
        reason = "" if failure is None else f"{type(failure).__name__}: {failure}"
        told = [part.decode() for part in self._all_bytes(reason.encode())]
        if failure is not None:
            setattr(failure, _ANNOUNCED, True)
            return
        failed = [(rank, reason) for rank, reason in enumerate(told) if reason]
        if failed:
            failure = CircuitLassoError(f"rank {failed[0][0]} of {self.size} failed: {failed[0][1]}")
            setattr(failure, _ANNOUNCED, True)
            raise failure

    def _all_bytes(self, packed: bytes) -> list[bytes]:
        """The bytes of every process, in the order of the processes; where none has any, their number travels only."""
        own = _as_tensor(packed).to(self._device)
        sizes = [torch.zeros(1, dtype=torch.long, device=own.device) for _ in range(self.size)]
        with _reaching():
            dist.all_gather(sizes, torch.tensor([len(own)], device=own.device), group=self.group)
        lengths = [int(size) for size in sizes]
        widest = max(lengths)
        if not widest:
            return [b""] * self.size
        padded = torch.nn.functional.pad(own, (0, widest - len(own)))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:length].cpu().numpy().tobytes() for part, length in zip(parts, lengths)]

    @property
    def beside(self) -> int:
        """How many of the processes share this machine and its memory, as far as torchrun says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    @property
    def _device(self) -> torch.device:
        """Where the backend wants tensors to be."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def _reaching() -> Iterator[None]:
    """What the backend says of a process that has gone without a word, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        gone = CircuitLassoError(
            f"another process is gone or can't be reached ({error}): see what it wrote last (out of memory?), and "
            "start all of them again; what a `checkpoint` holds isn't made twice"
        )
        setattr(gone, _ANNOUNCED, True)  # nobody is left to be told
        raise gone from error


_ANNOUNCED = "announced_to_all_ranks"
STRIP = 1 << 28  # bytes that `add_up` moves at once
ALONE = Ranks()


def as_ranks(process_group: Any) -> Ranks:
    """The processes behind `process_group`: None is this one alone, "world" all that torchrun started, or a group.

    Raises
    ------
    InputError: torch.distributed isn't initialised, or this process isn't in the group.
    """
    if process_group is None:
        return ALONE
    if isinstance(process_group, Ranks):
        return process_group
    if isinstance(process_group, str) and process_group != "world":
        raise InputError(f"`process_group` is {process_group!r}; it must be None, 'world' or a torch.distributed group")
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "`process_group` needs torch.distributed: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    group = None if isinstance(process_group, str) else process_group
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("`process_group` doesn't hold this process: call only on its members")
    return Ranks(rank, dist.get_world_size(group), group)


@contextmanager
def under_torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, with their process group made and left again; `ALONE` without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield as_ranks("world")
    finally:
        dist.destroy_process_group()


def _as_tensor(packed: bytes) -> UInt8[Tensor, " byte"]:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)
