"""Stages of a converted model for the schedules of `torch.distributed.pipelining`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

from mhc_compile.codegen.stage_module import StageModule
from mhc_compile.errors import PartitionError, wrong
from mhc_compile.passes.schedules import Schedule

_CLASSES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
_SPLIT = frozenset({"zero-bubble", "zbv", "dualpipev"})  # they compute input and weight gradients apart


# ---------------------------------------------------------------------------------------------- tied weights


@dataclass
class TiedWeights:
    """Parameters that several stages read, and the sum of their gradients over the processes that hold them.

    holders: name -> the ranks that hold it. Sums are formed in the order of ranks: all holders get the same bits.
    """

    parameters: Mapping[str, nn.Parameter]
    holders: Mapping[str, Sequence[int]]
    local: frozenset[int]  # the stages of this process
    group: dist.ProcessGroup | None
    _done: set[int] = field(default_factory=set)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return any(parameter is one for one in self.parameters.values())

    def check_held(self, names: Sequence[str], module: nn.Module) -> None:
        """Raise PartitionError when a module of a stage no longer holds the parameters of these names."""
        held = {id(parameter) for parameter in module.parameters()}
        for name in names:
            if id(self.parameters[name]) not in held:
                found = "replaced in its stage (fully_shard does that): its gradient cannot be summed"
                step = "wrap the stage in DistributedDataParallel, or untie the weight before the conversion"
                raise PartitionError(wrong(f"the tied weight {name}", found, "the parameter of the model", step))

    def start(self) -> None:
        """Before a step: what earlier steps left in the gradients, summed already, is counted by one holder."""
        self._done.clear()
        rank = dist.get_rank(self.group)
        for name, parameter in self.parameters.items():
            if rank != min(self.holders[name]):
                parameter.grad = None

    def finish(self, stage: int, factor: int) -> None:
        """A stage of this process has run its last backward; behind the last of them the gradients are summed."""
        self._done.add(stage)
        if self._done == self.local:
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    parameter.grad.div_(factor)
                self._sum(parameter, self.holders[name])

    def _sum(self, parameter: nn.Parameter, holders: Sequence[int]) -> None:
        rank = dist.get_rank(self.group)
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        parts = {holder: own if holder == rank else torch.empty_like(own) for holder in sorted(holders)}
        peers = {holder: _global_rank(self.group, holder) for holder in parts if holder != rank}
        if peers:
            sends = [dist.P2POp(dist.isend, own, peer, self.group) for peer in peers.values()]
            receives = [dist.P2POp(dist.irecv, parts[holder], peer, self.group) for holder, peer in peers.items()]
            for work in dist.batch_isend_irecv([*sends, *receives]):
                work.wait()
            first, *others = parts.values()
            total = first.clone()
            for other in others:
                total += other
            parameter.grad = total


def _global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


# ---------------------------------------------------------------------------------------------- stages


class Stage(PipelineStage):
    """A `PipelineStage` of a converted model: `submod` is its StageModule, or what was wrapped around it."""

    def __init__(
        self,
        module: StageModule,
        index: int,
        schedule: Schedule,
        device: torch.device,
        tied: TiedWeights,
        *,
        split: bool = True,
        whole: str | None = None,
    ) -> None:
        """split: the two halves of the backward run apart where the schedule says so; whole: why they must not."""
        given = () if index == 0 else _metas(module.received, module.takes_grad)
        sent = _metas(module.sent, module.gives_grad)
        runner = None if split else _all_done
        super().__init__(
            module, index, schedule.stages, device, given, sent, group=tied.group, dw_builder=runner
        )
        self.module, self.schedule, self.tied, self.whole = module, schedule, tied, whole
        own = {id(parameter) for parameter in module.parameters()}
        self._tied = [name for name, parameter in tied.parameters.items() if id(parameter) in own]
        self._whole_output: Any = None  # of the last stage, while torch has its tensors

    def clear_runtime_states(self) -> None:
        """At the start of every step."""
        super().clear_runtime_states()
        if self.has_backward:
            self.tied.check_held(self._tied, self.submod)
            self.tied.start()

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; of the last stage the tensors alone, as torch keeps no other structure for the backward."""
        output = super().forward_maybe_with_nosync(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not self.is_last:
            return output
        self._whole_output = output
        return tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the output of the last stage may be of any structure that pytree knows."""
        given = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            return given
        output, self._whole_output = self._whole_output, None
        if self.output_chunks and self.output_chunks[-1] is given:
            self.output_chunks[-1] = output
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; the last stage sends nothing, whatever the number of its outputs."""
        return [] if self.is_last else super().get_fwd_send_ops(fwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As torch's. Raises PartitionError when the two halves of this stage's backward cannot run apart."""
        if not (args[1] if len(args) > 1 else kwargs.get("full_backward", True)):
            check_split(self)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """As torch's; nothing in `schedule.eval`, where V-shaped schedules ask for it all the same."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """As torch's; see `get_local_bwd_output`."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """As torch's, for the parameters of this stage alone."""
        for parameter in self.submod.parameters():
            if parameter.grad is not None and parameter not in self.tied:
                parameter.grad.div_(grad_scale_factor)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """As torch's, then the sum of the gradients of tied weights."""
        super().perform_reduce_grad(grad_scale_factor)
        if self.has_backward:
            self.tied.finish(self.stage_index, grad_scale_factor)


def _all_done() -> Callable[..., None]:
    """What is left of a backward that ran as a whole."""
    return lambda: None


def _metas(values: Sequence[Tensor], trained: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=grad)
        for value, grad in zip(values, trained, strict=True)
    )


def check_split(stage: Stage) -> None:
    """Raise PartitionError when a stage, of any process, cannot compute input and weight gradients apart."""
    if isinstance(stage.submod, DistributedDataParallel):
        # torch sums what whole backwards accumulate, behind the last of them: here it would sum nothing, in silence.
        found = f"{stage.schedule.name!r}, which computes input and weight gradients apart"
        legal = "'1f1b', 'gpipe' or 'interleaved' for stages in DistributedDataParallel"
        raise PartitionError(wrong("the schedule", found, legal, "use one of them, or fully_shard(stage.submod)"))
    if stage.whole is not None:
        found = f"{stage.schedule.name!r}, which computes input and weight gradients apart"
        legal = f"one with whole backwards, for {stage.whole}"
        step = "pass split_backward=False to pipeline_stages, or schedule='1f1b', 'gpipe' or 'interleaved'"
        raise PartitionError(wrong("the schedule", found, legal, step))


def build_schedule(
    stages: Sequence[Stage], loss: Callable[..., Tensor] | None, microbatches: int | None, **options: Any
) -> Any:
    """torch's schedule over the stages of this process, in the order and for the microbatches that they were made for.

    Raises ConfigError for other numbers of microbatches than the schedule takes, PartitionError where torch refuses the
    stages or would lose their gradients.
    """
    schedule = stages[0].schedule
    if microbatches is not None:
        schedule = Schedule.of(schedule.name, schedule.stages, schedule.devices, microbatches)
    if loss is not None and schedule.name in _SPLIT:
        for stage in stages:
            check_split(stage)
    given = stages[0] if schedule.stages == schedule.devices and schedule.name in ("gpipe", "1f1b") else list(stages)
    return _CLASSES[schedule.name](given, schedule.microbatches, loss_fn=loss, **options)
