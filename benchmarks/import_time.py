"""Time that `import k_diffusion` takes beyond `import torch`: medians over fresh interpreters.

Writes benchmarks/results/import_time.json. The goal is at most 150 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parent / "results" / "import_time.json"
CODE = """
import time
import torch
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def main() -> None:
    modules = ["k_diffusion", "k_diffusion.sampling", "k_diffusion.models"]
    milliseconds = {}
    for module in modules:
        command = [sys.executable, "-c", CODE.format(module=module)]
        runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(7)]
        milliseconds[module] = 1000 * statistics.median(float(run.stdout) for run in runs)
        print(f"import {module}: {milliseconds[module]:.0f} ms beyond torch")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"milliseconds beyond torch": milliseconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
