"""DeepSpeed's names for our groups."""

from __future__ import annotations

from megamoe.parallel.groups import Groups, ProcessGroup


class ModelParallelUnit:
    """The object that DeepSpeed calls `mpu`, with the methods that it asks for.

    Context-parallel ranks hold the same weights and are data-parallel ranks to DeepSpeed; it has no methods that speak
    of sequences here, because DeepSpeed then divides losses, and refuses experts at ZeRO-3.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that hold the same dense weights."""
        return self._groups.replica.handle

    def get_data_parallel_rank(self) -> int:
        """Place among them."""
        return self._groups.replica.place

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.replica.size

    def get_model_parallel_group(self) -> ProcessGroup:
        """Ranks that together hold the dense weights once."""
        return self._groups.model.handle

    def get_model_parallel_rank(self) -> int:
        """Place among them."""
        return self._groups.model.place

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.model.size

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """Ranks that hold parts of the same matrices."""
        return self._groups.tp.handle

    def get_tensor_model_parallel_rank(self) -> int:
        """Place among them."""
        return self._groups.tp.place

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.tp.size
