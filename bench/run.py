"""Measure ours against a baseline and a floor, in one run on this machine.

python bench/run.py                    every row
python bench/run.py adaptive_conv      rows whose name begins so
python bench/run.py =train_step/bf16   one row
python bench/run.py --quick --json rows.json
"""

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import Row, device
from bench.sizes import SHORT

# Row -> the file that measures it, and what its `rows` is told besides; rows told the same are measured together.
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"adaptive_conv/{name}{suffix}": ("adaptive_conv", how)
        for suffix, how in (
            ("", {"precision": "float32"}),
            ("/bf16", {"precision": "bfloat16"}),
            ("/bf16/batch_32", {"precision": "bfloat16", "batch": 32}),
        )
        for name in ("forward", "train")
    },
    **{
        f"{name}/{label}{suffix}": ("train_step", {"architecture": architecture, "precision": precision, **how})
        for name, architecture in (("train_step", "adaconv"), ("adain/train_step", "adain"))
        for precision, label in SHORT.items()
        for suffix, how in (
            ("", {}),
            ("/batch_2", {"batch": 2}),
            ("/same_allocator", {"same_allocator": True}),
            ("/compiled", {"compiled": True}),
            ("/tf32", {"tf32": True}),
            ("/batch_32", {"batch": 32}),
            ("/batch_32/tf32", {"batch": 32, "tf32": True}),
        )
    },
    **{
        f"{name}/{side}/{label}{suffix}": ("stylize", {**network, "side": side, "precision": precision, **how})
        for name, network in (
            ("stylize/one", {}),
            ("stylize/cached", {"style_cached": True}),
            ("adain/stylize", {"architecture": "adain"}),
        )
        for side in (256, 512, 1024)
        for precision, label in SHORT.items()
        for suffix, how in (("", {}), ("/batch_16", {"batch": 16}))
    },
    "stylize/tiled/2048": ("stylize_tiled", {"side": 2048, "tile": 512}),
    "stylize/grid": ("stylize_grid", {}),
    "stylize/files/512/bf16": ("stylize_files", {"side": 512}),
    "load": ("load", {"against": "bare"}),
    **{f"load/{name}": ("load", {"against": name}) for name in ("webdataset", "ray_data", "one_image")},
    "ddp": ("ddp", {}),
    "shard": ("shard", {}),
    "tracking/step_p99": ("tracking", {}),
    "tracking/step_cpu": ("tracking", {}),
}


def machine() -> str:
    if device().type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def line(row: Row) -> str:
    return (
        f"{row.name:30} {row.ours * 1e3:10.1f} {row.baseline * 1e3:10.1f} {row.ratio:7.2f} "
        f"{row.floor * 1e3:10.1f} {row.of_floor:8.2f}  {row.unit}" + (f"; against {row.against}" if row.against else "")
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="beginnings of rows' names, or with a = before them whole names; none: all"
    )
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: shows that it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, in seconds")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(QUESTIONS))
        return 0

    def meant(row: str, name: str) -> bool:
        return row == name[1:] if name.startswith("=") else row.startswith(name)

    unknown = [name for name in options.names if not any(meant(row, name) for row in QUESTIONS)]
    if unknown:
        parser.error(f"expected rows of {', '.join(QUESTIONS)}; found {', '.join(unknown)}")
    wanted = [row for row in QUESTIONS if not options.names or any(meant(row, name) for name in options.names)]
    print(machine())
    print(f"{'row':30} {'ours ms':>10} {'base ms':>10} {'ratio':>7} {'floor ms':>10} {'of floor':>8}", flush=True)
    measured = []
    told = [QUESTIONS[row] for row in wanted]
    for file, how in (question for index, question in enumerate(told) if question not in told[:index]):
        for row in importlib.import_module(f"bench.{file}").rows(options.quick, **how):
            if row.name in wanted:
                print(line(row), flush=True)
                measured.append(row.to_dict())
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "rows": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
