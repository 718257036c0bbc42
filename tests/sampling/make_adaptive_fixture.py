"""Makes adaptive_fixture.json: what k-diffusion 0.1.1.post1 gives for `test_compat_dpm.CASES`.

    python tests/sampling/make_adaptive_fixture.py ORACLE

ORACLE is a folder with that distribution, installed without its dependencies but for torchsde and
torchdiffeq (`make bench` makes benchmarks/.peers, which is one).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]

import overhead  # noqa: E402
from test_compat_dpm import CASES, FAST, LIKELIHOOD, denoise, record, state  # noqa: E402


def main() -> None:
    overhead.PEERS = Path(sys.argv[1])
    peer = overhead.load_peer()
    rows = [record(peer, case) for case in CASES]
    fast = []
    for n, eta in FAST:
        torch.manual_seed(0)
        ends = (-torch.tensor(sigma).log() for sigma in (20.0, 0.05))
        x = peer.DPMSolver(denoise).dpm_solver_fast(state(20.0), *ends, n, eta=eta)
        fast.append(x.flatten().tolist())
    likelihoods = []
    for sigma_max in LIKELIHOOD:
        torch.manual_seed(5)
        fine = peer.log_likelihood(denoise, state(1.0), 0.01, sigma_max, atol=1e-10, rtol=1e-10)
        torch.manual_seed(5)
        usual, info = peer.log_likelihood(denoise, state(1.0), 0.01, sigma_max)
        likelihoods.append([fine[0].tolist(), usual.tolist(), info["fevals"]])
    fixture = {"adaptive": rows, "fast": fast, "likelihood": likelihoods}
    (HERE / "adaptive_fixture.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main()
