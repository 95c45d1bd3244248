"""What routing decides is decided once, also where activations are computed a second time for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType

from torch import Tensor

_Decide = Callable[[Callable[[], Tensor]], Tensor]
_taken: ContextVar[_Decide | None] = ContextVar("taken", default=None)
"""How decisions are taken in this thread at the moment; None: just so."""
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    """Whether this pass through the network repeats an earlier one."""
    return _recomputing.get()


def decided(decide: Callable[[], Tensor]) -> Tensor:
    """`decide()`, a tensor without a gradient; in a recomputed pass, what it gave in the first one.

    Which experts a token chose, which tokens an expert kept, which tokens are broadcast: decided anew, a near tie could
    fall the other way where sums are not repeatable (atomics on GPUs), and gradients would be those of another routing.
    """
    taken = _taken.get()
    return decide() if taken is None else taken(decide)


def best(values_TE: Tensor, number: int) -> Tensor:
    """The experts of each token's largest values, int64 [T, K], largest first; in a recomputed pass those of the first
    one."""
    return decided(lambda: values_TE.detach().topk(number, dim=-1).indices)


def once() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the first pass of a piece of the network and for its recomputation (`context_fn` of torch's
    checkpoint). Both take their decisions in the same order."""
    tape: list[Tensor] = []

    def record(decide: Callable[[], Tensor]) -> Tensor:
        tape.append(decide().detach())
        return tape[-1]

    return _Taking(lambda: record), _Taking(lambda: _replay(iter(tape)), again=True)


def _replay(tape: Iterator[Tensor]) -> _Decide:
    return lambda decide: next(tape)


class _Taking(AbstractContextManager[None]):
    """Decisions are taken by what `make` makes, anew each time the context is entered."""

    def __init__(self, make: Callable[[], _Decide], again: bool = False) -> None:
        self._make, self._again = make, again

    def __enter__(self) -> None:
        self._before = _taken.set(self._make()), _recomputing.set(self._again)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _taken.reset(self._before[0])
        _recomputing.reset(self._before[1])
