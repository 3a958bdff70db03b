"""The command-line arguments that say which model, its weights, their type and the device; for every command alike."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from .load import check_device
from .named import FoundModel, find_model, names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_model_name(parser: argparse.ArgumentParser) -> None:
    """Add -f/--model and --random-weights."""
    add = parser.add_argument
    add("-f", "--model", default="default", help=f"{', '.join(names())}, a hub id or a folder")
    add("--random-weights", action="store_true", help="random weights of the model's shape: time and memory only")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add -f/--model, --random-weights, --half and --device."""
    add_model_name(parser)
    add = parser.add_argument
    add("--half", action="store_true", help="fp16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def load(args: argparse.Namespace) -> tuple[FoundModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the arguments name: what was found, and what `FoundModel.load` gives.

    Raises:
        ConfigError: this torch cannot use the device. What `find_model` raises: no such model.
    """
    check_device(args.device)
    found = find_model(args.model, random=args.random_weights)
    return found, *found.load(torch.float16 if args.half else torch.float32, args.device)
