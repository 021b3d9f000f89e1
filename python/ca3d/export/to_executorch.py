"""The ExecuTorch side of `ca3d export`: a whole clip, lowered to XNNPACK."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ca3d
from ca3d import weights
from ca3d.errors import UserError
from ca3d.export import file_name
from ca3d.export.graphs import graphs_of
from ca3d.export.options import ExportConfig
from ca3d.export.packages import import_extra, quiet
from ca3d.models.fused import FusedCA3D

__all__ = ["classifier", "write"]


def write(
    config: ExportConfig,
    model: nn.Module,
    info: weights.ModelInfo,
    clips: list[Tensor],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Writes the program of an export; what XNNPACK doesn't take runs in portable kernels.

    Args:
        config: the options.
        model: in float32.
        info: of the model.
        clips: not used.
        folder: where to.
        say: called with a line about what is being done.

    Raises:
        ca3d.errors.UserError: executorch is missing or can't lower the model.
    """
    exir = import_extra("executorch.exir", "executorch")
    xnnpack = import_extra(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch"
    )
    fused = ca3d.fuse(model, portable=True)
    if not isinstance(fused, FusedCA3D):
        raise UserError(f"{info.model}: only CA3D models are exported to ExecuTorch")
    if config.precision == "float16":
        fused = fused.half()
    module, inputs, _ = graphs_of(fused, info.size)["clip"]
    # The partitioner brings weights into its own order, and wants them in torch's.
    module = module.to(memory_format=torch.contiguous_format)
    name = file_name("clip", "executorch")
    say(f"tracing and lowering {name}")
    with quiet(), torch.no_grad():
        program = torch.export.export(module, tuple(inputs.values()))
        try:
            lowered = exir.to_edge_transform_and_lower(
                program,
                partitioner=[xnnpack.XnnpackPartitioner()],
                constant_methods={"ca3d_info": json.dumps(dataclasses.asdict(info))},
            )
            content: bytes = lowered.to_executorch().buffer
        except Exception as error:
            raise UserError(
                f"ExecuTorch can't lower {info.model} in {config.precision}: "
                f"{' '.join(str(error).split())}"
            ) from error
    (folder / name).write_bytes(content)


def classifier(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Returns a function from clips (B, 3, T, H, W) to logits (B, classes).

    Args:
        path: the exported program.
        threads: not used: ExecuTorch's Python runtime takes all cores that the process may use.

    Raises:
        ca3d.errors.UserError: executorch is missing or can't run the program.
    """
    runtime = import_extra("executorch.runtime", "executorch").Runtime.get()
    # The program's memory must live as long as its method.
    program = runtime.load_program(str(path))
    method = program.load_method("forward")

    def run(clips: Tensor) -> Tensor:
        logits = []
        for clip in clips:
            try:
                (found,) = method.execute([clip.float().transpose(0, 1).contiguous()])
            except RuntimeError as error:
                raise UserError(f"{path}: ExecuTorch can't run it: {error}") from error
            logits.append(found.clone())
        return torch.cat(logits)

    run.program = program  # type: ignore[attr-defined]
    return run
