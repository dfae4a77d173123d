"""Networks in files for others: ONNX, safetensors, programs of torch.export; each holds a record of how to use it.

The record is JSON under RECORD in the file's metadata: "network" (see checkpoint.CONTRACT), "threshold" (see
checkpoint.THRESHOLD) where there is one, "preprocessing", "normalization", "weights" (their type), "source" (the
identity of the checkpoint) and "versions". No file holds a pickle.
"""

import hashlib
import importlib
import json
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ENDINGS = (".onnx", ".safetensors", ".pt2")
RECORD = "record"
LARGEST = 1.5 * 2**30  # bytes of weights that torch writes into one ONNX file


class FromPixels(nn.Module):
    """What an Embedder may run and has nothing to normalize for: images, uint8 RGB (N, 3, S, S) -> embeddings."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return images


class Served(FromPixels):
    """A network of net/ from pixels to embeddings (N, D) as they are compared: of unit length for cosine.

    Weights and buffers in half precision, of export.py --fp16 or of half() and bfloat16(), are made float32 before they
    are used, so that results depend on their rounding alone.
    """

    def __init__(self, network, distance: str):
        super().__init__()
        self.network = network.eval()
        self.embedding_size = network.embedding_size
        self.unit_length = distance == "cosine" and not network.l2_norm  # else it is so already

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        single = {name: tensor.float() for name, tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)}
        embeddings = torch.func.functional_call(self.network, single, self.network.normalize(images))
        return F.normalize(embeddings) if self.unit_length else embeddings


class Program(FromPixels):
    """A file's function from pixels to embeddings (N, D)."""

    def __init__(self, function, embedding_size: int):
        super().__init__()
        self.function = function
        self.embedding_size = embedding_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(images)


def halve(network: nn.Module) -> None:
    """Round to half precision what has several dimensions: the weights of convolutions and linear layers above all.

    Statistics, scales and biases stay float32: BatchNorm's variances may be larger than half precision can tell, and
    all of them together are few.
    """
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()


def save(path: Path, ending: str, served: Served, image_size: int, record: dict) -> None:
    """Write a network in the form of one of ENDINGS, whatever the path's own ending.

    Raises ImportError where a package is missing, ValueError where the form cannot hold the network.
    """
    metadata = {RECORD: json.dumps(record)}
    if ending == ".safetensors":
        metadata["format"] = "pt"  # transformers and others read no file without it
        _require("safetensors")
        from safetensors.torch import save as to_bytes

        state = {name: tensor.contiguous() for name, tensor in served.network.state_dict().items()}
        path.write_bytes(to_bytes(state, metadata))
    elif ending == ".onnx":
        _require("onnx", "onnxscript", "onnxruntime")
        if sum(weight.nbytes for weight in served.state_dict().values()) > LARGEST:
            raise ValueError("The weights have more than the 1.5 GB of a single ONNX file: choose .safetensors")
        program = _traced(served, image_size)
        with _refusal_in_one_line():
            onnx: Any = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["embeddings"], verbose=False
            )
        for end in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
            end.shape[0] = "N"  # instead of a name of torch's
        onnx.model.metadata_props.update(metadata)
        onnx.save(path)
    else:
        program = _traced(served, image_size)
        with open(path, "wb") as file:
            torch.export.save(program, file, extra_files=metadata)
        with zipfile.ZipFile(path) as file:
            if any(part.file_size and part.filename.endswith((".pt", ".pkl")) for part in file.infolist()):
                raise ValueError(f"torch {torch.__version__} writes pickles into .pt2 files; a newer one does not")


def _traced(served: Served, image_size: int) -> torch.export.ExportedProgram:
    """The computation, for any number of images, without what it says of the machine that traced it."""
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with _refusal_in_one_line():
        program = torch.export.export(served, (images,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of source files
    program.example_inputs = None  # they would be a pickle in the file
    return program


@contextmanager
def _refusal_in_one_line():
    try:
        yield
    except Exception as error:  # of many kinds, with pages of advice
        raise ValueError(f"torch cannot trace this network: {_first_line(error)}; .safetensors holds any") from error


def is_exported(path: str | Path) -> bool:
    """Whether a path has one of ENDINGS."""
    return Path(path).suffix in ENDINGS


def read(path: str | Path) -> dict:
    """The record in a file that `save` wrote, and what the file holds, from one reading.

    That is the "model_state_dict" of .safetensors, and the "session" and the "sha256" of .onnx. Raises
    FileNotFoundError, and ValueError for damaged files and others' files, and for programs of torch.export: torch runs
    code that they may hold when it loads them. ImportError where a package is missing.
    """
    _check_there(path)
    if Path(path).suffix == ".onnx":
        content = Path(path).read_bytes()
        session = open_session(path, content)
        metadata = session.get_modelmeta().custom_metadata_map
        held = {"session": session, "sha256": hashlib.sha256(content).hexdigest()}
    elif Path(path).suffix == ".safetensors":
        metadata, state = read_tensors(path)
        held = {"model_state_dict": state}
    else:
        raise ValueError(
            f"{path} is a program of torch.export, which could run code when it is loaded; "
            "give the checkpoint, or its .onnx or .safetensors"
        )
    return record_in(path, metadata) | held


def record_in(path: str | Path, metadata: dict | None) -> dict:
    """The record in a file's metadata; path is for messages. Raises ValueError if there is none."""
    try:
        record = json.loads((metadata or {})[RECORD])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no record of its network: export.py writes it") from error
    if not isinstance(record, dict) or not isinstance(record.get("network"), dict):
        raise ValueError(f"{path} is damaged: its record is {str(record)[:80]}")
    return record


def open_onnx(path: str | Path, session, image_size: int, embedding_size: int) -> Program:
    """The network of an ONNX file's session, run by onnxruntime on the CPU, wherever its images are.

    path: for messages. Raises ValueError if it does not map such images to such embeddings.
    """
    ends = [(end.name, end.type, end.shape[1:]) for end in (*session.get_inputs(), *session.get_outputs())]
    expected = [
        ("images", "tensor(uint8)", [3, image_size, image_size]),
        ("embeddings", "tensor(float)", [embedding_size]),
    ]
    if ends != expected:
        raise ValueError(f"{path} is not an embedding network of export.py: expected {expected}, found {ends}")

    def run(images):
        try:
            (embeddings,) = session.run(None, {"images": images.contiguous().cpu().numpy()})
        except Exception as error:  # onnxruntime's errors have no common class
            raise ValueError(f"{path} is damaged: {_first_line(error)}") from error
        if embeddings.shape != (len(images), embedding_size) or embeddings.dtype != "float32":
            raise ValueError(
                f"{path} is not an embedding network of export.py: expected float32 {(len(images), embedding_size)} "
                f"of {len(images)} images, found {embeddings.dtype} {embeddings.shape}"
            )
        return torch.from_numpy(embeddings).to(images.device)

    return Program(run, embedding_size)


def open_program(path: str | Path, embedding_size: int) -> Program:
    """The network in a .pt2 file, which has to be one's own: see read."""
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return Program(lambda images: module(images), embedding_size)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far embeddings (N, D) are from others: the largest of 1 - cosine and of the share by which a length differs.

    Not a number where either has an embedding that is not finite, or of length 0.
    """
    found, expected = found.double(), expected.double()
    lengths, wanted = found.norm(dim=1), expected.norm(dim=1)
    cosines = (found * expected).sum(dim=1) / (lengths * wanted)
    return torch.stack([1 - cosines, (lengths / wanted - 1).abs()]).max().item()


def open_session(path: str | Path, content: bytes):
    """The session of onnxruntime for the content of an ONNX file; path is for messages. Raises as read does."""
    onnxruntime = _require("onnxruntime")[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised
    # No weights from other files, which the identity does not cover: there are none in this folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise ValueError(f"{path} is damaged or not an ONNX file: {_first_line(error)}") from error


def read_tensors(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metadata and the tensors of a .safetensors file. Raises as read does."""
    safetensors = _require("safetensors")[0]
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and others on damaged files
        raise ValueError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from error


def _check_there(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {path}")


def _require(*names):
    """The modules of these packages. Raises ImportError with what to install."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(f"This needs {', '.join(names)} ({error}): pip install {' '.join(names)}") from error


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
