"""Host memory to device: at once on the CPU; on CUDA from page-locked memory on a stream of its own.

Passes run on while adapters arrive. A lease makes its thread's stream wait for the upload's event, and tells the
allocator that this stream uses the tensors: freed while a pass still reads them, their memory is not given to the next
upload before that pass is through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from xpert.experts.adapters import Adapter
from xpert.experts.engines._bank_tiers import Version

if TYPE_CHECKING:
    import torch

    from xpert.experts.engines._packing import PackedAdapter
    from xpert.language_model import LanguageModel

__all__ = ["Uploads"]


class Uploads:
    """For one loading thread; `use` may be called from any."""

    def __init__(self, base: LanguageModel) -> None:
        self.device: torch.device = base.device
        self.dtype: torch.dtype = base.dtype
        self._cuda = base.device.type == "cuda"
        self._stream: Any = None

    def prepare(self, packed: PackedAdapter) -> PackedAdapter:
        """The form to be kept in host memory."""
        return packed.pinned() if self._cuda else packed

    def upload(self, packed: PackedAdapter) -> tuple[Adapter, Any]:
        """The adapter on the device, and the CUDA event after which its tensors hold their values (None elsewhere)."""
        if not self._cuda:
            return packed.unpack(self.device, self.dtype), None
        import torch

        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch has no types for it
            with torch.cuda.stream(self._stream):
                adapter = packed.unpack(self.device, self.dtype)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # nor for this
                ready.record(self._stream)
        return adapter, ready

    def use(self, versions: Iterable[Version]) -> None:
        """Makes the calling thread's current stream wait for the versions' tensors, which a lease holds."""
        if not self._cuda:
            return
        import torch

        stream = torch.cuda.current_stream(self.device)
        for version in versions:
            adapter, ready = version.device, version.ready
            if adapter is None or ready is None or stream in version.streams:
                continue
            stream.wait_event(ready)
            for module in adapter.modules.values():
                module.a.record_stream(stream)
                module.b.record_stream(stream)
            for tensor in adapter.gate_tensors.values():
                tensor.record_stream(stream)
            version.streams.add(stream)
