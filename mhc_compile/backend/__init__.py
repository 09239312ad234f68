"""The torch.compile backend "mhc": seams fused in the captured graph, the rest by Inductor."""

from mhc_compile.backend.compile_graph import mhc

__all__ = ["mhc"]
