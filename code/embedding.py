"""From images to embeddings: a network on its device, in its memory layout and precision."""

import torch

from proxy_anchor import distributed, hardware
from proxy_anchor.progress import progress
from proxy_anchor.vectors import Embeddings


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

    network: a net.EmbeddingNet or net.PooledBackbone. amp: "none", or "bf16" or "fp16" for the network's products, with
    a scaler for the gradients of fp16 (else an idle one). compile: with torch.compile. A network of an exported file
    runs as it is: ValueError for it with amp or compile.
    """

    def __init__(self, network, device: torch.device, amp: str = "none", compile: bool = False):
        if getattr(network, "is_exported", False) and (amp != "none" or compile):
            raise ValueError("An exported file runs in float32 on the CPU: --amp is for checkpoints")
        hardware.to_device(network, device)
        self.network, self.device = network, device
        self.dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = Scaler(device, enabled=amp == "fp16")
        if compile:
            network.compile()
        self.replica = distributed.Replica(network)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = self.network.normalize(images)
        images = images.contiguous(memory_format=hardware.memory_format(self.device, images.shape[-1]))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            embeddings = self.replica(images)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def batches(self, loader):
        """The batches (images, labels) of a loader, on the device."""
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def embed(self, loader, description: str = "embedding", stop=None) -> Embeddings:
        """Embeddings of all images of an evaluation loader, in eval mode, with a progress bar.

        With several processes, the loader has this one's share of the images. A dataset with `groups` gives them too.
        stop: a Stop, which may end the pass early; check it before the embeddings are used.
        """
        self.network.eval()
        bar = progress(loader, description, len(loader.sampler))
        if stop:
            bar = stop.after_each(bar)
        vectors = [torch.empty(0, self.network.embedding_size, device=self.device)]
        labels = [torch.empty(0, dtype=torch.long, device=self.device)]
        for images, batch_labels in self.batches(bar):
            vectors.append(self(images))
            labels.append(batch_labels)
        groups = getattr(loader.dataset, "groups", None)
        if groups is not None:
            groups = torch.as_tensor(groups)[list(loader.sampler)].to(self.device)
        return Embeddings(torch.cat(vectors), torch.cat(labels), groups)
