"""The one place of what differs between accelerators: CUDA, ROCm, XPU, NPU, MPS, and the simulated one of the tests.

The rest of the package has a `torch.device` and asks here. Where torch has one interface for all backends
(`torch.accelerator`, `torch.Stream`, `torch.Event`), it is used; where it has none, a backend's own module is asked, by
the names that CUDA's gave them. No backend is named elsewhere: `tests/unit/test_accelerator.py` holds that.
docs/limits.md lists the backends that have been tried.

`names` reads and writes devices' names without torch, `facts` asks about devices, `host_memory` registers host memory
for copies.
"""
