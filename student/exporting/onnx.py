"""onnx: one `model.onnx` for ONNX Runtime and whatever else reads ONNX, for any number of pictures.

    images (N,3,S,S) float32, RGB, 0 to 1 -> tokens (N,T,D) after the final norm, logits (N,C)

Mean and std are inside, so that a program that has no Python cannot get them wrong. Nothing is
folded and every family goes. Weights are float32, in the file itself; where they are more than its
format can hold, 2 GiB, they lie in `model.onnx.data` beside it. What the exporter notes of the
source (paths, lines of code, names of modules) is taken out.

N pictures, S pixels a side, T tokens with [CLS] where there is one, D width, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.errors import UserError
from student.features.comparison import Comparison
from student.features.exported import MODULE, TIMM_FAMILIES, Exported
from student.models import conv_vit

LIBRARY = "onnx"
FAMILIES = (*TIMM_FAMILIES, conv_vit.FAMILY)
COMPARISON = Comparison("onnxruntime", most=1e-4, normalised=False)
FILE, DATA = "model.onnx", "model.onnx.data"
OPSET = 20  # the first with GELU; ONNX Runtime 1.17 reads it
ONE_FILE_BYTES = (1 << 31) - (16 << 20)  # of weights: protobuf's limit, less the graph
_NEEDS = ("onnx", "onnxruntime", "onnxscript")


def check(given: Exported) -> None:
    """Refuse where a package is missing."""
    for name in _NEEDS:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"--format onnx needs {name}; run `pip install {' '.join(_NEEDS)}` (or `pip "
                "install 'featcache[onnx]'`), or take --format timm"
            ) from error


class _Pixels(nn.Module):
    """Normalise pictures, then run a network on them."""

    mean: Tensor
    std: Tensor

    def __init__(self, given: Exported) -> None:
        super().__init__()
        # a copy: exporting leaves traces in a module, and the run's is compared with afterwards
        self.net: Any = copy.deepcopy(given.net).float()
        self.classes = given.classes
        for name, value in zip(("mean", "std"), given.pixels, strict=True):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (N,T,D), and logits (N,C) of a classifier."""
        images = (images - self.mean) / self.std
        tokens = self.net.forward_features(images)
        return (tokens, self.net.forward_head(tokens)) if self.classes else (tokens,)


def names(classes: int) -> list[str]:
    """Return the names of the outputs."""
    return ["tokens", "logits"] if classes else ["tokens"]


def write(given: Exported, folder: Path) -> None:
    """Write model.onnx, and config.json with sizes and pixels for people to read."""
    program = _program(given)
    mean, std = given.pixels
    config = {
        "input": "images",
        "shape": ["N", 3, given.img_size, given.img_size],
        "range": [0, 1],
        "colours": "RGB",
        "outputs": names(given.classes),
        "opset": OPSET,
        "built_in_mean": list(mean),
        "built_in_std": list(std),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = sum(each.const_value.nbytes for each in program.model.graph.initializers.values())
    # torch's name of the second file is DATA
    program.save(folder / FILE, external_data=weights > ONE_FILE_BYTES)


def _program(given: Exported) -> Any:
    """Return the network as torch.onnx's program, stripped."""
    net = _Pixels(given).eval()
    images = torch.zeros(2, 3, given.img_size, given.img_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        try:
            program: Any = torch.onnx.export(
                net,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=names(given.classes),
                dynamic_shapes={"images": {0: torch.export.Dim("N")}},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            why = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"torch.onnx cannot express this network ({why}); take --format timm, or {MODULE}"
            ) from error
    strip(program.model)
    return program


def strip(model: Any) -> None:
    """Take out what the exporter notes of where a graph comes from."""
    for function in model.functions.values():
        _strip_graph(function)
    _strip_graph(model.graph)
    model.metadata_props.clear()
    model.doc_string = None


def _strip_graph(graph: Any) -> None:
    values = [*graph.inputs, *getattr(graph, "initializers", {}).values()]
    for node in graph:
        values += node.outputs
        node.metadata_props.clear()
        node.doc_string = None
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.doc_string = None


def reload(folder: Path, classes: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Check the file by onnx, and open it in ONNX Runtime on the CPU; it must take one picture and
    three."""
    import onnx
    import onnxruntime

    path = str(folder / FILE)
    with _errors_of_onnx():
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def outputs(images: Tensor) -> dict[str, Tensor]:
        with _errors_of_onnx():
            found = session.run(names(classes), {"images": images.float().numpy()})
        return {
            name: torch.from_numpy(value).double()
            for name, value in zip(names(classes), found, strict=True)
        }

    _check_batches(outputs, session.get_inputs()[0].shape[-1])
    return outputs


@contextlib.contextmanager
def _errors_of_onnx() -> Iterator[None]:
    """Raise what onnx and ONNX Runtime raise as a ValueError: their kinds have no common base."""
    try:
        yield
    except Exception as error:
        raise ValueError(str(error)) from error


def _check_batches(outputs: Callable[[Tensor], dict[str, Tensor]], size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    three = torch.rand(3, 3, size, size, generator=generator)
    together, alone = outputs(three), outputs(three[:1])
    for name, value in together.items():
        scale = max(1.0, float(value.abs().max()))
        gap = (value[:1] - alone[name]).abs().max() if len(value) == 3 else torch.inf
        if not gap <= COMPARISON.most * scale:
            raise ValueError(f"{name} of a picture depend on the pictures beside it")


def usage(given: Exported) -> str:
    """Return Python that runs the file."""
    outputs = ", ".join(names(given.classes))
    size = given.img_size
    return (
        "import numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("DIR/{FILE}")\n'
        f"images = np.zeros((1, 3, {size}, {size}), np.float32)  # RGB, 0 to 1; mean and std are "
        "built in\n"
        f'{outputs}{"" if given.classes else ","} = session.run(None, {{"images": images}})'
    )
