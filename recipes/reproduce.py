# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of the PatchRec paper, one command each: trained, evaluated, and beside the paper's numbers.

    python recipes/reproduce.py --table 1 2 3 4 --figure 1 2 5 6 7 8 --data path/to/ml-100k      # hours of a core
    python recipes/reproduce.py --table 2 --data path/to/ml-100k --head items --seeds 0 1 2
    python recipes/reproduce.py --table all --data path/to/ml-100k path/to/ml-1m                 # every system there is
    python recipes/reproduce.py --table 2 --data path/to/ml-1m --model runs/pretrained/SmolLM2-135M-Instruct.Q4_1
    python recipes/reproduce.py --table 2 --data path/to/ml-1m --dry_run --model Llama-3.2-1B-Instruct \\
        --tokenizer path/to/llama3-tokenizer --scale paper --gpu A800

Prints what each step will cost before the first one begins: from rates of steps that are done in the folder, else of a
few passes and prompts that are measured; with --gpu at a share of that card's peak. Then it runs them one after the
other. Killed, the same command goes on and ends with the same files. --scale small is for models from random weights
and 2 cores: targets of a user together, --num_train_epochs short; --scale paper is the paper's training, one target
per sample and 64 samples a step. Further flags go to recipes/train.py.

Table 1: the data. 2: text, item and session patches beside yardsticks and peers. 3: with and without patch
pre-training. 4: items dropped instead of compressed. all: every system that the folder has a file of, alone and with
priors, with its cost. Figure 1: hit rate by rows. 2: by the latest items read. 5, 6: by the size of the text and of
sessions. 7: speed by compression. 8: whole histories. Each is written as Markdown and CSV, figures as PNG too, to
<output_dir>/results, and what depends on the clock to <output_dir>/measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from patchkern.data.preparation import add_filters, load
from patchkern.models.scratch import SIZES
from recipes import training_flags
from recipes.commands import data_flags
from recipes.reproduction import cost
from recipes.reproduction.cost import GPUS, Reader
from recipes.reproduction.names import FIGURES, FORMS, OURS, PEERS, TABLES
from recipes.reproduction.plan import Options, Planner
from recipes.reproduction.report import report
from recipes.reproduction.steps import Folder, Step, run
from recipes.tables import markdown_table
from recipes.training_flags import HANDED_ON


def main(argv: Sequence[str] | None = None) -> list[Path]:
    args, further = parse(argv)
    torch.set_num_threads(args.threads)
    written: list[Path] = []
    for path in args.data:
        args.data = path
        written += reproduce(args, further, Folder(args.output_dir or Path("runs") / f"reproduce-{Path(path).name}"))
    for result in written:
        say(f"\n{os.fspath(result)}\n{result.read_text(encoding='utf-8')}")
    return written


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", nargs="+", choices=TABLES, default=[])
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=[])
    parser.add_argument("--data", nargs="+", required=True, help='folders of data sets, or "synthetic"')
    add_filters(parser)
    parser.add_argument("--model", default="tiny", help=f"{', '.join(SIZES)}, a folder, or a shape for --dry_run")
    parser.add_argument("--tokenizer", help="the folder of one, for --model without")
    parser.add_argument("--head", choices=["titles", "items", "both"], default="titles", help="of recipes/train.py")
    parser.add_argument("--scale", choices=["small", "paper"], default="small")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_train_epochs", type=float, default=1.0, help="of every stage (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="test samples, evenly spaced (default: all)")
    parser.add_argument("--metric", nargs="+", choices=FORMS, default=list(FORMS), help="how to search and count")
    parser.add_argument("--systems", nargs="+", choices=OURS, help="of ours, these alone (default: all of the table)")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="beside ours in tables 2 and all"
    )
    parser.add_argument("--peer_epochs", type=int, help="of peers (default: their settings')")
    parser.add_argument("--rows_per_pass", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--bf16", choices=["true", "false"], help="autocast (default: on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="the plan and its cost, no more")
    parser.add_argument("--gpu", choices=GPUS, help="print the hours that it takes on one, too")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of its peak (default: %(default)s)")
    parser.add_argument("--output_dir", help="(default: runs/reproduce-<data set>)")
    args, further = parser.parse_known_args(argv)
    if not args.table and not args.figure:
        parser.error("--table, --figure: expected at least one of them")
    if args.output_dir and len(args.data) > 1:
        parser.error("--output_dir: expected none with several --data, which have a folder each")
    for name in ("limit", "num_train_epochs", "rows_per_pass", "threads", "peer_epochs"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: expected more than 0, got {value}")
    if not 0 < args.utilization <= 1:
        parser.error(f"--utilization: expected a share in 0..1, got {args.utilization}")
    # refuses what it does not know, and says what is read by it
    of_training, _ = training_flags.make_parser(None).parse_known_args(["--stage", "sft", "--data", "", *further])
    for name in ("settings", "keep_text", "group_size", "max_items", "vocab_size"):
        setattr(args, name, getattr(of_training, name))
    return args, further


def reproduce(args: argparse.Namespace, further: list[str], folder: Folder) -> list[Path]:
    """Everything for one data set; the files that were written."""
    data = load(args)
    bf16 = torch.cuda.is_available() if args.bf16 is None else args.bf16 == "true"
    options = Options(
        data_flags=tuple(data_flags(args)),
        name=data.name,
        model=args.model,
        head=args.head,
        scale=args.scale,
        seeds=tuple(args.seeds),
        epochs=args.num_train_epochs,
        limit=args.limit,
        forms=tuple(form for form in FORMS if form in args.metric),
        rows_per_pass=args.rows_per_pass,
        bf16=bf16,
        systems=tuple(args.systems or ()),
        peers=tuple(args.peers),
        peer_epochs=args.peer_epochs,
        further=tuple(further),
        settings=args.settings,
        keep_text=args.keep_text,
        group_size=args.group_size,
    )
    reader = Reader.of(
        args.model,
        data,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        separator=args.head != "items",
        head=args.head,
        max_items=args.max_items or HANDED_ON["max_items"],
        one_by_one=args.scale == "paper",
        limit=args.limit,
    )
    planner = Planner(options, reader)
    steps = planner.plan(args.table, args.figure)
    if args.dry_run or reader.has_weights is False:
        tell(steps, folder, planner, args)
        if not args.dry_run:
            raise FileNotFoundError(f"--model: expected one with weights but for --dry_run, got {args.model!r}")
        return []
    with folder.locked():
        pending = tell(steps, folder, planner, args)
        for number, step in enumerate(pending, 1):
            record = run(step, folder)
            say(f"[{number}/{len(pending)}] {step.key}: {record['seconds']:.1f} s")
        return report(folder, planner, args.table, args.figure)


def tell(steps: list[Step], folder: Folder, planner: Planner, args: argparse.Namespace) -> list[Step]:
    """Print what the steps that are not done will cost; these steps."""
    reader, options = planner.reader, planner.options
    pending = [step for step in steps if not folder.is_done(step)]
    say(f"{reader.data}\n{options.model}: {reader.shape.parameters / 1e6:,.1f} M parameters, head {options.head}")
    say(f"{len(steps)} steps, {len(steps) - len(pending)} of them done in {os.fspath(folder.path)}")
    if not pending:
        return []
    records = folder.records()
    rates = cost.recorded(records)
    needed = {step.work.kind for step in pending} - {"other"}
    if needed - rates.keys() and reader.has_weights:
        rates = cost.measured(options.model, reader, planner.model_options()) | rates
    here = cost.at_rates(pending, rates)
    here |= cost.like_others(pending, records, here)
    there = cost.on_gpu(pending, reader.shape, GPUS[args.gpu], args.utilization) if args.gpu else {}
    header = ["step", "rows", "seconds here", *([f"seconds on {args.gpu}"] if there else [])]
    rows = [header]
    for step in pending:
        seconds = here[step.key]
        cells = [
            step.key,
            f"{step.work.rows:,.0f}" if step.work.rows else "",
            "" if seconds is None else f"{seconds:,.0f}",
        ]
        rows.append([*cells, *([f"{there[step.key]:,.0f}"] if there else [])])
    known = [seconds for seconds in here.values() if seconds is not None]
    threads = torch.get_num_threads()
    total = f"{sum(known) / 60:,.0f} minutes here on {threads} thread{'s' if threads > 1 else ''} of an idle machine"
    rates_told = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.items())
    say("\n".join(markdown_table(rows)))
    unknown = len(here) - len(known)
    lacking = f", and {unknown} steps of which no rate is known" if unknown else ""
    say(f"{total if rates else 'no rate is known here'} ({rates_told or 'none'} rows/s){lacking}")
    if there:
        say(
            f"{sum(there.values()) / 3600:,.2f} hours on one {args.gpu} at {args.utilization:.0%} of its peak: from "
            "rows and weights, not measured"
        )
    return pending


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
