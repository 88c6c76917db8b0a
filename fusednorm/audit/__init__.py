"""`python -m fusednorm audit`: what every RMSNorm and product of an installation rounds, and what that changes.

- operands.py: the arrays, random ones and a real model's hidden states
- oracle.py: the exact results that everything is counted against
- peers.py: the norms and their registry; torch_peers.py: those of PyTorch; cuda_peers.py: those on CUDA alone;
  product_peers.py: the products; peer_files.py: those of `--peer FILE`
- measure.py: counts, batch invariance, time; products.py: what is asked of products; trial.py: calls that may end
  their process, in another one; run.py: all of it in one report
- report.py: the report as a table or as JSON; plot.py, product_plot.py: as bars; progress.py, cli.py: the command
"""

from .cuda_peers import KernelPeer
from .peers import Absent, Peer, declared
from .run import Found, Options, Report, audit, find

__all__ = ["Absent", "Found", "KernelPeer", "Options", "Peer", "Report", "audit", "declared", "find"]
