"""The errors a user can cause, each saying what happened, what was got, what was expected and what to do.

Every entry point turns a :class:`MegamoeError` into that text on stderr and exit code 2, without a traceback;
any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

EXIT_CODE = 2


class MegamoeError(Exception):
    """Base of all user-facing errors.

    Args:
        what: one sentence naming the problem.
        got: the offending value or state.
        expected: what would have been accepted.
        todo: the next step for the reader, a command where there is one.
    """

    def __init__(self, what: str, *, got: str = "", expected: str = "", todo: str = "") -> None:
        self.what, self.got, self.expected, self.todo = what, got, expected, todo
        super().__init__(self.render())

    def render(self) -> str:
        """The message as shown to the user, one labelled line per part that is present."""
        parts = (("got", self.got), ("expected", self.expected), ("to do", self.todo))
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in parts if text)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not pickle by themselves, and errors travel between ranks.
        return _rebuild, (type(self), self.what, self.got, self.expected, self.todo)


def _rebuild(kind: type[MegamoeError], what: str, got: str, expected: str, todo: str) -> MegamoeError:
    return kind(what, got=got, expected=expected, todo=todo)


class ConfigError(MegamoeError):
    """A configuration that cannot run: unknown key, wrong value, fields that contradict each other."""


class FolderInUseError(ConfigError):
    """A run folder in which another run is at work: nothing of it may be touched."""


class TopologyError(MegamoeError):
    """A world size that the parallel degrees do not fit."""


class DataError(MegamoeError):
    """A corpus, tokenizer or indexed dataset that is missing, empty, damaged or does not match."""


class CheckpointError(MegamoeError):
    """A checkpoint that is missing, damaged, of another architecture or topology, or that cannot be written."""


class TrainingError(MegamoeError):
    """A run whose numbers are beyond repair: steps that could not be used, one after the other."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which something is missing or not as it was written: an older one may be sound."""


class KernelUnavailable(MegamoeError):
    """An implementation of an op that was required and is not available here."""


class LostPeerError(MegamoeError):
    """Another rank is gone or does not answer. It may be about to say why, so this rank speaks late."""


class PeerError(MegamoeError):
    """Another rank failed and has already printed the reason; this rank only leaves with the same exit code."""
