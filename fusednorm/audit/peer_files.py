"""`--peer FILE`: norms and products of the user's own.

FILE is a Python module with a list PEERS of instances of `fusednorm.audit.Peer`, or of `fusednorm.audit.KernelPeer`,
which is one for kernels on torch's CUDA tensors:

    from fusednorm.audit import KernelPeer

    class Mine(KernelPeer):
        name, label, package = "mine", "my kernel", "my-package"
        def prepare(self): import my_package; self.run = my_package.norm
        def norm(self, x, weight, eps): return self.run(x, weight, eps)
        operations = ("rms_norm",)

    class MyProduct(KernelPeer):
        name, label, package = "my-mm", "my product", "my-package"
        def prepare(self): import my_package; self.run = my_package.mm
        def mm_dtype(self, a, b): return self.run(a, b)  # b is a transposed view; the result is float32
        operations = ("mm_dtype",)

    PEERS = [Mine(), MyProduct()]

A peer with the name and device of a known one takes its place.
"""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

from .peers import DEVICES, Peer, first_line


class WrongFile(Exception):
    """FILE has no peers; the text says why."""


def read(path: Path) -> list[Peer]:
    name = f"fusednorm_peer_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise WrongFile(f"{path} is not a Python file")
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise WrongFile(f"{path} raises {type(error).__name__}: {first_line(error)}") from error
    peers = getattr(module, "PEERS", None)
    if not isinstance(peers, (list, tuple)) or not all(isinstance(peer, Peer) for peer in peers):
        raise WrongFile(f"{path} has no list PEERS of instances of fusednorm.audit.Peer")
    for peer in peers:
        if not peer.name or peer.device not in DEVICES:
            raise WrongFile(f"{path}: {type(peer).__name__} needs a name, and a device of {', '.join(DEVICES)}")
        peer.label = peer.label or peer.name
    return list(peers)


def joined(known: list[Peer], paths: tuple[Path, ...], devices: tuple[str, ...]) -> list[Peer]:
    """The known peers and those of the files, on these devices."""
    table = {(peer.name, peer.device): peer for peer in known}
    for path in paths:
        table.update({(peer.name, peer.device): peer for peer in read(path) if peer.device in devices})
    return sorted(table.values(), key=lambda peer: devices.index(peer.device))
