"""Writes established.safetensors: what k-diffusion 0.1.1 gives for the cases beside this file.

Run by hand, in an environment that has it, or with the folder that it is unpacked in:

    pip install --no-deps --target peers k-diffusion==0.1.1.post1 torchsde==0.2.6 \\
      torchdiffeq==0.2.5 trampoline==0.1.2
    python tests/sampling/make_established.py peers

For each case: the result in float64 and in float32, and the original's own error in float32, which
is how far its result is from its float64 run on the same float32 levels, start and noise.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from established_cases import FIXTURE, SHAPE, call, cases, difference, finite, label
from safetensors.torch import save_file
from torch import Tensor


def load_original(folder: Path) -> Any:
    """Its sampling module alone: its package needs more than we want to install."""
    sys.path.append(str(folder))  # torchsde and torchdiffeq
    package = types.ModuleType("original")
    package.__path__ = [str(folder / "k_diffusion")]
    utils = types.ModuleType("original.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"original": package, "original.utils": utils})
    path = folder / "k_diffusion" / "sampling.py"
    spec = importlib.util.spec_from_file_location("original.sampling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["original.sampling"] = module
    spec.loader.exec_module(module)
    return module


class Tape:
    """Records the noise of one run, and gives it to another in a higher precision."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.noise: list[Tensor] = []

    def record(self, case: dict[str, Any]) -> Tensor:
        plain, tree = torch.randn_like, self.module.BrownianTreeNoiseSampler

        def randn_like(x: Tensor) -> Tensor:
            self.noise.append(plain(x))
            return self.noise[-1]

        class Recorded(tree):  # type: ignore[misc, valid-type]
            def __call__(inner, *times: Any) -> Tensor:
                self.noise.append(super().__call__(*times))
                return self.noise[-1]

        torch.randn_like, self.module.BrownianTreeNoiseSampler = randn_like, Recorded
        try:
            return call(self.module, case, torch.float32)
        finally:
            torch.randn_like, self.module.BrownianTreeNoiseSampler = plain, tree

    def replay(self, case: dict[str, Any]) -> Tensor:
        plain, tree = torch.randn_like, self.module.BrownianTreeNoiseSampler
        noise = iter(self.noise)

        class Replayed:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                pass

            def __call__(self, *times: Any) -> Tensor:
                return next(noise).double()

        torch.randn_like = lambda x: next(noise).double()
        self.module.BrownianTreeNoiseSampler = Replayed
        case = {**case, "start": torch.float32}
        if "sigmas" in case:
            case = {**case, "sigmas": torch.tensor(case["sigmas"]).double().tolist()}
        try:
            return call(self.module, case, torch.float64)
        finally:
            torch.randn_like, self.module.BrownianTreeNoiseSampler = plain, tree


def main() -> None:
    warnings.simplefilter("ignore")  # its trees are asked a last bit beyond their ends
    module = load_original(Path(sys.argv[1]))
    records, results = [], {"float32": [], "float64": []}  # type: ignore[var-annotated]
    for case in cases():
        record: dict[str, Any] = {**case, "fails": ""}
        try:
            double = call(module, case, torch.float64)
            tape = Tape(module)
            single = tape.record(case)
            record["own"] = difference(single, tape.replay(case))
            if not (finite(double) and finite(single)):
                record["fails"] = "not finite"
        except Exception as error:
            record["fails"] = f"{type(error).__name__}: {error}"
        if record["fails"]:
            double = single = torch.zeros(SHAPE)
            record["own"] = 0.0
            print(f"{label(case)}: {record['fails']}")
        records.append(record)
        results["float32"].append(single.float())
        results["float64"].append(double.double())
    print(f"{len(records)} cases, own errors up to {max(r['own'] for r in records):.2g}")
    tensors = {name: torch.stack(each) for name, each in results.items()}
    save_file(tensors, FIXTURE, {"cases": json.dumps(records)})


if __name__ == "__main__":
    main()
