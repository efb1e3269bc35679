"""Pipeline schedules of torch over stages without a network, for tests of the order of their actions."""

from torch.distributed.pipelining import schedules

SCHEDULES = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zb-v": schedules.ScheduleZBVZeroBubble,
    "dualpipe-v": schedules.ScheduleDualPipeV,
}
"""The schedules that have several stages on a rank, by their name in the recipe."""


class BareStage(schedules._PipelineStageBase):
    """A pipeline stage with only those attributes that a schedule reads when it is made."""

    _create_grad_recv_info = _prepare_backward_infra = _prepare_forward_infra = None  # type: ignore[assignment]
    device, group, submod, group_rank, has_backward = "cpu", None, None, 0, True  # type: ignore[assignment]

    def __init__(self, stage_index: int, num_stages: int, group_size: int):
        self.stage_index, self.num_stages, self.group_size = stage_index, num_stages, group_size


BareStage.__abstractmethods__ = frozenset()
