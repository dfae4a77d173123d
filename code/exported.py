"""Networks in files for other programs: ONNX and safetensors, with a record of how to use them.

The record is JSON under RECORD in the file's metadata: "network" (see spec.NetworkSpec), "threshold" (see
spec.Calibration) where there is one, "preprocessing", "normalization", "weights" (their type), "source" (the
identity of the checkpoint) and "versions". No file holds a pickle.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from proxy_anchor.weights import RECORD, first_line, read_safetensors, record_in, require

ENDINGS = (".onnx", ".safetensors")
LARGEST = 1.5 * 2**30  # bytes of weights that torch writes into one ONNX file


class NormalizesInside(nn.Module):
    """What an Embedder may run and has nothing to normalize for: images, uint8 RGB (N, 3, S, S) -> embeddings."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return images


class InferenceNet(NormalizesInside):
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


class OnnxNet(NormalizesInside):
    """The network in an ONNX file, run by onnxruntime on the CPU, wherever its images are; it can be pickled.

    path: for messages. content: of the file. Raises ValueError if it does not map images of this size to embeddings of
    this size.
    """

    is_exported = True  # see embedding.Embedder

    def __init__(self, path: str | Path, content: bytes, image_size: int, embedding_size: int, session=None):
        super().__init__()
        self.path, self.content, self.image_size, self.embedding_size = path, content, image_size, embedding_size
        self.session = session or open_session(path, content)
        ends = [
            (end.name, end.type, end.shape[1:]) for end in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        expected = [
            ("images", "tensor(uint8)", [3, image_size, image_size]),
            ("embeddings", "tensor(float)", [embedding_size]),
        ]
        if ends != expected:
            raise ValueError(f"{path} is not an embedding network of export.py: expected {expected}, found {ends}")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (N, 3, S, S) -> (N, D). Raises ValueError if the file is damaged, or of another network."""
        try:
            (embeddings,) = self.session.run(None, {"images": images.contiguous().cpu().numpy()})
        except Exception as error:  # onnxruntime's errors have no common class
            raise ValueError(f"{self.path} is damaged: {first_line(error)}") from error
        shape = len(images), self.embedding_size
        if embeddings.shape != shape or embeddings.dtype != "float32":
            raise ValueError(
                f"{self.path} is not an embedding network of export.py: expected float32 {shape} of {len(images)} "
                f"images, found {embeddings.dtype} {embeddings.shape}"
            )
        return torch.from_numpy(embeddings).to(images.device)

    def __reduce__(self):
        return OnnxNet, (self.path, self.content, self.image_size, self.embedding_size)


def halve(network: nn.Module) -> None:
    """Round to half precision the weights with several dimensions, those of convolutions and linear layers above all.

    Statistics, scales and biases stay float32: BatchNorm's variances may exceed the range of half
    precision, and together they are few.
    """
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()


def save(path: Path, ending: str, network: InferenceNet, image_size: int, record: dict) -> None:
    """Write a network in the form of one of ENDINGS, whatever the path's own ending.

    Raises ImportError where a package is missing, ValueError where the form cannot hold the network.
    """
    metadata = {RECORD: json.dumps(record)}
    if ending == ".safetensors":
        metadata["format"] = "pt"  # transformers and others read no file without it
        require("safetensors")
        from safetensors.torch import save as to_bytes

        state = {name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}
        path.write_bytes(to_bytes(state, metadata))
        return
    require("onnx", "onnxscript", "onnxruntime")
    if sum(weight.nbytes for weight in network.state_dict().values()) > LARGEST:
        raise ValueError("The weights exceed 1.5 GB, the most that a single ONNX file can hold: choose .safetensors")
    onnx = _to_onnx(network, image_size)
    for end in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
        end.shape[0] = "N"  # instead of a name of torch's
    onnx.model.metadata_props.update(metadata)
    onnx.save(path)


def _to_onnx(network: InferenceNet, image_size: int) -> Any:
    """The network's computation for any number of images, without paths of the machine that traced it."""
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    try:
        program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of source files
        return torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["embeddings"], verbose=False
        )
    except Exception as error:  # of many kinds, with pages of advice
        raise ValueError(f"torch cannot trace this network: {first_line(error)}; .safetensors holds any") from error


def is_exported(path: str | Path) -> bool:
    """Whether a path has one of ENDINGS."""
    return Path(path).suffix in ENDINGS


def read(path: str | Path) -> dict:
    """The record in a file that `save` wrote, with the content of the file, from one reading.

    That is the "model_state_dict" of .safetensors, and the "onnx", its "session" and "sha256" of .onnx. Raises
    FileNotFoundError, ValueError for damaged files and others' files, and ImportError where a package is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}")
    if Path(path).suffix == ".onnx":
        content = Path(path).read_bytes()
        session = open_session(path, content)
        metadata = session.get_modelmeta().custom_metadata_map
        digest = hashlib.sha256(content).hexdigest()
        return record_in(path, metadata) | {"onnx": content, "session": session, "sha256": digest}
    metadata, state = read_safetensors(path)
    return record_in(path, metadata) | {"model_state_dict": state}


def difference(embeddings: torch.Tensor, expected: torch.Tensor) -> float:
    """How far embeddings (N, D) are from others: the largest of 1 - cosine and of the share by which a length differs.

    NaN if any embedding is not finite or has length 0.
    """
    embeddings, expected = embeddings.double(), expected.double()
    lengths, wanted = embeddings.norm(dim=1), expected.norm(dim=1)
    cosines = (embeddings * expected).sum(dim=1) / (lengths * wanted)
    return torch.stack([1 - cosines, (lengths / wanted - 1).abs()]).max().item()


def open_session(path: str | Path, content: bytes):
    """The session of onnxruntime for the content of an ONNX file; path is for messages. Raises as read does."""
    onnxruntime = require("onnxruntime")[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised
    # No weights from other files, which the identity does not cover: there are none in this folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise ValueError(f"{path} is damaged or not an ONNX file: {first_line(error)}") from error
