"""Count the bytes that a process sends in collective operations, by kind.

Each collective has a payload: the whole tensor that is gathered, or the tensor of every process
that is reduced. With a ring of n processes, which NCCL and gloo use for large tensors, each process
sends (n - 1) / n of the payload in an all-gather or reduce-scatter, and twice that in an
all-reduce, which is one after the other (Patarasuk and Yuan 2009). Other algorithms send about as
much; switches that reduce inside the network send less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad_cli.models.module_trace import tensors_in

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass
class Sent:
    """Collectives of one kind.

    Attributes:
        calls: number of collectives.
        payload_bytes: sum of their payloads.
    """

    calls: int = 0
    payload_bytes: int = 0

    def after(self, times: int, earlier: Sent | None) -> Sent:
        """Return these and ``times`` times those of an earlier part of the program."""
        if earlier is None:
            return self
        return Sent(
            self.calls + times * earlier.calls,
            self.payload_bytes + times * earlier.payload_bytes,
        )

    def sent_bytes(self, kind: Kind, processes: int) -> int:
        """Return the bytes that each process sends, in a ring of ``processes``.

        Args:
            kind: a kind of :class:`CollectiveCounter`.
            processes: number of processes.
        """
        return RING[kind] * self.payload_bytes * (processes - 1) // processes


# Kind -> how often a process sends (n - 1) / n of the payload.
RING: dict[Kind, int] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}

# Operation of torch -> kind, and the argument that holds the payload.
_OPERATIONS: dict[str, tuple[Kind, int]] = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
}
# These only wait.
_WAITS = ("wait_tensor", "barrier", "monitored_barrier_")


class CollectiveCounter(TorchDispatchMode):
    """A context that counts collectives of this thread as operations dispatch.

    The same program gives the same counts on real tensors, with any backend, and on fake ones.

    Attributes:
        sent: kind -> what was sent; ``all_gather``, ``reduce_scatter`` and ``all_reduce``.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[Kind, Sent] = {kind: Sent() for kind in RING}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any]) -> None:
        """Add one collective.

        Raises:
            NotImplementedError: it is of another kind.
        """
        name = func.overloadpacket.__name__
        if name in _WAITS:
            return
        if name not in _OPERATIONS:
            raise NotImplementedError(f"the bytes of the collective {func} are not counted")
        kind, place = _OPERATIONS[name]
        sent = self.sent[kind]
        sent.calls += 1
        sent.payload_bytes += sum(_bytes(tensor) for tensor in tensors_in(args[place]))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
