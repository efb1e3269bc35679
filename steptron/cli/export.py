"""`steptron export hf CHECKPOINT OUT` and `steptron import hf DIR OUT`.

paths → export/hf.py → a line that says what was written
"""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of both commands."""
    export = subparsers.add_parser("export", help="write a checkpoint in the released Hugging Face format")
    hf = export.add_subparsers(dest="format", required=True, metavar="FORMAT").add_parser(
        "hf",
        help="safetensors and config.json",
        description="Write a checkpoint as safetensors and config.json, "
        "under the names of the released Step 3.5 models.",
        epilog="example: steptron export hf runs/demo demo-hf",
    )
    hf.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run folder (its newest complete checkpoint) or one of its checkpoints/step-… folders",
    )
    hf.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    hf.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="data type of all tensors except router biases, which stay fp32 (default: bf16)",
    )
    importer = subparsers.add_parser("import", help="read weights in the released Hugging Face format")
    hf = importer.add_subparsers(dest="format", required=True, metavar="FORMAT").add_parser(
        "hf",
        help="safetensors and config.json",
        description="Read safetensors and config.json into a checkpoint, and write the model as a recipe file.",
        epilog="example: steptron import hf Step-3.5-Flash imported",
    )
    hf.add_argument("dir", metavar="DIR", type=Path, help="folder with config.json and safetensors files")
    hf.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    hf.add_argument(
        "--mtp-heads",
        metavar="N",
        type=int,
        help="import only the first N MTP heads, 0 for none (default: as many as config.json says)",
    )


def run(args: argparse.Namespace) -> int:
    """Export or import. Returns the exit code."""
    # torch takes seconds to import, so a wrong command line is reported before.
    from steptron.export.hf import export_hf, import_hf

    if args.command == "export":
        written = export_hf(args.checkpoint, args.out, args.dtype)
        told = f"{args.out}: step {written.step}, {args.dtype}"
    else:
        written = import_hf(args.dir, args.out, args.mtp_heads)
        told = f"{args.out}: checkpoints/step-00000000, model.yaml (a file for recipes/model/), stage.yaml"
    tokenizer = "with tokenizer.json" if written.tokenizer else "no tokenizer.json found"
    print(f"{told}; {written.tensors} tensors, {written.bytes / 1e9:.3g} GB, {written.files} file(s); {tokenizer}")
    return 0
