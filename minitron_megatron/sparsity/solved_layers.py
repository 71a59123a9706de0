"""The layers that are solved so far: files with the new weights of each, laid over the source.

A layer's file is written when it is whole. So an interrupted run goes on after the last layer that has one.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.checkpoint.source import TensorSource, take
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import replacing
from minitron_megatron.model.axes import Param

_REPORT = "report"
# Network file systems show a new file after so long at the latest, by default.
_PATIENCE_S = 120.0


class SolvedLayers:
    """A source whose layers are replaced, one by one, by those in a folder.

    Args:
        source: of everything else.
        folder: with a file for every solved layer; it is made.

    Attributes:
        beside: what else was measured, by `key_of`: every rank has it, and a run that goes on measures it again.
        num_solved: layers, from the first one on, that are read from the folder. Whoever shares the folder sets it, for
            a network file system may not show a new file at once.
    """

    def __init__(self, source: TensorSource, folder: Path):
        self.source = source
        self.folder = folder
        self.network = source.network
        self.dtype = source.dtype
        self.num_solved = 0
        self.beside: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def count_files(self) -> int:
        """Returns the number of layers, from the first one on, that have a file."""
        numbers = range(len(self.network.layers))
        return next((number for number in numbers if not self._file(number).is_file()), len(numbers))

    def write(self, number: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Writes a solved layer.

        Args:
            number: of the layer.
            tensors: new matrices and their companions, by `key_of`.
            report: plain values that tell how it went, see `reports`.
        """
        with replacing(self._file(number)) as temporary:
            save_file(dict(tensors), temporary, metadata={_REPORT: json.dumps(report)})

    def reports(self) -> list[dict[str, Any]]:
        """Returns the reports of the solved layers."""
        reports = []
        for number in range(self.num_solved):
            with safe_open(self._wait_for(number), framework="pt") as file:
                reports.append(json.loads(file.metadata()[_REPORT]))
        return reports

    def read(self, param: Param, index: list[np.ndarray]) -> Tensor:
        """See `TensorSource.read`."""
        if (measured := self.beside.get(key_of(param))) is not None:
            return take(measured, index)
        if param.layer is not None and param.layer < self.num_solved:
            with safe_open(self._wait_for(param.layer), framework="pt") as tensors:
                if (key := key_of(param)) in tensors.keys():  # noqa: SIM118, it is no dict
                    first, last = int(index[0][0]), int(index[0][-1])
                    rows = tensors.get_slice(key)[first : last + 1]
                    return take(rows.contiguous(), [index[0] - first, *index[1:]])
        return self.source.read(param, index)

    def _wait_for(self, number: int) -> Path:
        """Returns the file of a solved layer.

        Raises:
            CheckpointError: it is not there, also after a while.
        """
        file, begun = self._file(number), time.monotonic()
        while not file.is_file():
            if time.monotonic() - begun > _PATIENCE_S:
                raise CheckpointError(f"{file} is missing: the folder must be on a file system that all ranks share")
            list(self.folder.iterdir())  # so that a network file system looks again
            time.sleep(0.5)
        return file

    def _file(self, number: int) -> Path:
        return self.folder / f"layer_{number:04d}.safetensors"


def key_of(param: Param) -> str:
    """Returns the key of a matrix or a companion in its layer's file."""
    return f"{param.position}.{param.name}"
