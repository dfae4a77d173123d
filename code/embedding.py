"""From images to embeddings: a network on its device, in its memory layout and precision, in one or more processes.

In several processes, the loss of a batch is not the mean of the losses of its shards, because every proxy meets every
embedding. So the embeddings are gathered, and every process computes the loss of the whole batch. Its gradient reaches
the network only through the process's own images; the sum over the processes is the gradient of the whole batch.
"""

import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from proxy_anchor import collectives
from proxy_anchor.hardware import return_freed_memory
from proxy_anchor.vectors import Embeddings

CHANNELS_LAST_FROM = 96  # pixels: on a CPU, smaller images are faster in torch's own layout


class Scaler(torch.amp.GradScaler):
    """A GradScaler that counts the steps that it skipped, without making the host wait for a GPU."""

    def __init__(self, device: torch.device, enabled: bool):
        super().__init__(device.type, enabled=enabled)
        self.one = torch.ones((), device=device)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def update(self, new_scale=None):
        before = self.scale(self.one)
        super().update(new_scale)
        self.skipped += self.scale(self.one) < before  # it is lowered where gradients overflowed

    def remark(self) -> str:
        """A line on the steps skipped since the last remark, or nothing."""
        skipped = int(self.skipped)
        self.skipped.zero_()
        if not skipped:
            return ""
        return f"fp16: {skipped:,} steps skipped, as their gradients overflowed; the scale is {self.get_scale():g}\n"


class Embedder:
    """Maps images, uint8 RGB (B, 3, H, W) on the device, to embeddings (B, D) in float32 or better.

    network: of net/embedding_net.py; for a Head, images are their features (B, C). amp:
    "none", or "bf16" or "fp16" for the network's products, with a scaler for the gradients of fp16 (else an idle one).
    compile: with torch.compile. A network of an exported file runs as it is: ValueError for it with amp or compile.
    """

    def __init__(self, network, device: torch.device, amp: str = "none", compile: bool = False):
        if getattr(network, "is_exported", False) and (amp != "none" or compile):
            raise ValueError("An exported file runs in float32 on the CPU: --amp is for checkpoints")
        to_device(network, device)
        self.network, self.device, self.settings = network, device, (amp, compile)
        self.dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = Scaler(device, enabled=amp == "fp16")
        if compile:
            network.compile()
        self.replica = Replica(network)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network.normalize(images)
        if images.ndim == 4:
            images = images.contiguous(memory_format=memory_format(self.device, images.shape[-1]))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            embeddings = self.replica(images)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def batches(self, loader):
        """The batches (images, labels) of a loader, on the device."""
        return_freed_memory()  # the loader's workers may be forked now, and would hold copies of it
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        return_freed_memory()

    @torch.inference_mode()
    def embed(self, loader, description: str = "embedding", stop=None) -> Embeddings:
        """Embeddings of all images of an evaluation loader, in eval mode, with a progress bar.

        With several processes, the loader has this one's share of the images. A dataset with `groups` gives them too.
        stop: a Stop, which may end the pass early; check it before the embeddings are used.
        """
        from proxy_anchor.progress import progress  # the only use of tqdm, which torch.hub's users may not have

        self.network.eval()
        bar = progress(loader, description, len(loader.sampler))
        if stop:
            bar = stop.watch(bar)
        vectors = [torch.empty(0, self.network.embedding_size, device=self.device)]
        labels = [torch.empty(0, dtype=torch.long, device=self.device)]
        for images, batch_labels in self.batches(bar):
            vectors.append(self(images))
            labels.append(batch_labels)
        groups = getattr(loader.dataset, "groups", None)
        if groups is not None:
            groups = torch.as_tensor(groups)[list(loader.sampler)].to(self.device)
        return Embeddings(torch.cat(vectors), torch.cat(labels), groups)


def to_device(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on the device. On a CPU its convolutions take the layout of the images, see memory_format."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]


def memory_format(device: torch.device, image_size: int) -> torch.memory_format:
    """The memory layout in which convolutions are fastest, for images of this size."""
    fast = device.type == "cuda" or (device.type == "cpu" and image_size >= CHANNELS_LAST_FROM)
    return torch.channels_last if fast else torch.contiguous_format


class Replica:
    """Calls a network and sums its gradients over the processes, overlapped with the backward pass."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.parallel, self.trainable = network, None

    def __call__(self, *inputs):
        if collectives.world_size() == 1 or not torch.is_grad_enabled():
            return self.network(*inputs)
        trainable = [parameter.requires_grad for parameter in self.network.parameters()]
        if trainable != self.trainable:  # DistributedDataParallel fixes the parameters that train when it is made
            self.trainable = trainable
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames a setting
                # With a static graph, layers that never run are no error.
                self.parallel = DistributedDataParallel(
                    self.network, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
                )
            self.parallel.register_comm_hook(None, sum_of_bucket)
        return self.parallel(*inputs)


def sum_of_bucket(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum instead of average the gradients: each process has computed the loss of the whole batch."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def sync_batchnorm(network, device: torch.device, bn_freeze: bool) -> None:
    """Let BatchNorm layers that train use the statistics of the whole batch, which torch can only do on CUDA."""
    if collectives.world_size() > 1 and not bn_freeze:
        if device.type == "cuda":
            network.model.synchronize_norms()
        else:
            print("On a CPU, each process has BatchNorm statistics of its own images.")
