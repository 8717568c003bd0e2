# SPDX-License-Identifier: Apache-2.0
"""What --prior takes: by name what is fitted in seconds, by the folder of its run another trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchkern as pk
from patchkern.data import Interactions
from patchkern.training import find_model
from recipes import models
from recipes.baselines.prior import NetworkPrior
from recipes.baselines.runs import Run, is_run, load_run

FITTED = {"popularity": pk.PopularityPrior, "transitions": pk.TransitionPrior, "linear": pk.LinearPrior}
FIT_LIMIT = 1000
EXPECTED = f"{', '.join(FITTED)}, or the folder of a run on the same data"
ABOUT = f"{EXPECTED}: of recipes/train.py with an item head, read as it was trained, or of recipes/baselines"


def check_prior(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error that names the flag: of --prior, --prior_weight and --fit_limit."""
    if args.fit_limit is None:
        args.fit_limit = FIT_LIMIT
    elif args.fit_limit < 1:
        parser.error(f"--fit_limit: expected at least 1, got {args.fit_limit}")
    elif not args.prior or args.prior_weight is not None:
        parser.error("--fit_limit: expected only where the weight of a --prior is fitted")
    if not args.prior:
        if args.prior_weight is not None:
            parser.error("--prior_weight: expected a --prior that it weighs")
        return
    for given in args.prior:
        if given not in FITTED and not models.is_saved(given) and not is_run(given):
            parser.error(f"--prior: expected {EXPECTED}, got {given!r}")
    if len({given if given in FITTED else Path(given).resolve() for given in args.prior}) < len(args.prior):
        parser.error(f"--prior: expected each once, got {' '.join(args.prior)}")
    if args.metric == "paper" or args.search == "diverse":
        parser.error("--prior: expected none with --metric paper or --search diverse, whose protocol has none")
    if args.prior_weight is None and args.split == "val":
        parser.error("--prior_weight: expected with --split val, or it would be fitted to the samples it is shown on")
    if args.prior_weight is None:
        return
    if len(args.prior_weight) != len(args.prior):
        parser.error(f"--prior_weight: expected one for each --prior ({len(args.prior)}), got {len(args.prior_weight)}")
    wrong = [weight for weight in args.prior_weight if not 0 <= weight < float("inf")]
    if wrong:
        parser.error(f"--prior_weight: expected at least 0, got {wrong[0]}")


def names_of(given: Sequence[str]) -> list[str]:
    """What tables and files call them: a run by its folder, and by those above it where that is not one alone.

    Examples:
        >>> names_of(["linear", "runs/hstu", "runs/a/items", "runs/b/items"])
        ['linear', 'hstu', 'a-items', 'b-items']
    """
    names: list[str] = []
    for prior in given:
        parts = Path(prior).resolve().parts[1:]
        others = [Path(other).resolve().parts[1:] for other in given if other != prior and other not in FITTED]
        least = 2 if parts[-1].startswith("checkpoint-") else 1
        depths = range(least, len(parts) + 1)
        alone = (depth for depth in depths if all(other[-depth:] != parts[-depth:] for other in others))
        names.append(prior if prior in FITTED else "-".join(parts[-next(alone, len(parts)) :]))
    return names


def make_priors(
    given: Sequence[str],
    data: Interactions,
    catalog: pk.Catalog,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """``{name: prior}`` over the items of a catalogue, in its order.

    Args:
        dtype, device: of trained models.
        options: of `patchkern.ItemHeadPrior`.

    Raises:
        ValueError: a run of other items, or without an item head; the message names --prior.
    """
    priors: dict[str, Any] = {}
    for name, prior in zip(names_of(given), given, strict=True):
        if prior in FITTED:
            priors[name] = FITTED[prior](data, catalog)
        elif is_run(prior):
            network, settings = load_run(Run(prior), catalog, "--prior")
            priors[name] = NetworkPrior(network.to(device), catalog, settings.window)
        else:
            model = models.load_saved(find_model(prior, "--prior"), dtype=dtype)
            _check_run(prior, model, data, catalog)
            priors[name] = pk.ItemHeadPrior(model.to(device).eval(), **options)
    return priors


def _check_run(folder: str, model: Any, data: Interactions, catalog: pk.Catalog) -> None:
    expected = f"--prior: expected a run over the {len(catalog):,} items of {data.name}"
    own = model.catalog.item_ids
    if not np.array_equal(own, catalog.item_ids):
        same = len(set(own.tolist()) & set(catalog.item_ids.tolist()))
        got = "these in another order" if same == own.size == len(catalog) else f"{own.size:,}, {same:,} of these"
        raise ValueError(f"{expected}, got {folder!r}, over {got}")
    if model.item_head is None:
        raise ValueError(f"{expected} with an item head (recipes/train.py --head items), got {folder!r}, without one")
    if model.policy is None:
        raise ValueError(f"{expected} with the policy it was trained with, got {folder!r}, without one")
