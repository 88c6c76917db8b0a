"""`python -m fusednorm audit`: what every RMSNorm of an installation rounds, where, and what that changes.

- operands.py: the arrays, random ones and a real model's hidden states
- oracle.py: the exact results that everything is counted against
- peers.py: the norms and their registry; torch_peers.py: those of PyTorch
- measure.py: counts, batch invariance, time; run.py: all of it in one report
- report.py: the report as a table or as JSON; plot.py: as bars; progress.py, cli.py: the command
"""

from .run import Found, Options, Report, audit, find

__all__ = ["Found", "Options", "Report", "audit", "find"]
