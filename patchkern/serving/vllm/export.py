# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder that vLLM serves: the checkpoint as it is, and every item of the catalogue a token.

python -m patchkern.serving export runs/items served/items
python -m vllm.entrypoints.openai.api_server --model served/items ...    # as export prints it
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchkern.models import files
from patchkern.models.adapters import ADAPTER
from patchkern.models.folders import current, replacing
from patchkern.search.protocol import usual_head
from patchkern.serving.vllm.plugin import ARCHITECTURES, PREFIX
from patchkern.serving.vllm.requests import LOGITS_PROCESSOR
from patchkern.serving.vllm.served import FOLDER, HEADS
from patchkern.training.checkpoints import find_model

_OWN = (files.DESCRIPTION, files.CATALOG, files.ITEM_EMBEDDINGS, files.ITEM_HEAD)
_STALE = ("*.safetensors", "*.bin", "model.safetensors.index.json", f"{FOLDER}/*.safetensors")


def export_model(run: str | os.PathLike[str], folder: str | os.PathLike[str], head: str | None = None) -> list[str]:
    """Write ``folder`` for vLLM from the model in ``run``.

    Weights, tokenizer and the model's other files are those of ``run``, linked where the file system can and copied
    where not. The configuration is changed: another class of model, and a token for every item after the vocabulary.

    Args:
        run: what ``PatchedCausalLM.save_pretrained`` wrote, with a tokenizer; or a run of the trainer, whose last
            checkpoint is taken.
        folder: another one; its files are replaced together.
        head: what is to be predicted: "titles", token by token, or "items", at once, by the model's item head; by
            default titles, or items where the model learned these alone.

    Returns:
        The command that serves it, as arguments.

    Raises:
        FileNotFoundError: no model there.
        ValueError: one that this cannot serve: of an architecture that is not registered, with an adapter apart from
            its base, without tokenizer, or without the head that is asked for.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
    saved = find_model(run, "run")
    source = current(saved)
    if Path(folder).resolve() in (Path(run).resolve(), saved.resolve(), source.resolve()):
        raise ValueError(f"folder: expected another one than the run's, got {os.fspath(folder)!r} for both")
    description = files.read_description(source)
    catalog, _ = files.choose_catalog(source, None)
    head = usual_head(description) if head is None else head
    if "titles" not in description.learns:
        raise ValueError(
            f"run: expected a PatchedCausalLM in {os.fspath(run)!r}, got an ItemModel, which reads no tokens"
        )
    if description.memory is not None:
        raise ValueError("run: expected a model without a memory around it, whose vectors are no tokens, got one with")
    if (source / ADAPTER).is_file():
        raise ValueError(
            f"run: expected a whole model, got an adapter in {os.fspath(run)!r}: merge it into its base first "
            "(model.hf_model = patchkern.models.merging.merge_and_unload(model.hf_model), then save_pretrained)"
        )
    if not description.tokenizer:
        raise ValueError(
            "run: expected a model that was saved with its tokenizer (save_pretrained(folder, tokenizer=...)), got one "
            "without, for which vLLM would not even check token ids"
        )
    if head == "items" and not description.item_head:
        raise ValueError('head: expected "titles" for a model without an item head, got "items"')
    if head == "titles" and not description.prompt.response_end:
        raise ValueError("run: expected a prompt with a response_end, without which no title ends, got one without")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = _served_config(config, description, len(catalog), head, catalog.fingerprint)
    with replacing(folder, "config.json", _STALE) as new:
        (new / FOLDER).mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.name != "config.json":
                _link(path, new / FOLDER / path.name if path.name in _OWN else new / path.name)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return command(folder, config.get("dtype") or config.get("torch_dtype"))


def command(folder: str | os.PathLike[str], dtype: Any = None) -> list[str]:
    """What serves an exported folder; as trained, where the checkpoint has float32 weights."""
    program = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", os.fspath(folder)]
    program += ["--logits-processors", LOGITS_PROCESSOR, "--logprobs-mode", "processed_logits"]
    return [*program, "--max-logprobs", "200", *(["--dtype", "float32"] if dtype == "float32" else [])]


def _served_config(
    config: dict[str, Any], description: files.Description, n_items: int, head: str, identity: str
) -> dict[str, Any]:
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise ValueError(
            f"run: expected a model of one of {', '.join(ARCHITECTURES)}, got {architectures}; for another one, make a "
            "class of patchkern.serving.vllm.models.ItemTokens and vLLM's own, and register it with vLLM"
        )
    vocab_size = config.get("vocab_size")
    if description.vocabulary_size is None or vocab_size != description.vocabulary_size:
        raise ValueError(
            f"run: expected a vocabulary of the size that {files.DESCRIPTION} tells of, {description.vocabulary_size}, "
            f"got {vocab_size}; load and save the model again"
        )
    own = {"vocab_size": vocab_size, "head": head, "catalog": identity}
    return {
        **config,
        "architectures": [PREFIX + architectures[0]],
        "vocab_size": vocab_size + n_items,
        "patchkern": own,
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m patchkern.serving export", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("run", metavar="RUN", help="a folder that patchkern saved, or a run of recipes/train.py")
    parser.add_argument("folder", metavar="FOLDER", help="where to write it for vLLM")
    parser.add_argument("--head", choices=HEADS, help="what to predict (default: titles, or items if learned alone)")
    given = parser.parse_args(argv)
    try:
        program = export_model(given.run, given.folder, given.head)
    except (OSError, ValueError) as error:
        sys.exit(f"export: {error}")
    print(f"{given.folder} is written; where vLLM and patchkern are installed, it is served by\n")
    print("    " + shlex.join(program))


if __name__ == "__main__":
    main()
